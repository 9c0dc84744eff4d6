"""PRT models in the places of other models: pipelines, evaluators, lm-evaluation-harness, and trainers of others."""

import copy
import logging
import math

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DataCollatorForSeq2Seq,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from prt_hf import (
    PRTConfig,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    PRTTrainer,
    RewardModel,
    UnsupportedError,
    default_peft_config,
)

KINDS = {
    "lora": {"target_modules": ["q_proj", "gate_proj", "lm_head"]},
    "lora-biases": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True, "use_rslora": True},
    "lora-below-head": {"target_modules": ["q_proj", "gate_proj"]},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "full": None,
}


@pytest.fixture(autouse=True)
def complaints():
    """What transformers logs as an error, such as a class that a pipeline does not know, fails the test."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records if record.levelno >= logging.ERROR] == []


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A backbone and a reward's base on disk."""
    root = tmp_path_factory.mktemp("models")
    for name, model in {"backbone": tiny.gpt2(2, vocab_size=100), "base": tiny.llama(1)}.items():
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


def reward_of(places, kind="lora", seed=0, base="base"):
    torch.manual_seed(seed)
    settings = KINDS[kind]
    return RewardModel.from_base(str(places / base), peft_config=settings and LoraConfig(**settings))


def prt_model(places, *kinds, **kwargs):
    rewards = [reward_of(places, kind, seed) for seed, kind in enumerate(kinds or ["lora"])]
    return PRTForCausalLM.from_parts(str(places / "backbone"), rewards, **kwargs)


@torch.no_grad()
def log_pt(model, input_ids, temperature=1.0):
    """The backbone by itself, with the columns that pad its head."""
    return (model.backbone(input_ids).logits.double() / temperature).log_softmax(-1)


@torch.no_grad()
def log_pi(model, input_ids, temperature=1.0):
    """Eq. 10 in float64, of separate networks."""
    total = log_pt(model, input_ids)[..., : tiny.VOCABULARY]
    for reward, strength in zip(model.rewards, model.strengths, strict=True):
        output = reward.network(input_ids=input_ids, use_cache=False)
        total = total + strength * output.logits[..., : tiny.VOCABULARY].double()
    return (total / temperature).log_softmax(-1)


def scores(log_probs, input_ids, start=1):
    """Log-probabilities of the tokens from `start` on."""
    return log_probs[:, start - 1 : -1].gather(-1, input_ids[:, start:, None])[..., 0]


