"""Prose of the standard library, which lora_rewards.py tunes on."""

import prose_models as prose
import pytest


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small standard library: ten modules of documented functions, and what has to be left out of it."""
    folder = tmp_path_factory.mktemp("library")
    for module in range(10):
        prose_of = "\n\n".join(
            f'def f{index}():\n    """Return value {module * 10 + index} of the module that is shown here.\n\n'
            f'    The number {index} stands alone in file {module} of them all. See below.\n    """'
            for index in range(6)
        )
        (folder / f"m{module}.py").write_text(
            f'"""Module {module} holds some functions that do nothing at all."""\n{prose_of}'
        )
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test").mkdir()
    (folder / "test" / "test_m.py").write_text('"""These are tests and nobody reads them as a text in prose."""')
    return folder


def test_bullets_are_what_the_docstring_says():
    passage = ["The first one.", "Is this the second?", "JSON text comes third (see below)."]
    assert prose.as_bullets(passage) == (
        "- the first one\n- is this the second?\n- jSON text comes third (see below)\nThe end."
    )


def test_prose_is_told_from_code_and_tables():
    document = (
        "Open a file and\nreturn a stream. It may\nraise an error.\n\n"
        ">>> open('x')  # This looks like a sentence but it is code.\n\n"
        "| a | b | c | d | e | f | g | h | 1 | 2 | 3 | 4 | 5 |.\n\nShort.\n\nnot a sentence, since it starts small."
    )
    assert prose.sentences(document) == ["Open a file and return a stream.", "It may raise an error."]


def test_documents_are_docstrings_in_a_fixed_order(library):
    documents = prose.standard_library_documents(library)
    names = list(documents)
    assert names[:10] == [f"m{module}.py" for module in range(10)]
    assert all(name.startswith("help(") for name in names[10:])
    assert documents["m0.py"].startswith("Module 0 holds some functions that do nothing at all.\n\nReturn value 0 of")


def test_no_sentence_is_in_two_splits(library):
    documents = prose.standard_library_documents(library)
    splits = prose.split(documents, seed=0)
    seen = [sentence for part in splits for passage in part for sentence in passage]
    assert len(seen) == len(set(seen)) > 100
    assert all(splits)
    # whole documents: file 4's sentences are all in one split
    owners = {
        name
        for name, part in zip(splits._fields, splits, strict=True)
        if any("in file 4 of" in s for p in part for s in p)
    }
    assert len(owners) == 1
    assert splits == prose.split(documents, seed=0) != prose.split(documents, seed=1)


def test_the_tokenizer_gives_text_back():
    tokenizer = prose.train_tokenizer(["Return the value of the key, or a default."] * 3, 280)
    ids = tokenizer("- return ütf\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "- return ütf\n"
    assert len(tokenizer) <= 280
