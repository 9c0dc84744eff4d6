"""What fine-tuning added to a model's logits, cached by content."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..networks.adapters import check_not_merged, is_plain, wrapped_layers
from ..networks.anatomy import unwrap_adapter
from ..networks.mixed_pass import can_mix, lock_of
from .state import RewardState


class DifferenceState:
    """log pi_ft - log pi_pt of the next token, up to a constant per context.

    Args:
        finetuned: pi_ft. Of a `PeftModel`, the adapter on and off are two rows of one pass where
            [`~prt_hf.networks.mixed_pass.can_mix`] says so, else two passes.
        pretrained (*optional*): pi_pt, by default the base of the `PeftModel`.
    """

    def __init__(self, finetuned: PeftModel | PreTrainedModel, pretrained: PreTrainedModel | None = None):
        self._finetuned, self._pretrained = finetuned, pretrained
        self._layers = list(wrapped_layers(finetuned.get_base_model())) if pretrained is None else []
        self._can_mix: bool | None = None  # not known before the adapter is seen switched on
        self._is_mixed: bool | None = None
        self._states: tuple[RewardState, ...] = ()

    def reset(self) -> None:
        for state in self._states:
            state.reset()

    def __call__(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        """`(batch_size, vocab_size)`, float32; without columns that pad one of the heads alone.

        Raises:
            UnsupportedError: the adapter was merged into its base.
            ContextLengthError: more tokens than a network can read.
        """
        tuned, base = self.blocks(input_ids, attention_mask)
        size = min(tuned.shape[-1], base.shape[-1])
        return tuned[:, :size].float() - base[:, :size].to(tuned.device).float()

    def blocks(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of pi_ft and of pi_pt."""
        with lock_of(unwrap_adapter(self._finetuned)):
            self._follow_the_adapter()
            if self._is_mixed:
                return self._states[0].blocks(input_ids, attention_mask)
            return tuple(state(input_ids, attention_mask) for state in self._states)

    def _follow_the_adapter(self) -> None:
        for _, layer in self._layers[:1]:  # adapters are switched as a whole
            check_not_merged(layer)
        is_on = bool(self._layers) and is_plain(self._layers[0][1])
        if is_on and self._can_mix is None:
            self._can_mix = can_mix(self._finetuned)
        is_mixed = is_on and self._can_mix
        if is_mixed == self._is_mixed:
            return
        self._is_mixed = is_mixed
        if is_mixed:
            self._states = (RewardState(self._finetuned, of="both"),)
        elif self._pretrained is None:
            self._states = (RewardState(self._finetuned), RewardState(self._finetuned, of="base"))
        else:
            self._states = (RewardState(self._finetuned), RewardState(self._pretrained))
