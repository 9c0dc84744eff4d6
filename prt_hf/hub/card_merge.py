"""Cards that are rendered again and again, and edited in between: which parts are still ours to replace."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.utils import logging

from ..errors import RewardFileError
from .folder import CARD_NAME

logger = logging.get_logger(__name__)

RENDERED = ("library_name", "pipeline_tag", "base_model", "base_model_relation", "model-index")
TRAINING, RESULTS = "training", "results"  # blocks
OLD_CARD_NAME = "README.old.md"

_BLOCK = re.compile(
    r"^<!-- prt_hf:(?P<name>[a-z]+) (?P<digest>[0-9a-f]{8}) -->[ \t]*\n(?P<text>.*?)^<!-- /prt_hf:(?P=name) -->[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
KINDS = {"adapter": "reward-adapter", "full": "full-reward", "recipe": "prt-recipe"}  # tags; a card has one
_IDENTITY = re.compile(r"<!-- config [0-9a-f]{8} -->")
_UNITED = ("tags", "datasets")
_LONGEST = 200_000  # characters of a card that is read: others may have written it
_MOST_BLOCKS, _DEEPEST = 100, 20
_NO_METADATA = re.compile(r"\s*---[ \t]*\n---[ \t]*(\n|$)")


def block(name: str, text: str) -> str:
    """A part of a card between two comments, of which the first carries a digest of the text.

    Without text it is an empty place, which a later card may fill.
    """
    text = re.sub(r"\n{3,}", "\n\n", _normalised(text))
    return f"<!-- prt_hf:{name} {_digest(text)} -->\n{text}{text and chr(10)}<!-- /prt_hf:{name} -->"


def identity(config: dict[str, Any]) -> str:
    """A comment by which cards of the same configuration know one another."""
    told = {name: value for name, value in config.items() if value and name != "format_version"}
    return f"<!-- config {_digest(json.dumps(told, sort_keys=True))} -->"


def merge_cards(old: str, new: str) -> str:
    """The card `old`, with what `new` knows better; `old` may be a user's own, `new` was rendered.

    A block whose text is as it was rendered is replaced, unless the new one is empty. An edited block is kept, with a
    warning; a deleted one stays deleted; all text outside is kept. Of the metadata, `tags` and `datasets` are united,
    results with the same task, data and metric replaced, what is known of the reward set, and all else is left as it is
    written. A card without text becomes `new`, with the metadata of both. Where `new` is of another reward or training
    than `old`, what `old` tells of training, results and base goes.

    Raises:
        RewardFileError: the metadata of `old` cannot be read.
    """
    newline = "\r\n" if "\r\n" in old else "\n"
    old_yaml, old_body = _parts(old)
    new_yaml, new_body = _parts(new)
    entries = _read(old_yaml)
    is_another = _is_another(old_body, new_body)
    if is_another:
        entries = {name: value for name, value in entries.items() if name not in RENDERED}
    entries = _merged_entries(entries, _read(new_yaml))
    body = _merged_body(old_body, new_body, is_another) if old_body.strip() else new_body
    return f"---\n{_with_entries(old_yaml, entries)}\n---\n{body}".replace("\n", newline)


def merged_or_new(old: str | None, new: str) -> str:
    """Return [`merge_cards`] of the two, or `new` where there is no old card or one that cannot be read: no weights are
    lost for its sake."""
    if old is None:
        return new
    try:
        return merge_cards(old, new)
    except RewardFileError as error:
        logger.warning(f"A new card is written. {error}")
        return new


def join_cards(there: str, ours: str) -> str:
    """Of the cards that lie at the Hub and here, the one that users have written into, with what `ours` knows better.
    Where both were edited, that of the Hub, with a warning."""
    if not is_edited(ours) or is_edited(there):
        joined = merge_cards(there, ours)
        if is_edited(ours) and _parts(joined)[1] != _parts(merge_cards(ours, joined))[1]:
            logger.warning(f"The card was edited here and on the Hub, where it is kept as it is: see both {CARD_NAME}.")
        return joined
    metadata, _ = _parts(there)
    return merge_cards(f"---\n{metadata}\n---\n", ours)


def is_edited(card: str) -> bool:
    """Whether its text is not as it was rendered."""
    _, body = _parts(card)
    blocks = list(_BLOCK.finditer(body))
    outside = _BLOCK.sub("", body)
    return bool(outside.strip()) or any(_digest(_normalised(found["text"])) != found["digest"] for found in blocks)


def with_metadata(card: str, **entries: Any) -> str:
    """A card with other metadata; tags and data sets are united with those there."""
    given = dict(entries)
    for name in _UNITED:
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    metadata, body = _parts(card)
    before = _read(metadata)
    merged = before | given | {name: _merged_entries(before, given)[name] for name in _UNITED if name in given}
    return f"---\n{_with_entries(metadata, merged)}\n---\n{body}"


def read_card(folder: Path) -> str | None:
    """The card of a folder, None where there is none."""
    path = folder / CARD_NAME
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


def write_card(folder: Path, card: str, earlier: str | None = None) -> None:
    """Write a card at one stroke, merged with what users have written into an earlier one.

    Args:
        earlier (*optional*): where it cannot be read, it is kept as `README.old.md`.
    """
    try:
        card = card if earlier is None else merge_cards(earlier, card)
    except RewardFileError as error:
        logger.warning(f"The earlier card is kept as {OLD_CARD_NAME}. {error}")
        _replace(folder / OLD_CARD_NAME, earlier)
    _replace(folder / CARD_NAME, card)


def _replace(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_bytes(text.encode())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _parts(card: str) -> tuple[str, str]:
    """Return metadata and body, with plain line ends.

    Raises:
        RewardFileError: it is not delimited, or too large to be merged in a reasonable time.
    """
    if len(card) > _LONGEST or card.count("<!-- prt_hf:") > _MOST_BLOCKS:
        raise _unreadable(f"{len(card)} characters, {card.count('<!-- prt_hf:')} parts")
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if found := REGEX_YAML_BLOCK.search(card):
        return found.group(2), card[found.end() :]
    if found := _NO_METADATA.match(card):
        return "", card[found.end() :]
    if re.match(r"\s*---[ \t]*\n[\w-]+:", card):
        raise _unreadable("it begins with `---` and never ends")
    return "", card


def _read(text: str) -> dict[str, Any]:
    try:
        entries = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unreadable(" ".join(str(error).split())) from error
    if not isinstance(entries, dict | None):
        raise _unreadable(f"{type(entries).__name__}: {text.strip()[:80]}")
    return entries or {}


class _PlainLoader(yaml.SafeLoader):
    """Loads YAML without references, by which a few lines can stand for more than any memory holds, and without deep
    nesting."""

    depth = 0

    def compose_node(self, parent, index):
        found = "references" if self.check_event(yaml.AliasEvent) else f"more than {_DEEPEST} levels"
        if found == "references" or self.depth > _DEEPEST:
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


def _is_another(old: str, new: str) -> bool:
    """Other configurations, or other trainings, where both cards tell."""
    before, now = ({found["name"]: found["text"] for found in _BLOCK.finditer(body)} for body in (old, new))
    pairs = [(body.get(TRAINING), _IDENTITY.findall(body.get("about", ""))) for body in (before, now)]
    return any(was and now and was != now for was, now in zip(*pairs, strict=True))


def _merged_body(old: str, new: str, is_another: bool) -> str:
    rendered = {found["name"]: found for found in _BLOCK.finditer(new)}

    def chosen(found: re.Match) -> str:
        is_outdated = is_another and found["name"] in (TRAINING, RESULTS)
        if found["name"] not in rendered or not (rendered[found["name"]]["text"] or is_outdated):
            return found[0]
        if _digest(_normalised(found["text"])) != found["digest"]:
            logger.warning_once(f"The card's part {found['name']!r} was edited, and is kept as it is.")
            return found[0]
        return rendered[found["name"]][0]

    return _BLOCK.sub(chosen, old)


def _normalised(text: str) -> str:
    """Editors may strip line ends."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _merged_entries(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What users have set there stays; what is rendered is set anew."""
    entries = new | old | {name: value for name, value in new.items() if name in RENDERED}
    for name in _UNITED:
        if name in new:
            values = old.get(name) or []
            values = values if isinstance(values, list) else [values]
            values = [value for value in values if value in new[name] or value not in KINDS.values()]
            entries[name] = [*values, *(value for value in new[name] if value not in values)]
    if old.get("model-index") and "model-index" in new:
        try:
            entries["model-index"] = _merged_index(old["model-index"], new["model-index"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise _unreadable(f"an incomplete model-index ({type(error).__name__}: {error})") from error
    return entries


def _merged_index(old: list[dict], new: list[dict]) -> list[dict]:
    """New results in the place of old ones of the same task, data and metric; the others follow the old ones."""
    first, *others = old
    results = [result | {"metrics": list(result["metrics"])} for result in first["results"]]
    for result in new[0]["results"]:
        same_data = [each for each in results if _data_of(each) == _data_of(result)]
        for metric in result["metrics"]:
            for each in same_data:
                places = [i for i, known in enumerate(each["metrics"]) if _metric_of(known) == _metric_of(metric)]
                if places:
                    each["metrics"][places[0]] = metric
                    break
            else:
                if not same_data:
                    same_data = [result | {"metrics": []}]
                    results += same_data
                same_data[-1]["metrics"].append(metric)
    return [first | {"results": results}, *others]


def _data_of(result: dict) -> tuple:
    dataset = result["dataset"]
    return result["task"]["type"], dataset["type"], *(dataset.get(name) for name in ("config", "split", "revision"))


def _metric_of(metric: dict) -> tuple:
    return metric["type"], metric.get("name")


def _with_entries(text: str, entries: dict[str, Any]) -> str:
    """The YAML `text` with other entries, in which all that stays is as it was written: order, comments, quotes."""
    before = _read(text)
    changed = {name: value for name, value in entries.items() if name not in before or before[name] != value}
    spans = {key.value: (key.start_mark.index, value.end_mark.index) for key, value in _nodes(text)}
    edited = text
    removed = before.keys() - entries.keys()
    for name in sorted(spans.keys() & (changed.keys() | removed), key=spans.get, reverse=True):
        start, end = spans[name]
        # A list ends where the next entry begins, behind the comments of that.
        end -= len(re.search(r"(\n[ \t]*(#[^\n]*)?)*\Z", text[start:end])[0])
        edited = edited[:start] + ("" if name in removed else _dumped({name: changed[name]})) + edited[end:]
    if added := {name: value for name, value in changed.items() if name not in spans}:
        edited = f"{edited.rstrip()}\n{_dumped(added)}".strip("\n")
    try:
        if yaml.safe_load(edited) == entries:
            return edited
    except yaml.YAMLError:
        pass
    return _dumped(entries)  # one line in braces, references


def _nodes(text: str) -> list:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return root.value if isinstance(root, yaml.MappingNode) else []


def _dumped(entries: dict[str, Any]) -> str:
    return yaml.dump(entries, sort_keys=False, allow_unicode=True).strip()
