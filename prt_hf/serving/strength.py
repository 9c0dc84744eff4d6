"""Add rewards to logits, with the strengths of the recipe or of single requests.

The engine has two runners, each with its own interface for processors that look at requests: V1 gives them the rows
before a step, V2 together with the step's logits.
"""

import re
from functools import lru_cache
from numbers import Real
from weakref import WeakValueDictionary

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from ..errors import PRTValueError

ARGUMENT = "prt_strength"  # among `extra_args` of SamplingParams, `vllm_xargs` of a request
_MOST = 1e4  # beyond it, float32 has no digits left for the backbone's log-probabilities
_Strengths = tuple[float, ...]

# Model and logits processor of one engine share the configuration, and no other object.
_STEPS: "WeakValueDictionary[int, Steps]" = WeakValueDictionary()


class Steps:
    """Adds rewards to a backbone's logits, step after step.

    Log-probabilities, as the PRT model of transformers has them: repetition penalties depend on what is added to a row.

    Attributes:
        next_rows (`dict[int, tuple]`): rows of the coming step that have strengths of their own.
    """

    def __init__(self, vllm_config: VllmConfig, strengths: list[float], size: int):
        self.size = size
        self.next_rows: dict[int, _Strengths] = {}
        self._logits: torch.Tensor | None = None
        self._backbone: torch.Tensor | None = None
        self._rewards: list[torch.Tensor] = []
        self._neutral: list[torch.Tensor | None] | None = None
        self._defaults = torch.tensor(strengths, dtype=torch.float32)  # models are made in another type
        self._row_strengths: torch.Tensor | None = None
        self._names_none: torch.Tensor | None = None
        _STEPS[id(vllm_config.model_config)] = self

    @staticmethod
    def of(vllm_config: VllmConfig) -> "Steps | None":
        """Return the steps of an engine's model."""
        return _STEPS.get(id(vllm_config.model_config))

    def combine(
        self,
        backbone: torch.Tensor,
        rewards: list[torch.Tensor],
        named_strengths: torch.Tensor | None = None,
        neutral: list[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Return log pi over the contract's tokens, without padding, `(num_rows, size)`, float32.

        Args:
            backbone: its logits.
            rewards: their logits in the backbone's columns, one tensor for each reward.
            named_strengths: `(num_rows,)`, strengths of the last reward, which is another one for each row that names
                one; NaN in rows that name none.
            neutral: for each reward the tokens that keep their probability; None where there are none.
        """
        # The step's own rows come first, those of prompts that are scored as well after them.
        rows, self.next_rows = self.next_rows, {}
        self._rewards = [reward[:, : self.size].float() for reward in rewards]
        self._defaults = self._defaults.to(backbone.device)
        self._row_strengths = self._defaults.expand(len(backbone), -1)
        self._names_none = None if named_strengths is None else named_strengths.isnan()
        if named_strengths is not None:
            self._row_strengths = torch.cat([self._row_strengths, named_strengths.nan_to_num()[:, None]], 1)
        if rows:
            self._row_strengths = self._changed(rows)
        self._neutral = neutral if any(each is not None for each in neutral or []) else None
        if self._neutral is not None:
            self._backbone = backbone[:, : self.size]
            self._logits = self._one_by_one(slice(None), self._row_strengths)
            return self._logits
        logits = backbone[:, : self.size].to(torch.float32, copy=True)
        for strength, reward in zip(self._row_strengths.T, self._rewards, strict=True):
            logits += strength[:, None] * reward
        self._logits = logits.log_softmax(-1)
        return self._logits

    def change(self, logits: torch.Tensor, rows: dict[int, _Strengths]) -> None:
        """Change the strengths of some rows of this step.

        Args:
            logits: those that sampling is about to choose from. The ones that [`combine`] returned, of which the engine
                makes log-probabilities, are changed as well.
            rows: new strengths.
        """
        index = list(rows)
        if self._neutral is not None:
            changed = self._one_by_one(index, self._changed(rows)[index])
            logits[index] += changed - self._logits[index]
            self._logits[index] = changed
            return
        difference = (self._changed(rows) - self._row_strengths)[index]
        for strength, reward in zip(difference.T, self._rewards, strict=True):
            logits[index] += strength[:, None] * reward[index]
            self._logits[index] += strength[:, None] * reward[index]
        self._logits[index] = self._logits[index].log_softmax(-1)

    def _one_by_one(self, index: slice | list[int], strengths: torch.Tensor) -> torch.Tensor:
        """Return log pi of some rows, as [`~prt_hf.functional.combine`] does where there are neutral tokens.

        What is neutral to one reward keeps what the others gave.
        """
        logits = self._backbone[index].to(torch.float32, copy=True)
        for strength, reward, neutral in zip(strengths.T, self._rewards, self._neutral, strict=True):
            if neutral is None:
                logits = logits.addcmul_(strength[:, None], reward[index]).log_softmax(-1)
                continue
            kept = logits.index_select(-1, neutral)
            log_share = logits.index_fill_(-1, neutral, -torch.inf).logsumexp(-1, keepdim=True)
            log_total = log_share.logaddexp(kept.logsumexp(-1, keepdim=True))
            logits = logits.addcmul_(strength[:, None], reward[index]).log_softmax(-1)
            logits.add_(log_share - log_total).index_copy_(-1, neutral, kept - log_total)
        return logits

    def _changed(self, rows: dict[int, _Strengths]) -> torch.Tensor:
        """Return the strengths of all rows, some of them changed, `(num_rows, rewards)`."""
        changed = self._row_strengths.clone()
        changed[list(rows)] = torch.tensor(list(rows.values()), dtype=changed.dtype, device=changed.device)
        if self._names_none is not None:
            changed[:, -1].masked_fill_(self._names_none, 0.0)
        return changed


class _Requests:
    """Reads `prt_strength`: a number, or one for each of `count` rewards, the last of them that which requests name."""

    count: int
    with_adapters: bool

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check the strengths of a request.

        Raises:
            PRTValueError: they are not for these rewards, or come with an option that the engine cannot give with them.
        """
        if cls.with_adapters and sampling_params.prompt_logprobs is not None:
            raise PRTValueError(
                "The engine scores prompts without the rewards that requests name.",
                expected="no `prompt_logprobs`",
                found=str(sampling_params.prompt_logprobs),
                remedy="start it without --enable-lora",
            )
        strengths = read(sampling_params)
        if strengths is None:
            return
        is_usable = all(
            type(value) is not bool and isinstance(value, Real) and abs(value) <= _MOST for value in strengths
        )
        if not is_usable or len(strengths) != cls.count:
            raise PRTValueError(
                f"`{ARGUMENT}` is not usable.",
                expected=f"{cls.count} of -{_MOST:g} ... {_MOST:g}, one for each reward"
                + (", the last for that which the request names" if cls.with_adapters else ""),
                found=str(sampling_params.extra_args[ARGUMENT])[:80],
            )
        # Prompts are scored by the recipe's strengths, and repetition may be punished before strengths are changed.
        others = {
            "prompt_logprobs": sampling_params.prompt_logprobs is not None,
            "repetition_penalty": sampling_params.repetition_penalty != 1,
        }
        for name, is_asked in others.items():
            if is_asked:
                raise PRTValueError(
                    f"The engine cannot change strengths and give `{name}`.",
                    expected=f"`{name}` or `{ARGUMENT}`",
                    found="both",
                )


class RequestStrengthsV1(_Requests, ProcessorV1):
    """Strengths of requests in vLLM's V1 model runner."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.vllm_config = vllm_config
        self.row_strengths: dict[int, _Strengths] = {}

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Tell the model the strengths of the coming step's rows."""
        process_dict_updates(self.row_strengths, batch_update, lambda params, *_: read(params))
        Steps.of(self.vllm_config).next_rows = dict(self.row_strengths)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits, which have the strengths already."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Return True: nothing is changed here."""
        return True


class RequestStrengthsV2(_Requests, ProcessorV2):
    """Strengths of requests in vLLM's V2 model runner."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self.vllm_config = vllm_config
        self.slot_strengths: dict[int, _Strengths] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember the strengths of a request; return whether it has any."""
        self.slot_strengths.pop(req_idx, None)
        strengths = read(sampling_params)
        if strengths is not None:
            self.slot_strengths[req_idx] = strengths
        return strengths is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Give the rows of requests with strengths of their own those strengths."""
        if self.slot_strengths.keys() & set(ctx.idx_mapping_np.tolist()):
            slots = ctx.expanded_idx_mapping.tolist()
            rows = {row: self.slot_strengths[slot] for row, slot in enumerate(slots) if slot in self.slot_strengths}
            Steps.of(self.vllm_config).change(logits, rows)
        return logits


class RefusedStrengths(ProcessorV1, ProcessorV2):
    """Refuses `prt_strength` where the engine takes no logits processors: in V1 with speculation.

    There the engine only asks processors that it finds by entry point; this one changes nothing, in any engine.

    Attributes:
        engines (`dict[int, ModelConfig]`): engines of this process that speculate, by id; while there is one, none
            takes strengths, as requests do not show which engine they are for.
    """

    engines: "WeakValueDictionary[int, ModelConfig]" = WeakValueDictionary()

    def __init__(self, *args):
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse strengths while an engine of this process speculates.

        Raises:
            PRTValueError: the request has some.
        """
        if cls.engines and read(sampling_params) is not None:
            raise PRTValueError(
                f"vLLM's V1 model runner does not take `{ARGUMENT}` with speculation.",
                remedy="leave out --speculative-config, or use the V2 model runner",
            )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return False: there is nothing to apply."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Do nothing."""

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Return the logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Return True: nothing is changed here."""
        return True


def read(sampling_params: SamplingParams) -> _Strengths | None:
    """Return the strengths that a request names, if any."""
    strengths = (sampling_params.extra_args or {}).get(ARGUMENT)
    if strengths is None:
        return None
    return tuple(strengths) if isinstance(strengths, list | tuple) else (strengths,)


def processor_name(vllm_config: VllmConfig, count: int, *, with_adapters: bool) -> str:
    """Return the name by which the engine finds the processor for `count` rewards, and one that requests may name."""
    name = f"{__name__}:RequestStrengthsV{2 if vllm_config.use_v2_model_runner else 1}Of{count + with_adapters}"
    return name + ("WithAdapters" if with_adapters else "")


@lru_cache
def __getattr__(name: str) -> type[_Requests]:
    """Make a processor class that knows how many rewards there are.

    The engine checks requests with the class itself, which it finds by its name alone.
    """
    if match := re.fullmatch(r"(RequestStrengthsV[12])Of(\d+)(WithAdapters)?", name):
        return type(name, (globals()[match[1]],), {"count": int(match[2]), "with_adapters": match[3] is not None})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
