"""A PRT model baked into a LoRA of its backbone: the divergence in float64, data of every kind, what is saved."""

import copy
import tempfile

import families
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import TrainingArguments, ViTImageProcessor

from prt_hf import (
    BakeConfig,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    RewardModel,
    UnsupportedError,
    bake,
)
from prt_hf.baking.trainer import BakeTrainer, TextBakeTrainer
from prt_hf.errors import PRTValueError

TOKENIZER = tiny.tokenizer()
LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
TUNING = tiny.TUNING | {"bf16": False, "packing": False}


def own_adapter(backbone):
    torch.manual_seed(5)
    return RewardModel.from_base(backbone, TOKENIZER, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def another(backbone):
    return RewardModel.from_base(tiny.gpt2(1, vocab_size=104), TOKENIZER)


def carried_over(backbone):
    torch.manual_seed(6)
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.llama(3)
        get_peft_model(base, copy.deepcopy(LORA)).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        return RewardModel.from_adapter(folder, base_model=tiny.llama(3))


REWARDS = {
    "own base": [own_adapter],
    "another": [another],
    "two": [another, own_adapter],
    "carried over": [carried_over],
}


def prt_model(kind="another"):
    backbone = tiny.llama(2, hidden_size=64)
    rewards = [make(backbone) for make in REWARDS[kind]]
    strengths = [0.7, -0.4][: len(rewards)]
    return PRTForCausalLM.from_parts(backbone, rewards, strengths, TOKENIZER)


def trainer_for(model, folder, rows=None, lora=LORA, **settings):
    rows = tiny.texts() if rows is None else rows
    args = BakeConfig(str(folder), **TUNING | settings)
    return TextBakeTrainer(model, args, train_dataset=rows, eval_dataset=rows, peft_config=lora)


def divergence(model, student, ids, kept, size=tiny.VOCABULARY):
    """KL(pi_theta || pi_student) of one row in float64, at the tokens that count."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].double()
        log_q = student(ids).logits[0, :-1, :size].double().log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1))[torch.tensor(kept[1:])].sum()


@pytest.mark.parametrize("kind", REWARDS)
def test_the_loss_is_the_divergence_without_full_logits(tmp_path, kind):
    model = prt_model(kind)
    trainer = trainer_for(model, tmp_path)
    rows = tiny.texts(4)
    student = trainer.model.eval()
    expected = [
        divergence(model, student, row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows
    ]
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    fused = trainer.compute_loss(student, inputs)
    assert trainer._is_fused
    fused.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters() if value.requires_grad}
    student.zero_grad()
    trainer._is_fused = False
    plain = trainer.compute_loss(student, inputs)
    plain.backward()
    assert abs(fused.item() - sum(expected).item() / count) < 1e-5
    assert abs(plain.item() - sum(expected).item() / count) < 1e-5
    for name, value in student.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-5)
    assert trainer.compute_loss(student, inputs, num_items_in_batch=2 * count).item() == pytest.approx(plain.item() / 2)


@pytest.mark.parametrize("kind", ["extended", "moved"])
def test_rewards_of_another_vocabulary_are_baked_by_the_models_own_probabilities(tmp_path, kind):
    tokens = families.BACKBONES[kind]
    backbone = families.build(kind, seed=3)
    reward = RewardModel.from_base(families.build("identical", tiny.gpt2), families.REWARD)
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokens)
    rows = [tokens.encode("<|think|>bad cab"), tokens.encode("add<eos>")]
    trainer = trainer_for(model, tmp_path, Dataset.from_list([{"input_ids": row} for row in rows]))
    student = trainer.model.eval()
    expected = sum(divergence(model, student, row, [True] * len(row), len(tokens)) for row in rows)
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    found = trainer.compute_loss(student, inputs)
    assert not trainer._is_fused
    assert found.item() == pytest.approx((expected / sum(len(row) - 1 for row in rows)).item(), abs=1e-5)


def test_a_baked_model_has_the_distribution_and_all_else_stays(tmp_path):
    model = prt_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = tiny.texts(32, supervised=False)
    settings = {"max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "seed": 1}
    args = BakeConfig(str(tmp_path / "baked"), **TUNING | settings | {"logging_steps": 30})
    baked = bake(model, rows, args, LoraConfig(r=32, target_modules="all-linear"), eval_dataset=rows)
    ids = torch.tensor([rows[4]["input_ids"]])
    with torch.no_grad():
        log_p, log_q = model(ids).logits, baked(ids).logits.log_softmax(-1)
        bare = model.backbone(ids).logits.log_softmax(-1)
    after, start = ((log_p.exp() * (log_p - each)).sum(-1).mean().item() for each in (log_q, bare))
    assert after < start / 3, (start, after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (tmp_path / "baked" / "adapter_config.json").is_file()
    loaded = PeftModel.from_pretrained(tiny.llama(2, hidden_size=64), tmp_path / "baked")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits.log_softmax(-1), log_q)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits.log_softmax(-1), log_q, rtol=1e-4, atol=1e-4)


def test_the_backbone_is_in_memory_once(tmp_path):
    model = prt_model()
    trainer = trainer_for(model, tmp_path)
    ours = {value.data_ptr() for value in model.backbone.parameters()}
    theirs = {value.data_ptr() for name, value in trainer.model.named_parameters() if "lora" not in name}
    assert theirs == ours
    assert not [name for name, _ in model.backbone.named_modules() if "lora" in name]


def test_to_prompts_alone_the_student_writes_and_the_teacher_scores(tmp_path):
    model = prt_model()
    rows = Dataset.from_list([{"prompt": "w5 w6 w7"}, {"prompt": "w8"}])
    trainer = trainer_for(model, tmp_path, rows, max_new_tokens=5)
    student = trainer.model.eval()
    student.generation_config.eos_token_id = 2
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    torch.manual_seed(0)
    found = trainer.compute_loss(student, inputs, num_items_in_batch=3)
    torch.manual_seed(0)
    batch = trainer.batch(inputs)
    texts, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert texts[0, :3].tolist() == TOKENIZER.encode("w5 w6 w7") and texts[1, :1].tolist() == TOKENIZER.encode("w8")
    expected, count = 0.0, 0
    for ids, seen in zip(texts, mask, strict=True):
        ids = ids[seen.bool()].tolist()
        written = len(ids) - (3 if ids[0] == TOKENIZER.encode("w5")[0] else 1)
        assert 2 not in ids[-written:-1], "nothing after the end counts"
        expected += divergence(model, student, ids, [False] * (len(ids) - written) + [True] * written)
        count += written
    assert found.item() == pytest.approx((expected / count).item(), abs=1e-5)
    assert trainer.train().training_loss > 0


def test_chats_are_prompts_in_the_tokenizers_template(tmp_path):
    model = prt_model()
    model.processing_class.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}w50"
    try:
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "w5 w6"}]}])
        trainer = trainer_for(model, tmp_path, rows)
        assert trainer.train_dataset[0]["input_ids"] == TOKENIZER.encode("w5 w6 w50")
    finally:
        model.processing_class.chat_template = None


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    finished = {}
    for name, resumes in (("whole", False), ("resumed", True)):
        folder = tmp_path / name
        if resumes:
            torch.manual_seed(0)
            args = BakeConfig(str(folder), **TUNING | settings | {"max_steps": 3})
            bake(prt_model(), tiny.texts(), args, LORA)
        torch.manual_seed(0 if not resumes else 99)
        args = BakeConfig(str(folder), **TUNING | settings, resume_from_checkpoint=str(resumes).lower())
        baked = bake(prt_model(), tiny.texts(), args, LORA)
        finished[name] = {key: value for key, value in baked.state_dict().items() if "lora" in key}
    for key, value in finished["whole"].items():
        torch.testing.assert_close(finished["resumed"][key], value, msg=key)


def test_text_classifiers(tmp_path):
    backbone = tiny.bert(2)
    reward = RewardModel.from_base(tiny.bert(1, names=tiny.COLOURS[::-1]), TOKENIZER)
    model = PRTForSequenceClassification.from_parts(backbone, [reward], tokenizer=TOKENIZER)
    rows = tiny.texts(8, supervised=False)
    args = TrainingArguments(str(tmp_path), **tiny.TUNING | {"max_steps": 2})
    trainer = BakeTrainer(model, args, train_dataset=rows, peft_config=LORA)
    student = trainer.model.eval()
    inputs = trainer.data_collator([rows[0], rows[1]])
    with torch.no_grad():
        log_p, log_q = model(**inputs).logits.double(), student(**inputs).logits.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert trainer.compute_loss(student, dict(inputs)).item() == pytest.approx(expected, abs=1e-6)
    assert isinstance(bake(model, rows, args, LORA), PeftModel)


def test_image_classifiers_with_pixels_of_their_own(tmp_path):
    small, large = (ViTImageProcessor(size={"height": size, "width": size}) for size in (8, 12))
    reward = RewardModel.from_base(tiny.vit(1, image_size=12, num_channels=3), large)
    model = PRTForImageClassification.from_parts(tiny.vit(2, num_channels=3), [reward], tokenizer=small)
    pictures = [{"image": Image.new("RGB", (10, 10), colour)} for colour in ("red", "blue", "white")]
    rows = Dataset.from_list(pictures)
    args = TrainingArguments(
        str(tmp_path), **tiny.TUNING | {"max_steps": 40, "learning_rate": 1e-2, "remove_unused_columns": False}
    )
    lora = LoraConfig(r=4, target_modules="all-linear")
    baked = bake(model, rows, args, lora)
    inputs = model.processing_class([row["image"] for row in pictures], return_tensors="pt")
    with torch.no_grad():
        log_p, log_q = model(**inputs).logits, baked(pixel_values=inputs["pixel_values"]).logits.log_softmax(-1)
        bare = model.backbone(pixel_values=inputs["pixel_values"]).logits.log_softmax(-1)
    after, before = ((log_p.exp() * (log_p - each)).sum(-1).mean().item() for each in (log_q, bare))
    assert after < before / 3, (before, after)
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_batch_statistics_stay_the_backbones(tmp_path):
    reward = RewardModel.from_base(tiny.vit(1))
    model = PRTForImageClassification.from_parts(tiny.resnet(2), [reward])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(str(tmp_path), **tiny.TUNING | {"max_steps": 3})
    baked = bake(model, tiny.images(), args)
    assert any("conv" in name and "lora" in name for name, _ in baked.named_parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_cannot_be_baked_is_refused(tmp_path):
    model = prt_model()
    with pytest.raises(PRTValueError, match="Only a PRT model"):
        bake(tiny.llama(), tiny.texts())
    with pytest.raises(PRTValueError, match="nothing to bake on"):
        bake(model, Dataset.from_list([]))
    model.strengths = [[0.5, 1.0]]
    with pytest.raises(UnsupportedError, match="one strength for each reward"):
        trainer_for(model, tmp_path)


def test_the_card_tells_what_was_baked_and_keeps_what_users_write(tmp_path):
    args = BakeConfig(str(tmp_path / "my-lora"), **TUNING | {"max_steps": 1})
    bake(prt_model("two"), tiny.texts(), args, LORA)
    path = tmp_path / "my-lora" / "README.md"
    card = path.read_text()
    assert "a reward on" in card and "| 0.7 |" in card and "| -0.4 |" in card
    assert "library_name: peft" in card and "baked-reward" in card
    path.write_text(card + "\nMine.\n")
    bake(prt_model(), tiny.texts(), args, LORA)
    assert "\nMine.\n" in path.read_text() and "| -0.4 |" not in path.read_text()
