"""Test how a network treats padding and a cache.

Some networks count positions without looking at the mask or at the cache, some let padding into their state. No flag
tells them apart, so eight tokens are read in each way, once per network, and the logits compared.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..errors import UnsupportedError
from ..networks.anatomy import context_length
from ..networks.mixed_pass import Pass, evaluating

LENGTH, PADDING = 8, 5  # of the text that is read, and of the padding before it: no multiple of usual blocks
STEPS = 3
# Of the spread of the logits. Counting from another position is tens of percent in small random networks, and several
# spreads in SmolLM2-135M, whose logits in bfloat16 differ by up to 28 units of rounding between two right ways to read.
TOLERANCE, UNITS = 0.05, 64


class Behaviour(NamedTuple):
    """How a network reads padding and a cache.

    Attributes:
        sees_padding: left padding changes nothing.
        steps: reading on from a cache, token by token, gives the same logits as reading everything.
        rewinds: so does reading several tokens at once, after others were taken back.
        skips: masked positions between tokens change nothing.
    """

    sees_padding: bool
    steps: bool
    rewinds: bool
    skips: bool


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, Behaviour]" = weakref.WeakKeyDictionary()


def behaviour_of(run: Pass) -> Behaviour:
    """Return the behaviour of a pass's network, which the first call measures by a few short passes."""
    model = run.model
    if model not in _KNOWN:
        with evaluating(model):
            found = _find_out(Pass(model))
        if found is None:
            return Behaviour(sees_padding=True, steps=True, rewinds=True, skips=True)
        _KNOWN[model] = found
    return _KNOWN[model]


def check_padding(run: Pass) -> None:
    """Check that a network ignores padding.

    Raises:
        UnsupportedError: padding before a text changes the network's logits.
    """
    if not behaviour_of(run).sees_padding:
        raise UnsupportedError(
            f"{type(run.model).__name__} does not tell padding from text.",
            expected="rows without padding",
            found="masked positions before a text",
            remedy="generate for one prompt at a time, or for prompts of equal length",
        )


@torch.no_grad()
def _find_out(run: Pass) -> Behaviour | None:
    """Measure a network; None if all its logits are equal, as with a head of zeros, which no reading makes wrong."""
    length = min(LENGTH, context_length(run.model) or LENGTH)
    apart = run.model.config.get_text_config().vocab_size // (length + 2)
    text = (torch.arange(1, length + 1, device=run.device) * apart)[None]
    mask = torch.ones_like(text)
    dtype = next(value.dtype for value in run.model.parameters() if value.is_floating_point())
    tolerance = max(TOLERANCE, UNITS * torch.finfo(dtype).eps)
    padded, padded_mask = (nn.functional.pad(tensor, (PADDING, 0)) for tensor in (text, mask))
    with torch.autocast(run.device.type, enabled=False):
        expected = _read(run, text, mask)
        if not bool(expected.std(-1).any()):
            return None

        def is_same(last: int, read: Callable, *inputs) -> bool:
            """Compare most of the last tokens: rounding alone may send a single one to another expert."""
            try:
                found = read(run, *inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # networks that are called in another way raise errors of many kinds
                return False
            difference = (found[-last:] - expected[-last:]).abs().amax(-1) / expected[-last:].std(-1)
            return bool(difference.median() <= tolerance)

        steps = run.cache_name is not None and is_same(STEPS, _read_in_steps, text, mask)
        rewinds = steps and not run.has_own_layers and is_same(STEPS, _read_after_others, text)
        # Layers of a model's own may divide texts into blocks that are longer than this one.
        sees_padding = not run.has_own_layers and is_same(length, _read, padded, padded_mask)
        if sees_padding and steps:
            sees_padding = is_same(STEPS, _read_in_steps, padded, padded_mask)
        gap = torch.zeros_like(text[:, :PADDING])
        spaced, spaced_mask = (torch.cat([each[:, :-STEPS], gap, each[:, -STEPS:]], 1) for each in (text, mask))
        skips = sees_padding and rewinds and is_same(STEPS, _read_in_steps, spaced, spaced_mask)
    return Behaviour(sees_padding, steps, rewinds, skips)


def _read(
    run: Pass, rows: torch.LongTensor, mask: torch.LongTensor, start: int = 0, cache: Cache | None = None
) -> torch.Tensor:
    """Return the logits of one row from `start` on; the tokens before it are in the cache."""
    inputs = {"input_ids": rows[:, start:], "use_cache": cache is not None}
    is_padded = not bool(mask.all())
    if start or is_padded:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    if is_padded and not (start and all(cache.is_linear)):
        inputs["attention_mask"] = mask
    if cache is not None:
        inputs[run.cache_name] = cache
    return run(**inputs).logits[0].float()


def _read_in_steps(run: Pass, rows: torch.LongTensor, mask: torch.LongTensor) -> torch.Tensor:
    """Read the last tokens one by one."""
    cache, length = DynamicCache(config=run.model.config), rows.shape[1]
    starts = [0, *range(length - STEPS, length)]
    ends = [*starts[1:], length]
    return torch.cat(
        [_read(run, rows[:, :end], mask[:, :end], start, cache) for start, end in zip(starts, ends, strict=True)]
    )


def _read_after_others(run: Pass, rows: torch.LongTensor) -> torch.Tensor:
    """Read the last tokens at once, after others were read in their place and taken back.

    Raises:
        UnsupportedError: the cache has a recurrent state, which keeps what it has read. Some forget it so soon that
            the logits of a text this short hardly tell.
    """
    cache, mask = DynamicCache(config=run.model.config), torch.ones_like(rows)
    start = rows.shape[1] - STEPS
    cache.activate_past_recording()
    _read(run, rows[:, :start], mask[:, :start], 0, cache)
    others = torch.cat([rows[:, :start], rows[:, :STEPS]], 1)
    _read(run, others, mask, start, cache)
    if any(any(getattr(layer, "is_recurrent_states_initialized", {}).values()) for layer in cache.layers):
        raise UnsupportedError("A recurrent state cannot be cropped.")
    cache.crop(-STEPS)
    return _read(run, rows, mask, start, cache)
