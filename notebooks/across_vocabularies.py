"""What a reward is worth on a backbone with another vocabulary: the figures of across_vocabularies.md.

    python notebooks/across_vocabularies.py --assets ASSETS --models MODELS --output notebooks/across_vocabularies.json
    python notebooks/across_vocabularies.py --output notebooks/across_vocabularies.json --table

MODELS is a folder with `smollm2-135m-instruct` and `gemma3-270m`. Rewards are tuned once, into `--work`; rows that the
output holds already are not measured again.
"""

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from across_models import SOURCES, Bytes, Merged, Plain, Seen, bullets, stories, tuned
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prt_hf import PRTForCausalLM, PRTLogitsProcessor, RewardModel
from prt_hf.demo.text import llama
from prt_hf.evaluation.machine import hardware, versions
from prt_hf.vocabulary.across import VocabularyMap
from prt_hf.vocabulary.byte_tokens import ByteTokens

STRENGTHS = 0.25, 0.5, 1.0
FEWER = 12  # stories for other strengths than 1, and for the obvious map
FEWEST = 2  # for the exact ratio
EXACT = "stories-old, the exact ratio of bytes"
SMOLLM2, GEMMA, QWEN3 = "smollm2-135m-instruct", "gemma3-270m", "qwen3"
OLD, NEW = "stories-old", "stories260K"
PROMPTS = (
    "Once upon a time, there was a little girl named Emma.",
    "- Tom had a big red ball.\n",
    "- One day, a dog went to the park.",
)
QUESTION = "Tell me a short story about a dog and a cat."
GERMAN = (
    "Im Frühling zogen die Kraniche über das Tal, und die Kinder zählten sie vom Dach der Scheune aus. Größere "
    "Schwärme flogen nachts; ihre Rufe hörte man bis in die Küche. Am nächsten Morgen lag weißer Reif auf den Äckern."
)
CHINESE = "清晨的渔村很安静，只有海鸥在码头上叫。老渔夫把网收好，坐在船边喝茶。他对孙子说：今天风太大，我们明天再出海。"


@dataclass(frozen=True)
class Part:
    """Texts on a backbone, by itself and with each reward at several strengths and look-aheads."""

    name: str
    backbone: str
    stories: int  # or the foreign texts: 0
    rewards: tuple[str, ...]
    lookaheads: tuple[int, ...]
    seen_as: str = ""


# On one vocabulary there is nothing to look ahead for, and no byte is several tokens.
PARTS = (
    Part("control: one vocabulary", NEW, 25, (OLD,), (0,)),
    Part("control: seen as bytes", NEW, 25, (OLD,), (8,), "bytes"),
    Part("control: seen through merged tokens", NEW, 25, (OLD,), (0, 8), "stories"),
    Part("control: seen through merged tokens that span lines", NEW, 16, (OLD,), (0, 8), "bullets"),
    Part("SmolLM2-135M-Instruct", SMOLLM2, 12, tuple(SOURCES), (0, 8)),
    Part("Gemma 3 270M", GEMMA, 4, (NEW, "stories3000"), (0, 8)),
    Part("German and Chinese: one vocabulary", NEW, 0, (OLD,), (0,)),
    Part("German and Chinese: SmolLM2-135M-Instruct", SMOLLM2, 0, (OLD,), (0, 8)),
    Part("German and Chinese: Gemma 3 270M", GEMMA, 0, (OLD,), (0, 8)),
)


@dataclass
class Study:
    """Where everything lies, and what has been measured."""

    assets: Path
    models: Path
    work: Path
    output: Path
    results: dict

    def once(self, table: str, part: str, row: str, measure: Callable) -> None:
        """Measure a row that is not there yet, and write all down."""
        rows = self.results.setdefault(table, {}).setdefault(part, {})
        if row not in rows:
            rows[row] = measure()
            self.output.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
            print(time.strftime("%H:%M"), part, "|", row, flush=True)

    def folder(self, name: str) -> Path:
        places = self.models / name, self.assets / "tokenizers" / name, self.assets / name
        return next(place for place in places if place.exists())

    def backbone(self, name: str, seen_as: str = "") -> Plain | Bytes | Merged:
        plain = Plain(self.folder(name))
        if seen_as == "bytes":
            return Bytes(plain.model, plain.tokenizer)
        if seen_as:
            corpus = bullets(self.assets, "train") if seen_as == "bullets" else stories(self.assets)
            return Merged(plain.model, plain.tokenizer, corpus)
        return plain

    def reward(self, name: str) -> RewardModel:
        return tuned(name, self.assets, self.work)


