"""Fine-tuned models distilled into a reward: KL(pi_ft || softmax(log pi_pt + r))."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from prt_hf import (
    BaseModelMismatchError,
    PRTConfig,
    PRTForCausalLM,
    PRTSFTConfig,
    PRTSFTTrainer,
    PRTTrainer,
    RewardFileError,
    RewardModel,
    UnsupportedError,
    prt_loss,
)
from prt_hf.cli import main
from prt_hf.errors import PRTValueError
from prt_hf.functional import prt_statistics
from prt_hf.networks import lm_head
from prt_hf.networks.lm_head import Projection
from prt_hf.reward.finetuned import TunedModel
from prt_hf.training.fused_loss import fused_prt_loss, fused_prt_statistics

TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`base` with its tokenizer, `lora`, an ordinary adapter of it, and `tuned`, the two merged."""
    home = tmp_path_factory.mktemp("distill")
    tiny.llama(2).save_pretrained(home / "base")
    TOKENIZER.save_pretrained(home / "base")
    torch.manual_seed(3)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear", r=2, lora_alpha=1)
    network = get_peft_model(base(home), lora)
    network.save_pretrained(home / "lora")
    network.merge_and_unload().save_pretrained(home / "tuned")
    return home


def base(home):
    return tiny.LlamaForCausalLM.from_pretrained(home / "base").eval()


def tuned(home):
    return tiny.LlamaForCausalLM.from_pretrained(home / "tuned").eval()


@pytest.fixture
def config(tmp_path):
    def make(config_class=PRTConfig, **changes):
        return config_class(**tiny.TUNING | {"output_dir": str(tmp_path / "out"), "learning_rate": 3e-3} | changes)

    return make


