"""Numbers of the Trainer against references, and trajectories that must agree."""

import copy
import json

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import images, texts
from torch.nn import functional as F

from prt_hf import (
    BaseModelMismatchError,
    ContextLengthError,
    LabelMismatchError,
    NonFiniteRewardError,
    PRTConfig,
    PRTTrainer,
    RewardModel,
    VocabularyMismatchError,
    combine,
)
from prt_hf.errors import PRTValueError
from prt_hf.networks.identity import weights_fingerprint
from prt_hf.reward.batch import Batch
from prt_hf.training.collators import TokenCollator


def sentences(rows=12):
    return Dataset.from_list([{**row, "label": index % 4} for index, row in enumerate(texts(rows, supervised=False))])


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_eval_batch_size": 5,
            "learning_rate": 1e-2,
            "max_steps": 4,
        }
        return PRTConfig(**tiny.TUNING | defaults | changes)

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer):
    trainer.train()
    return trainer


def reference_nll(backbone, reward, rows, kl_coef=1.0):
    """Sum of -log pi_theta over supervised tokens and their number, row by row, in float64."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_pt, r = (m(input_ids=ids).logits[0, :-1].double()[:, : tiny.VOCABULARY] for m in (backbone, reward))
        log_pi = (log_pt.log_softmax(-1) + r / kl_coef).log_softmax(-1)
        labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        total += F.nll_loss(log_pi, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total, count


# Numbers


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("kl_coef", [1.0, 2.0])
def test_eval_loss_is_the_mean_over_all_supervised_tokens(config, tokenizer, supervised, kl_coef):
    rows = texts(12, supervised=supervised)  # batches of 5, 5 and 2 with uneven numbers of labels
    source, target = tiny.llama(1), tiny.gpt2(2)
    trainer = PRTTrainer(
        source,
        config(kl_coef=kl_coef, entropy_coef=0.1),
        eval_dataset=rows,
        processing_class=tokenizer,
        backbone=target,
    )
    total, count = reference_nll(target, source, rows, kl_coef)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_eval_figures(config, tokenizer):
    rows, model = texts(), tiny.llama(1)
    metrics = PRTTrainer(model, config(), eval_dataset=rows, processing_class=tokenizer).evaluate()
    right, alone, entropy, size, divergence, count = 0, 0, 0.0, 0.0, 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].detach().double()
        log_pi, log_pt = (2 * logits).log_softmax(-1), logits.log_softmax(-1)
        labels = torch.tensor(row["labels"])[1:]
        keep = labels != -100
        right += (log_pi.argmax(-1) == labels)[keep].sum().item()
        alone += (logits.argmax(-1) == labels)[keep].sum().item()
        entropy += -(log_pt.exp() * log_pt).sum(-1)[keep].sum().item()
        size += (logits - logits.mean(-1, keepdim=True)).abs().mean(-1)[keep].sum().item()
        divergence += (log_pi.exp() * (log_pi - log_pt)).sum(-1)[keep].sum().item()
        count += keep.sum().item()
    for name, expected in {
        "accuracy": right,
        "reward_accuracy": alone,
        "reward_entropy": entropy,
        "reward_abs": size,
        "kl": divergence,
    }.items():
        assert metrics[f"eval_{name}"] == pytest.approx(expected / count, rel=1e-4), name


@pytest.mark.parametrize(("init", "says"), [("pretrained", True), ("zero", False)])
def test_a_first_loss_above_the_backbones_is_explained_once(config, tokenizer, caplog, init, says):
    rows = texts(8)
    trainer = PRTTrainer(
        tiny.llama(1),
        config(reward_init=init, per_device_train_batch_size=8, gradient_accumulation_steps=1, logging_steps=1),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    told = [record.getMessage() for record in caplog.records if "first loss" in record.getMessage()]
    assert len(told) == says
    if says:
        assert f"{first['loss']:.3f}" in told[0] and f"{first['backbone_loss']:.3f}" in told[0]
    else:
        assert first["loss"] == pytest.approx(first["backbone_loss"], rel=1e-5)


def test_logged_figures_are_those_of_the_logged_step(config, tokenizer):
    """A large step of its own, so that training and evaluation see the same batch."""
    rows = texts(8)
    trainer = PRTTrainer(
        tiny.llama(1),
        config(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, entropy_coef=0.5),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name in ("backbone_loss", "accuracy", "reward_accuracy", "reward_entropy", "reward_abs", "kl"):
        assert logged[name] == pytest.approx(before[f"eval_{name}"], rel=1e-4), name
    # the training loss is the objective of Eq. 12, the evaluation loss the likelihood
    assert logged["loss"] == pytest.approx(before["eval_loss"] - 0.5 * before["eval_reward_entropy"], rel=1e-4)


def test_figures_are_logged_with_every_epoch(config, tokenizer):
    """A learning rate of 0, so that the epoch's figures are those of the whole training set."""
    rows = texts(8)
    args = config(logging_strategy="epoch", max_steps=-1, num_train_epochs=2, learning_rate=0.0)
    trainer = PRTTrainer(tiny.llama(1), args, None, rows, rows, tokenizer)
    expected = trainer.evaluate()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2]
    for entry in logged:
        for name in ("backbone_loss", "accuracy", "reward_accuracy", "reward_entropy", "reward_abs", "kl"):
            assert entry[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-4), name


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_zero_start_begins_at_the_backbones_loss(config, tokenizer, peft_config):
    rows, base = texts(), tiny.llama(1)
    pretrained = copy.deepcopy(base)
    trainer = PRTTrainer(
        base, config(reward_init="zero"), eval_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    total, count = 0.0, 0
    for row in rows:
        logits = pretrained(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(row["labels"])[1:], reduction="sum").item()
        count += sum(label != -100 for label in row["labels"][1:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_compute_metrics_gets_the_prt_models_log_probabilities(config, tokenizer):
    source, rows = tiny.llama(1), texts(4)
    seen = {}

    def keep(prediction):
        seen.update(logits=torch.as_tensor(prediction.predictions), labels=prediction.label_ids)
        return {"rows": len(prediction.label_ids)}

    trainer = PRTTrainer(source, config(), eval_dataset=rows, processing_class=tokenizer, compute_metrics=keep)
    metrics = trainer.evaluate()
    ids = torch.tensor([rows[1]["input_ids"]])
    logits = source(ids).logits[0]
    torch.testing.assert_close(
        seen["logits"][1, : ids.shape[1]], combine(logits, logits).detach(), atol=1e-4, rtol=1e-4
    )
    plain = PRTTrainer(tiny.llama(1), config(), eval_dataset=rows, processing_class=tokenizer).evaluate()
    assert metrics["eval_rows"] == 4 and metrics["eval_loss"] == pytest.approx(plain["eval_loss"])


# What is trained, and what is not


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_the_default_backbone_is_the_pretrained_model(config, tokenizer, peft_config):
    """Adapter off, or a frozen copy: the same trajectory as with the backbone given."""
    rows = texts()
    own = PRTTrainer(tiny.llama(1), config(), None, rows, processing_class=tokenizer, peft_config=peft_config)
    given = PRTTrainer(
        tiny.llama(1), config(), None, rows, processing_class=tokenizer, peft_config=peft_config, backbone=tiny.llama(1)
    )
    assert losses(trained(own)) == pytest.approx(losses(trained(given)), rel=1e-5)
    assert losses(own)[-1] < losses(own)[0]


def test_only_the_adapter_moves(config, tokenizer):
    base = tiny.llama(1)
    before = copy.deepcopy(base.state_dict())
    trainer = PRTTrainer(base, config(), None, texts(), processing_class=tokenizer, peft_config=LoraConfig())
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if ".lora_" in name}
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_given_backbone_does_not_move(config, tokenizer):
    backbone = tiny.gpt2(2).train()
    before = copy.deepcopy(backbone.state_dict())
    trained(PRTTrainer(tiny.llama(1), config(), None, texts(), processing_class=tokenizer, backbone=backbone))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_backbone_runs_without_dropout(config, tokenizer):
    """Dropout regularises the reward; the backbone is a fixed distribution."""
    model = tiny.gpt2(1, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    trainer = PRTTrainer(model, config(), None, texts(), processing_class=tokenizer, peft_config=LoraConfig())
    batch = Batch({"input_ids": tiny.prompts(), "use_cache": False}, tiny.prompts()[:, 1:])
    trainer.model.train()
    expected = model(tiny.prompts()).logits
    for is_fused in (False, True):
        first, second = (
            trainer._forward(trainer.model, batch, trainer.backbones, [], is_fused=is_fused) for _ in range(2)
        )
        assert trainer.model.training
        (backbone, reward), (again, other) = (
            [term.logits() if is_fused else term for term in (*backbones, rewards)]
            for backbones, _, rewards in (first, second)
        )
        torch.testing.assert_close(backbone, expected[:, :-1].flatten(0, 1) if is_fused else expected)
        assert torch.equal(backbone, again) and not torch.equal(reward, other)


def test_batch_statistics_of_an_adapted_network_stay(config):
    base = tiny.resnet(1)
    before = copy.deepcopy(base.state_dict())
    trainer = PRTTrainer(
        base, config(), None, images(), eval_dataset=images(), peft_config=LoraConfig(), processing_class=None
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    full = PRTTrainer(tiny.resnet(1), config(), None, images())
    full.train()
    assert not torch.equal(
        full.model.state_dict()["resnet.embedder.embedder.normalization.running_mean"],
        before["resnet.embedder.embedder.normalization.running_mean"],
    ), "a full reward owns its statistics"


# Trajectories that must agree


def test_accumulated_micro_batches_equal_the_large_batch(config, tokenizer):
    rows = texts(16)  # micro-batches with unequal numbers of labels

    def run(batch, accumulation):
        args = config(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, entropy_coef=0.05, max_steps=3
        )
        return trained(PRTTrainer(tiny.llama(1), args, None, rows, processing_class=tokenizer))

    large, small = run(8, 1), run(2, 4)
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    for name, value in large.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(name), value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, tokenizer, peft_config, use_reentrant):
    def run(**changes):
        return losses(
            trained(
                PRTTrainer(
                    tiny.llama(1),
                    config(**changes),
                    None,
                    texts(),
                    processing_class=tokenizer,
                    peft_config=peft_config,
                )
            )
        )

    checkpointed = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert checkpointed == pytest.approx(run(), rel=1e-5)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_bf16_follows_float32(config, tokenizer, peft_config):
    def run(**changes):
        args = config(learning_rate=1e-3, **changes)
        rows = texts()
        return PRTTrainer(
            tiny.llama(1, initializer_range=0.1), args, None, rows, rows, tokenizer, peft_config=peft_config
        )

    full, mixed = trained(run()), trained(run(bf16=True))
    assert losses(mixed) == pytest.approx(losses(full), rel=0.02)
    assert {value.dtype for value in mixed.model.parameters() if value.requires_grad} == {torch.float32}
    assert mixed.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=0.02)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(lora_dropout=0.2)])
