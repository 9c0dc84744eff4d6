"""`PRTConfig`: `TrainingArguments` plus the coefficients of Portable Reward Tuning."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .errors import PRTValueError
from .reward_model import REWARD_INITS


@dataclass
class PRTConfig(TrainingArguments):
    """Arguments of [`PRTTrainer`]; all of [`~transformers.TrainingArguments`] are there too.

    Args:
        kl_coef (`float`, defaults to 1): lambda of Eq. 5. The paper keeps 1, because a reward learns its own scale.
        entropy_coef (`float`, defaults to 0): alpha of Eq. 12; the paper tries 1e-5 ... 1e-1.
        reward_init (`str`, defaults to `"pretrained"`): where a new reward starts. `"pretrained"`: as the base's
            logits, as in the paper. `"zero"`: r = 0 with an output layer of its own, so that tuning starts at the
            backbone's loss.
    """

    kl_coef: float = field(default=1.0, metadata={"help": "Weight lambda of KL(pi || pi_pt), Eq. 5 of the paper."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight alpha of entropy maximisation, Eq. 12."})
    reward_init: str = field(
        default="pretrained",
        metadata={"help": "Start of a new reward: the base's logits, or zero.", "choices": list(REWARD_INITS)},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, value, expected, is_valid in (
            ("kl_coef", self.kl_coef, "a number above 0", self.kl_coef > 0),
            ("entropy_coef", self.entropy_coef, "0 or a number above it", self.entropy_coef >= 0),
            ("reward_init", self.reward_init, " or ".join(REWARD_INITS), self.reward_init in REWARD_INITS),
            ("label_smoothing_factor", self.label_smoothing_factor, "0", self.label_smoothing_factor == 0),
        ):
            if not is_valid:
                raise PRTValueError(f"`{name}` is not usable in reward tuning.", expected=expected, found=repr(value))
        if self.label_names is None:
            self.label_names = ["labels"]
