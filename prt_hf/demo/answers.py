"""Run the text task: a form of answer, tuned on an old model that knows little, carried over to one that knows much."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .. import EFTLogitsProcessor, PRTLogitsProcessor
from .comparison import EFT, FINE_TUNED, PRETRAINED, PRT, REWARD_ONLY, Contenders, token_losses, tune_all
from .facts import Country, World, WorldSettings, examples, judge
from .report import Measure, Result, Sample, spread_note
from .text import TextTask, collator_of
from .training import Steps, tuning_seeds

Answers = dict[tuple[str, str], list[str]]  # (method, place) -> an answer for each country


@dataclass(frozen=True)
class AnswerSettings:
    """The world, the tuning, and how many tunings with different seeds there are."""

    world: WorldSettings = field(default_factory=WorldSettings)
    tuning: Steps = Steps(80, 2e-3, batch_size=16)
    tunings: int = 3
    new_tokens: int = 30
    samples: int = 3

    @property
    def stages(self) -> int:
        """The number of progress bars: two of pretraining, four for each tuning."""
        return 2 + 4 * self.tunings


def run_answers(world: World, folder: Path, settings: AnswerSettings, seed: int, stage: Callable[[str], str]) -> Result:
    """Tune rewards and their competitors with several seeds, and judge their answers; save the first reward."""
    task = TextTask(world.source, world.target, world.tokenizer, _rows(world, world.tuning), _rows(world, world.judged))
    collator = collator_of(world.tokenizer)
    runs, samples = [], []
    for each in tuning_seeds(seed, settings.tunings):
        contenders = tune_all(
            task, settings.tuning, each, collator, stage, adapter=True, processing_class=world.tokenizer
        )
        answers = answers_of(contenders, world, settings.new_tokens, stage(f"seed {each}, answering"))
        losses = contenders.scores([collator(task.test)], token_losses)
        if not runs:
            contenders.reward.save_pretrained(folder / "text-reward")
            samples = _samples(world.judged[: settings.samples], answers)
        runs.append([*shares_of(answers, world.judged), losses])
    names = ("form right (%)", "facts right (%)", "both right (%)", "nats/token")
    measures = [
        Measure.from_runs(name, scores, digits=3 if name == "nats/token" else 1)
        for name, scores in zip(names, zip(*runs, strict=True), strict=True)
    ]
    title = (
        f"answers about {len(world.judged)} countries, in a form tuned on the old model with {len(world.tuning)} others"
    )
    notes = [
        spread_note(settings.tunings),
        "form: a list in JSON of two sentences; facts: the right capital and continent, and no others, in any form",
    ]
    return Result("text", title, measures, contenders.models_held, samples, notes)


def answers_of(contenders: Contenders, world: World, new_tokens: int, description: str) -> Answers:
    """Return what every method answers about the judged countries, at the source and at the target."""
    tokenizer = world.tokenizer
    inputs = tokenizer([country.prompt for country in world.judged], return_tensors="pt", padding=True)
    inputs = inputs.to(contenders.device)
    processors = {
        PRT: PRTLogitsProcessor(contenders.reward, tokenizer),
        EFT: EFTLogitsProcessor(contenders.finetuned_source, tokenizer),
    }
    old, new = world.source, world.target
    generate = partial(_generate, inputs, tokenizer, new_tokens)
    calls = {
        (PRETRAINED, "source"): partial(generate, old),
        (PRETRAINED, "target"): partial(generate, new),
        (EFT, "target"): partial(generate, new, processors[EFT]),
        (PRT, "source"): partial(generate, old, processors[PRT]),
        (PRT, "target"): partial(generate, new, processors[PRT]),
        (REWARD_ONLY, "source"): partial(generate, contenders.reward.network),
        (FINE_TUNED, "source"): partial(generate, contenders.finetuned_source),
        (FINE_TUNED, "target"): partial(generate, contenders.finetuned_target),
    }
    answers = {key: call() for key, call in tqdm(calls.items(), desc=description, unit="method")}
    # By definition: EFT at its own source is the fine-tuned source, and a reward alone is the same at both places.
    answers[EFT, "source"] = answers[FINE_TUNED, "source"]
    answers[REWARD_ONLY, "target"] = answers[REWARD_ONLY, "source"]
    return answers


@torch.no_grad()
def _generate(
    inputs: dict, tokenizer: PreTrainedTokenizerBase, new_tokens: int, model: nn.Module, *processors: LogitsProcessor
) -> list[str]:
    for processor in processors:
        processor.attention_mask = inputs["attention_mask"]
    output = model.generate(**inputs, logits_processor=list(processors), max_new_tokens=new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def shares_of(answers: Answers, countries: list[Country]) -> list[dict[str, dict[str, float]]]:
    """Return the shares in % of answers with the form, with the facts, and with both."""
    shares = [defaultdict(dict) for _ in range(3)]
    for (method, place), texts in answers.items():
        verdicts = [judge(text, country) for text, country in zip(texts, countries, strict=True)]
        for share, kept in zip(shares, zip(*[(*each, all(each)) for each in verdicts], strict=True), strict=True):
            share[method][place] = 100 * sum(kept) / len(kept)
    return shares


def _samples(countries: list[Country], answers: Answers) -> list[Sample]:
    shown = {
        "new model, pretrained": (PRETRAINED, "target"),
        "new model + PRT": (PRT, "target"),
        "new model + EFT": (EFT, "target"),
        "old model, fine-tuned": (FINE_TUNED, "source"),
        "reward only": (REWARD_ONLY, "source"),
    }
    return [
        Sample(country.prompt.strip(), {name: answers[key][index] for name, key in shown.items()})
        for index, country in enumerate(countries)
    ]


def _rows(world: World, countries: list[Country]) -> list[dict[str, list[int]]]:
    """Return tokens with labels of the answers only."""
    rows = []
    for row in examples(countries):
        prompt, text = world.tokenizer([row["prompt"], row["prompt"] + row["completion"]])["input_ids"]
        ids = [*text, world.tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return rows
