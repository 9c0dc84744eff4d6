"""Throughput in vLLM: a recipe's backbone by itself and the PRT model, one engine after the other in one run."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from transformers import AutoConfig

from ..errors import PRTValueError, UnsupportedError
from ..recipe import PRTModelConfig

BARE, PRT = "bare backbone", "PRT"
PROMPT_LENGTH = 16
_RESULT = "RESULT "


def time_serving(recipe: str | Path, *, requests: int, new_tokens: int, rounds: int, dtype: str) -> dict[str, float]:
    """Tokens per second of a batch of requests, greedy, by row; of the fastest round.

    Args:
        recipe: folder of a PRT model, whose backbone's tokenizer and weights are on this machine.

    Raises:
        UnsupportedError: vLLM is not installed.
        PRTValueError: the folder holds no recipe.
        RuntimeError: an engine does not start; what it says stands on standard error.
    """
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed.", expected="vllm 0.32", found="none", remedy="pip install vllm")
    config = AutoConfig.from_pretrained(recipe)
    if not isinstance(config, PRTModelConfig):
        raise PRTValueError("The folder holds no recipe.", expected="a saved PRT model", found=config.model_type)
    settings = {"requests": requests, "new_tokens": new_tokens, "rounds": rounds, "dtype": dtype}
    places = {BARE: config.backbone_reference["id"], PRT: str(recipe)}
    return {row: _in_a_process(settings | {"model": place}) for row, place in places.items()}


def _in_a_process(settings: dict) -> float:
    """An engine gives its memory back when its process ends."""
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith(_RESULT)]
    if not results:
        raise RuntimeError(f"vLLM did not run {settings['model']}: exit status {ended.returncode}")
    return float(results[-1].removeprefix(_RESULT))


def _throughput(model: str, requests: int, new_tokens: int, rounds: int, dtype: str) -> float:
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype=dtype, max_model_len=PROMPT_LENGTH + new_tokens, max_num_seqs=requests)
    size = engine.llm_engine.model_config.get_vocab_size()
    # Which tokens does not matter, as long as no prompt begins as another does.
    prompts = [
        {"prompt_token_ids": [(requests * i + 7 * j) % (size - 3) + 3 for j in range(PROMPT_LENGTH)]}
        for i in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        start = perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        seconds.append(perf_counter() - start)
    return requests * new_tokens / min(seconds[1:])


if __name__ == "__main__":
    print(_RESULT + str(_throughput(**json.loads(sys.argv[1]))), flush=True)
