"""eps, C and gains against a brute force in float64 that is written from their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

from prt_hf import RewardModel
from prt_hf.errors import ContextLengthError, LabelMismatchError, NonFiniteRewardError, PRTValueError
from prt_hf.evaluation import Portability, batches, measure_portability, reading
from prt_hf.evaluation.portability import RIVALS
from prt_hf.evaluation.tally import divergence, log_concentration

WAYS = ("source", "target", "prt_source", "prt_target", "reward_only")


def gemma2(seed=0):
    """Its logits are soft-capped."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=97, num_key_value_heads=2, head_dim=8, initializer_range=0.4, **sizes)
    return Gemma2ForCausalLM(config).eval()


def perturbed(network, size=0.1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return network


def text_reward(base, tokenizer):
    reward = RewardModel.from_base(base, tokenizer, LoraConfig(target_modules="all-linear"))
    perturbed(reward.network)
    return reward


def by_definition(reward, source, target, labels, strength):
    """What `measure_portability` has to give, of logits `(positions, size)`, with nothing rearranged."""
    r = strength * reward.double()
    pi, other = (logits.double().softmax(-1) for logits in (source, target))
    c = r.exp().max(-1).values / (pi * r.exp()).sum(-1)
    weights_by_way = [pi, other, pi * r.exp(), other * r.exp(), r.exp()]
    found = {"nll": {}, "accuracy": {}}
    for way, weights in zip(WAYS, weights_by_way, strict=True):
        probabilities = weights / weights.sum(-1, keepdim=True)
        found["nll"][way] = -probabilities[torch.arange(len(labels)), labels].log().mean().item()
        found["accuracy"][way] = (probabilities.argmax(-1) == labels).double().mean().item()
    eps = (pi * (pi / other).log()).sum(-1).mean()
    return found | {"eps": eps.item(), "c_mean": c.mean().item(), "c_max": c.max().item(), "positions": len(labels)}


def assert_equal(found: Portability, expected: dict, tolerance=1e-4):
    for name in ("nll", "accuracy"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=tolerance, abs=1e-6), name
    for name in ("eps", "c_mean", "c_max", "positions"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=tolerance), name


@torch.no_grad()
def text_by_definition(reward, source, target, rows, strength):
    """Row by row, without padding; padded columns cut off."""
    parts = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        logits = [network(ids).logits[0, :-1, : tiny.VOCABULARY] for network in (reward.network, source, target)]
        parts.append([value[labels != -100] for value in (*logits, labels)])
    return by_definition(*map(torch.cat, zip(*parts, strict=True)), strength)


def padded(rows, side, size):
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(len(ids) for ids in part["input_ids"])
        columns = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for ids, labels in zip(part["input_ids"], part["labels"], strict=True):
            fill = [0] * (longest - len(ids))
            for name, values, filler in zip(columns, (ids, [1] * len(ids), labels), (0, 0, 7), strict=True):
                more = [filler] * len(fill)  # labels of padding are not ignored here: the mask tells
                columns[name].append(more + values if side == "left" else values + more)
        yield {name: torch.tensor(values) for name, values in columns.items()}


TARGETS = {
    "another family, a padded vocabulary": lambda: tiny.gpt2(2, vocab_size=104),
    "soft-capped logits": lambda: gemma2(2),
    "no head to be read apart": lambda: tiny.mamba(2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_language_models_equal_the_definitions(target, side, tokenizer, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 4 * tiny.VOCABULARY)
    base, target = tiny.llama(1, vocab_size=100), TARGETS[target]()
    reward, rows = text_reward(base, tokenizer), tiny.texts(7)
    found = measure_portability(reward, target, padded(rows, side, 3), strength=0.5)
    assert (found.strength, found.rows) == (0.5, 7)
    assert_equal(found, text_by_definition(reward, base, target, rows, 0.5))


def test_the_source_of_a_full_reward_is_what_it_names(tokenizer, tmp_path):
    tiny.llama(3).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    source, target = tiny.llama(3), tiny.llama(4)
    reward = RewardModel.from_base(str(tmp_path / "source"))
    perturbed(reward.network, 0.05)
    rows = tiny.texts(4)
    expected = text_by_definition(reward, source, target, rows, 1.0)
    assert_equal(measure_portability(reward, target, padded(rows, "right", 2)), expected)
    assert_equal(measure_portability(reward, target, padded(rows, "right", 4), source=source), expected)
    other = text_by_definition(reward, tiny.llama(5), target, rows, 1.0)
    assert_equal(measure_portability(reward, target, padded(rows, "right", 4), source=tiny.llama(5)), other)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_classifiers_equal_the_definitions_with_labels_in_another_order(kind, tokenizer):
    """Labels of the data are the reward's; the target's columns are brought into that order."""
    backwards = tiny.COLOURS[::-1]
    if kind == "images":
        base, target = tiny.vit(1), tiny.resnet(2, names=backwards)
        inputs = {"pixel_values": torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    else:
        base, target = tiny.bert(1), tiny.bert(2, names=backwards)
        inputs = {"input_ids": tiny.prompts(9), "attention_mask": torch.ones(9, 7, dtype=torch.long)}
    reward = RewardModel.from_base(
        base, tokenizer if kind == "texts" else None, LoraConfig(target_modules="all-linear")
    )
    perturbed(reward.network, 0.3)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    logits = [network.eval()(**inputs).logits.detach() for network in (reward.network, base, target)]
    expected = by_definition(logits[0], logits[1], logits[2].flip(-1), labels, 2.0)
    batched = [{name: value[part] for name, value in inputs.items()} for part in (slice(4), slice(4, 9))]
    labelled = [batch | {"labels": labels[part]} for batch, part in zip(batched, (slice(4), slice(4, 9)), strict=True)]
    found = measure_portability(reward, target, labelled, strength=2.0)
    assert_equal(found, expected)

    prt = (logits[2].flip(-1).log_softmax(-1) + 2 * logits[0]).argmax(-1) == labels
    alone = logits[2].flip(-1).argmax(-1) == labels
    differences = prt.double().numpy() - alone.double().numpy()
    assert found.advantage["target"] == pytest.approx(differences.mean())
    assert found.standard_error["target"] == pytest.approx(differences.std(ddof=1) / 3)

    unlabelled = measure_portability(reward, target, batched, strength=2.0)
    assert (unlabelled.eps, unlabelled.c_mean) == pytest.approx((expected["eps"], expected["c_mean"]), rel=1e-4)
    assert (unlabelled.nll, unlabelled.accuracy) == (None, None)
    assert unlabelled.verdict() == (None, ["the data has no labels, so better and worse are unknown"])


def test_standard_errors_take_rows_as_draws(tokenizer):
    """A text of many tokens is one draw: d = sum_i D_i / sum_i n_i has the variance of a ratio."""
    base, target, rows = tiny.llama(1), tiny.llama(2), tiny.texts(6)
    reward = text_reward(base, tokenizer)
    whole = measure_portability(reward, target, padded(rows, "right", 4))
    each = [measure_portability(reward, target, padded(rows.select([row]), "right", 1)) for row in range(6)]
    counts = np.array([one.positions for one in each])
    for rival in RIVALS:
        sums = counts * [one.advantage[rival] for one in each]
        mean = sums.sum() / counts.sum()
        assert whole.advantage[rival] == pytest.approx(mean)
        assert whole.advantage[rival] == pytest.approx(whole.nll[rival] - whole.nll["prt_target"])
        error = math.sqrt(6 / 5 * ((sums - mean * counts) ** 2).sum()) / counts.sum()
        assert whole.standard_error[rival] == pytest.approx(error)


def test_a_target_that_is_the_source_is_no_distance_away(tokenizer):
    base = tiny.llama(1)
    reward = text_reward(base, tokenizer)
    found = measure_portability(reward, base, padded(tiny.texts(4), "right", 4))
    assert found.eps == pytest.approx(0, abs=1e-9)
    assert found.nll["prt_target"] == pytest.approx(found.nll["prt_source"])


def test_a_reward_of_zero_is_not_concentrated_and_not_worth_porting(tokenizer):
    reward = RewardModel.from_base(
        tiny.llama(1), tokenizer, LoraConfig(target_modules="all-linear"), reward_init="zero"
    )
    found = measure_portability(reward, tiny.llama(2), padded(tiny.texts(4), "right", 4))
    assert (found.c_mean, found.c_max) == pytest.approx((1, 1))
    assert found.nll["reward_only"] == pytest.approx(math.log(tiny.VOCABULARY))
    assert found.nll["prt_target"] == pytest.approx(found.nll["target"])
    worth, reasons = found.verdict()
    assert worth is False
    assert "target with the reward no better than the target by itself: +0.000 +- 0.000 nats per token" in reasons


def test_large_rewards_do_not_overflow(tokenizer):
    """e^r is far outside float32."""
    base, target, rows = tiny.llama(1), tiny.llama(2), tiny.texts(2)
    reward = text_reward(base, tokenizer)
    found = measure_portability(reward, target, padded(rows, "left", 2), strength=20.0)
    ids = torch.tensor([rows[0]["input_ids"]])
    assert 20 * reward(input_ids=ids).max() > 100
    assert_equal(found, text_by_definition(reward, base, target, rows, 20.0), 1e-3)
    beyond = measure_portability(reward, target, padded(rows, "left", 2), strength=1e4)
    assert 1 < beyond.c_mean < beyond.c_max < math.inf
    assert math.isfinite(beyond.nll["prt_target"]) and beyond.to_dict()["nll"] == beyond.nll


def test_the_quantities_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    assert divergence(p.log(), q.log()).tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.inf])
    reward = torch.tensor([[math.log(3), 0.0, math.log(2)]])
    assert log_concentration(p[:1].log(), reward).exp().item() == pytest.approx(3 / 2)


def test_the_bound_of_the_proposition_holds():
    """|pi e^r / Z - pi' e^r / Z'| summed is at most 2 C |pi - pi'|, and that at most 2 C sqrt(2 eps) (Pinsker)."""
    torch.manual_seed(0)
    source, target = torch.randn(500, 6).log_softmax(-1), torch.randn(500, 6)
    target = (source + 0.3 * target).log_softmax(-1)
    reward = 2 * torch.randn(500, 6)
    apart = ((source + reward).softmax(-1) - (target + reward).softmax(-1)).abs().sum(-1)
    bound = 2 * log_concentration(source, reward).exp() * (2 * divergence(source, target)).sqrt()
    assert (apart <= bound + 1e-6).all()


def of(advantage, error, task="text-generation"):
    figures = {"task": task, "rows": 9, "positions": 9, "strength": 1.0, "eps": 1.0, "c_mean": 1.0, "c_max": 1.0}
    errors = dict.fromkeys(RIVALS, error)
    return Portability(**figures, advantage=dict(zip(RIVALS, advantage, strict=True)), standard_error=errors)


def test_the_verdict_asks_for_two_standard_errors_over_every_rival():
    worth, reasons = of((0.5, 0.3, 0.2), 0.09).verdict()
    assert worth is True and reasons == [
        "target with the reward better than the target by itself: +0.500 +- 0.090 nats per token",
        "target with the reward better than the source with it: +0.300 +- 0.090 nats per token",
        "target with the reward better than the reward by itself: +0.200 +- 0.090 nats per token",
    ]
    assert of((0.5, 0.3, 0.2), 0.11).verdict()[0] is None
    worth, reasons = of((0.5, -0.3, 0.1), 0.1, "image-classification").verdict()
    assert worth is False
    assert reasons[1:] == [
        "target with the reward no better than the source with it: -0.300 +- 0.100 in accuracy",
        "target with the reward within noise of the reward by itself: +0.100 +- 0.100 in accuracy",
    ]


def test_json_has_no_infinity():
    ruled_out = replace(of((0.5, 0.3, 0.2), 0.1), eps=math.inf, nll={"target": math.inf, "source": 1.0})
    assert ruled_out.to_dict()["eps"] is None and ruled_out.to_dict()["nll"] == {"target": None, "source": 1.0}


def test_what_cannot_be_measured_is_refused(tokenizer):
    base, target = tiny.llama(1, max_position_embeddings=16), tiny.llama(2)
    reward = text_reward(base, tokenizer)
    rows = tiny.texts(2)
    ignored = [{"input_ids": tiny.prompts(), "labels": torch.full((2, 7), -100)}]
    with pytest.raises(PRTValueError, match="0 supervised positions in the data"):
        measure_portability(reward, target, ignored)
    with pytest.raises(ContextLengthError, match="17 tokens"):
        measure_portability(reward, target, [{"input_ids": tiny.prompts(1, 17)}])
    with pytest.raises(PRTValueError, match="found: pixel_values"):
        measure_portability(reward, target, [{"pixel_values": torch.zeros(1, 1, 8, 8)}])
    with pytest.raises(LabelMismatchError, match="unknown: \\['black'\\]"):
        images = RewardModel.from_base(tiny.vit(1))
        measure_portability(images, tiny.resnet(2, names=[*tiny.COLOURS[:3], "black"]), [])
    with torch.no_grad():
        next(iter(reward.network.parameters())).fill_(math.nan)
    with pytest.raises(NonFiniteRewardError):
        measure_portability(reward, target, padded(rows, "right", 2))


def test_rows_of_every_kind_become_batches(tokenizer):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer)
    text = " ".join(f"w{index}" for index in range(3, 11))
    ids = list(range(3, 11))

    def first(rows, length=99):
        (batch,) = batches(Dataset.from_list(rows), reward, 8, length)
        return batch

    batch = first([{"text": text}, {"text": "w5 w6"}, {"text": "w5"}], length=5)
    assert batch["input_ids"].tolist() == [ids[:5], [5, 6, 2, 0, 0], [5, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [ids[:5], [5, 6, 2, -100, -100], [5, 2, -100, -100, -100]]
    batch = first([{"prompt": "w3 w4 w5 ", "completion": "w6 w7"}])
    assert batch["input_ids"].tolist() == [[*ids[:5], 2]] and batch["labels"].tolist() == [[-100] * 3 + [6, 7, 2]]
    batch = first([{"input_ids": ids, "labels": [-100, *ids[1:]]}])
    assert batch["labels"].tolist() == [[-100, *ids[1:]]]
    messages = [{"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]}]
    with pytest.raises(PRTValueError, match="no chat template"):
        first(messages)
    templated = tiny.tokenizer()
    templated.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}"
    reward.processing_class = templated
    assert first(messages)["input_ids"].tolist() == [[3, 4, 3, 5]]
    turns = [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w5"}]
    assert first([{"conversations": turns}])["input_ids"].tolist() == [[3, 4, 3, 5]]
    (asked, answered) = messages[0]["messages"]
    batch = first([{"prompt": [asked], "completion": [answered]}])
    assert batch["input_ids"].tolist() == [[3, 4, 3, 5]] and batch["labels"].tolist() == [[-100, -100, 3, 5]]
    with pytest.raises(PRTValueError, match="found: None in row 1"):
        first([{"text": text}, {"text": None}])
    with pytest.raises(PRTValueError, match="found: question"):
        first([{"question": text}])

    reward = RewardModel.from_base(tiny.bert(1), tokenizer)
    features = Features({"text": Value("string"), "label": ClassLabel(names=tiny.COLOURS[::-1])})
    rows = Dataset.from_dict({"text": ["w3 w4 w5", "w6"], "label": [0, 3]}, features=features)
    (batch,) = batches(rows, reward, 8, 2)
    assert batch["labels"].tolist() == [3, 0], "by name"
    assert batch["input_ids"].tolist() == [[3, 4], [0, 6]]
    (batch,) = batches(rows.remove_columns("label"), reward, 8, 2)
    assert "labels" not in batch
    reward = RewardModel.from_base(tiny.vit(1))
    with pytest.raises(PRTValueError, match="no image processor"):
        list(batches(Dataset.from_dict({"image": [0]}), reward, 8, 2))