@pytest.mark.parametrize("init", ["pretrained", "zero"])
def test_resumed_training_follows_the_same_trajectory(config, tokenizer, peft_config, init, tmp_path):
    def make(**changes):
        args = config(max_steps=6, reward_init=init, lr_scheduler_type="linear", **changes)
        return PRTTrainer(tiny.llama(1), args, None, texts(), processing_class=tokenizer, peft_config=peft_config)

    straight = trained(make(save_strategy="steps", save_steps=3))
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(straight)[-3:], rel=1e-6)
    for name, value in straight.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), value)


# The artefact


def test_checkpoints_are_rewards(config, tokenizer, tmp_path):
    base = tiny.llama(1)
    args = config(save_strategy="steps", save_steps=2, kl_coef=2.0, entropy_coef=0.01, max_steps=4)
    rows = texts()
    trainer = PRTTrainer(base, args, None, rows, rows, tokenizer, peft_config=LoraConfig(), backbone=tiny.gpt2(3))
    trainer.train()
    trainer.save_model()
    checkpoint = RewardModel.from_pretrained(tmp_path / "out" / "checkpoint-4", base_model=base)
    final = RewardModel.from_pretrained(tmp_path / "out", base_model=base)
    expected = trainer.reward.network.eval()(tiny.prompts()).logits
    for reward in (checkpoint, final):
        torch.testing.assert_close(reward(input_ids=tiny.prompts()), expected)
        assert (reward.config.kl_coef, reward.config.entropy_coef) == (2.0, 0.01)
        assert reward.config.source_backbone.weights == weights_fingerprint(tiny.gpt2(3))
        assert reward.config.reward_base.weights == weights_fingerprint(base)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(PRTValueError, match="(?s)another scale.*kl_coef=2.0.*found: kl_coef=1.0"):
        PRTTrainer(final, config(), eval_dataset=rows, backbone=tiny.gpt2(3))
    again = PRTTrainer(final, config(kl_coef=2.0), eval_dataset=rows, backbone=tiny.gpt2(3))
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["id", "model", "PeftModel", "RewardModel"])
def test_what_a_trainer_can_start_from(config, tokenizer, tmp_path, kind):
    base = tiny.llama(1)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "lm_head"])
    model = {
        "id": lambda: str(tmp_path / "base"),
        "model": lambda: base,
        "PeftModel": lambda: get_peft_model(base, lora),
        "RewardModel": lambda: RewardModel.from_base(base, tokenizer, lora),
    }[kind]()
    trainer = PRTTrainer(
        model,
        config(),
        None,
        texts(),
        processing_class=None if kind in ("id", "RewardModel") else tokenizer,
        peft_config=lora if kind in ("id", "model") else None,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(10.1, abs=3)
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()


def test_tuning_goes_on_from_a_saved_reward(config, tokenizer, tmp_path):
    rows = texts()
    for peft_config in (LoraConfig(), None):
        base = tiny.llama(1)
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        args = config(output_dir=str(tmp_path / f"out-{peft_config is None}"))
        first = PRTTrainer(str(tmp_path / "base"), args, None, rows, rows, peft_config=peft_config)
        first.train()
        first.save_model()
        # a full reward loads its source backbone again; an adapter switches itself off
        second = PRTTrainer(RewardModel.from_pretrained(args.output_dir), config(), None, rows, rows)
        before = first.evaluate()["eval_loss"]
        assert second.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
        second.train()
        assert second.evaluate()["eval_loss"] < before


def test_tuning_goes_on_by_the_name_of_a_reward(config, tokenizer, tmp_path):
    """On the backbone that it was tuned on, which need not be its own base."""
    rows, other = texts(), tmp_path / "other"
    tiny.gpt2(2).save_pretrained(other)
    for folder, model in (("base", tiny.llama(1)), ("other", tiny.gpt2(2))):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    args = config(output_dir=str(tmp_path / "reward"))
    first = PRTTrainer(str(tmp_path / "base"), args, None, rows, rows, peft_config=LoraConfig(), backbone=str(other))
    first.train()
    first.save_model()
    new = texts(12, seed=7)
    second = PRTTrainer(str(tmp_path / "reward"), config(), None, new, rows)
    assert second.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], rel=1e-5)
    before = second.evaluate(new)["eval_loss"]
    second.train()
    assert second.evaluate(new)["eval_loss"] < before
    assert second.reward.config.source_backbone == first.reward.config.source_backbone
    with pytest.raises(PRTValueError, match="no `peft_config` beside a RewardModel"):
        PRTTrainer(str(tmp_path / "reward"), config(), peft_config=LoraConfig())
    tiny.gpt2(3).save_pretrained(other)
    with pytest.raises(BaseModelMismatchError, match="not the one that was used before"):
        PRTTrainer(str(tmp_path / "reward"), config(), None, new)


