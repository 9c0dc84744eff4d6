"""Load the user's own models and data, with rows set aside for evaluation."""

from typing import Any

from datasets import Dataset, DatasetDict

from ..errors import PRTValueError
from ..training.data import first_line, load_data

TEST_SPLITS = ("test", "validation")
MOST_TEST_ROWS = 200


def load(auto_class: type, place: str, **kwargs: Any) -> Any:
    """Return `auto_class.from_pretrained(place)`; raise `PRTValueError` if it cannot be loaded."""
    try:
        return auto_class.from_pretrained(place, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise PRTValueError(
            f"{place} cannot be loaded.",
            expected=f"an id of the Hub, or a folder, that {auto_class.__name__} can load",
            found=first_line(error),
        ) from error


def load_splits(dataset: str, seed: int) -> tuple[Dataset, Dataset]:
    """Return rows for tuning and rows for evaluation; the latter are a split of that name, or a tenth of the rows."""
    train, test = _split(load_data(dataset), seed)
    test = test.select(range(min(len(test), MOST_TEST_ROWS)))
    return train, test


def _split(parts: DatasetDict, seed: int) -> tuple[Dataset, Dataset]:
    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    for name in TEST_SPLITS:
        if name in parts and parts[name] is not train:
            return train, parts[name]
    if len(train) < 2:
        raise PRTValueError(
            "The dataset is too small to set rows aside.", expected="at least 2 rows", found=f"{len(train)}"
        )
    halves = train.train_test_split(test_size=max(1, len(train) // 10), seed=seed)
    return halves["train"], halves["test"]
