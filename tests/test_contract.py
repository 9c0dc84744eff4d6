"""What fits, what does not, and what the user is told."""

import copy
import json
from dataclasses import replace

import pytest
import tiny
from transformers import logging

from prt_hf import (
    LabelContract,
    LabelMismatchError,
    RewardConfig,
    RewardFileError,
    VocabularyContract,
    VocabularyMismatchError,
)
from prt_hf.contract import PRT_CONFIG_NAME, ModelReference
from prt_hf.errors import PRTError, PRTValueError
from prt_hf.networks.anatomy import contract_of


def vocabulary(**kwargs):
    return VocabularyContract.from_tokenizer(tiny.tokenizer(**kwargs))


def test_same_vocabulary_under_differently_padded_heads():
    """As Qwen2.5-0.5B and -7B: 151936 and 152064 rows for the same tokens."""
    tokenizer = tiny.tokenizer()
    small, large = (contract_of(tiny.llama(vocab_size=rows), tokenizer) for rows in (104, 128))
    assert small == large and small.size == 97
    assert small.check(large).kind == "identical"


def test_language_models_need_a_tokenizer():
    with pytest.raises(PRTValueError, match="`processing_class=` a tokenizer"):
        contract_of(tiny.llama())


def test_a_tokenizer_is_read_again_once_its_tokens_or_roles_have_changed():
    tokenizer = tiny.tokenizer()
    read = VocabularyContract.from_tokenizer
    first = read(tokenizer)
    assert read(tokenizer) is first
    tokenizer.add_tokens(["<new>"])
    second = read(tokenizer)
    assert (second.size, second.added["<new>"]) == (first.size + 1, first.size)
    assert (second.fingerprint != first.fingerprint, second.ordinary) == (True, first.ordinary)
    tokenizer.pad_token = "<new>"
    assert read(tokenizer).special_tokens == second.special_tokens | {"pad_token": "<new>"}
    assert read(copy.deepcopy(tokenizer)) == read(tokenizer)


def test_labels_are_matched_by_name():
    reward, backbone = LabelContract(("red", "green", "blue")), LabelContract(("blue", "red", "green"))
    order = reward.match(backbone)
    assert order == [2, 0, 1]
    assert [reward.names[index] for index in order] == list(backbone.names)
    assert reward.match(reward) == [0, 1, 2]


def test_other_labels():
    with pytest.raises(LabelMismatchError) as error:
        LabelContract(("red", "green")).match(LabelContract(("red", "violet")))
    assert str(error.value) == (
        "The backbone's labels are not the reward's.\n"
        "  expected: the 2 labels that the reward was tuned with\n"
        "  found: 2 labels; absent: ['green'], unknown: ['violet']\n"
        "  remedy: name labels of the same meaning in `label_map={backbone's: reward's}`, or pass `allow_partial=True` "
        "to score those that both have"
    )
    with pytest.raises(LabelMismatchError, match="found: 3 labels"):
        LabelContract(("red", "green")).match(LabelContract(("red", "green", "blue")))


def test_labels_of_other_names_and_of_one_model_alone():
    reward = LabelContract(("tench", "cat", "dog"))
    backbone = LabelContract(("dog", "tench, Tinca tinca", "cat"))
    names = {"tench, Tinca tinca": "tench"}
    assert reward.match(backbone, names) == [2, 0, 1]
    larger = LabelContract(("bird", *backbone.names))
    assert reward.match(larger, names, allow_partial=True) == [-1, 2, 0, 1]
    assert reward.match(LabelContract(("cat", "dog")), allow_partial=True) == [1, 2]
    with pytest.raises(LabelMismatchError, match="(?s)4 labels; absent: .., unknown: ..bird.*allow_partial=True"):
        reward.match(larger, names)
    with pytest.raises(LabelMismatchError, match="absent: .'tench'"):
        reward.match(LabelContract(("bird", "fish")), allow_partial=True)
    for wrong, problem in (
        ({"tench": "tench"}, "names an unknown label"),
        ({"dog": "wolf"}, "names an unknown label"),
        ({"tench, Tinca tinca": "cat"}, "maps two labels onto one"),
    ):
        with pytest.raises(PRTValueError, match=problem):
            reward.match(backbone, wrong)


def test_labels_that_share_a_name():
    """ImageNet has two cranes: fine in the same order, ambiguous in another."""
    birds = LabelContract(("crane", "heron", "crane"))
    assert birds.match(LabelContract(("crane", "heron", "crane"))) == [0, 1, 2]
    with pytest.raises(LabelMismatchError, match=r"(?s)share a name.*\['crane'\] more than once"):
        birds.match(LabelContract(("heron", "crane", "crane")))


def test_labels_and_vocabularies_do_not_mix():
    labels = contract_of(tiny.vit())
    with pytest.raises(LabelMismatchError, match="a backbone with a vocabulary contract"):
        labels.match(vocabulary())
    with pytest.raises(VocabularyMismatchError, match="a backbone with a labels contract"):
        vocabulary().check(labels)


