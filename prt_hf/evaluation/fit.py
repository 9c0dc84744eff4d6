"""Check without any weights whether a reward and a backbone fit, and what the two cost together."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..contract import PRT_CONFIG_NAME, TEXT_GENERATION, ModelReference, RewardConfig
from ..errors import PRTError, RewardFileError
from ..hub.client import has_file, local_file, refuse_reward
from ..hub.folder import ADAPTER_CONFIG, check_files
from ..networks.adapter_config import read_peft_config
from ..networks.adapters import wrap
from ..networks.anatomy import context_length, head_of, pretrained_parameters
from ..networks.auto import load_processing_class, load_skeleton
from ..networks.identity import reference_to
from ..reward.full import check_full
from ..reward.loading import read_ordinary_adapter
from ..reward.model import RewardModel
from ..vocabulary import VocabularyContract, unwrap_tokenizer
from ..vocabulary.across import VocabularyMap


@dataclass(frozen=True)
class Fit:
    """A reward and a backbone, before the backbone is loaded.

    Attributes:
        reward ([`~contract.RewardConfig`]): The reward's configuration.
        backbone ([`~contract.ModelReference`]): The backbone.
        problems (tuple of `str`): Why the two do not fit; empty if they do.
        is_base_shared (`bool`): Whether the backbone is the base of the reward adapter, so that its weights are loaded
            once.
        backbone_parameters (`int`): The number of the backbone's parameters.
        base_parameters (`int`): The number of parameters of the adapter's base, or of a full reward.
        adapter_parameters (`int`): The number of the adapter's parameters; 0 for a full reward.
        weight_bytes (`int`): The bytes of all weights, in the given precision, or as they are stored.
        backbone_columns (`int`): The number of the backbone's logits, including rows that pad a vocabulary.
        reward_columns (`int`): The number of the reward's logits, including rows that pad a vocabulary.
        backbone_context (`int`, *optional*): The number of tokens that the backbone can read; None without a limit.
        reward_context (`int`, *optional*): The number of tokens that the reward can read; None without a limit.
        special_tokens (`dict`): Role -> the reward's token and the backbone's, for roles where they differ.
        match (`str`, *optional*): How the tokens of the two belong together; None if they do not, or for images.
        backbone_tokens (`int`, *optional*): The number of the backbone's tokens; None like `match`.
        is_permuted (`bool`): Whether the labels are in another order; they are matched by name.
        is_tokenizer_known (`bool`): Whether the backbone has a tokenizer; if not, the reward's is assumed.
        is_across (`bool`): Whether the backbone has another vocabulary, and that was asked for.
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
    match: str | None
    backbone_tokens: int | None
    is_permuted: bool
    is_tokenizer_known: bool
    is_across: bool

    @property
    def fits(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def cost_ratio(self) -> float:
        """c: the time of a step of the reward over one of the backbone, if reading the weights takes the time."""
        return (self.base_parameters + self.adapter_parameters) / self.backbone_parameters

    @property
    def speed_limit(self) -> float:
        """1 / (1 + c): the speed of decoding with the reward over that without it, at best, if not speculative."""
        return 1 / (1 + self.cost_ratio)

    def to_dict(self) -> dict:
        """Return all entries for JSON."""
        values = vars(self) | {"reward": json.loads(self.reward.to_json_string()), "backbone": vars(self.backbone)}
        reasons = values.pop("problems")
        derived = {"cost_ratio": self.cost_ratio, "speed_limit": self.speed_limit}
        return {"fits": self.fits, "reasons": list(reasons)} | values | derived


def check_fit(
    reward: str | Path,
    backbone: str,
    *,
    dtype: torch.dtype | None = None,
    is_quantized: bool = False,
    across_vocabularies: bool = False,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Fit:
    """Check whether a reward fits a backbone, by configurations and tokenizers; weights are not loaded or downloaded.

    Args:
        reward: A folder, or an id on the Hub, of a reward or of an ordinary LoRA adapter, which is carried over.
        backbone: A folder, or an id on the Hub.
        dtype (`torch.dtype`, *optional*): The precision that memory is computed for.
        is_quantized (`bool`): Whether the backbone is going to be quantised, so that its weights are not the reward's.
        across_vocabularies (`bool`): Whether the backbone may have another vocabulary.
        token: A token for the Hub.
        **kwargs: `revision` of the backbone; `trust_remote_code` of both models.

    Raises:
        RewardFileError: There is no reward, or an incomplete one.
        PRTValueError: There is no model, or not one that predicts tokens or labels.
    """
    asked = {"is_quantized": is_quantized, "across_vocabularies": across_vocabularies}
    found = check_fits([reward], [backbone], dtype=dtype, **asked, token=token, **kwargs)
    return found[str(reward), backbone]


def check_fits(
    rewards: Sequence[str | Path],
    backbones: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    is_quantized: bool = False,
    across_vocabularies: bool = False,
    token: str | bool | None = None,
    **kwargs: Any,
) -> dict[tuple[str, str], Fit]:
    """Check every reward with every backbone, as [`check_fit`] does; each configuration and tokenizer is read once.

    Ordinary adapters may be among the rewards: r = log pi_ft - log pi_pt.
    """
    found, models = {}, {}
    for place in rewards:
        reward, base = _skeleton_of_reward(place, token, kwargs.get("trust_remote_code"))
        for backbone in backbones:
            key = backbone, reward.config.task
            if key not in models:
                refuse_reward(backbone, "a pretrained model", token, kwargs.get("revision"))
                theirs = load_processing_class(backbone, reward.config.task, token=token, **kwargs)
                models[key] = load_skeleton(backbone, token=token, **kwargs), theirs
            found[str(place), backbone] = _fit(reward, base, *models[key], dtype, is_quantized, across_vocabularies)
    return found


def _fit(
    skeleton: RewardModel,
    base: PreTrainedModel,
    model: PreTrainedModel,
    theirs: Any,
    dtype: torch.dtype | None,
    is_quantized: bool,
    across_vocabularies: bool,
) -> Fit:
    config = skeleton.config
    problems, match = [], None
    try:
        match = skeleton.match_with(model, theirs, across_vocabularies=across_vocabularies)
        if match.is_across:  # by tokenizers alone
            VocabularyMap.between(
                config.contract,
                VocabularyContract.from_tokenizer(unwrap_tokenizer(theirs)),
                unwrap_tokenizer(skeleton.processing_class),
                unwrap_tokenizer(theirs),
            )
    except PRTError as error:
        problems.append(str(error))
    tokens = match and match.tokens
    found, named = reference_to(model), config.reward_base
    is_same = found.id == named.id and found.revision == named.revision
    is_shared = config.is_adapter and is_same and not is_quantized
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
        match=tokens and str(tokens),
        backbone_tokens=tokens and tokens.size,
        is_permuted=match is not None and match.columns is not None and config.task != TEXT_GENERATION,
        is_across=match is not None and match.is_across,
        is_tokenizer_known=theirs is not None or not isinstance(config.contract, VocabularyContract),
    )


def _skeleton_of_reward(
    place: str | Path, token: str | bool | None, trust_remote_code: bool | None
) -> tuple[RewardModel, PreTrainedModel]:
    """Return a reward without its base's weights, and the network that its adapter is on (or the full reward)."""
    if has_file(place, ADAPTER_CONFIG, token) and not has_file(place, PRT_CONFIG_NAME, token):
        adapter = read_ordinary_adapter(place, token)
        named, base = {"revision": adapter.revision, "trust_remote_code": trust_remote_code}, None
        if adapter.base_model_name_or_path:
            base = load_skeleton(adapter.base_model_name_or_path, token=token, **named)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*copying from a non-meta parameter")  # on purpose
            return RewardModel.from_adapter(place, base_model=base, token=token), base
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


def _differing_roles(config: RewardConfig, processing_class: Any) -> dict[str, tuple[str | None, str | None]]:
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
    """Return the bytes of a network's parameters; PEFT keeps adapters of 16-bit models in float32."""
    pretrained = {id(parameter) for parameter in pretrained_parameters(network).values()}
    return sum(
        parameter.numel() * max((dtype or parameter.dtype).itemsize, 0 if id(parameter) in pretrained else 4)
        for parameter in network.parameters()
    )


def _columns(model: PreTrainedModel) -> int:
    return head_of(model)[1].weight.shape[0]
