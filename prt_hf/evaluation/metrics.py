"""The metrics of the paper's tables as `evaluate.Metric`s that need no network.

They work as the Hub's do: `add`, `add_batch`, `compute`, and `evaluate.combine` for metrics with the same columns.
This module needs the package evaluate, which is part of the extra `eval`; nothing else in prt_hf imports it.
"""

import math
import re
import string
from collections.abc import Iterable
from decimal import Decimal

import datasets

from ..errors import PRTValueError, UnsupportedError

try:
    import evaluate
except ImportError as error:
    raise UnsupportedError(
        "The package evaluate is not installed.",
        expected="evaluate 0.4.6 or newer",
        found="none",
        remedy="pip install evaluate",
    ) from error

_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-\u2212])?\$?(?P<minus_behind>(?<=\$)[-\u2212])?"  # a minus behind a number subtracts
    r"(?P<digits>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?)"
)
_ANSWER_MARK = "####"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)
_CITATION = """\
@article{cobbe2021gsm8k,
  title  = {Training Verifiers to Solve Math Word Problems},
  author = {Cobbe, Karl and others},
  year   = {2021},
}"""


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference; both are ids of labels or tokens.

    `compute(predictions=[0, 1, 1], references=[0, 1, 2])` -> `{"accuracy": 0.667}`
    """

    def _info(self):
        return _described(self, predictions=datasets.Value("int64"), references=datasets.Value("int64"))

    def _compute(self, predictions, references):
        return {"accuracy": _share(map(int.__eq__, predictions, references), len(references))}


class ExactMatch(evaluate.Metric):
    """The share of texts that equal their reference, apart from what the options of `compute` ignore.

    The options are those of the Hub's metric of this name, and apply to both texts in this order:
    `regexes_to_ignore` (list of patterns), `ignore_case`, `ignore_punctuation`, `ignore_numbers`; then `strip` removes
    white space at either end.

    `compute(predictions=["Paris."], references=["paris"], ignore_case=True, ignore_punctuation=True)`
    -> `{"exact_match": 1.0}`
    """

    def _info(self):
        return _described(self, predictions=datasets.Value("string"), references=datasets.Value("string"))

    def _compute(
        self,
        predictions,
        references,
        regexes_to_ignore=(),
        ignore_case=False,
        ignore_punctuation=False,
        ignore_numbers=False,
        strip=False,
    ):
        def normalised(text: str) -> str:
            for pattern in regexes_to_ignore or ():
                text = re.sub(pattern, "", text)
            text = text.lower() if ignore_case else text
            text = text.translate(_PUNCTUATION) if ignore_punctuation else text
            text = text.translate(_DIGITS) if ignore_numbers else text
            return text.strip() if strip else text

        pairs = zip(predictions, references, strict=True)
        return {"exact_match": _share((normalised(one) == normalised(other) for one, other in pairs), len(references))}


class GSM8K(evaluate.Metric):
    """The share of grade-school problems with the right answer (Tables 4 and 6).

    An answer is right if the last number of the prediction has the value of the number after `####` in the reference,
    or of its last number if there is no `####`. Commas between thousands, `$`, decimals of zero and a full stop after
    the number make no difference; a prediction without a number is wrong.

    `compute(predictions=["48 + 24 = 72, so she sold $72.00."], references=["48 / 2 = 24 ... #### 72"])`
    -> `{"gsm8k": 1.0}`
    """

    def _info(self):
        return _described(self, predictions=datasets.Value("string"), references=datasets.Value("string"))

    def _compute(self, predictions, references):
        answers = [last_number(reference.rpartition(_ANSWER_MARK)[2]) for reference in references]
        if None in answers:
            row = answers.index(None)
            raise PRTValueError(
                "A reference has no answer.",
                expected=f"a number after `{_ANSWER_MARK}`",
                found=f"{references[row][-80:]!r} in row {row}",
            )
        found = map(last_number, predictions)
        return {"gsm8k": _share((one == other for one, other in zip(found, answers, strict=True)), len(answers))}


class Perplexity(evaluate.Metric):
    """Negative log-likelihood per token, in nats, and its exponential.

    Args:
        predictions: For each text, the sum of -log pi over its tokens, nats.
        references: For each text, its number of tokens.

    `compute(predictions=[6.0, 2.0], references=[3, 1])` -> `{"nll": 2.0, "perplexity": 7.39}`: long texts count more.
    """

    def _info(self):
        return _described(self, predictions=datasets.Value("float64"), references=datasets.Value("int64"))

    def _compute(self, predictions, references):
        tokens = sum(references)
        if tokens < 1 or min(references) < 0:
            raise PRTValueError("There are no tokens.", expected="at least one", found=str(references[:10]))
        nll = math.fsum(predictions) / tokens
        return {"nll": nll, "perplexity": math.exp(nll) if nll < 709 else math.inf}


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, None if there is none: `"it costs $1,250.50."` -> 1250.5."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    number = Decimal(found[-1]["digits"].replace(",", ""))
    return -number if found[-1]["minus"] or found[-1]["minus_behind"] else number


def _share(are_right: Iterable[bool], count: int) -> float:
    if not count:
        raise PRTValueError("There is nothing to compare.", expected="at least one prediction", found="none")
    return sum(are_right) / count


def _described(metric: evaluate.Metric, **features: datasets.Value) -> evaluate.MetricInfo:
    description = type(metric).__doc__
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION if isinstance(metric, GSM8K) else "",
        inputs_description=description,
        features=datasets.Features(features),
    )