class ObviousMap:
    """A token gets the reward of the source token of the same text, or of the longest one that it starts with."""

    strength = 1.0

    def __init__(self, reward: RewardModel, tokenizer: PreTrainedTokenizerFast):
        self._reward = reward
        self._rows = PRTLogitsProcessor(reward, tokenizer, across_vocabularies=True)._across.contexts
        ids = ByteTokens(reward.processing_class).ids
        starts = [[text[:end] for end in range(len(text or b""), 0, -1)] for text in ByteTokens(tokenizer).bytes]
        self._columns = torch.tensor([next((ids[start] for start in each if start in ids), -1) for each in starts])

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        path = self._rows.texts(input_ids)[0].path
        reward = self._reward(input_ids=torch.tensor([path]))[0, -1, self._columns].masked_fill(self._columns < 0, 0)
        return (scores[:, : len(reward)].log_softmax(-1) + self.strength * reward).log_softmax(-1)


@torch.no_grad()
def nats(tokenizer: PreTrainedTokenizerFast, text: str, seen: Seen, processor: Callable | None) -> float:
    """Return nats per byte of a text after its first letter, token by token."""
    ids = seen.ids
    shown = [tokenizer.decode(ids[:end], skip_special_tokens=True).strip() for end in range(6)]
    begin = next(end for end, start in enumerate(shown) if start and text.startswith(start))
    positions = torch.arange(begin - 1, len(ids) - 1)
    scores = seen.logits[positions]
    if processor is None:
        log_probs = scores.log_softmax(-1)
    elif getattr(processor, "vocabularies", None):  # several positions at once
        log_probs = processor.score(ids, torch.ones_like(ids), positions, scores[:, : processor.match.size])
    else:
        log_probs = torch.cat([processor(ids[None, :end], scores[end - begin, None]) for end in range(begin, len(ids))])
    found = -log_probs.gather(1, ids[begin:, None]).sum().item()
    return found / len(text.removeprefix(shown[begin]).encode())


def measure_texts(study: Study, part: Part) -> None:
    """Nats per byte of each text, for all rows of a part."""
    texts = [text[:490].rsplit(" ", 1)[0] for text in bullets(study.assets, "test")[: part.stories]]
    texts = texts or [GERMAN, CHINESE]
    rows = {"backbone": None}
    for name in part.rewards:
        for ahead in part.lookaheads:
            rows |= {f"{name}, look-ahead {ahead}, strength {each}": (name, ahead, each) for each in STRENGTHS}
        if len(part.lookaheads) > 1 or part.seen_as:
            rows[f"{name}, the obvious map"] = name, None, 1.0
    if part.seen_as == "bytes":
        rows[EXACT] = None
    if rows.keys() <= study.results.get("nats", {}).get(part.name, {}).keys():
        return
    view = study.backbone(part.backbone, part.seen_as)
    seen = lru_cache(None)(view)

    @lru_cache(1)
    def processor_of(name: str, ahead: int | None) -> Callable:
        reward, kwargs = study.reward(name), {"across_vocabularies": True, "lookahead": ahead}
        return (
            ObviousMap(reward, view.tokenizer)
            if ahead is None
            else PRTLogitsProcessor(reward, view.tokenizer, **kwargs)
        )

    def measure(name: str, ahead: int | None, strength: float) -> list[float]:
        processor = processor_of(name, ahead)
        processor.strength = strength
        some = texts if strength == 1 and ahead is not None else texts[:FEWER]
        return [nats(view.tokenizer, text, seen(text), processor) for text in some]

    def exact() -> list[float]:
        """The ratio of the two sources, each seen as bytes."""
        source = study.backbone(OLD)
        tuned = PRTForCausalLM.from_parts(source.model, [study.reward(OLD)], tokenizer=source.tokenizer).eval()
        new, old = (Bytes(model, source.tokenizer) for model in (tuned, source.model))
        found = []
        for text in texts[:FEWEST]:
            ratio = new(text).logits.log_softmax(-1) - old(text).logits.log_softmax(-1)
            both = Seen(seen(text).ids, seen(text).logits.log_softmax(-1) + ratio)
            found.append(nats(view.tokenizer, text, both, None))
        return found

    for row, how in rows.items():
        alone = exact if row == EXACT else lambda: [nats(view.tokenizer, text, seen(text), None) for text in texts]
        study.once("nats", part.name, row, partial(measure, *how) if how else alone)


