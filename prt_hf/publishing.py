"""What goes to the Hub: a saved reward or recipe and its card, in one commit."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from .card_blocks import CARD_NAME, join_cards, merge_cards, read_card
from .contract import PRT_CONFIG_NAME, ModelReference, RewardConfig
from .errors import RewardFileError
from .hub import FILE_PATTERNS, Branch, commit_files, open_branch
from .model_card import render_card
from .reward_files import NETWORK_FILES, REWARD, check_files, recover, weight_files, what_lies_in

logger = logging.get_logger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_CHAT_TEMPLATES = "additional_chat_templates/*.jinja"


class Shareable:
    """What has `save_pretrained`, and goes to the Hub as that writes it."""

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
        """Share what [`save_pretrained`] writes, in one commit.

        Args:
            repo_id: `"user/name"`; made if it does not exist. What users have written into the card there is kept.
            private: of a new repository.
            revision: branch; made if it does not exist.
            commit_message: by default `"Upload reward"` or `"Upload recipe"`.
            token: of the Hub; by default the one that `hf auth login` stored.
            create_pr: propose the commit instead.

        Raises:
            RewardFileError: the repository holds something else.
            PRTValueError: it is public, and `private`.
            HfHubHTTPError: no right, the branch has moved meanwhile, ...: the Hub's own errors.
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


def push_reward(folder: str | Path, repo_id: str, *, checkpoint: tuple[str, Path] | None = None, **where) -> CommitInfo:
    """Push the reward that was saved in a folder, without loading it.

    Args:
        checkpoint: a folder of the repository, and all the files that go there in the same commit.
        where: `private`, `revision`, `commit_message`, `token`, `create_pr`, as of [`Shareable.push_to_hub`].

    Raises:
        RewardFileError: the folder holds no whole reward, or the repository something else.
    """
    folder = Path(folder)
    names = files_to_push(folder)
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    warn_of_local_base(config.reward_base, "base_model=")
    place, source = checkpoint or ("", folder / "nothing")
    beside = {f"{place}/{file.relative_to(source).as_posix()}": file for file in source.rglob("*") if file.is_file()}
    return publish(
        REWARD,
        {name: folder / name for name in names} | beside,
        partial(render_card, config),
        folder,
        repo_id,
        replaced=lambda _: [*NETWORK_FILES, *([f"{place}/*"] if beside else [])],
        **where,
    )


def files_to_push(folder: Path) -> list[str]:
    """Names of the files of a saved reward that others need.

    Raises:
        RewardFileError: it is not whole.
    """
    recover(folder)
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    check_files(folder, config)
    weights = weight_files(folder, config)
    return [name for name in shared_files(folder) if name in weights or not name.endswith(".safetensors")]


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
    **where,
) -> CommitInfo:
    """One commit: the files, the card with what users have written into it there or in `folder`, and without files of
    an earlier push that match the patterns `replaced` gives for the branch.

    Args:
        render: makes the card for the repository's full name.

    Raises:
        RewardFileError: the repository holds something else.
    """
    branch = open_branch(repo_id, create_pr=create_pr, **where)
    found = what_lies_in(branch.files, branch.read) or _foreign_weights(branch.files)
    if found not in (None, kind):
        raise RewardFileError(
            f"{branch.repo_id} holds {found}; {kind} would spoil it.",
            expected=f"a new repository, or one where {kind} lies",
            found=found,
            remedy="choose another name, or another branch",
        )
    card = render(branch.repo_id)
    if (here := read_card(folder)) is not None:
        card = merge_cards(here, card)
    if (there := branch.read(CARD_NAME)) is not None:
        card = join_cards(there, card)
    patterns = list(replaced(branch))
    stale = [
        name
        for name in branch.files
        if found == kind and name not in files and any(_matches(name, pattern) for pattern in patterns)
    ]
    return commit_files(
        branch,
        {name: path for name, path in files.items() if name != CARD_NAME} | {CARD_NAME: card},
        commit_message or f"Upload {kind.removeprefix('a ')}",
        removed=sorted(stale),
        create_pr=create_pr,
    )


def shared_files(folder: Path) -> list[str]:
    """Names of a folder's files that others need: no pickles, no code, nothing else that a training run leaves."""
    names = [file.relative_to(folder).as_posix() for file in (*folder.iterdir(), *folder.glob(_CHAT_TEMPLATES))]
    return sorted(
        name
        for name in names
        if (folder / name).is_file()
        and not name.startswith(".")
        and name != TRAINER_STATE_NAME
        and any(fnmatch(name, pattern) for pattern in FILE_PATTERNS)
    )


def warn_of_local_base(reference: ModelReference, argument: str) -> None:
    if reference.id is None or Path(reference.id).is_dir():
        logger.warning(f"{reference} is not on the Hub: whoever loads what is pushed has to pass `{argument}`.")


def _matches(name: str, pattern: str) -> bool:
    """As in a shell: `*` stays within a folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _foreign_weights(names: Collection[str]) -> str | None:
    """Of libraries that leave no configuration that is known here."""
    weights = sorted(name for name in names if name.endswith(_WEIGHTS) and not name.endswith(TRAINING_ARGS_NAME))
    return f"weights of another kind ({weights[0]})" if weights else None
