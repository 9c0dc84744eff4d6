"""Whether a reward and a backbone fit, and what the two cost together, told without the weights of either."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..contract import PRT_CONFIG_NAME, ModelReference, RewardConfig, VocabularyContract, unwrap_tokenizer
from ..errors import PRTError, RewardFileError
from ..hub.client import local_file
from ..hub.folder import ADAPTER_CONFIG, check_files
from ..networks.adapter_config import read_peft_config
from ..networks.adapters import wrap
from ..networks.anatomy import context_length, head_of, pretrained_parameters
from ..networks.auto import load_processing_class, load_skeleton
from ..networks.identity import reference_to
from ..reward.full import check_full
from ..reward.model import RewardModel


@dataclass(frozen=True)
class Fit:
    """What is known of a reward on a backbone before the backbone is loaded.

    Attributes:
        reward ([`~contract.RewardConfig`]).
        backbone ([`~contract.ModelReference`]).
        problems (tuple of `str`): why the two do not fit; empty where they do.
        is_base_shared (`bool`): the backbone is the base of a reward adapter, so that its weights are held once.
        backbone_parameters, base_parameters, adapter_parameters (`int`): a full reward is all base, and no adapter.
        weight_bytes (`int`): of all that is held, in the precision asked for, or each as it is stored.
        backbone_columns, reward_columns (`int`): of their logits, rows that pad a vocabulary included.
        backbone_context, reward_context (`int`, *optional*): tokens that they can read; None without a limit.
        special_tokens (`dict`): role -> the reward's token and the backbone's, of those that differ.
        is_permuted (`bool`): labels in another order, and matched by name.
        is_tokenizer_known (`bool`): or else taken to be the reward's.
    """

    reward: RewardConfig
    backbone: ModelReference
    problems: tuple[str, ...]
    is_base_shared: bool
    backbone_parameters: int
    base_parameters: int
    adapter_parameters: int
    weight_bytes: int
    backbone_columns: int
    reward_columns: int
    backbone_context: int | None
    reward_context: int | None
    special_tokens: dict[str, tuple[str | None, str | None]]
    is_permuted: bool
    is_tokenizer_known: bool

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def cost_ratio(self) -> float:
        """c, a step of the reward over one of the backbone, where reading the weights takes the time."""
        return (self.base_parameters + self.adapter_parameters) / self.backbone_parameters

    @property
    def speed_limit(self) -> float:
        """1 / (1 + c): decoding with the reward over decoding without, at best, if not speculative."""
        return 1 / (1 + self.cost_ratio)

    def to_dict(self) -> dict:
        values = vars(self) | {"reward": json.loads(self.reward.to_json_string()), "backbone": vars(self.backbone)}
        reasons = values.pop("problems")
        derived = {"cost_ratio": self.cost_ratio, "speed_limit": self.speed_limit}
        return {"fits": self.fits, "reasons": list(reasons)} | values | derived


def check_fit(
    reward: str | Path, backbone: str, *, dtype: torch.dtype | None = None, token: str | bool | None = None, **kwargs
) -> Fit:
    """Hold a reward against a backbone by configurations and tokenizers; no weights are loaded, nor fetched.

    Args:
        reward: folder, or Hub id.
        backbone: folder, or Hub id.
        dtype (`torch.dtype`, *optional*): that memory is told for.
        token: for the Hub.
        kwargs: `revision` of the backbone; `trust_remote_code` of both models.

    Raises:
        RewardFileError: no reward there, or an incomplete one.
        PRTValueError: no model there, or not one that predicts tokens or labels.
    """
    skeleton, base = _skeleton_of_reward(reward, token, kwargs.get("trust_remote_code"))
    config = skeleton.config
    model = load_skeleton(backbone, token=token, **kwargs)
    theirs = load_processing_class(backbone, config.task, token=token, **kwargs)
    problems, order = [], None
    try:
        order = skeleton.order_for(model, theirs)
    except PRTError as error:
        problems.append(str(error))
    found, named = reference_to(model), config.reward_base
    is_shared = config.is_adapter and found.id == named.id and found.revision == named.revision
    held = [model, skeleton.network] if not is_shared else [skeleton.network]
    return Fit(
        reward=config,
        backbone=found,
        problems=tuple(problems),
        is_base_shared=is_shared,
        backbone_parameters=_count(model),
        base_parameters=_count(base),
        adapter_parameters=_count(skeleton.network) - _count(base),
        weight_bytes=sum(_bytes(network, dtype) for network in held),
        backbone_columns=_columns(model),
        reward_columns=_columns(base),
        backbone_context=context_length(model),
        reward_context=context_length(base),
        special_tokens=_differing_roles(config, theirs),
        is_permuted=isinstance(order, list) and order != sorted(order),
        is_tokenizer_known=theirs is not None or not isinstance(config.contract, VocabularyContract),
    )


def _skeleton_of_reward(place: str | Path, token, trust_remote_code) -> tuple[RewardModel, PreTrainedModel]:
    """A reward without its weights, and what is no adapter of it."""
    config = RewardConfig.from_json_file(local_file(place, PRT_CONFIG_NAME, token=token))
    if Path(place).is_dir():
        check_files(Path(place), config)
        if not config.is_adapter:
            check_full(Path(place), config)
    named = config.reward_base
    if not config.is_adapter:
        network = base = load_skeleton(str(place), token=token)
    elif named.id is None:
        raise RewardFileError(
            "The reward's base was made in memory and has no id to load it by.",
            expected="a reward that names its base",
            found=str(named),
        )
    else:
        peft_config = read_peft_config(local_file(place, ADAPTER_CONFIG, token=token).parent, named.id)
        base = load_skeleton(named.id, revision=named.revision, token=token, trust_remote_code=trust_remote_code)
        network = wrap(base, peft_config, device="meta")
    processing_class = load_processing_class(place, config.task, token=token)
    if processing_class is None and config.is_adapter:
        processing_class = load_processing_class(named.id, config.task, revision=named.revision or "main", token=token)
    reward = RewardModel(network, config, processing_class)
    reward.name_tokens()
    return reward, base


def _differing_roles(config: RewardConfig, processing_class) -> dict[str, tuple[str | None, str | None]]:
    tokenizer = unwrap_tokenizer(processing_class)
    if tokenizer is None or not isinstance(config.contract, VocabularyContract):
        return {}
    ours = config.contract.special_tokens
    theirs = VocabularyContract.from_tokenizer(tokenizer).special_tokens
    pairs = {role: (ours.get(role), theirs.get(role)) for role in dict.fromkeys([*ours, *theirs])}
    return {role: pair for role, pair in pairs.items() if pair[0] != pair[1]}


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: torch.nn.Module, dtype: torch.dtype | None) -> int:
    """PEFT keeps adapters of 16-bit models in float32."""
    pretrained = {id(parameter) for parameter in pretrained_parameters(network).values()}
    return sum(
        parameter.numel() * max((dtype or parameter.dtype).itemsize, 0 if id(parameter) in pretrained else 4)
        for parameter in network.parameters()
    )


def _columns(model: PreTrainedModel) -> int:
    return head_of(model)[1].weight.shape[0]
