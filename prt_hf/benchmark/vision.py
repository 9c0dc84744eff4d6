"""Time image classification, a batch at a time: bare backbone, PRT and EFT, in turn in one run."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from ..errors import PRTValueError
from ..evaluation.machine import time_in_turn
from ..functional import combine
from ..inference import PRTForImageClassification
from ..networks.adapters import bare_base
from ..networks.pixels import PIXELS, split_inputs
from ..reward.model import RewardModel

BARE = "bare"
PRT = "PRT"
EFT = "EFT"
REWARD = "reward by itself"
SOURCE = "source by itself"
ROWS = (BARE, PRT, EFT, REWARD, SOURCE)
# ViT-S/16 and ViT-B/16: the speed of a model depends on its shape only.
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
LARGE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
COMMON = {"image_size": 224, "patch_size": 16, "num_labels": 1000}


@dataclass
class VisionTimings:
    """Seconds of a batch, by row and round.

    Attributes:
        dtype: The precision of the models.
        images: The number of images in a batch.
        rows: Row -> seconds of each round.
    """

    dtype: str
    images: int
    rows: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ROWS})

    def seconds(self, row: str) -> float:
        """Return the seconds of the fastest round."""
        return min(self.rows[row])

    def speed(self, row: str) -> float:
        """Return images per second."""
        return self.images / self.seconds(row)

    def ratio(self, row: str, to: str = BARE) -> float:
        """Return the speed of a row over that of another."""
        return self.speed(row) / self.speed(to)

    @property
    def limit(self) -> float:
        """The best speed of PRT over that of the bare backbone: t_b / (t_b + t_r)."""
        return self.seconds(BARE) / (self.seconds(BARE) + self.seconds(REWARD))

    @property
    def eft_limit(self) -> float:
        """The best speed of EFT, which runs the source as well, over that of the bare backbone."""
        return self.seconds(BARE) / sum(map(self.seconds, (BARE, REWARD, SOURCE)))

    @property
    def figures(self) -> dict[str, float]:
        """The ratios that are reported."""
        return {"prt_of_limit": self.ratio(PRT) / self.limit, "prt_vs_eft": self.ratio(PRT, EFT)}


@torch.no_grad()
def time_vision(
    model: PRTForImageClassification,
    inputs: dict[str, torch.Tensor],
    *,
    rounds: int = 5,
    progress: Callable[[Iterable], Iterable] = iter,
) -> VisionTimings:
    """Time a batch with every row.

    Args:
        model: A PRT model with one reward. EFT uses the reward's network as the fine-tuned source, which has its shape.
        inputs: The pixels of backbone and reward, as `model.processing_class` makes them.
        rounds: The number of rounds.
        progress: Wraps the rounds.
    """
    if len(model.rewards) != 1 or rounds < 1:
        raise PRTValueError(
            "There is nothing to time.",
            expected="a PRT model with one reward, 1 round or more",
            found=f"{len(model.rewards)} rewards, {rounds} rounds",
        )
    model.eval()
    backbone, reward = model.backbone, model.rewards[0]
    is_adapter = reward.config.is_adapter
    source = bare_base(reward.network) if is_adapter else copy.deepcopy(reward.network)
    inputs = {name: pixels.to(backbone.device, backbone.dtype) for name, pixels in inputs.items()}
    backbone_inputs, (own,) = split_inputs(inputs, "reward", 1)
    reward_inputs = backbone_inputs | own
    columns = model.matches[0].columns_on(backbone.device)

    def eft() -> torch.Tensor:
        """Return log pi_pt + log pi_ft_old - log pi_pt_old."""
        tuned, pretrained = (
            network(**reward_inputs).logits.float().log_softmax(-1) for network in (reward.network, source)
        )
        return combine(backbone(**backbone_inputs).logits, tuned - pretrained, columns=columns)

    ways = {
        BARE: lambda: backbone(**backbone_inputs),
        PRT: lambda: model(**inputs),
        EFT: eft,
        REWARD: lambda: reward.network(**reward_inputs),
        SOURCE: lambda: source(**reward_inputs),
    }
    rows = time_in_turn(ways, rounds, backbone, progress)
    return VisionTimings(str(backbone.dtype).removeprefix("torch."), len(inputs[PIXELS]), rows)


def random_model(seed: int) -> PRTForImageClassification:
    """Return a random reward of ViT-S/16's shape on a random ViT-B/16; 1000 labels, 224 x 224 pixels."""
    torch.manual_seed(seed)
    backbone, base = (ViTForImageClassification(ViTConfig(**COMMON | size)).eval() for size in (LARGE, SMALL))
    return PRTForImageClassification.from_parts(backbone, [RewardModel.from_base(base)])


def pixels_for(model: PRTForImageClassification, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Return the pixels of random images, in the sizes of backbone and reward; their values do not matter."""
    generator = np.random.default_rng(seed)
    if model.processing_class is not None:
        images = [Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(count)]
        return dict(model.processing_class(images, return_tensors="pt"))
    config = model.backbone.config
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise PRTValueError(
            "The size of the backbone's images is unknown.",
            expected="an image processor beside its weights, or `image_size` in its configuration",
            found=repr(size),
        )
    return {PIXELS: torch.from_numpy(generator.standard_normal((count, config.num_channels, size, size))).float()}