def test_a_backbone_that_was_only_in_memory_has_to_be_given_again(config, tokenizer, tmp_path):
    trainer = PRTTrainer(
        tiny.llama(1),
        config(),
        None,
        texts(),
        processing_class=tokenizer,
        peft_config=LoraConfig(),
        backbone=tiny.gpt2(2),
    )
    trainer.train()
    trainer.save_model()
    reward = RewardModel.from_pretrained(tmp_path / "out", base_model=tiny.llama(1))
    with pytest.raises(PRTValueError, match="(?s)not known by an id.*`backbone=` the model that it was tuned against"):
        PRTTrainer(reward, config())
    again = PRTTrainer(reward, config(), eval_dataset=texts(), backbone=tiny.gpt2(2))
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(texts())["eval_loss"], rel=1e-5)


# Classifiers


@pytest.mark.parametrize(("make", "rows"), [(tiny.vit, images), (tiny.resnet, images), (tiny.bert, sentences)])
@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_classifiers(config, make, rows, peft_config):
    processing_class = tiny.tokenizer(padding_side="right") if make is tiny.bert else None
    args = config(max_steps=8)
    dataset = rows()
    trainer = PRTTrainer(make(1), args, None, dataset, dataset, processing_class, peft_config=peft_config)
    before = trainer.evaluate()
    total = 0.0
    model = make(1)
    for row in dataset:
        inputs = {name: torch.as_tensor(value)[None] for name, value in row.items() if name != "label"}
        total += F.cross_entropy(2 * model(**inputs).logits.double(), torch.as_tensor(row["label"])[None]).item()
    assert before["eval_loss"] == pytest.approx(total / len(dataset), rel=1e-4), "r starts as the pretrained logits"
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]