def perturbed(model):
    """Adapters start at nothing; a test of numbers wants something."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def texts(rows=6):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(rows):
        ids = torch.randint(3, tiny.VOCABULARY, (6 + 3 * (index % 5),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (1 + index % 4) + ids[1 + index % 4 :]})
    return Dataset.from_list(examples)


def nll(model):
    """Mean over the supervised tokens of `texts`."""
    found = []
    for row in texts():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        found.append(-scores(log_pi(model, ids), ids)[labels[:, 1:] != -100])
    return torch.cat(found).mean().item()


def settings(tmp_path, **changes):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 6,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "bf16": False,
    }
    return tiny.TUNING | defaults | changes


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Pipelines and evaluators


def test_text_generation_pipeline(places, tokenizer, tmp_path):
    model = perturbed(prt_model(places))
    prompts = ["w5 w6 w7 w8", "w9 w10"]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(output))
    model.save_pretrained(tmp_path / "recipe")
    for generator in (
        pipeline("text-generation", model=model, tokenizer=tokenizer),
        pipeline("text-generation", model=str(tmp_path / "recipe")),
    ):
        options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
        for batch_size in (1, 2):
            outputs = generator(prompts, batch_size=batch_size, **options)
            assert [output["generated_text"] for (output,) in outputs] == expected


def photos(count=4):
    numbers = np.random.default_rng(0).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in numbers]


def image_model():
    reward = RewardModel.from_base(tiny.resnet(1, num_channels=3))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return PRTForImageClassification.from_parts(tiny.vit(2, num_channels=3), [reward], [1.5], processor), processor


def class_scores(model, **inputs):
    with torch.no_grad():
        parts = [part(**inputs).logits.double() for part in (model.backbone, model.rewards[0].network)]
    return (parts[0].log_softmax(-1) + model.strengths[0] * parts[1]).softmax(-1).tolist()


def test_image_classification_pipeline():
    model, processor = image_model()
    images = photos()
    expected = class_scores(model, **processor(images, return_tensors="pt"))
    outputs = pipeline("image-classification", model=model, image_processor=processor)(images, batch_size=2)
    for output, wanted in zip(outputs, expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in output}
        assert found == pytest.approx(dict(zip(tiny.COLOURS, wanted, strict=True)), abs=1e-5)


def test_text_classification_pipeline():
    tokenizer = tiny.tokenizer(padding_side="right")
    reward = RewardModel.from_base(tiny.bert(1, names=tiny.COLOURS[::-1]), tokenizer)
    model = PRTForSequenceClassification.from_parts(tiny.bert(2), [reward], tokenizer=tokenizer)
    sentences = ["w5 w6 w7", "w8"]
    outputs = pipeline("text-classification", model=model, tokenizer=tokenizer)(sentences, top_k=None, batch_size=2)
    for sentence, output in zip(sentences, outputs, strict=True):
        inputs = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            pretrained = model.backbone(**inputs).logits.double().log_softmax(-1)
            wanted = (pretrained + reward.network(**inputs).logits.double().flip(-1)).softmax(-1)[0].tolist()
        found = {entry["label"]: entry["score"] for entry in output}
        assert found == pytest.approx(dict(zip(tiny.COLOURS, wanted, strict=True)), abs=1e-5)


@pytest.mark.parametrize("is_saved", [False, True])
def test_lm_evaluation_harness(places, tokenizer, tmp_path, is_saved):
    model = perturbed(prt_model(places))
    if is_saved:
        model.save_pretrained(tmp_path / "recipe")
        harness = HFLM(pretrained=str(tmp_path / "recipe"), device="cpu", batch_size=2)
    else:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=2)
    pairs = [("w5 w6 w7", " w8 w9"), ("w10", " w11"), ("w5 w6", " w12 w13 w14")]
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, continuation), (score, is_greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        log_probs, start = log_pi(model, ids), len(context.split())
        assert score == pytest.approx(scores(log_probs, ids, start).sum().item(), abs=1e-4)
        assert is_greedy == torch.equal(log_probs[:, start - 1 : -1].argmax(-1), ids[:, start:])
    (rolled,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("w5 w6 w7 w8",), 0)])
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    assert rolled == pytest.approx(scores(log_pi(model, ids), ids).sum().item(), abs=1e-4)
    asked = [(prompt, {"until": ["w999"], "max_gen_toks": 6}) for prompt in ("w5 w6 w7", "w8")]
    outputs = harness.generate_until([Instance("generate_until", {}, arguments, 0) for arguments in asked])
    for (prompt, _), text in zip(asked, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text.split() == tokenizer.decode(output, skip_special_tokens=True).split()


# Trainers


def by_prt_trainer(places, tmp_path, reward, **changes):
    """What every trainer that maximises the likelihood has to do: the losses of PRTTrainer, and its reward."""
    trainer = PRTTrainer(
        copy.deepcopy(reward),
        PRTConfig(**settings(tmp_path, kl_coef=1.0, entropy_coef=0.0, **changes)),
        train_dataset=texts(),
        backbone=str(places / "backbone"),
    )
    trainer.train()
    return trainer


def check_trained(model, before, backbone, out, place):
    """All of the rewards moved and nothing else; saved, they are themselves again."""
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone[name]), name
    for name, value in model.reward_networks.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name
    ids = tiny.prompts()
    expected = model.eval()(ids).logits.detach()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(loaded(ids).logits.detach(), expected, atol=1e-5, rtol=1e-5)
    for index, reward in enumerate(model.rewards):
        saved = RewardModel.from_pretrained(f"{out}/reward-{index}")
        torch.testing.assert_close(saved(input_ids=ids), reward(input_ids=ids), atol=1e-5, rtol=1e-5)
        assert saved.config.kl_coef == 1 / model.strengths[index]
        assert saved.config.source_backbone.id == str(place)


@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_is_reward_tuning(places, tokenizer, tmp_path, kind):
    """TRL multiplies hidden states by the head itself, and follows PRTTrainer all the way."""
    reward = reward_of(places, kind)
    expected = by_prt_trainer(places, tmp_path, reward, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    model = PRTForCausalLM.from_parts(str(places / "backbone"), [reward])
    before, backbone = snapshot(model.reward_networks), snapshot(model.backbone)
    args = SFTConfig(**settings(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3))
    assert args.gradient_checkpointing
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(expected), rel=1e-4)
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.1
    torch.testing.assert_close(
        reward(input_ids=tiny.prompts()), expected.reward(input_ids=tiny.prompts()), atol=1e-2, rtol=1e-2
    )
    trainer.save_model(tmp_path / "tuned")
    check_trained(model, before, backbone, tmp_path / "tuned", places / "backbone")


def test_first_loss_of_sft_trainer(places, tokenizer, tmp_path):
    """Two rewards, both of which train."""
    model = perturbed(prt_model(places, "lora", "full", strengths=[1.0, 0.5]))
    before, backbone = snapshot(model.reward_networks), snapshot(model.backbone)
    expected = nll(model)
    trainer = SFTTrainer(model, SFTConfig(**settings(tmp_path)), train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    trainer.save_model(tmp_path / "tuned")
    check_trained(model, before, backbone, tmp_path / "tuned", places / "backbone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sft_trainer_in_half_precision(tokenizer, tmp_path, dtype):
    """TRL's default is `bf16=True`: autocast, over weights of either precision."""
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(**KINDS["lora"]))
    model = PRTForCausalLM.from_parts(tiny.gpt2(2).to(dtype), [reward], tokenizer=tokenizer)
    expected = nll(model)
    args = SFTConfig(**settings(tmp_path, bf16=True))
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=3e-3)
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.1