def generate(backbone: Plain, inputs: dict, processor: PRTLogitsProcessor | None, count: int = 48) -> dict:
    """Greedy text, CPU milliseconds and source tokens read for each of its tokens, after a first token."""
    how = {"logits_processor": [processor] if processor else [], "do_sample": False}
    backbone.model.generate(**inputs, **how, max_new_tokens=2)
    before, wall, cpu = getattr(processor, "tokens_computed", 0), time.perf_counter(), time.process_time()
    output = backbone.model.generate(**inputs, **how, max_new_tokens=count)
    new = output.shape[1] - inputs["input_ids"].shape[1]
    found = {"ms": 1000 * (time.process_time() - cpu) / new, "wall ms": 1000 * (time.perf_counter() - wall) / new}
    text = backbone.tokenizer.decode(output[0, -new:], skip_special_tokens=True)
    rows = (getattr(processor, "tokens_computed", 0) - before) / new
    return found | {"text": text, "rows": rows, "load": os.getloadavg()[0]}


def measure_writing(study: Study, part: Part) -> None:
    """Texts after three prompts, side by side; on a chat model an answer, with the reward's own prompt."""
    names = ["backbone", *(f"{name}, look-ahead {ahead}" for name in part.rewards for ahead in part.lookaheads)]
    is_done = study.results.get("written", {}).get(part.name, {})
    if all(prompt in is_done for prompt in (*PROMPTS, *[QUESTION] * (part.backbone == SMOLLM2))):
        return
    view = study.backbone(part.backbone)
    processors = [None] + [
        PRTLogitsProcessor(study.reward(name), view.tokenizer, across_vocabularies=True, lookahead=ahead)
        for name in part.rewards
        for ahead in part.lookaheads
    ]

    def measure(inputs: dict) -> dict:
        return {name: generate(view, inputs, each) for name, each in zip(names, processors, strict=True)}

    for prompt in PROMPTS:
        study.once(
            "written", part.name, prompt, lambda prompt=prompt: measure(view.tokenizer(prompt, return_tensors="pt"))
        )
    if part.backbone == SMOLLM2:
        for each, name in zip(processors[1:], (name for name in part.rewards for _ in part.lookaheads), strict=True):
            prompt = f"- {QUESTION}\n"
            each.prompt = study.reward(name).processing_class(prompt, return_tensors="pt")
        chat = [{"role": "user", "content": QUESTION}]
        inputs = view.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        study.once("written", part.name, QUESTION, lambda: measure(inputs))


def tables_of(source: Path, target: Path) -> dict:
    """Build time and memory of a map, in a process of its own."""

    def memory() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    torch.set_num_threads(1)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, target)]
    before, start = memory(), time.process_time()
    tokens = [ByteTokens(tokenizer) for tokenizer in tokenizers]
    read, vocabularies = time.process_time(), VocabularyMap(*tokens, {})
    built, tables = time.process_time(), vocabularies.on(torch.device("cpu"))
    return {
        "sizes": [each.size for each in tokens],
        "seconds of tokens": read - start,
        "seconds of tables": built - read,
        "MiB": memory() - before,
        "MiB of tensors": sum(each.nbytes for each in tables) / 2**20,
        "both have": tables.is_single.double().mean().item(),
        "several": len(tables.waiting) / len(tables.columns),
    }


def measure_tables(study: Study) -> None:
    pairs = [(NEW, SMOLLM2), (SMOLLM2, QWEN3), (SMOLLM2, GEMMA), (QWEN3, GEMMA), (GEMMA, QWEN3)]
    for pair in pairs:

        def measure(pair=pair) -> dict:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(tables_of, *map(study.folder, pair)).result()

        study.once("tables", "pairs", " -> ".join(pair), measure)


def measure_speed(study: Study) -> None:
    """Milliseconds per token on SmolLM2, for rewards with random weights whose bodies are of one size."""
    if "times" in study.results.get("speed", {}).get(SMOLLM2, {}):
        return
    view = study.backbone(SMOLLM2)
    processors = {"backbone": None}
    for name, label in ((SMOLLM2, "the same vocabulary"), (NEW, "512 tokens"), (QWEN3, "151,669 tokens")):
        tokenizer = AutoTokenizer.from_pretrained(study.folder(name))
        base = llama(tokenizer, {"hidden_size": 64, "num_hidden_layers": 5}, 0)
        reward = RewardModel.from_base(base, tokenizer, LoraConfig(r=16, target_modules="all-linear"))
        for ahead in (0, 8)[: 1 if name == SMOLLM2 else 2]:
            kwargs = {"across_vocabularies": True, "lookahead": ahead}
            row = label if name == SMOLLM2 else f"{label}, look-ahead {ahead}"
            processors[row] = PRTLogitsProcessor(reward, view.tokenizer, **kwargs)
    inputs = view.tokenizer(PROMPTS[0], return_tensors="pt")

    def measure() -> dict:
        runs = [{row: generate(view, inputs, each) for row, each in processors.items()} for _ in range(3)]
        keys = "ms", "wall ms", "rows", "load"
        return {row: {key: [run[row][key] for run in runs] for key in keys} for row in processors}

    study.once("speed", SMOLLM2, "times", measure)


