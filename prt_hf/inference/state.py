"""The reward's KV cache, aligned with whatever prefix is asked for.

`generate()` does not announce what it does to its rows: beams are reordered, drafts rejected, one processor serves a
draft model and its target. So the state looks at the token rows themselves. Whatever was asked before, it returns what
a full recomputation returns; the cache only saves time.
"""

import threading
import weakref
from typing import Any

import torch
import transformers
from packaging import version
from torch import nn
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import ModelOutput

from ..errors import UnsupportedError
from ..networks.adapters import bare_base
from ..networks.anatomy import CACHE, check_length, context_length, unwrap_adapter
from ..networks.mixed_pass import MixedPass, Pass, evaluating, lock_of
from .probe import behaviour_of, check_padding
from .versions import Versions

PAD = -1  # token of masked positions, so that rows with equal tokens and different masks differ
# Before, a window that records its past had to be cropped after every forward.
RECORDS_PAST = version.parse(transformers.__version__) >= version.parse("5.18")
THREADS = 8  # that are remembered
ROOM = 256  # tokens by which a static cache grows
REMEMBERED = 64  # positions of a single row whose logits are kept: drafts are scored forwards, then verified again


class _Memory:
    """The rows, cache and logits of a thread's last call."""

    def __init__(self, context: tuple = ()):
        self.context = context  # of the thread: the precision that it computes in
        self.rows: torch.LongTensor | None = None
        self.cache: Cache | None = None
        self.oldest = 0  # shortest prefix that the cache can still be cropped to
        self.capacity = 0  # tokens for which a static cache has room
        # By length of the prefix: `(cached rows, vocab_size)` for each of those that are asked for.
        self.logits: dict[int, tuple[torch.Tensor, ...]] = {}

    def clear(self) -> None:
        """Forget everything but the thread's context."""
        self.__init__(self.context)

    @property
    def forgets(self) -> bool:
        """Whether a cropped cache lacks earlier tokens, as windows and convolutions do."""
        return any(type(layer) not in (DynamicLayer, StaticLayer) for layer in self.cache.layers)


