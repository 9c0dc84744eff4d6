"""Store results as JSON while they are measured, so that an interrupted run can continue."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RewardFileError
from ..hub.folder import replace_file

T = TypeVar("T")


def load_results(path: Path, parse: Callable[[Any], T], expected: str) -> T | None:
    """Return what `parse` makes of the JSON in a file, None if there is no file.

    What cannot be read raises `RewardFileError`, which names what is `expected`.
    """
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RewardFileError.unreadable(
            path, error, expected=expected, remedy="delete it, or name another folder"
        ) from error


def save_results(path: Path, entries: dict) -> None:
    """Write results atomically."""
    replace_file(path, json.dumps(entries, indent=2, allow_nan=False) + "\n")


def key_of(entries: dict) -> str:
    """Return a digest of all that results depend on; they are used again only under the same key."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
