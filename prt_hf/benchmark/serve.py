"""Time throughput in vLLM: a recipe's backbone and its PRT model, one engine after the other in one run."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import get_args

from peft import LoraConfig
from transformers import AutoConfig

from ..contract import PRT_CONFIG_NAME, RewardConfig
from ..errors import PRTValueError, UnsupportedError
from ..hub.client import local_folder
from ..inference.configuration import PRTModelConfig
from ..inference.recipe import place_of_reward
from ..serving import ADAPTER_BASE, ARCHITECTURE

BARE, PRT, NAMED = "bare backbone", "PRT", "PRT, named"
PROMPT_LENGTH = 16
_RESULT = "RESULT "


def time_serving(recipe: str | Path, *, requests: int, new_tokens: int, rounds: int, dtype: str) -> dict[str, float]:
    """Return the tokens per second of a batch of greedy requests, by row, in the fastest round.

    Rows are the backbone, the PRT model, and, if its rewards are adapters of the same base, the backbone with rewards
    that requests name in turn. Tokenizer and weights of the recipe's backbone have to be on this machine. An engine
    that does not start reports why on standard error.
    """
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed.", expected="vllm 0.32", found="none", remedy="pip install vllm")
    config = AutoConfig.from_pretrained(recipe)
    if not isinstance(config, PRTModelConfig):
        raise PRTValueError("The folder holds no recipe.", expected="a saved PRT model", found=config.model_type)
    settings = {"requests": requests, "new_tokens": new_tokens, "rounds": rounds, "dtype": dtype}
    backbone = {"model": config.backbone_reference["id"], "revision": config.backbone_reference["revision"]}
    engines = {BARE: backbone, PRT: {"model": str(recipe)}}
    rewards = [place_of_reward(Path(recipe), entry, token=None) for entry in config.reward_references]
    bases = {_base_of_adapter(reward) for reward in rewards}
    if len(bases) == 1 and None not in bases:
        engines[NAMED] = backbone | {"adapter_base": bases.pop(), "rewards": list(map(str, rewards))}
    return {row: _in_a_process(settings | engine) for row, engine in engines.items()}


def _base_of_adapter(reward: Path) -> str | None:
    config = RewardConfig.from_json_file(reward / PRT_CONFIG_NAME)
    if not config.is_adapter or len(config.terms) > 1:
        return None
    return str(local_folder(config.reward_base.id, revision=config.reward_base.revision))


def _in_a_process(settings: dict) -> float:
    """Run one engine in a process, so that its memory is freed at the end."""
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith(_RESULT)]
    if not results:
        raise RuntimeError(f"vLLM did not run {settings['model']}: exit status {ended.returncode}")
    return float(results[-1].removeprefix(_RESULT))


def _throughput(
    model: str,
    requests: int,
    new_tokens: int,
    rounds: int,
    dtype: str,
    revision: str | None = None,
    adapter_base: str | None = None,
    rewards: Sequence[str] = (),
) -> float:
    from vllm import LLM, SamplingParams
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.request import LoRARequest

    more = {"revision": revision}
    if adapter_base is not None:
        overrides = {"architectures": [ARCHITECTURE], ADAPTER_BASE: adapter_base}
        rank = max(LoraConfig.from_pretrained(reward).r for reward in rewards)
        rank = min(each for each in get_args(MaxLoRARanks) if each >= rank)
        more |= {"hf_overrides": overrides, "enable_lora": True, "max_loras": len(rewards), "max_lora_rank": rank}
    engine = LLM(model, dtype=dtype, max_model_len=PROMPT_LENGTH + new_tokens, max_num_seqs=requests, **more)
    size = engine.llm_engine.model_config.get_vocab_size()
    # Any tokens will do, as long as no prompt begins like another.
    prompts = [
        {"prompt_token_ids": [(requests * i + 7 * j) % (size - 3) + 3 for j in range(PROMPT_LENGTH)]}
        for i in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    named = [LoRARequest(reward, index + 1, reward) for index, reward in enumerate(rewards)]
    named = [named[i % len(named)] for i in range(requests)] if named else None
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        start = perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False, lora_request=named)
        seconds.append(perf_counter() - start)
    return requests * new_tokens / min(seconds[1:])


if __name__ == "__main__":
    print(_RESULT + str(_throughput(**json.loads(sys.argv[1]))), flush=True)
