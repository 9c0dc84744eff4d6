"""PRT models and recipes whose rewards have another vocabulary than the backbone, against the logits processor."""

import json

import pytest
import texts
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from prt_hf import BakeConfig, PRTForCausalLM, RewardModel, VocabularyMismatchError, bake
from prt_hf.errors import PRTValueError, UnsupportedError
from prt_hf.evaluation.across import AcrossReport, measure_across

SOURCE, TARGET = texts.byte_level(300), texts.sentencepiece(150)
PROMPTS = ["The girl went to the sea", "123 and 20"]


def reward_of(seed=3, tokenizer=SOURCE, make=tiny.llama):
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    return RewardModel.from_base(texts.model(tokenizer, make, seed), tokenizer, config)


@pytest.fixture(scope="module")
def backbone():
    return texts.model(TARGET, seed=1)


@pytest.fixture(scope="module")
def model(backbone):
    return PRTForCausalLM.from_parts(backbone, [reward_of()], tokenizer=TARGET, across_vocabularies=True).eval()


def encoded(prompts=PROMPTS):
    return TARGET(prompts, return_tensors="pt", padding=True)


def by_processor(processor, backbone, inputs):
    """Log-probabilities after each token of each row alone, from the processor; 0 at padding."""
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        text = ids[mask.bool()][None]
        logits = backbone(input_ids=text).logits[0]
        found = [processor(text[:, : end + 1], logits[end : end + 1])[0] for end in range(text.shape[1])]
        rows.append(torch.stack([torch.zeros_like(found[0])] * int((mask == 0).sum()) + found))
    return torch.stack(rows)


@torch.no_grad()
def test_scores_equal_those_of_the_processor(model, backbone):
    inputs = encoded()
    expected = by_processor(model.rewards[0].processor(backbone, TARGET, across_vocabularies=True), backbone, inputs)
    mask = inputs["attention_mask"].bool()
    found = model(**inputs, use_cache=False).logits
    assert (found[mask] - expected[mask]).abs().max() < 1e-4
    assert found[mask].exp().sum(-1).sub(1).abs().max() < 1e-5
    alone = backbone(**inputs).logits.log_softmax(-1)
    assert (found[mask] - alone[mask]).abs().max() > 0.1
    for keep in (1, torch.tensor([2, 5])):
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        some = model(**inputs, logits_to_keep=keep, use_cache=False).logits
        assert (some - found[:, kept])[mask[:, kept]].abs().max() < 1e-4


