"""The user's own data: labels as a classifier's ids, and rows of classifiers."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from transformers import ViTImageProcessor

from prt_hf.errors import PRTValueError
from prt_hf.training.data import (
    check_language_rows,
    classified_images,
    classified_texts,
    label_ids,
    load_data,
    pixel_values,
)

ID2LABEL = tiny.labels()["id2label"]  # red, green, blue, grey


def labelled(values, feature=None):
    return Dataset.from_dict({"label": values}, None if feature is None else Features({"label": feature}))


@pytest.mark.parametrize(
    ("values", "feature", "id2label", "ids"),
    [
        (["grey", "red"], None, ID2LABEL, [3, 0]),
        ([0, 1], ClassLabel(names=["grey", "blue"]), ID2LABEL, [3, 2]),  # some of the classes, in another order
        ([3, 0, 1], None, ID2LABEL, [3, 0, 1]),
        ([1, 2], None, {"0": "2", "1": "1"}, [1, 0]),  # numbers that are names
        ([True, False], None, {0: "False", 1: "True"}, [1, 0]),
        ([0, 1], ClassLabel(names=["1", "0"]), {0: "0", 1: "1"}, [1, 0]),
        ([1, 0], ClassLabel(names=["no", "yes"]), {0: "LABEL_0", 1: "LABEL_1"}, [1, 0]),
        ([1, 0], ClassLabel(names=["0", "1"]), {0: "no", 1: "yes"}, [1, 0]),
    ],
)
def test_labels_are_matched_by_name_else_are_numbers(values, feature, id2label, ids):
    assert label_ids(labelled(values, feature), "label", id2label) == ids


@pytest.mark.parametrize(
    ("values", "feature", "found"),
    [
        (["red", "mauve"], None, "found: ['mauve']"),
        (["red", None], None, "found: [None]"),
        ([0, 4], None, "found: [4]"),
        ([0, -1], ClassLabel(names=["red", "green"]), "found: [None]"),
        ([0, 1], ClassLabel(names=["red", "mauve"]), "found: ['mauve']"),
        ([0, 1], ClassLabel(names=["0", "1"]), "found: ['0', '1']"),  # fewer than the model has
        ([0.5, 1.0], None, "found: [0.5, 1.0]"),
        ([[0], [1, 2]], List(Value("int64")), "holds no labels"),
    ],
)
def test_labels_that_the_model_does_not_know_are_refused(values, feature, found):
    with pytest.raises(PRTValueError) as refusal:
        label_ids(labelled(values, feature), "label", ID2LABEL)
    assert found in str(refusal.value)


def test_texts_are_cut_off_at_the_context():
    rows = Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7"], "label": ["blue", "red"], "more": [1, 2]})
    options = {"text_column": "text", "label_column": "label", "id2label": ID2LABEL, "length": 3}
    prepared = classified_texts(rows, "rows", tokenizer=tiny.tokenizer(), **options)
    assert prepared["input_ids"][:] == [[3, 4, 5], [7]] and prepared["labels"][:] == [2, 0]
    assert "more" not in prepared.column_names
    with pytest.raises(PRTValueError, match="The tokenizer has no padding token"):
        classified_texts(rows, "rows", tokenizer=tiny.tokenizer(pad_token=None), **options)


@pytest.mark.parametrize("is_lazy", [True, False])
@pytest.mark.parametrize("as_paths", [True, False])
def test_images_become_pixels_in_the_colours_of_the_model(tmp_path, is_lazy, as_paths):
    images = [Image.new("RGBA", (5, 7), colour) for colour in ("white", "black")]
    if as_paths:
        for index, image in enumerate(images):
            image.save(tmp_path / f"{index}.png")
        images = [str(tmp_path / f"{index}.png") for index in range(2)]
    rows = Dataset.from_dict({"picture": images, "label": ["grey", "red"]})
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    prepared = classified_images(
        rows,
        "rows",
        image_column="picture",
        label_column="label",
        id2label=ID2LABEL,
        pixels={"pixel_values": partial(pixel_values, image_processor=processor, config=tiny.vit().config)},
        is_lazy=is_lazy,
    )
    assert torch.equal(
        torch.stack(list(prepared[:]["pixel_values"])), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    )
    assert list(prepared[:]["labels"]) == [3, 0]


def test_files_that_cannot_be_read_are_told_at_once(tmp_path):
    (tmp_path / "rows.JSONL").write_text('{"text": "w5"}')
    assert load_data(str(tmp_path / "rows.JSONL"))["train"]["text"][:] == ["w5"]
    (tmp_path / "rows.xyz").write_text("w5")
    (tmp_path / "broken.parquet").write_text("w5")
    for name, found in {
        "nothing.jsonl": "found: no such file",
        "rows.xyz": "found: a file with the suffix '.xyz'",
        "broken.parquet": "found: ArrowInvalid: Parquet file size is 2 bytes",
    }.items():
        with pytest.raises(PRTValueError, match=found):
            load_data(str(tmp_path / name))


def test_pixels_of_16_bits_are_those_of_8():
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_resize=False)
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    deep, shallow = Image.fromarray(grey), Image.fromarray((grey >> 8).astype(np.uint8))
    config = tiny.vit(num_channels=3).config
    assert deep.mode.startswith("I;16")
    assert torch.equal(pixel_values(deep, processor, config), pixel_values(shallow, processor, config))
    with pytest.raises(PRTValueError, match="(?s)pixels have no known range.*found: mode F"):
        pixel_values(Image.new("F", (8, 8)), processor, config)


def test_data_without_a_word_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(PRTValueError, match="(?s)empty.jsonl cannot be loaded.*found: no rows"):
        load_data(str(tmp_path / "empty.jsonl"))
    rows = Dataset.from_dict({"text": ["", " \n", ""]})
    with pytest.raises(PRTValueError, match="(?s)'text' of the dataset mine has empty texts only.*found: 3 empty ones"):
        check_language_rows(rows, "text", False, "mine")
    check_language_rows(Dataset.from_dict({"text": ["", "a word"]}), "text", False, "mine")
