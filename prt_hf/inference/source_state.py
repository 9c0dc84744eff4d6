"""Logits of a tuned and an untuned source model inside of texts that branch, grow unevenly and are taken back.

A backbone's next token may be several of the source's tokens, or change its last ones. So rows differ in length from
step to step, and what was read of a row may be taken back. The caches have a slot for each token of each row; slots
without a token are masked.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..errors import UnsupportedError
from ..networks.anatomy import check_length, context_length, unwrap_adapter
from ..networks.mixed_pass import Pass, evaluating
from .passes import Part, fewest_passes, separate_passes
from .probe import behaviour_of, check_padding
from .state import ResetInTraining, switching_length
from .versions import Versions

Path = list[int]  # token ids of a text
_SPARE = 64  # slots without a token
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # what configurations call them


class _Plan(NamedTuple):
    """The row that a path is read on from, and the number of its first tokens that need not be read again."""

    row: int = 0
    kept: int = 0


@dataclass
class _Memory:
    """Rows that have been read.

    Attributes:
        paths: token ids of each row.
        slots (`torch.BoolTensor` of shape `(rows, slots)`): whether a slot of the caches holds a token of the row.
        caches: one for each pass.
        logits: `(2, tokens, vocab_size)` for each row, after the last of its tokens.
    """

    paths: list[Path] = field(default_factory=list)
    slots: torch.Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))
    caches: list[Cache] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def plan(self, path: Path, wanted: int) -> _Plan:
        """Return how to read a path, after whose last `wanted` tokens logits have to be known."""
        first = max(0, len(path) - wanted)
        best = _Plan()
        for row, (other, logits) in enumerate(zip(self.paths, self.logits, strict=True)):
            kept = _common_length(path, other)
            if first < len(other) - logits.shape[1]:  # the logits there have been forgotten
                kept = min(kept, first)
            if kept > best.kept:
                best = _Plan(row, kept)
        return best

    def known(self, plan: _Plan, first: int) -> torch.Tensor:
        """Return the logits from position `first` on that need not be computed again."""
        logits = self.logits[plan.row]
        oldest = len(self.paths[plan.row]) - logits.shape[1]
        return logits[:, max(0, first - oldest) : max(0, plan.kept - oldest)]


class SourceState:
    """Logits of a network and of the pretrained model that it was tuned from, cached by content.

    Args:
        tuned: the reward's network, or a fine-tuned model.
        untuned: the source backbone; both are rows of one pass if `tuned` is a plain LoRA on it.
        size: number of tokens, without columns that pad a head.

    Raises:
        UnsupportedError: a network that cannot take back what it has read, such as a recurrent one.
    """

    def __init__(self, tuned: nn.Module, untuned: nn.Module, size: int):
        self._networks = networks = tuned.eval(), untuned.eval()
        parts = [Part(Pass(tuned), slice(size)), Part(Pass(untuned), slice(size), is_frozen=True)]
        self._size, self._mixed, self._separate = size, fewest_passes(parts), separate_passes(parts)
        self._behaviours = [behaviour_of(part.run) for part in parts]
        if not all(each.steps and each.rewinds for each in self._behaviours):
            raise UnsupportedError(
                f"{' or '.join({type(part.run.model).__name__ for part in parts})} cannot take back what it has read.",
                expected="source networks with a cache of attention alone",
                found="a recurrent state, or a cache of the model's own kind",
                remedy="such a reward works within its own vocabulary only",
            )
        configs = [unwrap_adapter(network).config for network in networks]
        limits = [*map(context_length, networks), *map(switching_length, configs)]
        self._limit = min((limit for limit in limits if limit), default=None)
        windows = [getattr(config.get_text_config(), name, None) for config in configs for name in _WINDOWS]
        self._window = min((window for window in windows if window), default=None)
        self._versions = [Versions(network) for network in networks]
        self.tokens_computed = 0  # over all calls, for tests and benchmarks
        self.reset()
        for network in networks:
            hook = unwrap_adapter(network).base_model.register_forward_pre_hook(ResetInTraining(self))
            weakref.finalize(self, hook.remove)

    def reset(self) -> None:
        """Forget all rows, and free the caches."""
        self._memory, self._seen = _Memory(), None

    def read(self, paths: Sequence[Path], wanted: int) -> list[torch.Tensor]:
        """Read texts, and remember them in the place of those before.

        Args:
            paths: token ids of each text, at least one.
            wanted: number of tokens at the end of each after which logits are returned.

        Returns:
            list of `torch.FloatTensor` of shape `(2, min(wanted, length), vocab_size)`: of `tuned` and `untuned`.

        Raises:
            ContextLengthError: a text is longer than a network can read.
            UnsupportedError: texts of several lengths, for a network that takes padding for text.
        """
        return self._logits(paths, wanted, is_remembered=True)

    def peek(self, paths: Sequence[Path], wanted: int) -> list[torch.Tensor]:
        """Return logits as [`read`] does, without remembering the texts, which branch off those that were read."""
        return self._logits(paths, wanted, is_remembered=False)

    @torch.no_grad()
    def _logits(self, paths: Sequence[Path], wanted: int, is_remembered: bool) -> list[torch.Tensor]:
        tuned, untuned = self._networks
        with evaluating(tuned), evaluating(untuned):
            self._follow_the_networks()
            distinct = list({tuple(path): path for path in paths}.values())
            check_length(max(map(len, distinct)), self._limit)
            old = self._memory
            plans = [old.plan(path, wanted) for path in distinct]
            found = {
                tuple(path): old.known(plan, max(0, len(path) - wanted))
                for path, plan in zip(distinct, plans, strict=True)
                if plan.kept == len(path) and not is_remembered
            }
            unread = [index for index, path in enumerate(distinct) if tuple(path) not in found]
            if unread:
                new = self._extended([distinct[index] for index in unread], [plans[index] for index in unread], wanted)
                found |= zip(map(tuple, new.paths), new.logits, strict=True)
                self._memory = new if is_remembered else old
            return [found[tuple(path)] for path in paths]

    def _follow_the_networks(self) -> None:
        """Forget all rows if the networks or the precision of the calls have changed."""
        kind = self._networks[1].device.type
        precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_inference_mode_enabled()
        is_mixed = all(each.is_current for each in self._mixed)
        seen = [precision, is_mixed, *(versions() for versions in self._versions)]
        if seen != self._seen:
            self.reset()
            self._seen, self._passes = seen, self._mixed if is_mixed else self._separate

    def _extended(self, paths: list[Path], plans: list[_Plan], wanted: int) -> _Memory:
        """Return a memory of these rows that shares what it can with the present one."""
        old = self._memory
        tokens, slots = self._slots(paths, plans)
        if self._has_wrong_gaps(slots, max(map(len, paths))):
            plans = [_Plan() for _ in paths]
            tokens, slots = self._slots(paths, plans)
        caches = self._caches([plan.row for plan in plans], slots.shape[1] - tokens.shape[1])
        new = self._forward(tokens, slots, caches, wanted) if tokens.shape[1] else None
        logits = []
        for row, (path, plan) in enumerate(zip(paths, plans, strict=True)):
            count = min(len(path) - plan.kept, wanted)
            parts = [old.known(plan, max(0, len(path) - wanted))] if plan.kept else []
            parts += [new[:, row, new.shape[2] - count :]] if count else []
            logits.append(torch.cat(parts, 1))
        return _Memory(paths, slots, caches, logits)

    def _slots(self, paths: list[Path], plans: list[_Plan]) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Return the tokens that have to be read, at the right, and all slots when they are."""
        kept = torch.tensor([plan.kept for plan in plans])
        slots = self._memory.slots[[plan.row for plan in plans]] if bool(kept.any()) else torch.ones(len(plans), 0) > 0
        slots = slots & (slots.cumsum(1) <= kept[:, None])
        used = slots.any(0).nonzero()
        slots = slots[:, : int(used[-1]) + 1 if len(used) else 0]
        new = [path[plan.kept :] for path, plan in zip(paths, plans, strict=True)]
        width = max(map(len, new))
        padded = [[0] * (width - len(each)) + each for each in new]
        tokens = torch.tensor(padded, dtype=torch.long).view(len(new), width)  # there may be none
        is_new = torch.arange(width) >= torch.tensor([width - len(each) for each in new])[:, None]
        return tokens, torch.cat([slots, is_new], 1)

    def _has_wrong_gaps(self, slots: torch.Tensor, longest: int) -> bool:
        """Return whether slots inside of a row are empty, where that is wrong or a waste."""
        if not bool((~slots & (slots.cumsum(1) > 0)).any()):
            return False
        # Windows count slots.
        is_wrong = not all(each.skips for each in self._behaviours) or slots.shape[1] > (self._window or torch.inf)
        return is_wrong or slots.shape[1] > 2 * longest + _SPARE

    def _caches(self, rows: list[int], length: int) -> list[Cache]:
        """Return caches of the first `length` slots of these rows; those that are remembered stay as they are."""
        old = self._memory
        if not length:
            # Windows keep all tokens, so that any number can be taken back; their masks hide the earlier ones.
            return [DynamicCache() for _ in self._passes]
        is_in_order = rows == list(range(len(old.paths)))
        caches = []
        for (run, _), cache in zip(self._passes, old.caches, strict=True):
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            if length < old.slots.shape[1]:
                cache.crop(length - old.slots.shape[1])
            if not is_in_order:
                blocks = range(len(run.blocks))
                cache.reorder_cache(torch.tensor([row + block * len(old.paths) for block in blocks for row in rows]))
            caches.append(cache)
        return caches

    def _forward(
        self, tokens: torch.LongTensor, slots: torch.BoolTensor, caches: list[Cache], wanted: int
    ) -> torch.Tensor:
        """Read tokens, and return the logits at the last of them, `(2, rows, n, vocab_size)`."""
        width = tokens.shape[1]
        inputs = {
            "input_ids": tokens,
            "position_ids": (slots.cumsum(1) - 1).clamp(min=0)[:, -width:],
            "use_cache": True,
            "logits_to_keep": min(width, wanted),
        }
        if not bool(slots.all()):
            inputs["attention_mask"] = slots.long()
        blocks: list[torch.Tensor] = []
        for (run, _), cache in zip(self._passes, caches, strict=True):
            if "attention_mask" in inputs:
                check_padding(run)
            output = run(**inputs, **{run.cache_name: cache})
            blocks += run.split(output.logits[:, -min(width, wanted) :, : self._size])
        self.tokens_computed += int(slots[:, -width:].sum())
        return torch.stack([block.to(blocks[0].device) for block in blocks])


def _common_length(one: Path, other: Path) -> int:
    """Return the number of first tokens that two texts share."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # one[:low] is shared, one[:high] is not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
