"""The reward's KV cache, aligned with whatever prefix is asked for.

`generate()` never says what it does to its rows: beams are reordered, drafts rejected, one processor serves a draft
model and its target. So the state looks at the token rows themselves. Whatever was asked before, it returns what a full
recomputation returns; the cache only saves time.
"""

import weakref

import torch
import transformers
from packaging import version
from torch import nn
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..errors import UnsupportedError
from ..passes import MixedPass, Pass, bare_base
from ..pretrained import CACHE, check_length, context_length, unwrap_adapter

PAD = -1  # stands for masked positions, so that rows with equal tokens and different masks differ
# Before, a window that records its past had to be cropped after every forward.
RECORDS_PAST = version.parse(transformers.__version__) >= version.parse("5.18")
ROOM = 256  # tokens by which a static cache grows
REMEMBERED = 64  # positions of a single row whose logits are kept: drafts are scored forwards, then verified again


class RewardState:
    """Next-token logits of a causal language model, cached by content.

    Each call matches the asked rows with the cached ones by their longest common prefix, then reuses, reorders, crops
    and extends the cache, or starts anew where that would not be exact. Equal rows are computed once.

    Args:
        network: the model; a `PeftModel` for a reward adapter.
        of (`str`): whose logits: `"network"`; of a `PeftModel` also its `"base"`, without adapters; or `"both"`, the
            network first, in one pass where [`~prt_hf.passes.can_mix`] says so.
        compile_config (`CompileConfig`, *optional*): keep a static cache, and compile the step of one token (of the
            network only). The step with a growing cache is the reference.

    Raises:
        UnsupportedError: a network without an attention cache cannot be compiled so.
    """

    def __init__(self, network: nn.Module, of: str = "network", compile_config: CompileConfig | None = None):
        model = unwrap_adapter(network)
        accepted = Pass(network).accepted
        self.network = network
        self.tokens_computed = 0  # over all calls, for tests and benchmarks
        self._of, self._compile_config = of, compile_config
        self._pass: Pass | None = None
        self._config = model.config
        self._limit = context_length(model)
        # Models with a cache of their own (RWKV, xLSTM, MiniMax) promise nothing about reordering: recompute.
        is_cached = getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        # State-space models had another name for it before transformers 5.24.
        names = (CACHE, "cache_params") if is_cached else ()
        self._cache_name = next((name for name in names if name in accepted), None)
        # A recurrent state cannot be rewound, nor continued by several tokens at once.
        self._is_recurrent = getattr(model, "_is_stateful", False) or self._cache_name is None
        self._takes_padding = is_cached
        if compile_config is not None and (self._is_recurrent or of != "network"):
            raise UnsupportedError(
                f"The step of {type(model).__name__} cannot be compiled.",
                expected="a network whose cache is of attention alone",
                remedy="leave `compile_config` out",
            )
        self.reset()
        # On the decoder, which runs in every kind of pass.
        hook = model.base_model.register_forward_pre_hook(_reset_in_training(weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def reset(self) -> None:
        """Forget all rows, and free the cache."""
        self._rows: torch.LongTensor | None = None
        self._cache: Cache | None = None
        self._oldest = 0  # shortest prefix that the cache can still be cropped to
        self._capacity = 0  # tokens for which a static cache has room
        # By length of the prefix: `(cached rows, vocab_size)` for each of those that are asked for.
        self._logits: dict[int, tuple[torch.Tensor, ...]] = {}

    def _maker(self) -> tuple:
        """What may change between calls without a step of training."""
        return self.network.dtype, self.network.device, str(getattr(self.network, "active_adapters", None))

    def _new_pass(self) -> Pass:
        if self._of == "network":
            return Pass(self.network)
        base = bare_base(self.network).eval()
        return Pass(base) if self._of == "base" else MixedPass(base, [self.network, None])

    def __call__(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        """Logits for the token after each row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).
            attention_mask (`torch.LongTensor` of the same shape, *optional*): 0 at padding; all ones by default.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`, on the network's device.

        Raises:
            ContextLengthError: more tokens than the network can read.
        """
        return self.blocks(input_ids, attention_mask)[0]

    @torch.no_grad()
    def blocks(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """As a call, for each of those that were asked for."""
        if self._pass is None or self._made_by != self._maker():
            self.reset()
            self._pass, self._made_by = self._new_pass(), self._maker()
        rows = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, PAD)
        rows, copies = _distinct(rows.to(self.network.device))
        length = rows.shape[1]
        source, common = self._match(rows)
        if common == length and length in self._logits:
            return tuple(logits[source][copies] for logits in self._logits[length])
        try:
            kept = self._align(rows, source, min(common, length - 1))
            logits = self._forward(rows, kept)
        except BaseException:
            self.reset()  # the cache may be ahead of the rows
            raise
        is_one_row = self._rows is not None and len(self._rows) == len(rows) == 1
        earlier = {n: kept_logits for n, kept_logits in self._logits.items() if is_one_row and n <= kept}
        self._logits = dict(list(earlier.items())[1 - REMEMBERED :]) | {length: logits}
        self._rows = rows
        return tuple(block[copies] for block in logits)

    def _match(self, rows) -> tuple[torch.LongTensor | None, int]:
        """For each row the cached row with the longest common prefix, and the length that all of them share."""
        if self._rows is None:
            return None, 0
        length = min(rows.shape[1], self._rows.shape[1])
        differ = rows[:, None, :length] != self._rows[None, :, :length]
        first_difference = torch.where(differ.any(-1), differ.byte().argmax(-1), length)
        common, source = first_difference.max(1)
        return source, int(common.min())

    def _align(self, rows, source, common: int) -> int:
        """Bring the cache to the first `common` tokens of the rows, or drop it; returns how many it now holds."""
        cached = 0 if self._cache is None else self._rows.shape[1]
        surplus = cached - common
        is_reusable = common > 0 and self._cache is not None and common >= self._oldest
        if self._is_recurrent:
            is_reusable = is_reusable and surplus == 0 and rows.shape[1] == common + 1
        elif isinstance(self._cache, StaticCache):
            is_reusable = (
                is_reusable
                and rows.shape[1] <= self._capacity
                and len(rows) == len(self._rows)
                and (surplus == 0 or not self._forgets)
            )
        elif surplus > 0:
            is_reusable = (
                is_reusable and (RECORDS_PAST or not self._forgets) and getattr(self._cache, "is_croppable", True)
            )
        if not is_reusable:
            self.reset()
            return 0
        if surplus > 0 and isinstance(self._cache, StaticCache):
            for layer in self._cache.layers:
                layer.cumulative_length.sub_(surplus)  # what lies behind is masked, and overwritten
        elif surplus > 0:
            self._cache.crop(-surplus)
            if self._forgets:
                self._oldest = common
        if not (
            len(source) == len(self._rows) and torch.equal(source, torch.arange(len(source), device=source.device))
        ):
            blocks = range(len(self._pass.blocks))
            self._cache.reorder_cache(torch.cat([source + block * len(self._rows) for block in blocks]))
        return common

    @property
    def _forgets(self) -> bool:
        """Whether a cropped cache lacks what lies further back, as windows and convolutions do."""
        return any(type(layer) not in (DynamicLayer, StaticLayer) for layer in self._cache.layers)

    def _forward(self, rows, kept: int) -> tuple[torch.Tensor, ...]:
        mask = rows != PAD
        length = int(mask.sum(1).max())
        check_length(length, self._limit)
        new = rows[:, kept:]
        kwargs = {"input_ids": new.clamp(min=0), "use_cache": self._cache_name is not None, "logits_to_keep": 1}
        if not bool(mask.all()):
            if not self._takes_padding:
                raise UnsupportedError(
                    f"{type(unwrap_adapter(self.network)).__name__} does not tell padding from text.",
                    expected="rows without padding",
                    found=f"{int((~mask).sum())} masked positions",
                    remedy="generate for one prompt at a time, or for prompts of equal length",
                )
            kwargs["attention_mask"] = mask.long()
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, kept:]
        if self._compile_config is not None and self._cache is None:
            self._capacity = ROOM * (1 + rows.shape[1] // ROOM)
            self._cache = StaticCache(config=self._config, max_cache_len=self._capacity)
        elif self._cache_name is not None and self._cache is None:
            self._cache = DynamicCache(config=self._config)
            if RECORDS_PAST and not self._is_recurrent:
                self._cache.activate_past_recording()
        if self._cache is not None:
            kwargs[self._cache_name] = self._cache
            if kept and all(self._cache.is_linear):
                kwargs.pop("attention_mask", None)  # padding lies behind the state
        is_training = self.network.training
        if is_training:
            self.network.eval()
        try:
            output = self._pass(**kwargs) if self._compile_config is None else self._static_step(rows, kept, kwargs)
        finally:
            if is_training:
                self.network.train()
        returned = getattr(output, self._cache_name or "", None)
        self._cache = returned if isinstance(returned, Cache) else None
        self.tokens_computed += new.numel()
        # A compiled step may write its next output into the same memory.
        return self._pass.split(output.logits[:, -1].clone())

    def _static_step(self, rows, kept: int, kwargs: dict):
        """The mask and positions of a static cache are made outside of what is compiled."""
        model = self._pass.model
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(kept, rows.shape[1], device=rows.device).expand(len(rows), -1)
        inputs = model.prepare_inputs_for_generation(
            rows.clamp(min=0),
            next_sequence_length=rows.shape[1] - kept,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=positions,
            use_cache=True,
            **{CACHE: self._cache},
        )
        is_step = rows.shape[1] == kept + 1 and kept > 0
        run = model.get_compiled_call(self._compile_config) if is_step else model
        return run(**self._pass.prepare(inputs), return_dict=True)


def _reset_in_training(reference: weakref.ref):
    """A pass in training mode says that the weights are about to change: what they gave before is not to be reused."""

    def hook(module, _):
        state = reference()
        if module.training and state is not None:
            state.reset()

    return hook


def _distinct(rows) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The different rows, and for each row its index among them."""
    if len(rows) == 1:
        return rows, torch.zeros(1, dtype=torch.long, device=rows.device)
    return torch.unique(rows, dim=0, return_inverse=True)
