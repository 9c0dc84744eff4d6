"""`PRTSFTTrainer`: text data as in TRL's `SFTTrainer`, with PRT's objective."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from ..errors import PRTValueError
from ..networks.anatomy import unwrap_adapter
from ..networks.mixed_pass import replaced_forwards
from .config import PRTConfig
from .trainer import PRTTrainer


@dataclass
class PRTSFTConfig(SFTConfig, PRTConfig):
    """Arguments of [`PRTSFTTrainer`]: those of [`~trl.SFTConfig`], with its defaults, and of [`PRTConfig`].

    `bf16` is by default what the machine can do; TRL's default fails without a GPU.
    """

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.loss_type != "nll":
            raise PRTValueError(
                "`loss_type` is not usable in reward tuning.", expected="'nll', of the PRT model", found=self.loss_type
            )
        if self.chat_template_path is not None and not self.chat_template_path.endswith((".jinja", ".j2")):
            raise PRTValueError(
                "Another model's chat template may add tokens, but a reward keeps its base's vocabulary.",
                expected="`chat_template_path` a .jinja or .j2 file",
                found=self.chat_template_path,
                remedy="set `tokenizer.chat_template`, or save the template to a file",
            )


class SFTData(SFTTrainer):
    """TRL's trainer without its own fused head, which would ignore an adapter of the head."""

    def __init__(self, model: nn.Module, *args, **kwargs):
        base = unwrap_adapter(model)
        with replaced_forwards([(base, base.forward)]), _head_shown_bare(model):
            super().__init__(model, *args, **kwargs)


class PRTSFTTrainer(PRTTrainer, SFTData):
    """[`PRTTrainer`] for the data sets that [`~trl.SFTTrainer`] takes.

    These are text, prompt and completion, or messages. TRL tokenizes them, with chat templates, completion-only and
    assistant-only loss, truncation, packing, and padding-free batches.

    Args:
        args ([`PRTSFTConfig`], *optional*): takes the place of a `PRTConfig`.
        formatting_func: TRL's.
        kwargs: [`PRTTrainer`]'s other arguments.
    """

    config_class = PRTSFTConfig

    def _default_collator(self, train_dataset, eval_dataset) -> None:
        """Return None: TRL makes a collator that fits its packing."""


@contextmanager
def _head_shown_bare(model: nn.Module) -> Iterator[None]:
    """Hide an adapter of the head from TRL, which refuses it because its own loss could not train it."""
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings
