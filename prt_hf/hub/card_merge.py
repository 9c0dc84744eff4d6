"""Merge a rendered card into one that users may have edited."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump
from transformers.utils import logging

from ..errors import RewardFileError
from .folder import CARD_NAME, replace_file

logger = logging.get_logger(__name__)

RENDERED = ("library_name", "pipeline_tag", "base_model", "base_model_relation")  # metadata that users do not set
KINDS = {
    "adapter": "reward-adapter",
    "full": "full-reward",
    "recipe": "prt-recipe",
    "baked": "baked-reward",
}  # tags; a card has one
OLD_CARD_NAME = "README.old.md"

_BLOCK = re.compile(
    r"^<!-- prt_hf:(?P<name>[a-z]+) (?P<digest>[0-9a-f]{8}) -->[ \t]*\n(?P<text>.*?)^<!-- /prt_hf:(?P=name) -->[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_UNITED = ("tags", "datasets")
# Limits on cards that others may have written.
_MOST_CHARACTERS, _MOST_BLOCKS, _MOST_LEVELS = 200_000, 100, 20


def block(name: str, text: str) -> str:
    """Return a part of a card between two comments; the first holds a digest of the text, by which edits are found."""
    text = re.sub(r"\n{3,}", "\n\n", _normalised(text))
    return f"<!-- prt_hf:{name} {_digest(text)} -->\n{text}{text and chr(10)}<!-- /prt_hf:{name} -->"


def merge_cards(old: str, new: str) -> str:
    """Return the card `old`, brought up to date by the card `new`.

    Body: a block of `old` that nobody edited is replaced by that of `new`, unless the new one is empty. Edited blocks
    and all text outside blocks are kept, and deleted blocks stay deleted. If only `new` was edited, or `old` has no
    body, the body of `new` is taken, with its empty blocks filled from `old`.

    Metadata: entries of `old` are kept, `new` adds others and sets those of `RENDERED`. `tags` and `datasets` are
    united; results of the same task, data and metric get the new value.

    Raises:
        RewardFileError: The metadata of a card cannot be read, or the card is too large.
    """
    (old_entries, old_body), (new_entries, new_body) = _parsed(old), _parsed(new)
    return _card(_merged_entries(old_entries, new_entries), _merged_body(old_body, new_body))


def merged_or_new(old: str | None, new: str) -> str:
    """Return [`merge_cards`] of the two, or `new` if there is no old card or it cannot be read.

    So a save never fails because of a card.
    """
    try:
        return new if old is None else merge_cards(old, new)
    except RewardFileError as error:
        logger.warning(f"A new card is written. {error}")
        return new


def with_metadata(card: str, **entries: Any) -> str:
    """Return the card with these metadata; `tags` and `datasets` are added to those of the card."""
    before, body = _parsed(card)
    united = {name: _united(before.get(name), entries[name]) for name in _UNITED if name in entries}
    return _card(before | entries | united, body)


def read_card(folder: Path) -> str | None:
    """Return the card of a folder, None if there is none."""
    path = folder / CARD_NAME
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


def write_card(folder: Path, card: str, earlier: str | None = None) -> None:
    """Write a card atomically, merged into an earlier one that users may have edited.

    If that cannot be read, it is kept as `README.old.md`.
    """
    try:
        card = card if earlier is None else merge_cards(earlier, card)
    except RewardFileError as error:
        logger.warning(f"The earlier card is kept as {OLD_CARD_NAME}. {error}")
        replace_file(folder / OLD_CARD_NAME, earlier)
    replace_file(folder / CARD_NAME, card)


def _card(entries: dict[str, Any], body: str) -> str:
    return f"---\n{yaml_dump(entries, sort_keys=False).strip()}\n---\n{body}"


def _parsed(card: str) -> tuple[dict[str, Any], str]:
    """Return the metadata and the body of a card; raise `RewardFileError` if it is unreadable or too large."""
    if len(card) > _MOST_CHARACTERS or card.count("<!-- prt_hf:") > _MOST_BLOCKS:
        raise _unreadable(f"{len(card)} characters, {card.count('<!-- prt_hf:')} parts")
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        if re.match(r"\s*---[ \t]*\n[\w-]+:", card):
            raise _unreadable("it begins with `---` and never ends")
        return {}, card
    try:
        entries = yaml.load(found.group(2), Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unreadable(" ".join(str(error).split())) from error
    if not isinstance(entries, dict | None):
        raise _unreadable(f"{type(entries).__name__}: {found.group(2).strip()[:80]}")
    return entries or {}, card[found.end() :]


class _PlainLoader(yaml.SafeLoader):
    """Loads YAML without deep nesting, and without references, by which a few lines can fill any memory."""

    depth = 0

    def compose_node(self, parent, index):
        found = "references" if self.check_event(yaml.AliasEvent) else f"more than {_MOST_LEVELS} levels"
        if found == "references" or self.depth > _MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, f"{found} are not supported", self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _unreadable(found: str) -> RewardFileError:
    return RewardFileError(
        "The card's metadata cannot be read.",
        expected="entries in YAML between two lines `---` at the top of README.md",
        found=found,
        remedy="correct README.md, or delete it to get a new one",
    )


def _merged_body(old: str, new: str) -> str:
    before, now = ({found["name"]: found for found in _BLOCK.finditer(body)} for body in (old, new))

    def chosen(found: re.Match) -> str:
        ours, theirs = now.get(found["name"]), before.get(found["name"])
        if theirs is None or ours is None:
            return found[0]
        if _is_edited(theirs):
            if ours[0] != theirs[0]:
                logger.warning_once(f"The card's part {found['name']!r} was edited, and is kept as it is.")
            return theirs[0]
        return ours[0] if ours["text"] else theirs[0]

    if not old.strip() or (_has_edits(new) and not _has_edits(old)):
        return _BLOCK.sub(chosen, new)
    if (words := _outside(new)) and words != _outside(old):
        logger.warning(f"The card was edited in two places; text of one {CARD_NAME} is not in the other: see both.")
    return _BLOCK.sub(chosen, old)


def _has_edits(body: str) -> bool:
    return bool(_outside(body)) or any(_is_edited(found) for found in _BLOCK.finditer(body))


def _outside(body: str) -> str:
    return " ".join(_BLOCK.sub("", body).split())


def _is_edited(found: re.Match) -> bool:
    return _digest(_normalised(found["text"])) != found["digest"]


def _normalised(text: str) -> str:
    """Strip the ends of lines, as editors may."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _merged_entries(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    entries = new | old | {name: new[name] for name in RENDERED if name in new}
    for name in _UNITED:
        if name in new:
            entries[name] = _united(old.get(name), new[name])
    if old.get("model-index") and new.get("model-index"):
        try:
            entries["model-index"] = _merged_index(old["model-index"], new["model-index"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(f"an incomplete model-index ({type(error).__name__}: {error})") from error
    return entries


def _united(old: Any, new: Any) -> list:
    """Return the values of both lists, in this order; the kind of a card is that of the new one."""
    old, new = ([] if each is None else each if isinstance(each, list) else [each] for each in (old, new))
    kinds = KINDS.values() if any(value in KINDS.values() for value in new) else ()
    kept = [value for value in old if value in new or value not in kinds]
    return [*kept, *(value for value in new if value not in kept)]


def _merged_index(old: list[dict], new: list[dict]) -> list[dict]:
    """Return the old results, those of the same task, data and metric with the new value, then the other new ones."""
    name, results = model_index_to_eval_results(old[:1])
    latest = {_key(result): result for result in model_index_to_eval_results(new)[1]}
    for index, result in enumerate(results):
        if (found := latest.pop(_key(result), None)) is not None:
            results[index] = replace(result, metric_value=found.metric_value, verified=None, verify_token=None)
    return eval_results_to_model_index(name, [*results, *latest.values()]) + old[1:]


def _key(result: EvalResult) -> tuple:
    return result.unique_identifier, result.metric_type, result.metric_name