def test_labels_that_do_not_count_from_zero():
    config = tiny.vit().config
    config.id2label = {1: "red", 2: "green"}
    with pytest.raises(LabelMismatchError, match="ids 0 ... n - 1"):
        LabelContract.from_model_config(config)


# prt_config.json


def a_config(**changes):
    return RewardConfig(
        task="text-generation",
        contract=vocabulary(),
        reward_base=ModelReference("me/base", "abc", "LlamaForCausalLM", "0" * 64),
        source_backbone=ModelReference("me/base"),
        kl_coef=2.0,
        entropy_coef=0.01,
        **changes,
    )


@pytest.mark.parametrize("contract", [vocabulary(), LabelContract(("red", "green"))])
def test_config_round_trip(tmp_path, contract):
    config = a_config()
    task = {"labels": "image-classification", "vocabulary": "text-generation"}[contract.kind]
    config = replace(config, contract=contract, task=task)
    (tmp_path / PRT_CONFIG_NAME).write_text(config.to_json_string())
    assert RewardConfig.from_json_file(tmp_path / PRT_CONFIG_NAME) == config
    assert config.strength == 0.5
    assert "w55" not in config.to_json_string(), "the vocabulary itself belongs to the tokenizer's files"


def write_changed(folder, **changes):
    path = folder / PRT_CONFIG_NAME
    entries = json.loads(a_config().to_json_string()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value != "absent"}))
    return path


def test_newer_minor_versions_are_read_with_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("prt_hf.contract"), "warning", said.append)
    config = RewardConfig.from_json_file(write_changed(tmp_path, format_version="1.7", mood="sunny"))
    assert config.kl_coef == 2.0 and "['mood']" in said[0]


def test_newer_major_versions_are_refused(tmp_path):
    with pytest.raises(RewardFileError, match="(?s)newer prt_hf.*found: 2.0.*update your clone"):
        RewardConfig.from_json_file(write_changed(tmp_path, format_version="2.0"))


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": "absent"},
        {"contract": {"kind": "colours"}},
        {"contract": {"kind": "vocabulary", "size": 97}},
        {"contract": [1, 2]},
        {"kl_coef": 0.0},
        {"kl_coef": "heavy"},
        {"kl_coef": 1e-320},
        {"kl_coef": float("inf")},
        {"entropy_coef": -1},
        {"is_adapter": "no"},
        {"task": "image-classification"},
        {"task": ["text-generation"]},
        {"contract": {"kind": "vocabulary", "size": 10**30, "fingerprint": "f"}},
        {"contract": {"kind": "vocabulary", "size": 97.5, "fingerprint": "f"}},
        {"contract": {"kind": "vocabulary", "size": 97, "fingerprint": ["f"]}},
        {"contract": {"kind": "vocabulary", "size": 97, "fingerprint": "f", "special_tokens": {"eos_token": {}}}},
        {"contract": {"kind": "labels", "names": "red"}, "task": "image-classification"},
        {"contract": {"kind": "labels", "names": []}, "task": "image-classification"},
        {"contract": {"kind": "labels", "names": [1, 2]}, "task": "image-classification"},
        {"reward_base": {"id": ["me/base"]}},
        {"source_backbone": "me/base"},
        {"more_source_backbones": 3},
        {"reward_base": {"name": "me/base"}},
        {"reward_base": None},
        {"format_version": "absent"},
        {"format_version": "latest"},
    ],
)
def test_malformed_configs(tmp_path, changes):
    with pytest.raises(RewardFileError, match=r"prt_config.json cannot be read"):
        RewardConfig.from_json_file(write_changed(tmp_path, **changes))


def test_configs_that_are_too_large_or_too_deep(tmp_path):
    path = tmp_path / PRT_CONFIG_NAME
    path.write_text('{"contract": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(RewardFileError, match="cannot be read: RecursionError"):
        RewardConfig.from_json_file(path)
    with path.open("wb") as file:
        file.truncate(2**36)  # takes no space, and would take all memory
    with pytest.raises(RewardFileError, match="cannot be read: ValueError: 68719476736 bytes"):
        RewardConfig.from_json_file(path)


def test_no_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardFileError, match="(?s)holds no reward.*found: config.json"):
        RewardConfig.from_json_file(tmp_path / PRT_CONFIG_NAME)
    (tmp_path / PRT_CONFIG_NAME).write_text('{"format_version": "1.')
    with pytest.raises(RewardFileError, match="JSONDecodeError"):
        RewardConfig.from_json_file(tmp_path / PRT_CONFIG_NAME)


def test_every_error_is_also_a_standard_one():
    for error in (VocabularyMismatchError, LabelMismatchError, PRTValueError):
        assert issubclass(error, PRTError) and issubclass(error, ValueError)
    assert issubclass(RewardFileError, OSError)
