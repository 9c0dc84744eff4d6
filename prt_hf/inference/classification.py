"""Text and image classifiers with rewards."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..contract import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
from ..networks.pixels import PIXELS, PRTImageProcessor, missing_pixels, split_inputs
from .prt_model import PRTPreTrainedModel


class PRTForSequenceClassification(PRTPreTrainedModel):
    """A text classifier with rewards.

    `logits` are log-probabilities over the backbone's labels, `(batch_size, num_labels)`; the rewards' labels are
    matched to them by name.
    """

    task = TEXT_CLASSIFICATION
    main_input_name = "input_ids"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Return log-probabilities of the labels, and the loss if `labels` are given.

        `labels` are of shape `(batch_size,)`, in the backbone's order; hidden states and attentions are the backbone's.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return SequenceClassifierOutput(
            **self._classify(inputs, labels, output_hidden_states, output_attentions, kwargs)
        )

    def _classify(
        self,
        inputs: dict,
        labels: torch.LongTensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        kwargs: dict,
        reward_inputs: Sequence[dict] = (),
    ) -> dict:
        """Return the entries of the output."""
        num_items = kwargs.pop("num_items_in_batch", None)
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        inputs, asked = ({k: v for k, v in given.items() if v is not None} for given in (inputs | kwargs, asked))
        logits, beside = self._run(inputs, asked, reward_inputs=reward_inputs)
        log_probs = self._combine(logits)
        loss = None
        if labels is not None:
            reduction = "mean" if num_items is None else "sum"
            loss = nn.functional.nll_loss(log_probs, labels.to(log_probs.device), reduction=reduction)
            loss = loss if num_items is None else loss / num_items
        return {"loss": loss, "logits": log_probs} | beside


class PRTForImageClassification(PRTForSequenceClassification):
    """An image classifier with rewards.

    `logits` are log-probabilities over the backbone's labels, `(batch_size, num_labels)`; the rewards' labels are
    matched to them by name. If a reward needs other pixels than the backbone (another size, another normalisation),
    `processing_class` makes both: `pipeline("image-classification", model=model,
    image_processor=model.processing_class)`.
    """

    task = IMAGE_CLASSIFICATION
    main_input_name = "pixel_values"

    @property
    def _joint(self) -> PRTImageProcessor | None:
        """The processor that makes the pixels of several networks, where they want different ones."""
        return self.processing_class if isinstance(self.processing_class, PRTImageProcessor) else None

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Return log-probabilities of the labels, and the loss if `labels` are given.

        `labels` are of shape `(batch_size,)`, in the backbone's order; hidden states and attentions are the backbone's.
        `pixel_values` are for the backbone, and for all rewards with the same preprocessing; `reward_0_pixel_values`
        are for the first reward alone, and so on. A plain `Trainer` needs `remove_unused_columns=False` to pass those.

        Raises:
            UnsupportedError: a reward needs other pixels than the backbone, and they are missing.
        """
        kwargs, reward_inputs = split_inputs(kwargs, "reward", len(self.rewards))
        for index, own in enumerate(reward_inputs):
            theirs = None if self._joint is None else self._joint.others.get(f"reward_{index}")
            if theirs is not None and PIXELS not in own:
                remedy = "`model.processing_class(images, return_tensors='pt')` makes both"
                raise missing_pixels("reward", index, self._joint.main, theirs, remedy)
        inputs = {PIXELS: pixel_values}
        return ImageClassifierOutput(
            **self._classify(inputs, labels, output_hidden_states, output_attentions, kwargs, reward_inputs)
        )