def test_sft_trainer_with_biased_heads(tokenizer, tmp_path):
    torch.manual_seed(0)
    backbone, base = (PhiForCausalLM(PhiConfig(**_SMALL)).eval() for _ in range(2))
    for part in (backbone, base):
        torch.nn.init.normal_(part.lm_head.bias)
    reward = RewardModel.from_base(base, tokenizer, LoraConfig(target_modules=["lm_head"]))
    model = PRTForCausalLM.from_parts(backbone, [reward], strengths=[0.7])
    expected = nll(model)
    trainer = SFTTrainer(model, SFTConfig(**settings(tmp_path)), train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_is_reward_tuning(places, tokenizer, tmp_path, accumulation):
    reward = reward_of(places)
    sizes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 6 // accumulation}
    expected = by_prt_trainer(places, tmp_path, reward, **sizes)
    model = PRTForCausalLM.from_parts(str(places / "backbone"), [reward])
    before, backbone, first = snapshot(model.reward_networks), snapshot(model.backbone), nll(model)
    args = TrainingArguments(**settings(tmp_path, gradient_checkpointing=True, **sizes))
    collator = DataCollatorForSeq2Seq(tiny.tokenizer(padding_side="right"))
    trainer = Trainer(model, args, collator, texts(), texts(), tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-5)
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(expected), rel=1e-4)
    trainer.save_model(tmp_path / "tuned")
    check_trained(model, before, backbone, tmp_path / "tuned", places / "backbone")


@pytest.mark.parametrize("make", [tiny.vit, tiny.resnet])
def test_transformers_trainer_of_image_classifiers(tmp_path, make):
    """Batch statistics included, which the frozen layers of reward and backbone have in common."""
    torch.manual_seed(0)
    pixel_values, base = torch.randn(6, 1, 8, 8), make(1)
    data = Dataset.from_dict({"pixel_values": pixel_values.tolist(), "labels": [0, 1, 2, 3, 0, 1]}).with_format("torch")
    reward = RewardModel.from_base(base, None, default_peft_config(base))
    expected = PRTTrainer(copy.deepcopy(reward), PRTConfig(**settings(tmp_path)), None, data, backbone=make(1))
    expected.train()
    model = PRTForImageClassification.from_parts(base, [reward])
    backbone = snapshot(base)
    trainer = Trainer(model, TrainingArguments(**settings(tmp_path)), train_dataset=data)
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(expected), rel=1e-4)
    assert all(torch.equal(value, backbone[name]) for name, value in base.state_dict().items())


