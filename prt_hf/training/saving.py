"""The part of the trainer that saves and pushes: always a whole reward, with its card."""

import copy
import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils import PushInProgress, logging

from ..errors import PRTValueError
from ..hub.card import render_card
from ..hub.card_merge import merged_or_new, read_card, with_metadata, write_card
from ..hub.folder import link_or_copy
from ..hub.publishing import push_reward, reward_files_to_push
from ..hub.training_record import TrainingRecord
from ..reward.model import RewardModel

logger = logging.get_logger(__name__)

_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


class RewardSaver(Trainer):
    """The part of [`PRTTrainer`] that saves and pushes `reward`; the Trainer itself saves networks only."""

    reward: RewardModel

    def __init__(self, *args, **kwargs):
        self.evaluations_elsewhere: list[dict] = []  # entries of the log, of other data than `eval_dataset`
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does, but resume from complete checkpoints only, and never beyond the last step.

        Args:
            resume_from_checkpoint: a folder, or `True` for the last complete checkpoint in `output_dir`.
            kwargs: the Trainer's other arguments.

        Raises:
            PRTValueError: there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(True, self.args.output_dir)
        limits = self.args.max_steps, self.args.num_train_epochs
        if resume_from_checkpoint and 0 < limits[0] <= trained_steps(resume_from_checkpoint):
            logger.warning(f"{resume_from_checkpoint} has all {limits[0]} steps: nothing is left to train.")
            # The Trainer would add a step of the epoch, but it runs no epoch after the last.
            self.args.max_steps, self.args.num_train_epochs = -1, 0
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.max_steps, self.args.num_train_epochs = limits

    def evaluate(
        self, eval_dataset: str | Dataset | dict[str, Dataset] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate as the Trainer does, and remember evaluations on other data than `eval_dataset`."""
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            self.evaluations_elsewhere += self.state.log_history[before:]
        return metrics

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        *,
        dataset_tags: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
        **known: Any,
    ) -> None:
        """Write the reward's card to `output_dir`, and keep what users have written into it.

        Args:
            language: metadata.
            license: metadata.
            tags: metadata.
            model_name: name in the lines that load the reward; by default the repository's, or the folder's.
            dataset_tags: ids of data sets on the Hub, by default those that the data sets themselves name.
            dataset_name: TRL's name for `dataset_tags`; files are left out.
            known: the Trainer's other arguments, which are not used: the reward knows its base and task.
        """
        if not self.is_world_process_zero():
            return
        named = dataset_name or dataset_tags or []
        datasets = [name for name in ([named] if isinstance(named, str) else named) if not Path(name).exists()]
        given = {"language": language, "license": license, "tags": tags, "datasets": datasets}
        self._update_card(model_name)
        if metadata := {name: value for name, value in given.items() if value}:
            self.reward.card = with_metadata(self.reward.card, **metadata)
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, self.reward.card, read_card(folder))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the reward and push it to `args.hub_model_id`, in one commit, as [`RewardModel.push_to_hub`] does.

        Args:
            commit_message: title of the commit.
            blocking: wait for the push, instead of returning a `Future`.
            token: by default that of `args`.
            revision: branch; by default that of `args`.
            private: make a new repository private; by default as `args` says.
            card_kwargs: for [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if private is not None:
            self.args.hub_private_repo = private  # all versions of `init_hf_repo` read it
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card_kwargs)
        self._finish_current_push()
        arguments = {
            "private": self.args.hub_private_repo,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
            "token": token,
        }
        if blocking:
            return push_reward(self.args.output_dir, self.hub_model_id, **arguments)
        staged = self._staged(self.args.output_dir)
        return run_as_future(_push_staged, staged, self.hub_model_id, **arguments)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as `hub_strategy` says: checkpoints as rewards, without the pickled states of the training.

        The Trainer's own would push a fixed list of files, without the reward's.
        """
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            logger.warning_once(
                "Checkpoints are pushed as rewards, without the optimizer's states (pickles): training resumes "
                f"from {self.args.output_dir} only."
            )
        staged = self._staged(checkpoint_folder)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        job = run_as_future(
            _push_staged,
            staged,
            self.hub_model_id,
            checkpoint=places.get(strategy),
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
        )
        if is_pushing:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _staged(self, folder: str | Path) -> Path:
        """Return a copy of the reward as it is now, whatever is saved or deleted while it is pushed."""
        staged = Path(tempfile.mkdtemp(prefix=".pushing-", dir=self.args.output_dir))
        for name in reward_files_to_push(Path(folder)):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(Path(folder, name), staged / name)
        return staged

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self._update_card()
        self.reward.save_pretrained(output_dir, state_dict=state_dict)
        args = copy.copy(self.args)
        args.hub_token = None  # checkpoints may go to the Hub, where others read them
        torch.save(args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _update_card(self, name: str | None = None) -> None:
        name = name or self.hub_model_id or Path(self.args.output_dir).absolute().name
        card = render_card(self.reward.config, name, TrainingRecord.from_trainer(self))
        self.reward.card = merged_or_new(self.reward.card, card)


def checkpoint_to_resume(given: str | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` stands for; None if training starts anew.

    `given` is a folder, which must be complete; true, or `"true"`, for the last complete checkpoint in `output_dir`;
    false, `"false"` or None.
    """
    wish = str(given or False).lower()
    if wish == "false":
        return None
    found = last_checkpoint(Path(output_dir)) if wish == "true" else str(given)
    if _state_in(found) is None:
        raise PRTValueError(
            "There is no checkpoint to resume from.",
            expected=f"a complete {_PREFIX}* folder{f' in {output_dir}' if wish == 'true' else ''}",
            found=found or "none",
            remedy="train without `resume_from_checkpoint`, or name a checkpoint of another folder",
        )
    return found


def trained_steps(checkpoint: str | None) -> int:
    """Return the steps that a checkpoint has; 0 without one."""
    state = _state_in(checkpoint)
    return 0 if state is None else state.global_step


def _state_in(checkpoint: str | Path | None) -> TrainerState | None:
    """Return the state in a checkpoint, whose file is written last; None if there is none or a part of it."""
    try:
        return None if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    except (OSError, ValueError, TypeError):
        return None


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint; warn of later ones that are incomplete."""
    numbered = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal() and path.is_dir()
    ]
    for _, path in sorted(numbered, reverse=True):
        if _state_in(path) is not None:
            return str(path)
        logger.warning(f"Skipping the incomplete checkpoint {path}.")
    return None


def _push_staged(folder: Path, repo_id: str, **arguments) -> CommitInfo:
    """Push in the background, where only the log can report a failure."""
    try:
        return push_reward(folder, repo_id, **arguments)
    except Exception as error:
        logger.error(f"A push to the Hub has failed: {error}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
