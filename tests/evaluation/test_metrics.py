"""Metrics by hand, alone, in batches and combined."""

import math
from decimal import Decimal

import evaluate
import pytest

from prt_hf.errors import PRTValueError
from prt_hf.evaluation.metrics import GSM8K, Accuracy, ExactMatch, Perplexity, last_number


@pytest.fixture
def made(tmp_path):
    """Metrics that keep their columns in a folder of the test."""
    return lambda kind: kind(cache_dir=str(tmp_path))


def test_accuracy_is_the_share_of_right_ids(made):
    metric = made(Accuracy)
    metric.add_batch(predictions=[0, 1], references=[0, 2])
    metric.add_batch(predictions=[3, 3], references=[3, 3])
    assert metric.compute() == {"accuracy": 0.75}
    assert metric.compute(predictions=[1], references=[0]) == {"accuracy": 0.0}, "nothing is left of the last time"


def test_exact_match_leaves_out_what_it_is_told_to(made):
    texts = {
        "predictions": ["Paris.", "the Seine 7", " Rome", "Oslo"],
        "references": ["paris", "Seine 8", "Rome", "Oslo"],
    }

    def match(**options):
        return made(ExactMatch).compute(**texts, **options)["exact_match"]

    assert match() == 0.25
    assert match(ignore_case=True) == 0.25
    assert match(ignore_case=True, ignore_punctuation=True) == 0.5
    assert match(strip=True) == 0.5
    assert match(regexes_to_ignore=["the ", r"\d$"]) == 0.5
    assert match(regexes_to_ignore=["the "], ignore_numbers=True) == 0.5
    everything = {"ignore_case": True, "ignore_punctuation": True, "ignore_numbers": True, "strip": True}
    assert match(regexes_to_ignore=["the "], **everything) == 1.0


@pytest.mark.parametrize(
    "text, number",
    [
        ("48 + 24 = 72", 72),
        ("#### 1,234", 1234),
        ("She pays $1,250.50.", "1250.5"),
        ("It is 18.00 dollars", 18),
        ("7 apples, 3 pears, and that is all", 3),
        ("1,2 and 12,34", 34),
        ("a loss of -5", -5),
        ("a loss of -$5 or $-6", -6),
        ("from 10-5", 5),
        ("a loss of \u22125", -5),
        ("1.5e3 or 2E-2", "0.02"),
        ("9e9999", 9999),
        ("20 - 8", 8),
        ("half is .5", ".5"),
        ("50%", 50),
        ("**42**", 42),
        ("(3)", 3),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_compares_the_last_numbers_by_value(made):
    references = [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "#### 1,000",
        "2 + 2 = 4\n#### 4",
        "It is 5, or\n#### -5",
        "9",
    ]
    predictions = ["So she sold 72.", "The answer is $1000.00", "4 at first, then 5", "-5", "I do not know"]
    assert made(GSM8K).compute(predictions=predictions, references=references) == {"gsm8k": 0.6}
    message = r"no answer.\n  expected: a number after `####`\n  found: '3 ####' in row 1"
    with pytest.raises(PRTValueError, match=message):
        made(GSM8K).compute(predictions=["1", "3"], references=["#### 1", "3 ####"])


def test_perplexity_weighs_tokens_alike(made):
    metric = made(Perplexity)
    metric.add_batch(predictions=[6.0], references=[3])
    metric.add_batch(predictions=[0.0, 2.0], references=[0, 1])
    assert metric.compute() == {"nll": 2.0, "perplexity": pytest.approx(math.e**2)}
    assert made(Perplexity).compute(predictions=[1e6], references=[1])["perplexity"] == math.inf
    with pytest.raises(PRTValueError, match="There are no tokens"):
        made(Perplexity).compute(predictions=[0.0], references=[0])


@pytest.mark.parametrize("kind", [Accuracy, ExactMatch, GSM8K])
def test_nothing_to_compare_is_told(made, kind):
    with pytest.raises(PRTValueError, match="There is nothing to compare"):
        made(kind).compute(predictions=[], references=[])


def test_they_combine(made):
    both = evaluate.combine([made(ExactMatch), made(GSM8K)])
    both.add_batch(predictions=["#### 4"], references=["#### 4"])
    both.add_batch(predictions=["4"], references=["#### 4"])
    assert both.compute() == {"exact_match": 0.5, "gsm8k": 1.0}