PAIRS = [("w5 w6 w7", " w8 w9", " w10"), ("w11", " w12", " w13 w14 w15"), ("w16 w17", " w18 w19", " w20 w21")]


def pairs():
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS])


def log_ratios(model, tokenizer, log_probs):
    """log p(chosen) - log p(rejected), with the end that TRL appends."""
    ratios = []
    for prompt, *completions in PAIRS:
        sums = []
        for completion in completions:
            ids = torch.tensor([tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]])
            sums.append(scores(log_probs(model, ids), ids, len(prompt.split())).sum())
        ratios.append(sums[0] - sums[1])
    return torch.stack(ratios)


@pytest.mark.parametrize("reference", ["backbone", "given", "precomputed", "recipe"])
@pytest.mark.parametrize("kinds", [["lora"], ["full", "head-saved"]])
def test_dpo_trainer(places, tokenizer, tmp_path, reference, kinds):
    """The reference is the backbone, which the model's own can be; precomputed, or of a model that was loaded from its
    recipe, it is the model as it starts, whose loss is log 2."""
    model = perturbed(prt_model(places, *kinds))
    if reference == "recipe":
        model.save_pretrained(tmp_path / "recipe")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    before, backbone = snapshot(model.reward_networks), snapshot(model.backbone)
    expected = torch.tensor(math.log(2))
    if reference in ("backbone", "given"):
        differences = log_ratios(model, tokenizer, log_pi) - log_ratios(model, tokenizer, log_pt)
        expected = -F.logsigmoid(0.1 * differences).mean()
    changes = {"precompute_ref_log_probs": reference == "precomputed", "learning_rate": 1e-3, "beta": 0.1}
    args = DPOConfig(**settings(tmp_path, **changes))
    assert args.gradient_checkpointing
    given = model.backbone if reference == "given" else None
    trainer = DPOTrainer(model, given, args=args, train_dataset=pairs(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)
    assert logged(trainer)[-1] < logged(trainer)[0]
    trainer.save_model(tmp_path / "tuned")
    check_trained(model, before, backbone, tmp_path / "tuned", places / "backbone")


def one_base(places):
    """A reward on its backbone, which share a pass where nothing is trained."""
    network = AutoModelForCausalLM.from_pretrained(places / "base")
    reward = RewardModel.from_base(network, tiny.tokenizer(), default_peft_config(network))
    return PRTForCausalLM.from_parts(network, [reward])


def test_generation_while_training(places):
    """Trainers that generate leave the model in training mode."""
    model = perturbed(one_base(places))
    expected = model.generate(tiny.prompts(), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.train().generate(tiny.prompts(), max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("place", ["backbone", "base"])
def test_grpo_trainer(places, tokenizer, tmp_path, place):
    """Entropy and KL divergence of the first step, from the log-probabilities of what was generated."""
    temperature, figures = 0.7, {"entropy": [], "kl": []}
    model = perturbed(prt_model(places) if place == "backbone" else one_base(places))
    before, backbone = snapshot(model.reward_networks), snapshot(model.backbone)

    def count_small(prompts, completion_ids, **kwargs):
        for prompt, completion in zip(prompts, completion_ids, strict=True):
            ids = torch.tensor([tokenizer(prompt)["input_ids"] + completion])
            start = len(prompt.split())
            tuned, pretrained = (log_probs(model, ids, temperature) for log_probs in (log_pi, log_pt))
            difference = scores(pretrained, ids, start) - scores(tuned, ids, start)
            figures["kl"].append((difference.exp() - difference - 1)[0])
            figures["entropy"].append(-(tuned.exp() * tuned).sum(-1)[0, start - 1 : -1])
        return [float(sum(token < 50 for token in completion)) for completion in completion_ids]

    changes = {"num_generations": 3, "max_completion_length": 6, "temperature": temperature, "beta": 0.1}
    args = GRPOConfig(**settings(tmp_path, learning_rate=1e-3, **changes))
    assert args.gradient_checkpointing
    # Of one length: TRL pads prompts on the left and gives no positions, which moves those of GPT-2.
    data = Dataset.from_list([{"prompt": prompt} for prompt in ("w5 w6 w7", "w8 w9 w10")])
    trainer = GRPOTrainer(model, count_small, args, data, processing_class=tokenizer)
    trainer.train()
    for name, values in figures.items():
        assert logged(trainer, name)[0] == pytest.approx(torch.cat(values[:6]).mean().item(), rel=1e-3), name
    trainer.save_model(tmp_path / "tuned")
    check_trained(model, before, backbone, tmp_path / "tuned", places / place)


@pytest.mark.parametrize("kinds", [["lora"], ["full", "head-saved"]])
def test_training_is_resumed(places, tokenizer, tmp_path, complaints, kinds):
    args = SFTConfig(
        **settings(
            tmp_path,
            per_device_train_batch_size=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            learning_rate=1e-3,
        )
    )
    data = {"train_dataset": texts(), "eval_dataset": texts()}
    whole = SFTTrainer(prt_model(places, *kinds), args, processing_class=tokenizer, **data)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    second = SFTTrainer(prt_model(places, *kinds), args, processing_class=tokenizer, **data)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert logged(second) == logged(whole) and len(logged(whole)) == 4
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.model.state_dict().items())
    best = AutoModelForCausalLM.from_pretrained(whole.state.best_model_checkpoint)
    torch.testing.assert_close(best(tiny.prompts()).logits, whole.model.eval()(tiny.prompts()).logits)
    assert not [record for record in complaints if "keys in the checkpoint" in record.getMessage()]
    assert not (tmp_path / "out" / "model.safetensors").exists()


# What TRL's own head cannot be

_SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def soft_capped():
    return Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=3.0))