def gains(bare: list[float], found: list[float]) -> list[float]:
    """Return what each text gains; some rows have the first texts only."""
    return [before - after for before, after in zip(bare, found, strict=False)]


def tables_of_texts(nats: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the mean over stories, and of what is gained ± its standard error; foreign texts one by one."""
    lines = []
    whole = nats[PARTS[0].name]
    for part in (part for part in PARTS if part.name in nats):
        (_, bare), *rows = nats[part.name].items()
        if not part.stories:
            lines += ["", f"**{part.name}** (nats per byte)", "", "| | German | Chinese |", "|---|---|---|"]
            lines += [
                f"| {row} | {' | '.join(f'{each:.4f}' for each in found)} |"
                for row, found in [("backbone", bare), *rows]
            ]
            continue
        is_control = part.backbone == NEW
        last = " of one vocabulary's |" if is_control else ""
        lines += [
            "",
            f"**{part.name}** (nats per byte)",
            "",
            f"| | stories | backbone | with the reward | gain |{last}",
        ]
        lines.append("|---" * (5 + is_control) + "|")
        for row, found in rows:
            each = gains(bare, found)
            spread = statistics.stdev(each) / math.sqrt(len(each))
            cells = [row, len(each), f"{statistics.mean(bare[: len(each)]):.4f}", f"{statistics.mean(found):.4f}"]
            cells.append(f"{statistics.mean(each):+.4f} ± {spread:.4f}")
            if is_control:
                strength = row.rpartition("strength ")[2] if "strength" in row else 1.0
                same = gains(whole["backbone"], whole[f"{OLD}, look-ahead 0, strength {strength}"])[: len(each)]
                cells.append(f"{statistics.mean(each) / statistics.mean(same):.0%}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def table(results: dict) -> str:
    """Return the tables of the page as Markdown."""
    lines = tables_of_texts(results["nats"])
    for part, prompts in results["written"].items():
        plain = [prompts[prompt] for prompt in PROMPTS]
        lines += ["", f"**{part}**, {len(plain)} prompts, 48 tokens each, greedy, strength 1", ""]
        lines += ['| | lines with "- " first | CPU ms per token | source tokens per token |', "|---" * 4 + "|"]
        for row in plain[0]:
            runs = [prompt[row] for prompt in plain]
            written = [line for run in runs for line in run["text"].split("\n")[1:] if line]
            ms, rows = (statistics.mean(run[key] for run in runs) for key in ("ms", "rows"))
            count = sum(line.startswith("- ") for line in written)
            lines.append(f"| {row} | {count} of {len(written)} | {ms:.0f} | {rows:.1f} |")
    lines += ["", "| reward of -> backbone | tokens | both have | of several | tokens read | tables built | memory |"]
    lines.append("|---" * 7 + "|")
    for pair, found in results["tables"]["pairs"].items():
        sizes = " -> ".join(f"{size:,}" for size in found["sizes"])
        shares = f"{found['both have']:.0%} | {found['several']:.0%}"
        seconds = f"{found['seconds of tokens']:.1f} s | {found['seconds of tables']:.1f} s"
        lines.append(f"| {pair} | {sizes} | {shares} | {seconds} | {found['MiB']:.0f} MiB |")
    lines += ["", "| reward | CPU ms per token | times one vocabulary | source tokens per token |", "|---" * 4 + "|"]
    rows = results["speed"][SMOLLM2]["times"]
    for row, found in rows.items():
        ms, same = (statistics.median(each["ms"]) for each in (found, rows["the same vocabulary"]))
        lines.append(f"| {row} | {ms:.0f} | {ms / same:.2f} | {found['rows'][0]:.1f} |")
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("PRT_ASSETS"), help="or PRT_ASSETS")
    parser.add_argument("--models", type=Path, help="a folder with the two models")
    parser.add_argument("--work", type=Path, default=Path("across_vocabularies"), help="where the rewards lie, or will")
    parser.add_argument("--output", type=Path, default=Path("across_vocabularies.json"), help="is continued")
    parser.add_argument("--part", default="", help="only what has this in its name: control, SmolLM2, tables, ...")
    parser.add_argument("--table", action="store_true", help="only print the tables of the output")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    if not args.table:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore")
        results |= {"machine": hardware(), "versions": versions()}
        study = Study(args.assets, args.models, args.work, args.output, results)
        measures = [(part.name, measure_texts, part) for part in PARTS]
        measures += [(f"writing: {part.name}", measure_writing, part) for part in PARTS[4:6]]
        for name, measure, *part in [*measures, ("tables", measure_tables), ("speed", measure_speed)]:
            if args.part in name:
                measure(study, *part)
    if not args.part:
        print(table(results))


if __name__ == "__main__":
    main()
