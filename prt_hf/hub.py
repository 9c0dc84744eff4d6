"""The only code that talks to the Hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .errors import PRTValueError, RewardFileError

REWARD_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md"]


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


def has_file(path_or_repo: str, name: str) -> bool:
    """Whether a folder, or a repository that can be reached, holds a file."""
    if Path(path_or_repo).is_dir():
        return (Path(path_or_repo) / name).is_file()
    try:
        hf_hub_download(path_or_repo, name)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
        return False  # what is wrong with the repository, loading it will tell
    return True


def local_folder(path_or_repo: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a reward or recipe: a local one as it is, a repository of the Hub once it is in the cache.

    Errors of the Hub (missing repository, wrong revision, no right) reach the user as such.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    try:
        folder = snapshot_download(str(path_or_repo), revision=revision, token=token, allow_patterns=REWARD_PATTERNS)
    except HFValidationError as error:
        raise RewardFileError(
            f"There is nothing at {path_or_repo}.", expected="a folder, or an id of the Hub", found="neither"
        ) from error
    return Path(folder)
