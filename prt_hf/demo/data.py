"""The user's own models and data, of the Hub or in files."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ..errors import PRTValueError

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TEST_SPLITS = ("test", "validation")
MOST_TEST_ROWS = 200


def load(auto_class: type, place: str, **kwargs):
    """`auto_class.from_pretrained(place)`.

    Raises:
        PRTValueError: there is no such thing at that place.
    """
    try:
        return auto_class.from_pretrained(place, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise PRTValueError(
            f"{place} cannot be loaded.",
            expected=f"an id of the Hub, or a folder, that {auto_class.__name__} can load",
            found=_first_line(error),
        ) from error


def load_splits(dataset: str, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to tune on and rows to judge on; the latter from a split of that name, or every tenth row set aside.

    Raises:
        PRTValueError: it cannot be loaded, or has too few rows.
    """
    path = Path(dataset)
    try:
        if path.is_file() and path.suffix in FORMATS:
            parts = load_dataset(FORMATS[path.suffix], data_files=str(path))
        else:
            parts = load_dataset(dataset)
    except Exception as error:  # the datasets library raises what its many back ends raise
        raise PRTValueError(
            f"The dataset {dataset} cannot be loaded.",
            expected=f"a dataset of the Hub, a folder, or a file ({', '.join(FORMATS)})",
            found=_first_line(error),
        ) from error
    train, test = _split(parts, seed)
    test = test.select(range(min(len(test), MOST_TEST_ROWS)))
    return train, test


def require_column(rows: Dataset, name: str, dataset: str) -> None:
    """Raises:
    PRTValueError: the column is missing.
    """
    if name not in rows.column_names:
        raise PRTValueError(
            f"The dataset {dataset} has no column {name!r}.",
            expected=f"a column {name!r}",
            found=", ".join(rows.column_names),
            remedy=f"rename the column that holds it to {name!r}",
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
