"""Make the models and texts of the pair "prose" of lora_rewards.py, from the standard library of this Python.

Three Llamas are pretrained on docstrings and help topics. Other passages of them, as bullet lists, are to tune on.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from prt_hf.demo.text import collator_of, llama
from prt_hf.demo.training import Steps, fit

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
SENTENCES_PER_PASSAGE = 4
CLOSING_LINE = "The end."
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY_SIZE, LENGTH = 1024, 128
MODELS = {  # name: size, steps of pretraining
    "source": ({"hidden_size": 64, "num_hidden_layers": 2}, Steps(250, 4e-3, 8)),
    "target": ({"hidden_size": 128, "num_hidden_layers": 4}, Steps(700, 4e-3, 8)),
    "second": ({"hidden_size": 96, "num_hidden_layers": 3}, Steps(450, 4e-3, 8)),
}

Passage = list[str]  # sentences in a row, all from one document


class Splits(NamedTuple):
    """Passages of different documents, without repeated sentences."""

    pretraining: list[Passage]
    tuning: list[Passage]
    test: list[Passage]


def make_prose_models(folder: Path) -> None:
    """Pretrain the models, and save them as `text-<name>` in a folder.

    Its `rows.json` gets the token ids to tune (`train`) and to `test` on.
    """
    splits = split(standard_library_documents(), seed=0)
    running_text = [as_prose(passage) for passage in splits.pretraining]
    tokenizer = train_tokenizer(running_text, VOCABULARY_SIZE)
    stream = [token for ids in tokenizer(running_text)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    starts = range(0, len(stream) - LENGTH + 1, LENGTH)
    blocks = [{"input_ids": stream[start : start + LENGTH]} for start in starts]
    for name, (size, steps) in MODELS.items():
        model = llama(tokenizer, size, 0)
        fit(model, blocks, steps, 0, f"pretraining the model {name!r}", collator_of(tokenizer))
        for part in (model, tokenizer):
            part.save_pretrained(folder / f"text-{name}")
    rows = {}
    for name, passages in (("train", splits.tuning), ("test", splits.test)):
        texts = tokenizer([as_bullets(passage) for passage in passages])["input_ids"]
        rows[name] = [[*ids, tokenizer.eos_token_id][:LENGTH] for ids in texts]
    (folder / "rows.json").write_text(json.dumps(rows))


def standard_library_documents(folder: Path | None = None) -> dict[str, str]:
    """Return docstrings by source file and help texts by topic, in the same order on every machine."""
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)]
    documents = {}
    for path in tqdm(files, desc="reading the standard library", unit="file"):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):  # files that show bad syntax or encodings on purpose
            continue
        documents[path.relative_to(folder).as_posix()] = "\n\n".join(_docstrings(tree))
    return documents | {f"help({name!r})": topics.topics[name] for name in sorted(topics.topics)}


def sentences(document: str) -> list[str]:
    """Return the sentences of a document's prose, without code, tables and headings."""
    found = []
    for paragraph in re.split(r"\n\s*\n", document):
        text = " ".join(paragraph.split())
        if _is_prose(text):
            found += re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    return found


def split(documents: dict[str, str], seed: int) -> Splits:
    """Split the documents into 70 / 20 / 10 %, without sentences that occurred before."""
    seen: set[str] = set()
    passages = []
    for document in documents.values():
        new = [sentence for sentence in dict.fromkeys(sentences(document)) if sentence not in seen]
        seen.update(new)
        cuts = range(0, len(new) - 1, SENTENCES_PER_PASSAGE)
        passages.append([new[start : start + SENTENCES_PER_PASSAGE] for start in cuts])
    random.Random(seed).shuffle(passages)
    first, second = round(0.7 * len(passages)), round(0.9 * len(passages))
    return Splits(*(sum(part, []) for part in (passages[:first], passages[first:second], passages[second:])))


def as_prose(passage: Passage) -> str:
    """Return the sentences in a row."""
    return " ".join(passage)


def as_bullets(passage: Passage) -> str:
    """Return one sentence a line after "- ", without capital and full stop, then the closing line."""
    lines = [f"- {sentence[0].lower()}{sentence[1:].removesuffix('.')}" for sentence in passage]
    return "\n".join([*lines, CLOSING_LINE])


def train_tokenizer(texts: Iterator[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that begins every text with `<s>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _is_prose(text: str) -> bool:
    plain = sum(character.isalpha() or character == " " for character in text)
    return (
        len(text) >= 40 and text[0].isupper() and text[-1] in ".!?" and ">>>" not in text and plain > 0.85 * len(text)
    )