@torch.no_grad()
def test_a_strength_for_each_row_and_several_rewards(backbone):
    ours, other, same = reward_of(), reward_of(4, texts.unigram(150), tiny.gpt2), reward_of(5, TARGET)
    model = PRTForCausalLM.from_parts(backbone, [ours, same, other], tokenizer=TARGET, across_vocabularies=True).eval()
    inputs = encoded(PROMPTS[:1] * 2)
    model.strengths = [[0.0, 1.0], [0.0, 0.5], [0.0, 2.0]]
    found = model(**inputs, use_cache=False).logits
    assert (found[0] - backbone(**inputs).logits[0].log_softmax(-1)).abs().max() < 1e-5
    processors = [
        each.processor(backbone, TARGET, across_vocabularies=True, strength=strength)
        for each, strength in ((same, 0.5), (ours, 1.0), (other, 2.0))
    ]
    ids = inputs["input_ids"][1:]
    scores = backbone(input_ids=ids).logits[:, -1]
    for processor in processors:
        scores = processor(ids, scores)
    assert (found[1, -1] - scores[0]).abs().max() < 1e-4
    settings = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    (generated,) = model.generate(**inputs, **settings, do_sample=False).scores
    assert (generated - found[:, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_equals_the_processor(model, backbone, options):
    inputs, options = encoded(), {"max_new_tokens": 6, "pad_token_id": TARGET.pad_token_id} | options
    processor = model.rewards[0].processor(
        backbone, TARGET, across_vocabularies=True, attention_mask=inputs["attention_mask"]
    )
    torch.manual_seed(0)
    expected = backbone.generate(**inputs, **options, logits_processor=[processor])
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_recipes_remember(model, backbone, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    TARGET.save_pretrained(tmp_path / "backbone")
    base = texts.model(SOURCE, seed=3)
    base.save_pretrained(tmp_path / "base")
    SOURCE.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(tmp_path / "base"), peft_config=config).save_pretrained(tmp_path / "reward")
    with pytest.raises(VocabularyMismatchError, match="across_vocabularies=True"):
        PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [tmp_path / "reward"])
    made = PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [tmp_path / "reward"], across_vocabularies=True)
    made.save_pretrained(tmp_path / "recipe")
    assert json.loads((tmp_path / "recipe" / "config.json").read_text())["across_vocabularies"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    inputs = encoded()
    assert torch.equal(loaded(**inputs, use_cache=False).logits, made.eval()(**inputs, use_cache=False).logits)


def test_a_wrong_token_map_is_refused_at_once(backbone):
    with pytest.raises(PRTValueError, match="names an unknown token"):
        PRTForCausalLM.from_parts(
            backbone, [reward_of()], tokenizer=TARGET, across_vocabularies=True, token_map={"<new>": "</s>"}
        )


def test_what_needs_one_vocabulary_is_refused(model):
    inputs = encoded(PROMPTS[:1])
    with pytest.raises(UnsupportedError, match="cannot draft for the backbone"):
        model.generate(**inputs, speculative=True, max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="no cache holds both"):
        model(**inputs, use_cache=True)
    with pytest.raises(UnsupportedError, match="no rows for some of the backbone's tokens"):
        model.base_model(**inputs)
    packed = torch.arange(inputs["input_ids"].shape[1])[None] % 3
    with pytest.raises(UnsupportedError, match="reads a row as one text"):
        model(**inputs, position_ids=packed, use_cache=False)
    try:
        with pytest.raises(UnsupportedError, match="is not tuned there"):
            model.train()(**inputs, use_cache=False)
    finally:
        model.eval()


def test_baked_into_the_backbone(model, tmp_path):
    """The KL to the PRT model falls, though a full projection does not exist."""
    rows = Dataset.from_dict({"text": texts.SENTENCES[:2] * 2})
    args = BakeConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    student = bake(model, rows, args)
    ids = TARGET(texts.SENTENCES[0], return_tensors="pt").input_ids
    with torch.no_grad():
        teacher = model(input_ids=ids, use_cache=False).logits
        with student.disable_adapter():
            before = student(input_ids=ids).logits.log_softmax(-1)
        after = student(input_ids=ids).logits.log_softmax(-1)
    kl = [
        (teacher.exp() * (teacher - each[..., : teacher.shape[-1]])).sum(-1).mean().item() for each in (before, after)
    ]
    assert kl[1] < 0.7 * kl[0]


@torch.no_grad()
def test_nats_per_byte(backbone):
    """By hand: the sum over tokens, divided by the bytes of the text that they predict."""
    reward = reward_of()
    rows = Dataset.from_dict({"prompt": ["The girl ", "Once upon"], "completion": ["went to the sea.", " a time"]})
    found = measure_across(reward, backbone, rows, tokenizer=TARGET)
    total = size = 0
    processor = reward.processor(backbone, TARGET, across_vocabularies=True)
    for row in rows:
        ids = TARGET(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        ids = ids[:, :-1] if ids[0, -1] == TARGET.eos_token_id else ids
        prompt = TARGET(row["prompt"]).input_ids
        start = next((i for i, own in enumerate(prompt) if own != ids[0, i]), len(prompt))
        for end in range(start, ids.shape[1]):
            logits = backbone(input_ids=ids[:, :end]).logits[:, -1]
            total -= processor(ids[:, :end], logits)[0, ids[0, end]].item()
        size += len(TARGET.decode(ids[0, start:]).encode())
    assert found.size == size and found.rows == 2
    assert found.prt_target[1.0] == pytest.approx(total / size, abs=1e-5)
    gain, error = found.gains[1.0]
    assert gain == pytest.approx(found.nats["target"] - found.prt_target[1.0], abs=1e-6) and error > 0


@pytest.mark.parametrize(
    ("first_gain", "advice"),
    [(0.2, "use --strength 0.25 in the place of 1; "), (-0.01, "the target is best without the reward")],
)
def test_the_advice_on_strength(first_gain, advice):
    gains = {0.25: (first_gain, 0.01), 0.5: (-0.1, 0.01), 1.0: (-0.4, 0.02)}
    figures = dict.fromkeys(("source", "prt_source", "target"), 1.0), dict.fromkeys(gains, 1.0)
    report = AcrossReport(4, 100, *figures, gains, strength=0.25, gain=(0.3, 0.02), in_place=0.5, rows_per_token=2.0)
    assert report.lines()[-1].startswith(f"strength: {advice}")


def test_texts_longer_than_the_source_reads():
    """They are cut off where the source ends, for both models alike."""
    reward, backbone = reward_of(), texts.model(TARGET, seed=1, max_position_embeddings=1024)
    long = " ".join(texts.SENTENCES)
    found = measure_across(reward, backbone, Dataset.from_dict({"text": [long]}), tokenizer=TARGET)
    end = SOURCE(long, return_offsets_mapping=True)["offset_mapping"][256 - 16 - 1][1]
    short = measure_across(reward, backbone, Dataset.from_dict({"text": [long[:end]]}), tokenizer=TARGET)
    assert 0 < end < len(long) and found.size == short.size and found.prt_target == short.prt_target