class RewardState:
    """Next-token logits of a causal language model, cached by content.

    Each call matches the given rows with the cached ones by their longest common prefix, then reuses, reorders, crops
    and extends the cache, or starts anew where that would not be exact. Equal rows are computed once.

    Several threads may call it and take turns: the last 8 of them have a cache each, so texts that are decoded side by
    side keep theirs. A compiled step belongs to one thread, as CUDA graphs do.

    Args:
        network: the model; a `PeftModel` for a reward adapter.
        of (`str`): whose logits to give: `"network"`; for a `PeftModel` also its `"base"`, without adapters, or
            `"both"` in one pass, the network first, for which [`~prt_hf.networks.mixed_pass.can_mix`] must hold.
        compile_config (`CompileConfig`, *optional*): keep a static cache, and compile the step of one token (of the
            network only). The step with a growing cache is the reference.

    Raises:
        UnsupportedError: a network without an attention cache cannot be compiled so.
    """

    def __init__(self, network: nn.Module, of: str = "network", compile_config: CompileConfig | None = None):
        model = unwrap_adapter(network)
        self.network = network
        self.tokens_computed = 0  # over all calls, for tests and benchmarks
        self._of, self._compile_config = of, compile_config
        self._pass: Pass | None = None
        self._config = model.config
        self._limit, self._switch = context_length(model), switching_length(model.config)
        self._cache_name = Pass(network).cache_name
        # A recurrent state cannot be rewound, nor continued by several tokens at once.
        self._is_recurrent = getattr(model, "_is_stateful", False) or self._cache_name is None
        if compile_config is not None and (self._is_recurrent or of != "network"):
            raise UnsupportedError(
                f"The step of {type(model).__name__} cannot be compiled.",
                expected="a network whose cache is of attention alone",
                remedy="leave `compile_config` out",
            )
        self.reset()
        # On the decoder, which runs in every kind of pass.
        hook = model.base_model.register_forward_pre_hook(ResetInTraining(self))
        weakref.finalize(self, hook.remove)

    def reset(self) -> None:
        """Forget all rows, and free the caches.

        Only needed for memory, and after changes that [`~prt_hf.inference.versions.Versions`] does not see.
        """
        self._memories: dict[int, _Memory] = {}  # by thread, in the order of their last calls

    def _new_pass(self) -> Pass:
        """Return a pass of the network as it is now."""
        if self._of == "network":
            return Pass(self.network)
        base = bare_base(self.network).eval()
        return Pass(base) if self._of == "base" else MixedPass(base, [self.network, None])

    def __call__(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        """Return logits for the token after each row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids.
            attention_mask (`torch.LongTensor` of the same shape, *optional*): 0 at padding; all ones by default.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`, on the network's device.

        Raises:
            ContextLengthError: more tokens than the network can read.
            UnsupportedError: padding that the network takes for text.
        """
        return self.blocks(input_ids, attention_mask)[0]

    @torch.no_grad()
    def blocks(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return logits as a call does, for the network, its base or both, as `of` says."""
        with lock_of(unwrap_adapter(self.network)):
            return self._blocks(self._memory(), input_ids, attention_mask)

    def _memory(self) -> _Memory:
        """Return the memory of this thread, an empty one if the network or the thread's precision has changed."""
        if self._pass is None or self._versions() != self._seen:
            self.reset()
            self._pass, self._versions = self._new_pass(), Versions(self.network)
            self._seen = self._versions()
        kind, thread = self.network.device.type, threading.get_ident()
        context = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        memory = self._memories.pop(thread, None)
        if memory is None or memory.context != context:
            memory = _Memory(context)
        self._memories[thread] = memory
        if len(self._memories) > THREADS:
            del self._memories[next(iter(self._memories))]
        return memory

    def _blocks(
        self, memory: _Memory, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Return remembered logits, or compute those of the distinct rows from the longest usable prefix on."""
        rows = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, PAD)
        rows, copies = _distinct(rows.to(self.network.device))
        length = rows.shape[1]
        source, common = _match(rows, memory.rows)
        if common == length and length in memory.logits:
            return tuple(logits[source][copies] for logits in memory.logits[length])
        try:
            kept = self._align(memory, rows, source, min(common, length - 1))
            logits = self._forward(memory, rows, kept)
        except BaseException:
            memory.clear()  # the cache may be ahead of the rows
            raise
        is_one_row = memory.rows is not None and len(memory.rows) == len(rows) == 1
        earlier = {n: kept_logits for n, kept_logits in memory.logits.items() if is_one_row and n <= kept}
        memory.logits = dict(list(earlier.items())[1 - REMEMBERED :]) | {length: logits}
        memory.rows = rows
        return tuple(block[copies] for block in logits)

    def _align(self, memory: _Memory, rows: torch.LongTensor, source: torch.LongTensor | None, common: int) -> int:
        """Bring the cache to the first `common` tokens of the rows, or drop it; return how many it now holds."""
        cache = memory.cache
        cached = 0 if cache is None else memory.rows.shape[1]
        surplus = cached - common
        is_reusable = common > 0 and cache is not None and common >= memory.oldest
        if self._is_recurrent:
            is_reusable = is_reusable and surplus == 0 and rows.shape[1] == common + 1
        elif isinstance(cache, StaticCache):
            is_reusable = (
                is_reusable
                and rows.shape[1] <= memory.capacity
                and len(rows) == len(memory.rows)
                and (surplus == 0 or not memory.forgets)
            )
        elif surplus > 0:
            is_reusable = is_reusable and (RECORDS_PAST or not memory.forgets) and behaviour_of(self._pass).rewinds
        if is_reusable and self._switch is not None:
            is_reusable = self._is_long(memory.rows) == self._is_long(rows)
        if not is_reusable:
            memory.clear()
            return 0
        if surplus > 0 and isinstance(cache, StaticCache):
            for layer in cache.layers:
                layer.cumulative_length.sub_(surplus)  # later tokens are masked, and overwritten
        elif surplus > 0:
            cache.crop(-surplus)
            if memory.forgets:
                memory.oldest = common
        is_in_order = len(source) == len(memory.rows) and torch.equal(
            source, torch.arange(len(source), device=source.device)
        )
        if not is_in_order:
            blocks = range(len(self._pass.blocks))
            cache.reorder_cache(torch.cat([source + block * len(memory.rows) for block in blocks]))
        return common

    def _is_long(self, rows: torch.LongTensor) -> bool:
        """Return whether the texts are so long that the network turns its positions by other frequencies.

        Raises:
            UnsupportedError: some are, and some are not.
        """
        are_long = (rows != PAD).sum(1) > self._switch
        if bool(are_long.any() != are_long.all()):
            raise UnsupportedError(
                "Short and long texts of one batch would be read with the same frequencies of longrope.",
                expected=f"all at most {self._switch} tokens (original_max_position_embeddings), or all longer",
                found=f"{int((~are_long).sum())} short, {int(are_long.sum())} long",
                remedy="generate for one prompt at a time",
            )
        return bool(are_long.any())

    def _forward(self, memory: _Memory, rows: torch.LongTensor, kept: int) -> tuple[torch.Tensor, ...]:
        """Read all tokens but the first `kept`, which the cache holds, and return the last logits."""
        mask = rows != PAD
        check_length(int(mask.sum(1).max()), self._limit)
        new = rows[:, kept:]
        is_padded = not bool(mask.all())
        kwargs = {"input_ids": new.clamp(min=0), "use_cache": False, "logits_to_keep": 1}
        if kept or is_padded or self._compile_config is not None:  # else the network counts by itself
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, kept:]
        if is_padded:
            check_padding(self._pass)
            if self._switch is not None:
                self._is_long(rows)
            kwargs["attention_mask"] = mask.long()
        if memory.cache is None:
            memory.cache = self._new_cache(memory, rows.shape[1])
        if memory.cache is not None:
            kwargs |= {self._cache_name: memory.cache, "use_cache": True}
            if kept and all(memory.cache.is_linear):
                kwargs.pop("attention_mask", None)  # the state is past the padding
        with evaluating(self.network):
            output = self._pass(**kwargs) if self._compile_config is None else self._static_step(rows, kept, kwargs)
        returned = getattr(output, self._cache_name or "", None)
        memory.cache = returned if isinstance(returned, Cache) else None
        self.tokens_computed += new.numel()
        # A compiled step may write its next output into the same memory.
        return self._pass.split(output.logits[:, -1].clone())

    def _new_cache(self, memory: _Memory, length: int) -> Cache | None:
        """Return an empty cache, or None for a network that cannot read on from one."""
        if self._compile_config is not None:
            memory.capacity = ROOM * (1 + length // ROOM)
            return StaticCache(config=self._config, max_cache_len=memory.capacity)
        if self._cache_name is None or not behaviour_of(self._pass).steps:
            return None
        cache = DynamicCache(config=self._config)
        if RECORDS_PAST and not self._is_recurrent:
            cache.activate_past_recording()
        return cache

    def _static_step(self, rows: torch.LongTensor, kept: int, kwargs: dict) -> ModelOutput:
        """Run a step with a static cache, whose mask and positions are made outside of the compiled part."""
        model = self._pass.model
        inputs = model.prepare_inputs_for_generation(
            rows.clamp(min=0),
            next_sequence_length=rows.shape[1] - kept,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs["position_ids"],
            use_cache=True,
            **{CACHE: kwargs[CACHE]},
        )
        is_step = rows.shape[1] == kept + 1 and kept > 0
        run = model.get_compiled_call(self._compile_config) if is_step else model
        return run(**self._pass.prepare(inputs), return_dict=True)


class ResetInTraining:
    """A hook that resets a state on a pass in training mode, after which the weights change; copies do nothing."""

    def __init__(self, state: Any):
        self._state = weakref.ref(state)

    def __call__(self, module: nn.Module, _: tuple) -> None:
        state = None if self._state is None else self._state()
        if module.training and state is not None:
            state.reset()

    def __getstate__(self) -> dict:
        return {"_state": None}


def switching_length(config: PreTrainedConfig) -> int | None:
    """Return the length beyond which the network reads the whole text with other frequencies; None without longrope."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    lengths = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def _match(rows: torch.LongTensor, cached: torch.LongTensor | None) -> tuple[torch.LongTensor | None, int]:
    """Return for each row the cached row with the longest common prefix, and the length that all of them share."""
    if cached is None:
        return None, 0
    length = min(rows.shape[1], cached.shape[1])
    differ = rows[:, None, :length] != cached[None, :, :length]
    first_difference = torch.where(differ.any(-1), differ.byte().argmax(-1), length)
    common, source = first_difference.max(1)
    return source, int(common.min())


def _distinct(rows: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Return the different rows, and for each row its index among them."""
    if len(rows) == 1:
        return rows, torch.zeros(1, dtype=torch.long, device=rows.device)
    return torch.unique(rows, dim=0, return_inverse=True)
