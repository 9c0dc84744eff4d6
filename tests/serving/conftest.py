"""PRT models in vLLM, where that is installed: a virtual environment of its own, see .ci/run.

Not in a folder named `vllm`, which would be found as that package where it is not installed.
"""

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from prt_hf import PRTForCausalLM, RewardModel, default_peft_config

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Read when vLLM is imported, and by the processes that it starts.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    # Of small functions here and there, which takes longer than the tests.
    "TORCH_COMPILE_DISABLE": os.environ.get("TORCH_COMPILE_DISABLE", "1"),
}

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@dataclass
class Served:
    """A recipe of a backbone and two rewards, all of other sizes, with heads of other paddings; and a third reward that
    requests may name.

    The kernels of vLLM's CPU backend want heads of 32 numbers or more.
    """

    folder: Path

    def __post_init__(self):
        self.tokenizer = tiny.tokenizer(chat_template=CHAT_TEMPLATE)
        self.backbone = self.save(
            "backbone",
            tiny.llama(1, hidden_size=64, head_dim=64, num_hidden_layers=3, vocab_size=104, initializer_range=0.2),
        )
        self.base = self.save("base", tiny.llama(2, head_dim=32, vocab_size=100, tie_word_embeddings=True))
        self.adapter = str(self.folder / "adapter")
        self.lora_reward(self.base).save_pretrained(self.adapter)
        self.full = str(self.folder / "full")
        RewardModel.from_base(tiny.sliding_window(3, head_dim=32), self.tokenizer).save_pretrained(self.full)
        self.recipe = str(self.folder / "recipe")
        self.model = PRTForCausalLM.from_parts(self.backbone, [self.adapter, self.full], strengths=[0.7, -0.4])
        self.model.save_pretrained(self.recipe)
        self.named = str(self.folder / "named")
        self.lora_reward(self.base, seed=5, kl_coef=0.8).save_pretrained(self.named)
        self.with_named = PRTForCausalLM.from_parts(self.backbone, [self.adapter, self.full, self.named])

    def save(self, name, model, tokenizer=None) -> str:
        model.save_pretrained(self.folder / name)
        (tokenizer or self.tokenizer).save_pretrained(self.folder / name)
        return str(self.folder / name)

    def lora_reward(self, base: str, seed=0, kl_coef=1.0, **lora_kwargs) -> RewardModel:
        """A reward adapter on every layer and the head, that says something else than its base."""
        lora_kwargs = {"r": 4} | lora_kwargs
        reward = RewardModel.from_base(
            base, peft_config=default_peft_config(AutoModelForCausalLM.from_pretrained(base), **lora_kwargs)
        )
        reward.config = replace(reward.config, kl_coef=kl_coef)
        torch.manual_seed(seed)
        for name, parameter in reward.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return reward

    @property
    def strengths_with_named(self) -> list[float]:
        """Of a request that names the third reward and no strengths."""
        return [*self.model.strengths, 1 / 0.8]

    def text(self, prompt: list[int], tokens: int, strengths=None) -> list[int]:
        """Greedy, by transformers."""
        return tiny.greedy(self._at(strengths), prompt, tokens)

    @torch.no_grad()
    def log_probs(self, tokens: list[int], strengths=None) -> torch.Tensor:
        """Of the token after each, by transformers."""
        return self._at(strengths)(torch.tensor([tokens])).logits[0]

    def _at(self, strengths: list[float] | None) -> PRTForCausalLM:
        self.with_named.strengths = [*(strengths or self.model.strengths), 0.0][:3]
        return self.with_named


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))
