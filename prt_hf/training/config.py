"""`PRTConfig`: `TrainingArguments` plus the coefficients of Portable Reward Tuning."""

import os
from dataclasses import dataclass, field

from huggingface_hub.constants import HF_HOME
from transformers import TrainingArguments

from ..errors import PRTValueError
from ..reward.adapter import REWARD_INITS

FUSED_LOSSES = ("auto", "always", "never")


@dataclass
class PRTConfig(TrainingArguments):
    """Arguments of [`PRTTrainer`], in addition to those of [`~transformers.TrainingArguments`].

    Args:
        kl_coef (`float`, defaults to 1): lambda of Eq. 5. The paper keeps 1, because a reward learns its own scale.
        entropy_coef (`float`, defaults to 0): alpha of Eq. 12; the paper tries 1e-5 ... 1e-1.
        reward_init (`str`, defaults to `"pretrained"`): start of a new reward. `"pretrained"`: the base's logits, as in
            the paper. `"zero"`: r = 0 with an output layer of its own, so that tuning starts at the backbone's loss.
        fused_loss (`str`, defaults to `"auto"`): whether the full logits of language models are avoided. `"auto"`: if
            all models' logits are their last hidden states times their heads. `"always"`: raise an error if this is
            impossible. `"never"`.
        precompute_backbone (`bool`, defaults to `False`): run the backbone once over every data set, and store its
            states at the supervised positions. Epochs and later runs read them and load no backbone. Worth it from two
            epochs on; impossible for data sets with augmentation.
        backbone_cache_dir (`str`, *optional*): folder for these states; by default `prt_hf` beside the Hub's cache.

    Raises:
        PRTValueError: a value is outside its range.
    """

    _argument_group_name = "training"  # heading in the help of `prt-hf train`

    kl_coef: float = field(default=1.0, metadata={"help": "Weight lambda of KL(pi || pi_pt), Eq. 5 of the paper."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight alpha of entropy maximisation, Eq. 12."})
    reward_init: str = field(
        default="pretrained",
        metadata={"help": "Start of a new reward: the base's logits, or zero.", "choices": list(REWARD_INITS)},
    )
    fused_loss: str = field(
        default="auto",
        metadata={"help": "Whether the full logits of language models are avoided.", "choices": list(FUSED_LOSSES)},
    )
    precompute_backbone: bool = field(
        default=False, metadata={"help": "Run the backbone once over every data set, and store its states on disk."}
    )
    backbone_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for these states; by default beside the Hub's cache."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.backbone_cache_dir is None:
            self.backbone_cache_dir = os.path.join(HF_HOME, "prt_hf")
        for name, value, expected, is_valid in (
            ("kl_coef", self.kl_coef, "a positive number", self.kl_coef > 0),
            ("entropy_coef", self.entropy_coef, "0 or a positive number", self.entropy_coef >= 0),
            ("reward_init", self.reward_init, " or ".join(REWARD_INITS), self.reward_init in REWARD_INITS),
            ("fused_loss", self.fused_loss, " or ".join(FUSED_LOSSES), self.fused_loss in FUSED_LOSSES),
            ("label_smoothing_factor", self.label_smoothing_factor, "0", self.label_smoothing_factor == 0),
        ):
            if not is_valid:
                raise PRTValueError(f"`{name}` is not usable in reward tuning.", expected=expected, found=repr(value))
        if self.label_names is None:
            self.label_names = ["labels"]