def test_backbone_with_its_labels_in_another_order(config):
    target = tiny.resnet(2)
    order = [2, 0, 3, 1]
    permuted = tiny.resnet(2, names=[tiny.COLOURS[index] for index in order])
    permuted.load_state_dict(target.state_dict())
    head = permuted.classifier[-1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    results = [
        PRTTrainer(tiny.vit(1), config(), eval_dataset=images(), backbone=backbone).evaluate()
        for backbone in (target, permuted)
    ]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)
    reward = RewardModel.from_base(tiny.vit(1))
    assert reward.contract.match(PRTTrainer(permuted, config()).reward.contract) == order


def test_backbone_with_another_head_padding(config, tokenizer):
    rows, source, target = texts(), tiny.llama(1), tiny.gpt2(2, vocab_size=128)
    trainer = PRTTrainer(source, config(), eval_dataset=rows, processing_class=tokenizer, backbone=target)
    total, count = reference_nll(target, source, rows)  # the padded columns take no part
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


# What cannot be right is refused


def test_backbones_that_do_not_fit(config, tokenizer, tmp_path):
    with pytest.raises(LabelMismatchError, match="absent: .'grey'"):
        PRTTrainer(tiny.vit(), config(), backbone=tiny.resnet(names=["red", "green", "blue", "violet"]))
    with pytest.raises(VocabularyMismatchError, match="97 to 4193 logits"):
        PRTTrainer(tiny.llama(), config(), processing_class=tokenizer, backbone=tiny.llama(vocab_size=90))
    tiny.llama(2).save_pretrained(tmp_path)
    tiny.tokenizer(changed={"w9": "other"}).save_pretrained(tmp_path)
    with pytest.raises(VocabularyMismatchError, match="2 differ"):
        PRTTrainer(tiny.llama(), config(), processing_class=tokenizer, backbone=str(tmp_path))


