"""The Hub of the tests itself, with nothing but the huggingface_hub client."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    create_branch,
    create_commit,
    create_repo,
    create_tag,
    hf_hub_download,
    list_repo_commits,
    list_repo_files,
    list_repo_refs,
    model_info,
    snapshot_download,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FILES = {
    "README.md": b"---\nlibrary_name: peft\ntags: [prt]\n---\nA card.\n",
    "config.json": b'{"a": 1}',
    "model.safetensors": bytes(range(256)) * 300,
    "deeply/nested/part.bin": bytes(range(1, 256)) * 7,
}
BOTH = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)


@pytest.fixture
def folder(tmp_path):
    for path, content in FILES.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return tmp_path / "folder"


def content_of(folder):
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"}


def asked(hub, method, part):
    return [request for request in hub.requests if request.method == method and part in request.path]


def title(commits):
    return [commit.title for commit in commits]


@BOTH
def test_what_is_uploaded_in_one_commit_is_what_is_downloaded(hub, folder):
    create_repo("me/model")
    commit = upload_folder(repo_id="me/model", folder_path=folder, commit_message="all").oid
    assert title(list_repo_commits("me/model")) == ["all", "initial commit"]
    assert len(asked(hub, "POST", "/commit/")) == 1
    assert hub.files("me/model") == FILES
    assert content_of(snapshot_download("me/model", revision=commit)) == FILES
    storage = [request.token for request in hub.requests if request.path.startswith("/storage/")]
    if hub.transport == "lfs":
        assert storage == [None] * 4, "two uploads, two downloads, and no token among them"
    else:
        assert storage == []
        assert [len(asked(hub, "GET", f"/xet-{right}-token/")) for right in ("write", "read")] == [1, 1]

    upload_folder(repo_id="me/model", folder_path=folder)
    assert title(list_repo_commits("me/model")) == ["all", "initial commit"], "nothing has changed"
    info = model_info("me/model", files_metadata=True)
    assert (info.sha, info.library_name, info.tags, info.card_data.tags) == (commit, "peft", ["prt"], ["prt"])
    assert {file.rfilename: file.size for file in info.siblings} == {
        ".gitattributes": 92,
        **{path: len(content) for path, content in FILES.items()},
    }


@BOTH
def test_what_is_put_is_downloaded_by_this_process_and_by_another(hub, folder):
    hub.put("me/model", folder, private=True)
    hub.put("me/model", {"config.json": b"{}"})
    expected = FILES | {"config.json": b"{}"}
    assert hub.files("me/model") == content_of(snapshot_download("me/model")) == expected
    there = folder.parent / "there"
    download = f"import huggingface_hub as h; h.snapshot_download('me/model', local_dir={str(there)!r})"
    subprocess.run([sys.executable, "-c", download], check=True, env=hub.environment)
    assert {name: there.joinpath(name).read_bytes() for name in expected} == expected


def test_rights_are_those_of_the_token(hub, folder):
    assert whoami()["name"] == "me"
    assert whoami(token=hub.read_token)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami(token="hf_unknown")
    hub.put("me/model", FILES)
    for act in (
        lambda: create_repo("me/second", token=hub.read_token),
        lambda: create_repo("me/second", token=hub.other_token),
        lambda: upload_folder(repo_id="me/model", folder_path=folder, token=hub.read_token),
        lambda: upload_file(repo_id="me/model", path_in_repo="x", path_or_fileobj=b"x", token=hub.other_token),
        lambda: create_tag("me/model", tag="v1", token=hub.other_token),
        lambda: HfApi().delete_repo("me/model", token=hub.other_token),
    ):
        with pytest.raises(HfHubHTTPError, match="have the rights") as error:
            act()
        assert error.value.response.status_code == 403
    assert list(hub.repositories) == ["me/model"]
    assert len(hub.repositories["me/model"].commits) == 2


def test_private_and_gated_repositories(hub):
    create_repo("me/model", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("me/model")
    assert create_repo("me/model", exist_ok=True).repo_id == "me/model"
    upload_file(repo_id="me/model", path_in_repo="config.json", path_or_fileobj=b"{}")
    for token in (hub.other_token, False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("me/model", "config.json", token=token)
        with pytest.raises(RepositoryNotFoundError):
            model_info("me/model", token=token)
    assert model_info("me/model", token=hub.read_token).private is True

    HfApi().update_repo_settings("me/model", visibility="public", gated="manual")
    for token in (hub.other_token, False):
        assert model_info("me/model", token=token).gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download("me/model", "config.json", token=token)
    assert Path(hf_hub_download("me/model", "config.json")).read_bytes() == b"{}"
    HfApi().delete_repo("me/model")
    assert hub.repositories == {}


def test_commits_branches_tags_and_pull_requests(hub):
    first = hub.put("me/model", {"a.json": b"1", "folder/b.json": b"2"})
    create_tag("me/model", tag="v1")
    create_branch("me/model", branch="next/step")
    upload_file(repo_id="me/model", path_in_repo="a.json", path_or_fileobj=b"11", revision="next/step")
    add = CommitOperationAdd("a.json", b"111")
    proposed = create_commit("me/model", [add], commit_message="p", create_pr=True, token=hub.other_token)
    assert proposed.pr_revision == "refs/pr/1"
    contents = {"main": b"1", "v1": b"1", first[:7]: b"1", "next/step": b"11", "refs/pr/1": b"111"}
    for revision, content in contents.items():
        assert Path(hf_hub_download("me/model", "a.json", revision=revision)).read_bytes() == content
        assert hub.files("me/model", revision) == {"a.json": content, "folder/b.json": b"2"}
    refs = list_repo_refs("me/model", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags + refs.pull_requests} == {
        "main": first,
        "next/step": hub.repositories["me/model"].resolve("next/step"),
        "v1": first,
        "1": proposed.oid,
    }

    create_commit("me/model", [CommitOperationAdd("c.json", b"3")], commit_message="c", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        create_commit("me/model", [CommitOperationAdd("c.json", b"4")], commit_message="c", parent_commit=first)
    assert error.value.response.status_code == 412
    upload_folder(repo_id="me/model", folder_path=Path(__file__).parent, allow_patterns="none", delete_patterns="f*")
    assert hub.files("me/model") == {"a.json": b"1", "c.json": b"3"}
    assert list_repo_files("me/model") == [".gitattributes", "a.json", "c.json"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "folder/b.json")
    for revision in ("v2", "refs/pr/2", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download("me/model", "a.json", revision=revision)


@BOTH
def test_a_pull_request_of_another_does_not_move_main(hub, folder):
    before = hub.put("me/model", {"config.json": b"{}"})
    proposed = upload_folder(repo_id="me/model", folder_path=folder, create_pr=True, token=hub.other_token)
    assert (proposed.pr_num, proposed.oid) == (1, hub.repositories["me/model"].resolve("refs/pr/1"))
    assert hub.files("me/model", "refs/pr/1") == FILES
    assert hub.files("me/model") == {"config.json": b"{}"}
    assert hub.repositories["me/model"].resolve("main") == before


def test_cards_that_the_hub_refuses(hub):
    create_repo("me/model")
    for card, message in (("base_model: ../base", '"base_model" with value "../base" is not valid'), ("a: [", "YAML")):
        with pytest.raises(ValueError, match=message):
            upload_file(repo_id="me/model", path_in_repo="README.md", path_or_fileobj=f"---\n{card}\n---\n".encode())
    print("ZZ", *hub.requests, sep="\nZZ")
    assert hub.files("me/model") == {}


@BOTH
def test_a_push_that_is_cut_off_leaves_no_commit(hub, folder):
    create_repo("me/model")
    push = partial(upload_folder, repo_id="me/model", folder_path=folder, ignore_patterns="*.bin")  # one large file
    hub.storage_full = True
    with pytest.raises((RuntimeError, OSError), match="Error while uploading|Not a directory"):
        push()
    hub.storage_full = False
    upload = ("PUT", "/storage/*") if hub.transport == "lfs" else ("GET", "*/xet-write-token/*")
    hub.fail(*upload, status=403)
    with pytest.raises((RuntimeError, OSError), match="Error while uploading|403"):
        push()
    hub.fail(*upload, drop=True, times=6)
    with pytest.raises((RuntimeError, OSError), match="Error while uploading|decoding response"):
        push()
    assert asked(hub, "POST", "/commit/") == []
    assert hub.files("me/model") == {}
    assert title(list_repo_commits("me/model")) == ["initial commit"]

    hub.fail(*upload, drop=True)
    push()
    assert hub.files("me/model") == {path: content for path, content in FILES.items() if not path.endswith(".bin")}


def test_a_commit_that_is_cut_off_was_not_made(hub):
    before = hub.put("me/model", FILES)
    hub.fail("POST", "*/commit/main", drop=True)
    with pytest.raises(Exception, match="disconnected without sending a response"):
        upload_file(repo_id="me/model", path_in_repo="config.json", path_or_fileobj=b"2")
    assert hub.repositories["me/model"].resolve("main") == before
    assert hub.files("me/model") == FILES


def test_a_download_that_is_cut_off_goes_on_or_fails(hub):
    hub.put("me/model", FILES)
    hub.fail("GET", "/storage/*", drop=True, after=1)
    assert content_of(snapshot_download("me/model")) == FILES
    assert [request.status for request in asked(hub, "GET", "/storage/")] == [200, None, 200]
    hub.put("me/model", {"model.safetensors": b"another" * 100})
    hub.fail("GET", "/storage/*", drop=True, times=None)
    with pytest.raises(Exception, match="peer closed connection"):
        hf_hub_download("me/model", "model.safetensors")
