"""Next-token logits of the terms of a reward, cached by content, in as few passes as possible."""

import torch
from peft import PeftModel
from torch import nn
from transformers import CompileConfig

from ..networks.adapters import adapted_layers, check_not_merged, is_plain
from ..networks.anatomy import unwrap_adapter
from ..networks.mixed_pass import can_mix, lock_of
from .passes import base_key
from .state import RewardState


class TermStates:
    """Next-token logits of one network, or of two whose difference is the reward.

    While its adapter is switched on, a `PeftModel` and its own base are two rows of one pass where
    [`~prt_hf.networks.mixed_pass.can_mix`] allows it. Other networks have a pass each.

    Args:
        networks: the first may be a `PeftModel`, and the second its base.
        compile_config (`CompileConfig`, *optional*): compile the step of the first, where it has a pass of its own.
    """

    def __init__(self, *networks: nn.Module, compile_config: CompileConfig | None = None):
        self.networks = networks
        self._compile_config = compile_config
        self._witness: nn.Module | None = None  # adapters are switched as a whole: one layer shows how
        network, *others = networks
        if isinstance(network, PeftModel) and any(base_key(each) == base_key(network) for each in others):
            self._witness = next((layer for _, layer in adapted_layers(network)), None)
        self._can_mix: bool | None = None  # not known before the adapter is seen switched on
        self._is_mixed: bool | None = None
        self._states: tuple[RewardState, ...] = ()
        self._follow_the_adapter()

    def reset(self) -> None:
        """Free the caches."""
        for state in self._states:
            state.reset()

    def __call__(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None, wanted: slice = slice(None)
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits of the wanted networks, `(batch_size, vocab_size)` each, as [`RewardState`] gives them.

        Raises:
            UnsupportedError: the adapter was merged into its base.
            ContextLengthError: more tokens than a network can read.
        """
        with lock_of(unwrap_adapter(self.networks[0])):
            self._follow_the_adapter()
            if self._is_mixed:
                return self._states[0].blocks(input_ids, attention_mask)[wanted]
            return tuple(state(input_ids, attention_mask) for state in self._states[wanted])

    def _follow_the_adapter(self) -> None:
        """Choose the states: one for both networks while the adapter is switched on, else one for each."""
        network, *others = self.networks
        is_on = False
        if self._witness is not None:
            check_not_merged(self._witness)
            is_on = is_plain(self._witness)
        if is_on and self._can_mix is None:
            self._can_mix = can_mix(network)
        is_mixed = bool(is_on and self._can_mix)
        if is_mixed == self._is_mixed:
            return
        self._is_mixed = is_mixed
        if is_mixed:
            self._states = (RewardState(network, of="both"),)
            return
        first = RewardState(network, compile_config=self._compile_config)
        # A base that is read off its adapter follows it to other devices.
        has_own_base = self._witness is not None
        self._states = (first, *(RewardState(network, of="base") if has_own_base else RewardState(o) for o in others))
