"""Figures on targets whose vocabulary is an update of the reward's, against a brute force over the tokens of both."""

import json
from functools import partial

import families
import lm_eval.tasks
import pytest
import tiny
import torch
from datasets import Dataset
from families import BACKBONES, REWARD
from lm_eval.tasks import TaskManager
from peft import LoraConfig
from transformers import AutoModelForCausalLM, pipeline

from prt_hf import PRTForCausalLM, RewardModel, VocabularyMismatchError
from prt_hf.cli import main
from prt_hf.evaluation import PortabilityReport, check_fit, portability_report
from prt_hf.evaluation.harness import task_report

KINDS = ["extended", "renamed", "moved", "reduced"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`identical`, the base of `reward`, the targets `extended`, ..., and a fine-tuned model of each, `... tuned`."""
    home = tmp_path_factory.mktemp("targets")
    for seed, kind in enumerate(BACKBONES):
        for name, more in ((kind, 0), (f"{kind} tuned", 20)):
            families.build(kind, tiny.llama, seed + more).save_pretrained(home / name)
            BACKBONES[kind].save_pretrained(home / name)
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(home / "identical"), peft_config=config).save_pretrained(home / "reward")
    return home


def pairs_of(kind):
    """The reward's tokens and those of a target that they are, by their names and roles."""
    return {old: new for new, old in families.BruteForce(None, BACKBONES[kind]).pairs.items()}


def texts(rows=5):
    """Token rows of what all targets have, which ends with the reward's end token."""
    known = set.intersection(*({*pairs_of(kind)} for kind in KINDS)) - {REWARD.pad_token_id}
    pool, generator = sorted(known), torch.Generator().manual_seed(0)
    made = []
    for row in range(rows):
        ids = [pool[index] for index in torch.randint(len(pool), (5 + row,), generator=generator)] + [
            REWARD.eos_token_id
        ]
        made.append({"input_ids": ids, "labels": [-100] * (1 + row % 3) + ids[1 + row % 3 :]})
    return Dataset.from_list(made)


@torch.no_grad()
def logits_of(network, kind, rows):
    """Logits at the supervised positions, in the reward's order, 0 probability for what the network lacks."""
    pairs, found = pairs_of(kind), []
    for row in rows:
        logits = network(torch.tensor([[pairs[index] for index in row["input_ids"]]])).logits[0, :-1].double()
        ordered = torch.full((len(logits), len(REWARD)), -torch.inf, dtype=torch.float64)
        for old, new in pairs.items():
            ordered[:, old] = logits[:, new]
        found.append(ordered[[label != -100 for label in row["labels"][1:]]])
    return torch.cat(found)


def figures(weights, labels):
    """Means of -log p, of being right and of the entropy, of probabilities up to a factor."""
    p = weights / weights.sum(-1, keepdim=True)
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    hits = p.argmax(-1) == labels
    return [each.double().mean().item() for each in (-p[range(len(labels)), labels].log(), hits, entropy)]


def test_figures_are_over_the_tokens_of_both(home, tmp_path):
    rows = texts()
    load = AutoModelForCausalLM.from_pretrained
    reward = RewardModel.from_pretrained(home / "reward")
    targets = {kind: str(home / kind) for kind in KINDS}
    finetuned = {kind: str(home / f"{kind} tuned") for kind in KINDS}
    report = portability_report(
        reward, targets, rows, eft=str(home / "identical tuned"), finetuned=finetuned, batch_size=2, output_dir=tmp_path
    )
    labels = torch.tensor([label for row in rows for label in row["labels"][1:] if label != -100])
    r = logits_of(reward.network, "identical", rows)
    source, tuned = (logits_of(load(home / name), "identical", rows) for name in ("identical", "identical tuned"))
    everywhere = {"pretrained": source.exp(), "eft": tuned.exp(), "prt": (source + r).exp(), "reward_only": r.exp()}
    for method, weights in everywhere.items():
        found = report.source.figures[method]
        expected = figures(weights, labels)
        assert [found.nll.value, found.accuracy.value, found.entropy] == pytest.approx(expected, rel=1e-4), method
    for kind in KINDS:
        target, oracle = (logits_of(load(home / name), kind, rows) for name in (kind, f"{kind} tuned"))
        at_target = {
            "pretrained": target.exp(),
            "eft": target.exp() * tuned.exp() / source.exp(),
            "prt": (target + r).exp(),
            "reward_only": r.exp(),
            "finetuned": oracle.exp(),
        }
        place = report.targets[kind]
        for method, weights in at_target.items():
            found, expected = place.figures[method], figures(weights, labels)
            assert [found.nll.value, found.accuracy.value, found.entropy] == pytest.approx(expected, rel=1e-4), method
        shared = sorted(pairs_of(kind))
        pi, other = source[:, shared].softmax(-1), target[:, shared].softmax(-1)
        c = r[:, shared].exp().max(-1).values / (pi * r[:, shared].exp()).sum(-1)
        found = place.portability
        expected = [(pi * (pi / other).log()).sum(-1).mean().item(), c.mean().item(), c.max().item()]
        assert [found.eps, found.c_mean, found.c_max] == pytest.approx(expected, rel=1e-4)
        assert found.nll["prt_target"] == place.figures["prt"].nll.value
        (note,) = (note for note in report.notes if note.startswith(f"{kind}: "))
        assert note.startswith(f"{kind}: its vocabulary is {'renamed' if kind == 'reduced' else kind}: ")
        assert note.endswith("Figures are over the tokens that both have") and note in report.table()
    assert PortabilityReport.from_folder(tmp_path, reward.config).to_dict() == json.loads(json.dumps(report.to_dict()))


def test_a_token_that_a_target_lacks(home):
    row = {"input_ids": [3, REWARD.get_vocab()["<|reserved_0|>"], 4]}
    with pytest.raises(VocabularyMismatchError, match="'<.reserved_0.>', id 71 of the reward"):
        portability_report(str(home / "reward"), [str(home / "reduced")], Dataset.from_list([row] * 2))


def test_fit_and_check_say_how_tokens_match(home, capsys):
    sentences = {
        "identical": "73 tokens, the same",
        "extended": "extended: 73 of 76 tokens are the reward's; 3 keep the backbone's probability",
        "renamed": "renamed: 71 of 73 tokens are the reward's; of them by another name '<|end|>' = '<eos>'; "
        "2 keep the backbone's probability; 2 of the reward's are not used",
        "reduced": "renamed: 71 of 71 tokens are the reward's; 2 of the reward's are not used",
    }
    for kind, sentence in sentences.items():
        fit = check_fit(home / "reward", str(home / kind))
        assert fit.fits and fit.backbone_tokens == len(BACKBONES[kind])
        assert main(["check", str(home / "reward"), str(home / kind)]) == 0
        padding = f"reward's head; {fit.backbone_columns - fit.backbone_tokens} rows pad the backbone's head"
        assert f"vocabulary {sentence}; 7 rows pad the {padding}" in capsys.readouterr().out
        assert main(["check", str(home / "reward"), str(home / kind), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["match"] == fit.match
        assert kind == "identical" or fit.match == sentence


def test_check_measures(home, tmp_path, capsys):
    """Texts are the reward's tokens, and what is measured is what `portability_report` says."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "abcd <think> xyz"}) for _ in range(3)))
    data = ["--data", str(tmp_path / "rows.jsonl"), "--json"]
    assert main(["check", str(home / "reward"), str(home / "moved"), *data]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = Dataset.from_list([{"text": "abcd <think> xyz"}] * 3)
    report = portability_report(str(home / "reward"), [str(home / "moved")], rows, methods=["prt"])
    (place,) = report.targets.values()
    assert found["portability"]["nll"] == pytest.approx(place.portability.nll)
    assert found["portability"]["eps"] == pytest.approx(place.portability.eps)


TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
QUESTIONS = [{"question": f"ab<think>{'xyz' * row}", "answer": "qr</think>"[: 3 + 8 * row]} for row in range(3)]


@pytest.mark.parametrize("kind", ["extended", "moved"])
def test_the_harness_and_pipelines_read_the_targets_tokens(home, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    reward, target = RewardModel.from_pretrained(home / "reward"), str(home / kind)
    report = task_report(reward, [target], ["letters"], reward_name="reward", include_path=tmp_path, batch_size=2)
    tokenizer, network = BACKBONES[kind], AutoModelForCausalLM.from_pretrained(target)
    rule, sums = families.BruteForce(reward.network, tokenizer), []
    for row in QUESTIONS:
        start, ids = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']}{row['answer']}"))
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0]
        steps = range(len(start), len(ids))
        sums.append(sum(rule.log_probs(ids[:step], logits[step - 1])[ids[step]].item() for step in steps))
    found = report.scores[target, "prt"]["letters"]["perplexity"].estimate.value
    assert found == pytest.approx(torch.tensor([-sum(sums) / len(sums)]).exp().item(), rel=1e-4)

    model, texts = PRTForCausalLM.from_parts(target, [reward]), ["ab<think>cd", "xyz"]
    expected = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        ids = network.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[rule])
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    generator = pipeline("text-generation", model=model, tokenizer=model.processing_class)
    for batch_size in (1, 2):
        options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
        outputs = generator(texts, batch_size=batch_size, **options)
        assert [output["generated_text"] for (output,) in outputs] == expected


def test_text_classifiers_read_their_own_tokens(tmp_path, capsys):
    """Labels are in another order as well; one row at a time, as BERT counts padding on the left."""
    order = ["blue", "grey", "red", "green"]
    tiny.bert(2, vocab_size=len(REWARD)).save_pretrained(tmp_path / "source")
    REWARD.save_pretrained(tmp_path / "source")
    target = tiny.bert(3, order, vocab_size=len(BACKBONES["moved"]))
    target.save_pretrained(tmp_path / "moved")
    BACKBONES["moved"].save_pretrained(tmp_path / "moved")
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules=["query", "value"])
    reward = RewardModel.from_base(str(tmp_path / "source"), peft_config=config)
    reward.save_pretrained(tmp_path / "reward")
    texts, pairs = ["abc<|user|>", "xyz", "qq<eos>rs"], pairs_of("moved")
    rows = Dataset.from_dict({"text": texts, "label": ["red", "grey", "blue"]})
    report = portability_report(reward, [str(tmp_path / "moved")], rows, methods=["pretrained", "prt"], batch_size=1)
    weights = {"pretrained": [], "prt": []}
    with torch.no_grad():
        for text in texts:
            ids = REWARD(text)["input_ids"]
            logits = target(torch.tensor([[pairs[index] for index in ids]])).logits[0].double()
            logits = logits[[order.index(name) for name in tiny.COLOURS]]
            weights["pretrained"].append(logits.exp())
            weights["prt"].append((logits + reward(input_ids=torch.tensor([ids]))[0].double()).exp())
    (place,) = report.targets.values()
    labels = torch.tensor([tiny.COLOURS.index(name) for name in rows["label"]])
    for method, each in weights.items():
        found, expected = place.figures[method], figures(torch.stack(each), labels)
        assert [found.nll.value, found.accuracy.value, found.entropy] == pytest.approx(expected, rel=1e-4), method
    assert not report.notes
    assert main(["check", str(tmp_path / "reward"), str(tmp_path / "moved")]) == 0
    printed = capsys.readouterr().out
    assert (
        "labels     4, in another order, matched by name; vocabulary moved: 71 of 73 tokens are the reward's\n"
        in printed
    )
