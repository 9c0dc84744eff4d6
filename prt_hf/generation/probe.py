"""What a network does with padding and with a cache, found out by asking it.

Some networks count positions without looking at the mask or at the cache, some let padding into their state. No flag
tells them apart, so eight tokens are read in each way, once per network, and the logits compared.
"""

import weakref
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from ..errors import UnsupportedError
from ..passes import Pass, lock_of
from ..pretrained import context_length

LENGTH = 8  # of the text that is read, and of the padding before it
STEPS = 3
# Of the spread of the logits. Rounding in bfloat16 stays below; counting from another position is tens of percent.
TOLERANCE = 0.05


class Behaviour(NamedTuple):
    """
    Attributes:
        sees_padding: left padding changes nothing.
        steps: reading on from a cache gives what reading everything gives.
    """

    sees_padding: bool
    steps: bool


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, Behaviour]" = weakref.WeakKeyDictionary()


def behaviour_of(run: Pass) -> Behaviour:
    """Return what was found out of the network of a pass, by short passes of it at the first time."""
    model = run.model
    with lock_of(model):
        if model not in _KNOWN:
            is_training = model.training
            model.eval()
            try:
                _KNOWN[model] = _find_out(Pass(model))
            finally:
                model.train(is_training)
        return _KNOWN[model]


def check_padding(run: Pass) -> None:
    """Raises:
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
def _find_out(run: Pass) -> Behaviour:
    length = min(LENGTH, (context_length(run.model) or LENGTH * 2) // 2)
    apart = run.model.config.get_text_config().vocab_size // (length + 2)
    text = (torch.arange(1, length + 1, device=run.device) * apart)[None]
    with torch.autocast(run.device.type, enabled=False):
        expected = run(input_ids=text, use_cache=False).logits[0].float()
        return Behaviour(_sees_padding(run, text, expected), _steps(run, text, expected))


def _sees_padding(run: Pass, text: torch.LongTensor, expected: torch.Tensor) -> bool:
    if run.has_own_layers:  # which may divide texts into blocks that are longer than this one
        return False
    length = text.shape[1]
    positions = torch.arange(length, device=text.device)
    zeros = torch.zeros_like(text)
    output = run(
        input_ids=torch.cat([zeros, text], 1),
        attention_mask=torch.cat([zeros, torch.ones_like(text)], 1),
        position_ids=torch.cat([zeros[0], positions])[None],
        use_cache=False,
    )
    return _is_same(output.logits[0, length:], expected)


def _steps(run: Pass, text: torch.LongTensor, expected: torch.Tensor) -> bool:
    if run.cache_name is None:
        return False
    length = text.shape[1]
    cache, logits = DynamicCache(config=run.model.config), []
    try:
        for start, end in [(0, length - STEPS), *((length - left, length - left + 1) for left in range(STEPS, 0, -1))]:
            positions = torch.arange(start, end, device=text.device)[None]
            inputs = {"input_ids": text[:, start:end], "position_ids": positions, "use_cache": True}
            output = run(**inputs, **{run.cache_name: cache})
            cache = output[run.cache_name]
            logits.append(output.logits[0, -1])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # as unlike as the caches that networks want instead
        return False
    return _is_same(torch.stack(logits[1:]), expected[-STEPS:])


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """At most tokens: rounding alone may send a single one to another expert."""
    difference = (found.float() - expected).abs().amax(-1) / expected.std(-1)
    return bool(difference.median() <= TOLERANCE)
