"""Read from and write to the Hub; no other module does."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..contract import PRT_CONFIG_NAME
from ..errors import PRTValueError, RewardFileError
from .folder import folder_to_read

# No pickles, no code, nothing hidden.
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "*.tiktoken")
_HIDDEN = (".*", "*/.*")
_CHECKPOINTS = ("checkpoint-*/*", "last-checkpoint/*")  # where a Trainer's `hub_strategy` puts them


def commit_of(model_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """Return the commit that a branch or tag of a model points to now; None for a local folder.

    Raises:
        PRTValueError: `model_id` is neither a folder nor an id.
    """
    if Path(model_id).is_dir():
        return None
    try:
        with _asked_for(model_id):
            config = hf_hub_download(model_id, "config.json", revision=revision, token=token)
    except HFValidationError as error:
        raise PRTValueError(
            f"There is no model at {model_id}.",
            expected="a folder, or an id of the Hub",
            found="neither",
            remedy="if a reward's base has moved, pass `base_model=` where it is now",
        ) from error
    return Path(config).parent.name  # .../snapshots/<commit>/config.json


def folder_on_disk(model_id: str, commit: str | None = None) -> Path | None:
    """Return the folder of a model that is on this machine, without a request; None if there is none.

    Args:
        model_id: folder, id of the Hub, or empty.
        commit (*optional*): by default the one that `main` pointed to when it was last looked up.
    """
    if os.path.isdir(model_id):
        return Path(model_id)
    try:
        config = try_to_load_from_cache(model_id, "config.json", revision=commit)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def has_file(path_or_repo: str, name: str, token: str | bool | None = None, revision: str | None = None) -> bool:
    """Return whether a folder, or a repository that can be reached, holds a file."""
    try:
        return local_file(path_or_repo, name, token, revision).is_file()
    except (HfHubHTTPError, LocalEntryNotFoundError, RewardFileError):
        return False  # loading the repository will report what is wrong with it


def refuse_reward(
    path_or_repo: str, expected: str, token: str | bool | None = None, revision: str | None = None
) -> None:
    """Raise `PRTValueError` if a place where a model is expected holds a reward."""
    if has_file(path_or_repo, PRT_CONFIG_NAME, token, revision):
        raise PRTValueError(
            f"{path_or_repo} is a reward, which is no model by itself.",
            expected=expected,
            found=PRT_CONFIG_NAME,
            remedy="RewardModel.from_pretrained loads it; `rewards=[...]` or --reward add it to a model",
        )


def local_file(
    path_or_repo: str | Path, name: str, token: str | bool | None = None, revision: str | None = None
) -> Path:
    """Return the path of one file of a reward, after downloading it if it is on the Hub."""
    if Path(path_or_repo).is_dir():
        return folder_to_read(Path(path_or_repo)) / name
    try:
        with _asked_for(path_or_repo):
            return Path(hf_hub_download(str(path_or_repo), name, revision=revision, token=token))
    except HFValidationError as error:
        raise _nothing_at(path_or_repo) from error


def local_folder(
    path_or_repo: str | Path, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> Path:
    """Return the folder of a reward or recipe, after downloading it if it is on the Hub.

    Errors of the Hub (missing repository, wrong revision, no access) are passed on. `subfolder` is a folder in it: a
    checkpoint, or a reward of a recipe.
    """
    if not Path(path_or_repo).is_dir():
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _FETCHED]
        ignored = [*_HIDDEN, *(() if subfolder else _CHECKPOINTS)]
        try:
            with _asked_for(path_or_repo):
                path_or_repo = snapshot_download(
                    str(path_or_repo), revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignored
                )
        except HFValidationError as error:
            raise _nothing_at(path_or_repo) from error
    return folder_to_read(Path(path_or_repo, subfolder or ""))


def is_of_hub(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, comes from the Hub or the connection to it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
            return True
        error = error.__cause__
    return False


@dataclass(frozen=True)
class Branch:
    """The state of a branch when a push to it begins.

    Attributes:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): The branch; None is the main branch.
        commit (`str`): The head of the branch; a push fails if it has moved.
        files (`frozenset[str]`): The paths in the repository.
        token (*optional*): A token for the Hub.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: frozenset[str]
    token: str | bool | None = None

    def read(self, name: str) -> str | None:
        """Return the text of a file, None if there is no such file."""
        if name not in self.files:
            return None
        path = hf_hub_download(self.repo_id, name, revision=self.commit, token=self.token)
        return Path(path).read_bytes().decode(errors="replace")


def open_branch(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> Branch:
    """Create the repository and the branch if they do not exist, and return the state of the branch.

    A repository that is public already is refused with `private=True`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    if private and not info.private:
        raise PRTValueError(
            f"{repo_id} is public.",
            expected="a private repository, or a new one",
            found="a public one; a push does not make it private",
            remedy="make it private in its settings, choose another name, or push without `private`",
        )
    files = frozenset(entry.rfilename for entry in info.siblings or ())
    return Branch(repo_id, revision, info.sha, files, token)


def commit_files(
    branch: Branch,
    files: Mapping[str, str | bytes | Path],
    message: str,
    *,
    removed: Iterable[str] = (),
    create_pr: bool = False,
) -> CommitInfo:
    """Push all files in one commit on top of `branch.commit`, so that readers never see a partial upload.

    Args:
        branch: The result of [`open_branch`].
        files: Path in the repository -> text, bytes, or a local file.
        message: The commit message.
        removed: Paths in the repository that the commit deletes.
        create_pr: Whether to open a pull request instead.
    """
    contents = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    return HfApi(token=branch.token).create_commit(
        branch.repo_id,
        operations,
        commit_message=message,
        revision=branch.revision,
        create_pr=create_pr,
        parent_commit=branch.commit,
    )


@contextmanager
def _asked_for(place: str | Path) -> Iterator[None]:
    """Say in errors of the Hub what was asked for, and that no folder here has that name."""
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        error.args = (f"There is no folder {place} here, and the Hub does not give it: {error}", *error.args[1:])
        raise


def _nothing_at(path_or_repo: str | Path) -> RewardFileError:
    return RewardFileError(
        f"There is nothing at {path_or_repo}.", expected="a folder, or an id of the Hub", found="neither"
    )