def test_data_that_teaches_nothing(config, tokenizer):
    empty = texts().select([])
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(PRTValueError, match=f"`{name}` is empty"):
            PRTTrainer(tiny.llama(), config(), processing_class=tokenizer, **{name: empty})
    ignored = texts().map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(PRTValueError, match="every label is ignored"):
        PRTTrainer(tiny.llama(), config(), None, ignored, processing_class=tokenizer).train()
    with pytest.raises(PRTValueError, match="(?s)every label is ignored"):
        PRTTrainer(tiny.llama(), config(), eval_dataset=ignored, processing_class=tokenizer).evaluate()
    with pytest.raises(PRTValueError, match="(?s)not tokenized.*`input_ids`.*found: text"):
        PRTTrainer(tiny.llama(), config(), None, Dataset.from_list([{"text": "w5"}]), processing_class=tokenizer)
    unlabelled = images().remove_columns("label")
    with pytest.raises(PRTValueError, match="(?s)has no labels.*found: pixel_values"):
        PRTTrainer(tiny.vit(), config(), None, unlabelled).train()


def test_batches_without_labels_beside_others_are_fine(config, tokenizer):
    """One micro-batch whose prompts were cut before their completions."""
    rows = texts(8).map(
        lambda row, index: {"labels": [-100] * len(row["labels"])} if index < 4 else row, with_indices=True
    )
    args = config(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, per_device_eval_batch_size=2, max_steps=2
    )
    trainer = trained(PRTTrainer(tiny.llama(1), args, None, rows, rows, tokenizer))
    assert all(0 < loss < 20 for loss in losses(trainer))
    total, count = reference_nll(trainer.backbone, trainer.model.eval(), rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_texts_longer_than_the_context(config, tokenizer):
    """Told before the first step, in the rows as they are chosen; rows that are made when they are read, at theirs."""
    rows = texts()
    message = "(?s)at most 12 tokens.*found: 18 tokens.*remedy: cut rows off: `truncation=True, max_length"
    short = rows.select([index for index, row in enumerate(rows) if len(row["input_ids"]) <= 12])
    for given in ((rows, None), (short, rows), (short, {"all": rows})):
        with pytest.raises(ContextLengthError, match=message):
            PRTTrainer(tiny.gpt2(n_positions=12), config(), None, *given, processing_class=tokenizer)
    with pytest.raises(ContextLengthError, match=message):  # of the backbone
        keywords = {"processing_class": tokenizer, "backbone": tiny.gpt2(1, n_positions=12)}
        PRTTrainer(tiny.llama(), config(), None, rows, **keywords)
    PRTTrainer(tiny.gpt2(n_positions=12), config(), None, short, processing_class=tokenizer)
    late = rows.with_transform(lambda batch: batch)
    trainer = PRTTrainer(tiny.gpt2(n_positions=12), config(), None, late, processing_class=tokenizer)
    with pytest.raises(ContextLengthError, match="(?s)at most 12 tokens.*remedy: cut rows off"):
        trainer.train()


def test_broken_networks_are_named(config, tokenizer):
    model = tiny.llama(1)
    model.lm_head.weight.data[4] = torch.inf
    with pytest.raises(NonFiniteRewardError, match="id 4"):
        PRTTrainer(model, config(), None, texts(), processing_class=tokenizer, backbone=tiny.llama(2)).train()


def test_training_the_backbones_own_weights(config, tokenizer):
    with pytest.raises(PRTValueError, match="(?s)trains weights that belong to its backbone.*bias='none'"):
        PRTTrainer(
            tiny.gpt2(), config(), None, texts(), processing_class=tokenizer, peft_config=LoraConfig(bias="all")
        ).train()


def test_arguments_that_have_no_place(config, tokenizer):
    with pytest.raises(PRTValueError, match="(?s)a PRTConfig.*TrainingArguments"):
        from transformers import TrainingArguments

        PRTTrainer(tiny.llama(), TrainingArguments("out", use_cpu=True), processing_class=tokenizer)
    with pytest.raises(PRTValueError, match="`compute_loss_func` is not supported"):
        PRTTrainer(tiny.llama(), config(), processing_class=tokenizer, compute_loss_func=lambda *_: 0)
    with pytest.raises(PRTValueError, match="exists already"):
        PRTTrainer(RewardModel.from_base(tiny.llama(), tokenizer), config(), peft_config=LoraConfig())
    for changes in ({"kl_coef": 0.0}, {"entropy_coef": -1.0}, {"reward_init": "ones"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(PRTValueError, match=f"`{next(iter(changes))}` is not usable"):
            config(**changes)


def test_a_full_reward_of_unknown_source_needs_its_backbone(config, tokenizer):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, reward_init="zero")
    with pytest.raises(PRTValueError, match="(?s)not known by an id.*`backbone=` the model that it was tuned against"):
        PRTTrainer(reward, config())
    fresh = RewardModel.from_base(tiny.llama(1), tokenizer)
    assert weights_fingerprint(PRTTrainer(fresh, config()).backbone) == weights_fingerprint(tiny.llama(1))


# What a user may do by the way


def test_masks_say_what_is_learned():
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    batch = {name: value.tolist() for name, value in TokenCollator(0)(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 0], [5, 6, 7, 0], [8, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]],
        "labels": [[5, 6, 7, -100], [-100, 6, -100, -100], [-100, 9, -100, -100]],
    }


def test_masks_of_the_data_set_reach_the_loss(config, tokenizer):
    rows = texts()
    masked = rows.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]})
    masked = masked.remove_columns("labels")
    results = [
        PRTTrainer(tiny.llama(1), config(), eval_dataset=data, processing_class=tokenizer).evaluate()["eval_loss"]
        for data in (rows, masked)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    padded = rows.map(
        lambda row: {
            "input_ids": row["input_ids"] + [0] * 3,
            "labels": row["labels"] + [0] * 3,
            "attention_mask": [1] * len(row["input_ids"]) + [0] * 3,
        }
    )
    trainer = PRTTrainer(tiny.llama(1), config(), eval_dataset=padded, processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(results[0], rel=1e-6)
    packed = rows.add_column("position_ids", [list(range(len(row))) for row in rows["input_ids"]])
    with pytest.raises(PRTValueError, match="(?s)is packed.*found: position_ids"):
        PRTTrainer(tiny.llama(1), config(), None, packed, processing_class=tokenizer)


def test_the_same_object_as_reward_and_backbone(config, tokenizer):
    model, rows = tiny.llama(1), texts()
    trainer = PRTTrainer(model, config(), None, rows, processing_class=tokenizer, backbone=model)
    trainer.train()
    assert weights_fingerprint(trainer.backbone) == weights_fingerprint(tiny.llama(1))
    reward = RewardModel.from_base(tiny.llama(1), tokenizer)
    with pytest.raises(PRTValueError, match="trains weights that belong to its backbone"):
        PRTTrainer(reward, config(), None, rows, backbone=reward.network).train()


def test_backbones_that_carry_adapters(config, tokenizer):
    backbone = get_peft_model(tiny.llama(2), LoraConfig(target_modules=["q_proj"]))
    for carrying in (backbone, backbone.get_base_model()):
        with pytest.raises(PRTValueError, match="carries an adapter"):
            PRTTrainer(tiny.llama(1), config(), processing_class=tokenizer, backbone=carrying)


def test_frozen_adapters_are_not_trained(config, tokenizer):
    frozen = get_peft_model(tiny.llama(1), LoraConfig(target_modules=["q_proj"]))
    for value in frozen.parameters():
        value.requires_grad_(False)
    with pytest.raises(PRTValueError, match="(?s)no trainable parameter.*is_trainable=True"):
        PRTTrainer(frozen, config(), None, texts(), processing_class=tokenizer).train()
    partly = get_peft_model(tiny.llama(1), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    kept = {}
    for name, value in partly.named_parameters():
        if ".lora_A." in name:
            value.requires_grad_(False)
            kept[name] = value.clone()
    trained(PRTTrainer(partly, config(), None, texts(), processing_class=tokenizer))
    assert all(torch.equal(partly.get_parameter(name), value) for name, value in kept.items())


def test_predictions_without_labels_are_the_prt_models(config, tokenizer):
    data = images()
    trainer = PRTTrainer(tiny.vit(1), config(), backbone=tiny.resnet(2))
    pixel_values = data[:]["pixel_values"]
    expected = combine(tiny.resnet(2)(pixel_values).logits, tiny.vit(1)(pixel_values).logits)
    for rows in (data, data.remove_columns("label")):
        predictions = torch.as_tensor(trainer.predict(rows).predictions)
        torch.testing.assert_close(predictions, expected.detach(), atol=1e-5, rtol=1e-5)


def test_text_classifiers_read_the_same_tokens(config, tmp_path):
    tiny.bert(2).save_pretrained(tmp_path)
    tiny.tokenizer(changed={"w9": "other"}).save_pretrained(tmp_path)
    with pytest.raises(VocabularyMismatchError, match="2 differ"):
        PRTTrainer(tiny.bert(1), config(), processing_class=tiny.tokenizer(), backbone=str(tmp_path))


def test_another_tokenizer_than_the_rewards(config, tokenizer):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer)
    with pytest.raises(VocabularyMismatchError, match="The reward's own tokenizer"):
        PRTTrainer(reward, config(), processing_class=tiny.tokenizer(changed={"w9": "other"}))


def test_a_start_that_is_over(config, tokenizer):
    with pytest.raises(PRTValueError, match="(?s)keeps its own start.*reward_init='pretrained'"):
        PRTTrainer(RewardModel.from_base(tiny.llama(1), tokenizer), config(reward_init="zero"))


@pytest.mark.parametrize("ends", [[], [2], [9]])
def test_data_that_never_supervise_an_end_are_told_once(config, tokenizer, caplog, ends):
    """The end token of the tokenizer, or another one at which the model stops."""
    rows = [
        {**row, "input_ids": [each for each in row["input_ids"] if each != 9] + ends} for row in texts(40, 0, False)
    ]
    model = tiny.llama(1)
    model.generation_config.eos_token_id = [2, 9]
    with caplog.at_level("WARNING"):
        trained(PRTTrainer(model, config(max_steps=20), None, Dataset.from_list(rows), None, tokenizer))
    told = [record.message for record in caplog.records if "end token" in record.message]
    assert len(told) == (not ends)
    assert all("None of the first 64 rows supervises an end token ('<eos>')" in message for message in told)
