"""Push a saved reward or recipe and its card to the Hub, in one commit."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ..contract import PRT_CONFIG_NAME, ModelReference, RewardConfig
from ..errors import RewardFileError
from .card import render_card
from .card_merge import merge_cards, read_card
from .client import Branch, commit_files, open_branch
from .folder import (
    CARD_NAME,
    NETWORK_FILES,
    REWARD,
    check_files,
    check_kind,
    folder_to_read,
    known_files,
    weight_files,
    what_lies_in,
)

logger = logging.get_logger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


class Shareable:
    """Adds `push_to_hub` to classes with `save_pretrained`."""

    _push_folder: Callable[..., CommitInfo]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Push what [`save_pretrained`] writes, in one commit.

        Args:
            repo_id: `"user/name"`; created if it does not exist. Text that users wrote into the card there is kept.
            private: Whether a new repository is private.
            revision: A branch; created if it does not exist.
            commit_message: By default `"Upload reward"` or `"Upload recipe"`.
            token: A token for the Hub; by default the one that `hf auth login` stored.
            create_pr: Whether to open a pull request instead.

        Raises:
            RewardFileError: The repository holds something else.
            PRTValueError: `private=True`, but the repository is already public.
            HfHubHTTPError: There is no access, the branch has moved meanwhile, ...
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
            )


def push_reward(
    folder: str | Path, repo_id: str, include: Sequence[str] = (), *, checkpoint: str | None = None, **where: Any
) -> CommitInfo:
    """Push a saved reward without loading it.

    Args:
        folder: The folder that it was saved to.
        repo_id: The repository.
        include: Names of other files in the folder that are pushed as well.
        checkpoint: A folder in the repository that gets a copy of the reward in the same commit.
        **where: `private`, `revision`, `commit_message`, `token` and `create_pr` of [`Shareable.push_to_hub`], and
            `announce` of [`publish`].

    Raises:
        RewardFileError: The folder holds no complete reward, or the repository holds something else.
    """
    folder = folder_to_read(Path(folder))
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    files = {name: folder / name for name in reward_files_to_push(folder, include, config)}
    if checkpoint is not None:
        files |= {f"{checkpoint}/{name}": path for name, path in files.items()}
    warn_of_local_base(config.reward_base, "base_model=")
    return publish(
        REWARD,
        files,
        partial(render_card, config),
        folder,
        repo_id,
        replaced=lambda _: [*NETWORK_FILES, *([f"{checkpoint}/*"] if checkpoint else [])],
        **where,
    )


def reward_files_to_push(folder: Path, include: Sequence[str] = (), config: RewardConfig | None = None) -> list[str]:
    """Return the names of the files of a saved reward, and of those to `include`, for [`push_reward`].

    An incomplete reward or a link raises `RewardFileError`. `config` is the reward's, if it has been read.
    """
    config = config or RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    check_files(folder, config)
    weights = weight_files(folder, config)
    names = [name for name in known_files(folder) if name in weights or not name.endswith(".safetensors")]
    return check_pushed(folder, [*names, *include])


def check_pushed(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names, after checking that they are files in the folder.

    Raises:
        RewardFileError: There is no such file, or it is a link, which could point to any file of this machine.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        path = folder / name
        is_inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not is_inside or not path.is_file() or path.is_symlink() or path.parent.is_symlink():
            raise RewardFileError(
                f"{name} cannot be pushed.",
                expected=f"a file in {folder}",
                found="a link" if path.is_symlink() or path.parent.is_symlink() else "no such file there",
                remedy="replace the link by a copy of the file" if is_inside else "name files of the folder",
            )
    return names


def publish(
    kind: str,
    files: Mapping[str, Path],
    render: Callable[[str], str],
    folder: Path,
    repo_id: str,
    *,
    replaced: Callable[[Branch], Iterable[str]],
    commit_message: str | None = None,
    create_pr: bool = False,
    announce: Callable[[Iterable[str]], object] = lambda names: None,
    **where: Any,
) -> CommitInfo:
    """Push files and the card, merged with the edited cards in `folder` and in the repository, in one commit.

    Args:
        kind: `REWARD` or `RECIPE`.
        files: Path in the repository -> local file.
        render: Returns the card for the repository's full name.
        folder: The folder of the saved reward or recipe.
        repo_id: The repository.
        replaced: Returns patterns of the files of an earlier push that the commit deletes.
        commit_message: By default `"Upload reward"` or `"Upload recipe"`.
        create_pr: Whether to open a pull request instead.
        announce: Called with the paths of the files before any is sent.
        **where: `private`, `revision` and `token` of [`Shareable.push_to_hub`].

    Raises:
        RewardFileError: The repository holds something else.
    """
    announce(files)
    branch = open_branch(repo_id, create_pr=create_pr, **where)
    found = what_lies_in(branch.files, branch.read) or _foreign_weights(branch.files)
    check_kind(branch.repo_id, found, kind)
    card = render(branch.repo_id)
    for earlier in (read_card(folder), branch.read(CARD_NAME)):
        card = card if earlier is None else merge_cards(earlier, card)
    patterns = list(replaced(branch))
    earlier_files = branch.files - files.keys() if found == kind else ()
    return commit_files(
        branch,
        {**files, CARD_NAME: card},
        commit_message or f"Upload {kind.removeprefix('a ')}",
        removed=sorted(name for name in earlier_files if any(_matches(name, pattern) for pattern in patterns)),
        create_pr=create_pr,
    )


def warn_of_local_base(reference: ModelReference, argument: str) -> None:
    """Warn if a model is not on the Hub, so that users have to pass `argument` instead."""
    if reference.id is None or Path(reference.id).is_dir():
        logger.warning(f"{reference} is not on the Hub: users have to pass `{argument}` to load what is pushed.")


def _matches(name: str, pattern: str) -> bool:
    """Match as a shell does: `*` stays within a folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _foreign_weights(names: Collection[str]) -> str | None:
    """Return a description of weights of other libraries, None if there are none."""
    weights = sorted(name for name in names if name.endswith(_WEIGHTS) and not name.endswith(TRAINING_ARGS_NAME))
    return f"weights of another kind ({weights[0]})" if weights else None
