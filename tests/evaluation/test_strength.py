"""The proposed strength against a search in float64 that computes everything anew for each strength."""

import json
import math

import pytest
import tiny
import torch
from peft import LoraConfig

from prt_hf import RewardModel
from prt_hf.evaluation import Portability, batches, measure_portability
from prt_hf.evaluation.reading import REWARD, Part
from prt_hf.evaluation.strength import Proposal, propose
from prt_hf.evaluation.tally import FACTORS, TARGET, Tally


def reward_on(base, tokenizer):
    torch.manual_seed(0)
    return RewardModel.from_base(base, tokenizer, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def search(rows, present):
    """Return the proposal by its definition, for rows of `(log pi, r, labels)`."""

    def losses_and_hits(row, strength):
        log_pi, reward, labels = row
        log_probs = (log_pi.double() + strength * reward.double()).log_softmax(-1)
        at_labels = -log_probs[torch.arange(len(labels)), labels]
        return at_labels, (log_probs.argmax(-1) == labels).double()

    def mean(half, strength, of=0):
        return torch.cat([losses_and_hits(row, strength)[of] for row in half]).mean().item()

    first, second = rows[::2], rows[1::2]
    strengths = [factor * present for factor in FACTORS]
    best = min(strengths, key=lambda strength: mean(first, strength))
    gain = mean(second, present) - mean(second, best)
    counts = torch.tensor([len(row[2]) for row in second])
    sums = torch.stack([(losses_and_hits(r, present)[0] - losses_and_hits(r, best)[0]).sum() for r in second])
    variance = len(second) / (len(second) - 1) * ((sums - gain * counts) ** 2).sum() / counts.sum() ** 2
    more = mean(second, best, 1) - mean(second, present, 1)
    return Proposal(present, pytest.approx(best), len(second), gain, math.sqrt(variance), more)


def assert_equal(found, expected):
    for name, value in vars(expected).items():
        assert getattr(found, name) == (value if name == "strength" else pytest.approx(value, rel=1e-4, abs=2e-6)), name


@torch.no_grad()
@pytest.mark.parametrize("present", [1.0, 2.5])
def test_the_proposal_equals_a_search_that_reads_everything_anew(tokenizer, present):
    source, target, texts = tiny.llama(1), tiny.gpt2(2, vocab_size=104), tiny.texts(9)
    reward = reward_on(source, tokenizer)
    found = measure_portability(reward, target, batches(texts, reward, 4, 99), strength=present).proposal
    rows = []
    for row in texts:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        log_pi, r = (net(ids).logits[0, :-1, : tiny.VOCABULARY] for net in (target, reward.network))
        rows.append([value[labels != -100] for value in (log_pi, r, labels)])
    assert_equal(found, search(rows, present))


@torch.no_grad()
def test_classifiers_get_a_proposal_by_likelihood(tokenizer):
    source, target = tiny.vit(1), tiny.resnet(2, names=tiny.COLOURS[::-1])
    reward = reward_on(source, None)
    pixels = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    found = measure_portability(reward, target, [{"pixel_values": pixels, "labels": labels}])
    log_pi, r = target(pixel_values=pixels).logits.flip(-1), reward.network(pixel_values=pixels).logits
    rows = [(log_pi[[row]], r[[row]], labels[[row]]) for row in range(9)]
    assert_equal(found.proposal, search(rows, 1.0))
    assert measure_portability(reward, target, [{"pixel_values": pixels}]).proposal is None, "without labels"


def test_the_strength_that_the_data_was_drawn_with_is_found():
    """Labels are drawn from pi e^{0.6 r}; the loss has its lowest expectation there, by Gibbs' inequality."""
    generator = torch.Generator().manual_seed(0)
    tally = Tally(1.0)
    log_pi = torch.randn(4000, 7, generator=generator, dtype=torch.float64)
    reward = 3 * torch.randn(4000, 7, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((log_pi + 0.6 * reward).softmax(-1), 1, generator=generator)[:, 0]
    tally.add(Part({TARGET: log_pi, REWARD: reward}, labels, torch.arange(4000) // 10))
    found = propose(tally)
    assert found.strength == pytest.approx(0.6, abs=0.11) and found.is_better and found.rows == 200
    assert str(found).startswith(f"strength: use --strength {found.strength:g} in the place of 1: +0.")
    tally = Tally(found.strength)
    tally.add(Part({TARGET: log_pi, REWARD: reward}, labels, torch.arange(4000) // 10))
    again = propose(tally)
    assert not again.is_better, "what was proposed is not replaced again"


def test_a_reward_of_zero_is_left_as_it_is():
    tally = Tally(1.0)
    tally.add(Part({TARGET: torch.zeros(6, 3), REWARD: torch.zeros(6, 3)}, torch.arange(6) % 3, torch.arange(6)))
    found = propose(tally)
    assert (found.strength, found.is_better) == (1.0, False)
    assert str(found) == "strength: 1, the present one, is best on half of the rows"


def test_what_the_proposal_says():
    found = Proposal(1.0, 0.7, 50, 0.0123, 0.004, -0.002)
    figures = "+0.0123 +- 0.0040 nats, -0.2 points of accuracy on the 50 other rows"
    assert str(found) == f"strength: use --strength 0.7 in the place of 1: {figures}"
    assert str(Proposal(0.5, 1.0, 50, 0.0123, 0.004, -0.002)).endswith(f"{figures}; the search ends there")
    assert str(Proposal(1.0, 0.7, 50, 0.0123, 0.008, -0.002)).startswith(
        "strength: stay at 1; 0.7 is best on half of the rows, and within noise or worse on the others: +0.0123"
    )


def test_a_few_rows_give_no_proposal_and_files_keep_one(tokenizer):
    source, target = tiny.llama(1), tiny.llama(2)
    reward = reward_on(source, tokenizer)
    few, enough = (measure_portability(reward, target, batches(tiny.texts(rows), reward, 4, 99)) for rows in (3, 4))
    assert few.proposal is None and enough.proposal.rows == 2
    for found in (few, enough):
        assert Portability.from_dict(json.loads(json.dumps(found.to_dict()))) == found