@torch.no_grad()
def divergence(finetuned, backbone, reward, rows):
    """Mean of KL(pi_ft || softmax(log pi_pt + r)) over supervised tokens, row by row, in float64."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        keep = torch.tensor(row.get("labels", row["input_ids"]))[1:] != -100
        log_q = finetuned(ids).logits[0, :-1].double().log_softmax(-1)
        log_pt = backbone(ids).logits[0, :-1].double().log_softmax(-1)
        log_p = (log_pt + reward(input_ids=ids)[0, :-1].double()).log_softmax(-1)
        total += float((log_q.exp() * (log_q - log_p)).sum(-1)[keep].sum())
        count += int(keep.sum())
    return total / count


def pieces(rows, columns, seed, softcap=None, bias=True):
    torch.manual_seed(seed)
    hidden = tuple(torch.randn(rows, size, requires_grad=True) for size in (6, 3))
    weights = tuple(torch.randn(columns, size, requires_grad=True) for size in (6, 3))
    return Projection(hidden, weights, torch.randn(columns, requires_grad=True) if bias else None, softcap)


def as_logits(of):
    logits = sum(hidden @ weight.T for hidden, weight in zip(of.hidden, of.weights, strict=True))
    logits = logits if of.bias is None else logits + of.bias
    return logits if of.softcap is None else of.softcap * torch.tanh(logits / of.softcap)


def test_the_loss_is_the_divergence_from_the_teacher():
    torch.manual_seed(0)
    backbone, reward, teacher = torch.randn(3, 2, 5, 11, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 3, 4, -100], [5, 6, -100, 0, 2]])
    log_p = (backbone.log_softmax(-1) + reward / 2).log_softmax(-1)
    expected = (teacher.softmax(-1) * (teacher.log_softmax(-1) - log_p)).sum(-1)[labels != -100]
    loss = prt_loss(backbone, reward, labels, kl_coef=2.0, teacher_logits=teacher, num_items_in_batch=10)
    torch.testing.assert_close(loss.double(), expected.sum() / 10, atol=1e-6, rtol=1e-5)
    found = prt_statistics(backbone, reward, labels, kl_coef=2.0, teacher_logits=teacher)["loss"]
    torch.testing.assert_close(found[labels != -100].double(), expected, atol=1e-6, rtol=1e-5)
    exact = 2 * (teacher - backbone)  # r that makes the PRT model the teacher
    assert abs(prt_loss(backbone, exact, labels, kl_coef=2.0, teacher_logits=teacher)) < 1e-6


@pytest.mark.parametrize(("entropy_coef", "softcap", "kl_coef"), [(0.0, None, 1.0), (0.1, None, 2.0), (0.0, 5.0, 0.5)])
def test_in_chunks_it_is_the_plain_loss_with_its_gradients(monkeypatch, entropy_coef, softcap, kl_coef):
    monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", 4 * 13)
    backbone, reward, teacher = (pieces(10, 13, seed, cap) for seed, cap in ((1, None), (2, softcap), (3, 4.0)))
    labels, kwargs = torch.arange(10), {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "num_items_in_batch": 7}
    plain = prt_loss(as_logits(backbone), as_logits(reward), labels, teacher_logits=as_logits(teacher), **kwargs)
    chunked = fused_prt_loss(backbone, reward, labels, teacher=teacher, **kwargs)
    torch.testing.assert_close(chunked, plain)
    inputs = [*reward.hidden, *reward.weights, reward.bias]
    for found, expected in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    found = fused_prt_statistics(backbone, reward, labels, kl_coef=kl_coef, teacher=teacher)
    expected = prt_statistics(
        as_logits(backbone), as_logits(reward), labels, kl_coef=kl_coef, teacher_logits=as_logits(teacher)
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused_loss", ["always", "never"])
@pytest.mark.parametrize("of", ["lora", "tuned"])
def test_training_starts_at_the_divergence_from_the_fine_tuned_model(home, config, of, fused_loss):
    trainer = PRTTrainer(
        str(home / "base"),
        config(fused_loss=fused_loss, max_steps=3),
        train_dataset=tiny.texts(),
        eval_dataset=tiny.texts(5, seed=1),
        processing_class=TOKENIZER,
        distill_from=str(home / of),
        peft_config=LoraConfig(r=4),
    )
    expected = divergence(tuned(home), base(home), trainer.reward, tiny.texts(5, seed=1))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    expected = divergence(tuned(home), base(home), trainer.reward, tiny.texts(5, seed=1))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_chunked_or_plain_the_trajectory_is_the_same(home, config):
    losses = []
    for fused_loss in ("always", "never"):
        torch.manual_seed(0)
        trainer = PRTTrainer(
            base(home),
            config(fused_loss=fused_loss, max_steps=4),
            train_dataset=tiny.texts(),
            processing_class=TOKENIZER,
            distill_from=str(home / "lora"),
            peft_config=LoraConfig(r=4),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["olora", "biases"])
def test_adapters_that_change_their_base_are_distilled_and_change_no_other(home, config, tmp_path, kind):
    model, lora = base(home), {"init_lora_weights": "olora", "target_modules": ["q_proj"]}
    if kind == "biases":
        model = tiny.gpt2(2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        lora = {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    before = copy.deepcopy(model)
    network = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=2, **lora)).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    network.save_pretrained(tmp_path / "lora")
    for teacher in (tmp_path / "lora", network):
        trainer = PRTTrainer(
            model,
            config(max_steps=1),
            train_dataset=tiny.texts(),
            eval_dataset=tiny.texts(5, seed=1),
            processing_class=TOKENIZER,
            distill_from=teacher,
            peft_config=LoraConfig(r=2),
        )
        trainer.train()
        found = trainer.evaluate()["eval_loss"]
        assert found == pytest.approx(divergence(network, before, trainer.reward, tiny.texts(5, seed=1)), rel=1e-4)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))


def test_half_an_adapter_is_no_teacher(home, config, tmp_path):
    def refused(kind, text):
        with pytest.raises(kind, match=text):
            PRTTrainer(
                base(home),
                config(),
                train_dataset=tiny.texts(),
                processing_class=TOKENIZER,
                distill_from=tmp_path / "lora",
                peft_config=LoraConfig(r=2),
            )

    shutil.copytree(home / "lora", tmp_path / "lora")
    weights = load_file(home / "lora" / "adapter_model.safetensors")
    gone = min(weights)
    save_file(
        {name: weights[name] for name in weights if name != gone}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    refused(BaseModelMismatchError, f"do not fit its base(?s:.)*{gone}")
    whole = (home / "lora" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(whole[:-1])
    refused(RewardFileError, "adapter_model.safetensors is damaged")
    (tmp_path / "lora" / "adapter_config.json").write_text("[]")
    refused(RewardFileError, "adapter_config.json cannot be read")


def test_a_private_adapter_is_a_teacher_with_a_token(home, hub, monkeypatch):
    hub.put("me/lora", home / "lora", private=True)
    monkeypatch.delenv("HF_TOKEN")
    reward = RewardModel.from_base(str(home / "base"), peft_config=LoraConfig())
    teacher = TunedModel(reward, "me/lora", token=hub.token)
    teacher.load()
    assert (teacher.origin.id, teacher.origin.revision) == ("me/lora", hub.repositories["me/lora"].resolve("main"))
    with torch.no_grad():
        found = teacher.network(ids := tiny.prompts()).logits
        torch.testing.assert_close(found, tuned(home)(ids).logits, atol=2e-4, rtol=1e-4)


def test_a_model_is_not_distilled_into_itself(home, config):
    model = base(home)
    trainer = PRTTrainer(model, config(), train_dataset=tiny.texts(), processing_class=TOKENIZER, distill_from=model)
    with pytest.raises(PRTValueError, match="or to what it is distilled from"):
        trainer.train()


def test_a_reward_of_enough_capacity_becomes_the_fine_tuned_model(home, config, tmp_path):
    rows = tiny.texts(4, supervised=False)
    trainer = PRTTrainer(
        str(home / "base"),
        config(max_steps=250, learning_rate=1e-2, reward_init="zero", lr_scheduler_type="cosine"),
        train_dataset=rows,
        processing_class=TOKENIZER,
        distill_from=str(home / "lora"),
    )
    before = divergence(tuned(home), base(home), trainer.reward, rows)
    trainer.train()
    after = divergence(tuned(home), base(home), trainer.reward, rows)
    assert before > 0.3 and after < 0.01 * before
    trainer.save_model(str(tmp_path / "reward"))
    again = RewardModel.from_pretrained(tmp_path / "reward")
    model = PRTForCausalLM.from_parts(base(home), [again]).eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        log_p, log_q = model(ids).logits[0, :-1], tuned(home)(ids).logits[0, :-1].log_softmax(-1)
    assert F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) < 0.02


def test_the_reward_tells_what_it_was_distilled_from(home, config, tmp_path):
    trainer = PRTTrainer(
        str(home / "base"),
        config(max_steps=1),
        train_dataset=tiny.texts(),
        distill_from=str(home / "lora"),
        peft_config=LoraConfig(r=4),
    )
    shared = {value.data_ptr() for value in trainer.reward.network.parameters()}
    teacher_weights = [name for name, value in trainer._teachers[0].network.named_parameters() if "lora_" not in name]
    held = dict(trainer._teachers[0].network.named_parameters())
    assert teacher_weights and all(held[name].data_ptr() in shared for name in teacher_weights)  # one base in memory
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "prt_config.json").read_text())
    assert saved["distilled_from"]["id"] == str(home / "lora") and saved["terms"] == ["network"]
    assert saved["source_backbone"]["id"] == str(home / "base")
    assert RewardModel.from_pretrained(tmp_path / "out").config == trainer.reward.config
    assert "| distilled from (fine-tuned model) | `lora` |" in (tmp_path / "out" / "README.md").read_text()


def test_checkpoints_are_gone_on_from(home, config, tmp_path):
    def trainer(**changes):
        torch.manual_seed(0)
        return PRTTrainer(
            str(home / "base"),
            config(max_steps=4, save_strategy="steps", save_steps=2, **changes),
            train_dataset=tiny.texts(),
            distill_from=str(home / "lora"),
            peft_config=LoraConfig(r=4),
        )

    whole = trainer()
    whole.train()
    resumed = trainer(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    ids = tiny.prompts()
    with torch.no_grad():
        torch.testing.assert_close(resumed.reward(input_ids=ids), whole.reward(input_ids=ids))


def test_the_data_may_be_what_trl_takes_and_the_command_does_the_same(home, config, tmp_path):
    rows = [{"text": TOKENIZER.decode(row["input_ids"])} for row in tiny.texts()]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"max_steps": 2, "learning_rate": 1e-2, "lora_r": 4, "bf16": False, "fused_loss": "always"}
    given = tiny.TUNING | options | {"output_dir": str(tmp_path / "reward")}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    places = ["--model_name_or_path", str(home / "base"), "--dataset_name", str(tmp_path / "text.jsonl")]
    assert main(["train", *places, "--distill-from", str(home / "lora"), "--eval_strategy", "no", *arguments]) == 0
    from datasets import Dataset
    from transformers import set_seed

    set_seed(42)
    trainer = PRTSFTTrainer(
        str(home / "base"),
        config(PRTSFTConfig, max_steps=2, learning_rate=1e-2, bf16=False, fused_loss="always"),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        distill_from=str(home / "lora"),
        peft_config=LoraConfig(r=4, lora_alpha=16),
    )
    trainer.train()
    found = RewardModel.from_pretrained(tmp_path / "reward")
    assert found.config.distilled_from.id == str(home / "lora")
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=(ids := tiny.prompts())), trainer.reward(input_ids=ids))


def test_what_cannot_be_distilled_is_refused(home, config, tmp_path):
    def trainer(distill_from, model=None, backbone=None, **changes):
        return PRTTrainer(
            model or str(home / "base"),
            config(**changes),
            train_dataset=tiny.texts(),
            processing_class=TOKENIZER,
            backbone=backbone,
            distill_from=distill_from,
            peft_config=LoraConfig(r=4),
        )

    lora = str(home / "lora")
    with pytest.raises(BaseModelMismatchError, match="tuned from another model than the reward's source backbone"):
        trainer(lora, model=tiny.llama(8))
    with pytest.raises(PRTValueError, match="(?s)distilled on one backbone.*found: 2 backbones"):
        trainer(lora, backbone=[None, tiny.llama(8)])
    with pytest.raises(UnsupportedError, match="backbone in memory"):
        trainer(lora, precompute_backbone=True, backbone_cache_dir=str(tmp_path / "cache"))
    prefix = get_peft_model(base(home), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="tokens of its own before the text"):
        trainer(prefix)
    RewardModel.from_base(base(home), copy.deepcopy(TOKENIZER), LoraConfig()).save_pretrained(tmp_path / "reward")
    with pytest.raises(PRTValueError, match="is a reward, which is no model by itself"):
        trainer(str(tmp_path / "reward"))
