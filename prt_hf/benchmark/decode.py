"""Time decoding: bare backbone, PRT, PRT with speculation and EFT, in turn in one run.

Every round times every row on every prompt. Figures use the fastest round of each prompt, because other programs only
ever add time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PRTValueError
from ..evaluation.machine import now
from ..inference import EFTLogitsProcessor, PRTForCausalLM
from ..networks.anatomy import CACHE
from ..reward.adapter import default_peft_config
from ..reward.model import RewardModel

BARE = "bare"
SEQUENTIAL = "PRT"
SPECULATIVE = "PRT, speculative"
EFT = "EFT"
ASSISTED = "bare, assisted"
SAME_BASE = "PRT, reward on the backbone's own weights"
ROWS = (BARE, SEQUENTIAL, SPECULATIVE, EFT, ASSISTED, SAME_BASE)
NETWORKS = ("backbone", "reward", "source")


@dataclass
class DecodeTimings:
    """Seconds, by prompt and round.

    Attributes:
        dtype: The precision of the models.
        tokens: The number of new tokens after each prompt.
        rows: The seconds of decoding, by row.
        forwards: The seconds of a forward pass of one token with a cache, by network, in turn as in decoding.
        is_same_text: Whether speculation gave exactly the tokens of sequential PRT.
        acceptance: Accepted drafts / drafts.
    """

    dtype: str
    tokens: int
    rows: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in ROWS})
    forwards: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in NETWORKS})
    is_same_text: bool = True
    acceptance: float = 0.0

    def forward_seconds(self, network: str) -> float:
        """Return the mean over prompts of the fastest round's forward pass."""
        return _fastest(self.forwards[network]) / len(self.forwards[network])

    @property
    def c(self) -> float:
        """The time of the reward over that of the backbone, t_reward / t_backbone."""
        return self.forward_seconds("reward") / self.forward_seconds("backbone")

    @property
    def limit(self) -> float:
        """The best speed of sequential PRT over that of the bare backbone: 1 / (1 + c)."""
        return 1 / (1 + self.c)

    @property
    def eft_limit(self) -> float:
        """The best speed of PRT over that of EFT, which runs the source backbone as well.

        This is (1 + 2c) / (1 + c) if the source costs as much as the reward.
        """
        backbone, reward, source = map(self.forward_seconds, NETWORKS)
        return (backbone + reward + source) / (backbone + reward)

    def speed(self, row: str) -> float:
        """Return tokens per second."""
        return self.tokens * len(self.rows[row]) / _fastest(self.rows[row])

    def ratio(self, row: str, to: str = BARE) -> float:
        """Return the speed of a row over that of another."""
        return self.speed(row) / self.speed(to)

    @property
    def figures(self) -> dict[str, float]:
        """The ratios that are reported."""
        return {
            "sequential_of_limit": self.ratio(SEQUENTIAL) / self.limit,
            "vs_eft_of_limit": self.ratio(SEQUENTIAL, EFT) / self.eft_limit,
            "speculative_vs_sequential": self.ratio(SPECULATIVE, SEQUENTIAL),
            "speculative_vs_bare": self.ratio(SPECULATIVE),
            "same_base_vs_bare": self.ratio(SAME_BASE),
        }


@torch.no_grad()
def time_decoding(
    backbone: PreTrainedModel,
    source: PreTrainedModel,
    reward: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[torch.LongTensor],
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: Callable[[Iterable], Iterable] = iter,
) -> DecodeTimings:
    """Time greedy decoding of `prompts`, one at a time, with every row.

    Args:
        backbone: The backbone; all models have its precision and device.
        source: pi_pt_old, which EFT and ordinary assisted decoding need.
        reward: A reward adapter on `source`.
        tokenizer: The tokenizer of all models.
        prompts: Token ids, each of shape `(1, prompt_length)`.
        new_tokens: The number of tokens that are generated after each prompt.
        rounds: The number of rounds.
        progress: Wraps the rounds.
    """
    if not reward.config.is_adapter or not prompts or new_tokens < 2 or rounds < 1:
        raise PRTValueError(
            "There is nothing to time.",
            expected="a reward adapter, one prompt or more, 2 new tokens or more, 1 round or more",
            found=f"adapter: {reward.config.is_adapter}, {len(prompts)} prompts, {new_tokens} tokens, {rounds} rounds",
        )
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer)
    own = RewardModel.from_base(backbone, tokenizer, default_peft_config(backbone, init_lora_weights="gaussian"))
    own.network.eval()
    same_base = PRTForCausalLM.from_parts(backbone, [own], tokenizer=tokenizer)
    eft = EFTLogitsProcessor(reward.network, tokenizer)
    settings = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    ways = {
        BARE: backbone.generate,
        SEQUENTIAL: model.generate,
        SPECULATIVE: partial(model.generate, speculative=True, return_dict_in_generate=True),
        EFT: partial(backbone.generate, logits_processor=[eft]),
        ASSISTED: partial(backbone.generate, assistant_model=source),
        SAME_BASE: same_base.generate,
    }
    timings = DecodeTimings(str(backbone.dtype).removeprefix("torch."), new_tokens)
    for seconds in (*timings.rows.values(), *timings.forwards.values()):
        seconds += [[] for _ in prompts]
    drafted = accepted = 0
    for round_ in progress(range(rounds + 1)):
        eft.reset()  # otherwise it reuses the states of the same text
        for index, prompt in enumerate(prompts):
            texts = {}
            for name, generate in ways.items():
                start = now(backbone)
                texts[name] = generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
                timings.rows[name][index].append(now(backbone) - start)
            output = texts[SPECULATIVE]
            timings.is_same_text &= torch.equal(texts[SEQUENTIAL], output.sequences)
            drafted, accepted = drafted + output.num_drafted, accepted + output.num_accepted
            for name, seconds in _forward_seconds((backbone, reward.network, source), prompt, new_tokens).items():
                timings.forwards[name][index].append(seconds)
        if not round_:  # it only warmed up
            for seconds in (*timings.rows.values(), *timings.forwards.values()):
                seconds[:] = [[] for _ in prompts]
    timings.acceptance = accepted / drafted
    return timings


def _forward_seconds(networks: Sequence[PreTrainedModel], prompt: torch.LongTensor, count: int) -> dict[str, float]:
    """Return the mean seconds of a forward pass over `count` tokens after the prompt, by network.

    The networks run in turn: a small one by itself would find its weights in the processor's cache, unlike in decoding.
    """
    caches = [DynamicCache(config=network.config) for network in networks]
    seconds = dict.fromkeys(NETWORKS, 0.0)
    for step in range(count + 1):
        ids = prompt[:, -1:] if step else prompt
        for name, network, cache in zip(NETWORKS, networks, caches, strict=True):
            start = now(network)
            network(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            seconds[name] += (now(network) - start) / count if step else 0.0
    return seconds


def _fastest(seconds: list[list[float]]) -> float:
    return sum(map(min, seconds))
