"""Decoding speed: bare backbone, PRT, PRT with speculation, EFT, side by side in one run.

Every round times every row on every prompt in turn. A figure is made of the fastest round of each prompt, because other
programs only ever add time.
"""

from collections.abc import Callable, Iterable
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
        rows: of decoding, by row.
        forwards: of one token with a cache, by network, the three in turn as decoding runs them.
        tokens: new tokens after each prompt.
        is_same_text: whether speculation gave the very tokens of sequential PRT.
        acceptance: accepted drafts / drafts.
    """

    dtype: str
    tokens: int
    rows: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in ROWS})
    forwards: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in NETWORKS})
    is_same_text: bool = True
    acceptance: float = 0.0

    def forward_seconds(self, network: str) -> float:
        return _fastest(self.forwards[network]) / len(self.forwards[network])

    @property
    def c(self) -> float:
        """t_reward / t_backbone"""
        return self.forward_seconds("reward") / self.forward_seconds("backbone")

    @property
    def limit(self) -> float:
        """What sequential PRT could reach of the bare backbone: 1 / (1 + c)."""
        return 1 / (1 + self.c)

    @property
    def eft_limit(self) -> float:
        """What PRT could reach of EFT, which runs the source backbone as well; (1 + 2c) / (1 + c) if that costs as much
        as the reward."""
        backbone, reward, source = map(self.forward_seconds, NETWORKS)
        return (backbone + reward + source) / (backbone + reward)

    def speed(self, row: str) -> float:
        """Tokens per second."""
        return self.tokens * len(self.rows[row]) / _fastest(self.rows[row])

    def ratio(self, row: str, to: str = BARE) -> float:
        return self.speed(row) / self.speed(to)

    @property
    def figures(self) -> dict[str, float]:
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
    """Greedy decoding of `prompts`, one at a time, by every row; all models in the backbone's precision and place.

    Args:
        source: pi_pt_old, which EFT and ordinary assisted decoding need.
        reward: a reward adapter on `source`.
        prompts: each of shape `(1, prompt_length)`.
        progress: wraps the rounds.
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
        eft.reset()  # it would recognise the text that it has scored before
        for index, prompt in enumerate(prompts):
            texts = {}
            for name, generate in ways.items():
                start = now(backbone)
                texts[name] = generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
                timings.rows[name][index].append(now(backbone) - start)
            told = texts[SPECULATIVE]
            timings.is_same_text &= torch.equal(texts[SEQUENTIAL], told.sequences)
            drafted, accepted = drafted + told.num_drafted, accepted + told.num_accepted
            for name, seconds in _forward_seconds((backbone, reward.network, source), prompt, new_tokens).items():
                timings.forwards[name][index].append(seconds)
        if not round_:  # it only warmed up
            for seconds in (*timings.rows.values(), *timings.forwards.values()):
                for of_prompt in seconds:
                    of_prompt.clear()
    timings.acceptance = accepted / drafted
    return timings


def _forward_seconds(networks, prompt: torch.LongTensor, count: int) -> dict[str, float]:
    """Mean over `count` tokens after the prompt. In turn, because a small network that runs by itself finds its weights
    in the processor's cache, and in decoding it does not."""
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
