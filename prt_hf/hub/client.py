"""The only code that talks to the Hub."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import PRTValueError, RewardFileError
from .folder import folder_to_read

# What is fetched: no pickles, no code, nothing hidden.
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "*.tiktoken")
_HIDDEN = (".*", "*/.*")
_CHECKPOINTS = ("checkpoint-*/*", "last-checkpoint/*")  # where a Trainer's `hub_strategy` puts them


def commit_of(model_id: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The commit that a branch or tag of a model stands for now; None for a local folder.

    Raises:
        PRTValueError: neither a folder nor an id.
    """
    if Path(model_id).is_dir():
        return None
    try:
        config = hf_hub_download(model_id, "config.json", revision=revision, token=token)
    except HFValidationError as error:
        raise PRTValueError(
            f"There is no model at {model_id}.",
            expected="a folder, or an id of the Hub",
            found="neither",
            remedy="if a reward's base has moved, pass `base_model=` where it is now",
        ) from error
    return Path(config).parent.name  # .../snapshots/<commit>/config.json


def has_file(path_or_repo: str, name: str, token: str | bool | None = None) -> bool:
    """Whether a folder, or a repository that can be reached, holds a file."""
    if Path(path_or_repo).is_dir():
        return (folder_to_read(Path(path_or_repo)) / name).is_file()
    try:
        hf_hub_download(path_or_repo, name, token=token)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
        return False  # what is wrong with the repository, loading it will tell
    return True


def local_file(path_or_repo: str | Path, name: str, token: str | bool | None = None) -> Path:
    """One file of a reward; as [`local_folder`], which fetches them all."""
    if Path(path_or_repo).is_dir():
        return folder_to_read(Path(path_or_repo)) / name
    try:
        return Path(hf_hub_download(str(path_or_repo), name, token=token))
    except HFValidationError as error:
        raise _nothing_at(path_or_repo) from error


def local_folder(
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the folder of a reward or recipe: a local one as it is, that of a repository once it is in the cache.

    Errors of the Hub (missing repository, wrong revision, no right) reach the user as such.

    Args:
        subfolder: of the folder or repository; a checkpoint, or one reward of a recipe.
    """
    if not Path(path_or_repo).is_dir():
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _FETCHED]
        ignored = [*_HIDDEN, *(() if subfolder else _CHECKPOINTS)]
        try:
            path_or_repo = snapshot_download(
                str(path_or_repo), revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignored
            )
        except HFValidationError as error:
            raise _nothing_at(path_or_repo) from error
    return folder_to_read(Path(path_or_repo, subfolder or ""))


def is_of_hub(error: BaseException) -> bool:
    """Whether the Hub or the way there failed, or what was raised because of that."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
            return True
        error = error.__cause__
    return False


@dataclass(frozen=True)
class Branch:
    """Where a push goes, as it was when that began.

    Attributes:
        repo_id, revision (`str`): None is the main branch.
        commit (`str`): its head, and the only one that a push is based on.
        files (`frozenset[str]`): paths in the repository.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: frozenset[str]
    token: str | bool | None = None

    def read(self, name: str) -> str | None:
        """The text of a file, None where there is no such file."""
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
    """Make the repository and the branch where they do not exist, and see what is there.

    Raises:
        PRTValueError: to be private, and public already.
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
            found="a public one, which a push does not make private",
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
    """All files in one commit on what [`open_branch`] saw, so that nobody ever loads a half of them.

    Args:
        files: path in the repository -> text, bytes, or a local file.
        removed: paths in the repository.
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


def _nothing_at(path_or_repo: str | Path) -> RewardFileError:
    return RewardFileError(
        f"There is nothing at {path_or_repo}.", expected="a folder, or an id of the Hub", found="neither"
    )
