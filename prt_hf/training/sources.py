"""Choose the reward and the source backbones that the arguments of a trainer name."""

import copy

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..contract import PRT_CONFIG_NAME
from ..errors import PRTValueError, UnsupportedError
from ..hub.client import has_file
from ..networks.anatomy import ProcessingClass, task_of
from ..networks.auto import load_pretrained, load_processing_class
from ..reward.backbones import Backbone, OwnBase, source_backbones
from ..reward.model import RewardModel
from .config import PRTConfig


def reward_and_backbones(
    model: str | PreTrainedModel | PeftModel | RewardModel,
    backbone: str | PreTrainedModel | None | list,
    processing_class: ProcessingClass | None,
    peft_config: PeftConfig | None,
    args: PRTConfig,
) -> tuple[RewardModel, list[Backbone]]:
    """Return the reward and its source backbones, by the arguments of [`PRTTrainer`].

    Arguments that do not go together raise `PRTValueError`.
    """
    given = backbone if isinstance(backbone, list | tuple) else [backbone]
    if isinstance(model, str) and has_file(model, PRT_CONFIG_NAME):
        model = RewardModel.from_pretrained(model)
    if isinstance(model, RewardModel):
        reward = _continued(model, peft_config, args)
        if backbone is None:
            return reward, source_backbones(reward)
        return reward, [Backbone(reward, each) for each in given]

    name = model if isinstance(model, str) else None
    if name is not None:
        # Steps of an optimiser vanish in weights of half precision; frozen weights may stay as they are stored.
        model = load_pretrained(name, dtype="auto" if peft_config else torch.float32)
        processing_class = processing_class or load_processing_class(name, task_of(model))
    is_own = [each is None or each is model or (name is not None and each == name) for each in given]
    is_full = peft_config is None and not isinstance(model, PeftModel)
    pretrained = copy.deepcopy(model) if is_full and name is None and any(is_own) else name
    reward = RewardModel.from_base(model, processing_class, peft_config, reward_init=args.reward_init)

    def own() -> Backbone:
        if not is_full:
            return OwnBase(reward)
        return Backbone(reward, pretrained, **({} if name is None else {"dtype": torch.float32}))

    return reward, [
        own() if each_is_own else Backbone(reward, each) for each, each_is_own in zip(given, is_own, strict=True)
    ]


def _continued(reward: RewardModel, peft_config: PeftConfig | None, args: PRTConfig) -> RewardModel:
    """Return an existing reward after checking that it can be tuned as the arguments say."""
    if len(reward.config.terms) > 1:
        raise UnsupportedError(
            "An adapter that was carried over is a reward of two networks, and not tuned as one.",
            expected="a reward that PRTTrainer made",
            found="log pi_ft - log pi_pt",
            remedy="PRTTrainer(base, distill_from=adapter) makes a reward of it",
        )
    if peft_config is not None:
        raise PRTValueError(
            "The reward exists already.", expected="no `peft_config` beside a RewardModel", found=repr(peft_config)
        )
    if reward.config.source_backbone is not None and reward.config.kl_coef != args.kl_coef:
        raise PRTValueError(
            "The reward was tuned at another scale.",
            expected=f"kl_coef={reward.config.kl_coef}, as in its {PRT_CONFIG_NAME}",
            found=f"kl_coef={args.kl_coef}",
            remedy=f"PRTConfig(kl_coef={reward.config.kl_coef}, ...)",
        )
    if args.reward_init != "pretrained" and args.reward_init != reward.config.reward_init:
        raise PRTValueError(
            "A RewardModel keeps its own start.",
            expected=f"reward_init={reward.config.reward_init!r}",
            found=repr(args.reward_init),
            remedy="RewardModel.from_base(..., reward_init=...)",
        )
    return reward