def hardly_soft_capped():
    return Gemma2ForCausalLM(Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=1000.0))


def divided():
    return GraniteForCausalLM(GraniteConfig(**_SMALL, logits_scaling=4.0))


def multiplied():
    return CohereForCausalLM(CohereConfig(**_SMALL, logit_scale=0.25))


def hooked():
    model = tiny.llama(3)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.tanh())
    return model


@pytest.mark.parametrize("is_reward", [False, True])
@pytest.mark.parametrize("make", [soft_capped, hardly_soft_capped, divided, multiplied, hooked])
def test_logits_that_are_not_linear(tokenizer, tmp_path, make, is_reward):
    torch.manual_seed(0)
    odd, plain = make().eval(), tiny.llama(1)
    backbone, base = (plain, odd) if is_reward else (odd, plain)
    model = PRTForCausalLM.from_parts(backbone, [RewardModel.from_base(base, tokenizer)])
    args, collator = TrainingArguments(**settings(tmp_path)), DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, args, collator, texts(), texts(), tokenizer)
    expected = nll(model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer)[-1] < expected
    trainer = SFTTrainer(model, SFTConfig(**settings(tmp_path)), train_dataset=texts(), processing_class=tokenizer)
    with pytest.raises(UnsupportedError, match=f"(?s){type(odd).__name__}'s logits are not.*PRTTrainer"):
        trainer.train()


def test_adapters_of_the_head_that_are_not_linear(places, tokenizer, tmp_path):
    """DoRA starts as the base, so that its first logits would not tell."""
    reward = RewardModel.from_base(
        str(places / "base"), peft_config=LoraConfig(target_modules=["lm_head"], use_dora=True)
    )
    model = PRTForCausalLM.from_parts(str(places / "backbone"), [reward])
    trainer = SFTTrainer(model, SFTConfig(**settings(tmp_path)), train_dataset=texts(), processing_class=tokenizer)
    with pytest.raises(UnsupportedError, match="not plain LoRA"):
        trainer.train()


def test_experts_are_not_balanced(tokenizer, tmp_path):
    torch.manual_seed(0)
    experts = MixtralForCausalLM(MixtralConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=1)).eval()
    model = PRTForCausalLM.from_parts(experts, [RewardModel.from_base(tiny.llama(1), tokenizer)])
    changes = {"precompute_ref_log_probs": True, "max_steps": 1}
    arguments = {"train_dataset": pairs(), "processing_class": tokenizer}
    with pytest.raises(UnsupportedError, match="router_aux_loss_coef=0.0"):
        DPOTrainer(model, args=DPOConfig(**settings(tmp_path, **changes)), **arguments).train()
    trainer = DPOTrainer(model, args=DPOConfig(**settings(tmp_path, router_aux_loss_coef=0.0, **changes)), **arguments)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), rel=1e-4)
