"""Files of reports, each replaced at one stroke, and the Markdown in them."""

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import PRTValueError


def check_folder(folder: str | Path) -> None:
    """Before the work that is to be kept there. Nothing is made yet.

    Raises:
        PRTValueError: it cannot be written.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise PRTValueError(
            f"Nothing can be written into {folder}.",
            expected="a folder that can be written, or made",
            found=f"{there} is {'not writable' if there.is_dir() else 'a file'}",
        )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` writes takes the place of `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def markdown_table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def short_name(name: str) -> str:
    """Ids as they are, of paths the last part; nothing that would end a cell or a code span."""
    name = Path(name).absolute().name if Path(name).exists() else name
    return " ".join(name.split()).replace("|", "/").replace("`", "'")
