"""The only code that talks to the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

REWARD_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md"]


def local_folder(path_or_repo: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a reward: a local one as it is, a repository of the Hub after downloading it to the cache.

    Errors of the Hub (missing repository, wrong revision, no right) reach the user as such.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    return Path(snapshot_download(str(path_or_repo), revision=revision, token=token, allow_patterns=REWARD_PATTERNS))
