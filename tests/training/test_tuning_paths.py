"""Ways to compute the same training: fused or whole logits, shared layers, stored and several source backbones."""

import copy
import json

import pytest
import tiny
import torch
import transformers
from packaging import version
from peft import IA3Config, LoraConfig
from test_heads import Bent, cohere, gemma2, gptj, granite
from tiny import images, texts
from transformers import LlamaForCausalLM, TrainerCallback

from prt_hf import PRTConfig, PRTTrainer, RewardModel
from prt_hf.errors import BackboneCacheError, PRTValueError, UnsupportedError
from prt_hf.networks.identity import weights_fingerprint
from prt_hf.networks.shared_trunk import SharedTrunk
from prt_hf.reward import backbones
from prt_hf.training import fused_loss as fused
from prt_hf.training.collators import TokenCollator

LORA = LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"])


@pytest.fixture
def tuner(tmp_path, tokenizer):
    """Makes trainers: its keywords are the trainer's, the others those of its arguments."""

    def make(model, *, train_dataset=None, eval_dataset=None, data_collator=None, backbone=None, peft_config=None, **c):
        keywords = {"compute_metrics": c.pop("compute_metrics", None)}
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "backbone_cache_dir": str(tmp_path / "states"),
            "per_device_eval_batch_size": 5,
            "learning_rate": 3e-3,
            "max_steps": 3,
        }
        torch.manual_seed(0)
        is_text = isinstance(model, str) or hasattr(model, "lm_head")
        train_dataset = (texts() if is_text else images()) if train_dataset is None else train_dataset
        return PRTTrainer(
            model,
            PRTConfig(**tiny.TUNING | defaults | c),
            data_collator,
            train_dataset,
            train_dataset if eval_dataset is None else eval_dataset,
            tokenizer if is_text else None,
            backbone=backbone,
            peft_config=peft_config,
            **keywords,
        )

    return make


FIGURES = ("loss", "backbone_loss", "grad_norm", "accuracy", "reward_accuracy", "reward_entropy", "reward_abs", "kl")


def course(trainer):
    """All figures of training, step by step, and of evaluation behind it."""
    trainer.train()
    trainer.evaluate()
    figures = {
        (entry["step"], name): value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.removeprefix("eval_") in FIGURES
    }
    assert len(figures) == trainer.state.global_step * len(FIGURES) + len(FIGURES) - 1
    return figures


def roughly(expected, rel=2e-5):
    return pytest.approx(expected, rel=rel, abs=1e-6)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Whole logits, or none


WAYS = {
    "adapter": (lambda: tiny.llama(1), {"peft_config": LORA}),
    "adapter below the head": (lambda: tiny.llama(1), {"peft_config": LoraConfig(target_modules=["q_proj"])}),
    "head saved whole": (
        lambda: tiny.llama(1),
        {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    ),
    "head with a bias": (
        lambda: tiny.llama(1),
        {"peft_config": LoraConfig(target_modules=["lm_head"], lora_bias=True, use_rslora=True), "kl_coef": 2.0},
    ),
    "full": (lambda: tiny.llama(1), {}),
    "tied full": (lambda: tiny.gpt2(1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), {}),
    "zero start": (lambda: tiny.llama(1), {"peft_config": LORA, "reward_init": "zero"}),
    "zero start, full": (lambda: tiny.llama(1), {"reward_init": "zero"}),
    "kl_coef": (lambda: tiny.llama(1), {"peft_config": LORA, "kl_coef": 2.0}),
    "entropy_coef": (lambda: tiny.llama(1), {"peft_config": LORA, "entropy_coef": 0.1}),
    "padded backbone": (
        lambda: tiny.llama(1),
        {"peft_config": LORA, "backbone": lambda: tiny.gpt2(2, vocab_size=128)},
    ),
    "padded reward": (lambda: tiny.llama(1, vocab_size=128), {"peft_config": LORA, "kl_coef": 2.0}),
    "softcapped": (gemma2, {"peft_config": LORA, "entropy_coef": 0.1}),
    "softcapped backbone": (lambda: tiny.llama(1), {"peft_config": LORA, "backbone": gemma2, "kl_coef": 2.0}),
    "scaled": (cohere, {"peft_config": LORA, "kl_coef": 2.0}),
    "scaled backbone": (lambda: tiny.llama(1), {"backbone": granite}),
    "state space": (lambda: tiny.mamba(1), {"peft_config": LoraConfig(target_modules=["in_proj", "lm_head"])}),
    "accumulated": (
        lambda: tiny.llama(1),
        {"peft_config": LORA, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    **{
        f"checkpointing, use_reentrant={use_reentrant}": (
            lambda: tiny.llama(1),
            {
                "peft_config": LORA,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
            },
        )
        for use_reentrant in (True, False)
    },
}


def made(changes):
    """With models that no other run shares."""
    return {name: value() if callable(value) and name == "backbone" else value for name, value in changes.items()}


@pytest.mark.parametrize("way", WAYS)
def test_fused_training_is_training_with_whole_logits(tuner, way):
    model, changes = WAYS[way]
    whole = tuner(model(), fused_loss="never", **made(changes))
    fused = tuner(model(), fused_loss="always", **made(changes))
    assert course(fused) == roughly(course(whole))
    assert fused._is_fused and not whole._is_fused


@pytest.mark.parametrize("peft_config", [LORA, None])
def test_fused_training_in_bfloat16_follows(tuner, peft_config):
    runs = {
        kind: tuner(tiny.llama(1, initializer_range=0.1), fused_loss=kind, bf16=True, peft_config=peft_config)
        for kind in ("never", "auto")
    }
    figures = {kind: course(trainer) for kind, trainer in runs.items()}
    assert runs["auto"]._is_fused
    for (step, name), value in figures["never"].items():
        assert figures["auto"][step, name] == pytest.approx(value, rel=0.02, abs=0.02), (step, name)


def bent(**config):
    return Bent(tiny.llama(1, **config).config)


CANNOT = {
    "a classifier": (lambda: tiny.vit(1), {}, "a classifier has few"),
    "a head that is bent": (bent, {}, "Bent has logits that differ by"),
    "a backbone whose head is bent": (lambda: tiny.llama(1), {"backbone": bent}, "Bent has logits that differ by"),
    "DoRA of the head": (
        lambda: tiny.llama(1),
        {"peft_config": LoraConfig(target_modules=["lm_head"], use_dora=True)},
        "LlamaForCausalLM has an adapter of the head that is not plain LoRA",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_fused_says_why(tuner, kind):
    model, changes, reason = CANNOT[kind]
    with pytest.raises(UnsupportedError, match=f"(?s)The loss cannot be fused.*fused_loss='auto'.*found: {reason}"):
        tuner(model(), fused_loss="always", **made(changes)).train()


def test_what_cannot_be_fused_is_trained_with_whole_logits(tuner):
    runs = [tuner(tiny.llama(1), backbone=bent(), peft_config=LORA, fused_loss=kind) for kind in ("auto", "never")]
    runs[0]._sources[0].network.load_state_dict(runs[1]._sources[0].network.state_dict())
    assert course(runs[0]) == course(runs[1])
    assert not runs[0]._is_fused


# Layers that both have in common


UPPER = LoraConfig(target_modules=["model.layers.2.self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head"])
HEAD_ONLY = LoraConfig(target_modules=["lm_head"])
CHECKPOINTED = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
]


def test_a_head_that_is_zero_hides_nothing(tuner):
    """Of a bent head, nothing shows where its logits are zero."""
    runs = [
        tuner(bent(), backbone=tiny.llama(2), peft_config=peft_config, reward_init="zero", fused_loss=fused_loss)
        for peft_config in (LORA, None)
        for fused_loss in ("auto", "never")
    ]
    first, plain, full, plain_full = map(course, runs)
    assert first == roughly(plain) and full == roughly(plain_full)
    assert [run._is_fused for run in runs] == [False] * 4
    straight = tuner(tiny.llama(1), peft_config=LORA, reward_init="zero")
    straight.train()
    assert straight._is_fused


def test_a_decoder_that_is_called_in_part_is_trained_with_whole_logits(tuner):
    config = transformers.OPTConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
    )
    torch.manual_seed(1)
    model = transformers.OPTForCausalLM(config)
    auto, never = (tuner(copy.deepcopy(model), peft_config=LoraConfig(), fused_loss=way) for way in ("auto", "never"))
    assert course(auto) == roughly(course(never)) and not auto._is_fused


def test_products_with_the_head_are_made_in_autocasts_precision(tuner, monkeypatch):
    seen = set()
    add = fused._Gradients.add

    def noting(self, part, logits_gradient):
        seen.update(weight.dtype for weight in self._reward.weights)
        assert logits_gradient.dtype == torch.float32
        add(self, part, logits_gradient)

    monkeypatch.setattr(fused._Gradients, "add", noting)
    for peft_config in (LORA, None):
        tuner(tiny.llama(1), peft_config=peft_config, bf16=True, entropy_coef=0.1).train()
    assert seen == {torch.bfloat16}


class Calls(TrainerCallback):
    """How often modules computed something, in each step of training."""

    def __init__(self, *modules):
        self.steps, self.counts = [], [0] * len(modules)
        for index, module in enumerate(modules):
            module.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index):
        self.counts[index] += 1

    def on_step_begin(self, *args, **kwargs):
        self.counts = [0] * len(self.counts)

    def on_step_end(self, *args, **kwargs):
        self.steps.append(self.counts)
        self.counts = [0] * len(self.counts)  # evaluation is counted apart


@pytest.mark.parametrize("changes", CHECKPOINTED)
@pytest.mark.parametrize(("peft_config", "shared"), [(UPPER, 2), (HEAD_ONLY, 4)])
@pytest.mark.parametrize("fused_loss", ["always", "never"])
def test_layers_below_the_adapter_are_run_once(tuner, monkeypatch, changes, peft_config, shared, fused_loss):
    own = {"peft_config": peft_config, "fused_loss": fused_loss}
    changes = changes | own
    trainer = tuner(tiny.llama(1, num_hidden_layers=4), **changes)
    layers = trainer.model.get_base_model().model.layers
    calls = Calls(*(layer.self_attn.k_proj for layer in layers))
    trainer.add_callback(calls)
    found = course(trainer)
    assert len(trainer.backbones[0]._trunk._layers) == shared
    # Once with the adapter off; above, once more with it on, and once more where the backward pass repeats that. Old
    # transformers checkpoint a layer's call rather than its forward, and repeat what was shared, too, if reentrant.
    above = 3 if changes.get("gradient_checkpointing") else 2
    repeats = version.parse(transformers.__version__) < version.parse("5.20") and changes == CHECKPOINTED[2] | own
    below = [[1] * shared, [2] * shared] if repeats else [[1] * shared]
    steps = calls.steps[1:]  # the first step also looks at the networks
    assert len(steps) == 2 and all(counts[:shared] in below for counts in steps)
    assert all(counts[shared:] == [above] * (4 - shared) for counts in steps)
    monkeypatch.setattr(SharedTrunk, "of", classmethod(lambda cls, network: None))
    separate = tuner(tiny.llama(1, num_hidden_layers=4), **changes)
    assert found == roughly(course(separate))
    assert separate.backbones[0]._trunk is None


def test_a_trunk_with_accumulated_batches_and_another_backbone_beside_it(tuner, monkeypatch):
    """In evaluation both backbones are run before the reward."""
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 5}

    def run():
        trainer = tuner(tiny.llama(1, num_hidden_layers=4), peft_config=UPPER, backbone=[None, tiny.gpt2(2)], **changes)
        return trainer, course(trainer)

    trainer, found = run()
    assert trainer.backbones[0]._trunk is not None
    monkeypatch.setattr(SharedTrunk, "of", classmethod(lambda cls, network: None))
    assert found == roughly(run()[1])


TRUNKS = {
    "parallel blocks": (gptj, "transformer.h.1.attn.q_proj"),
    "state space": (lambda: tiny.mamba(1), "backbone.layers.1.mixer.in_proj"),
    "softcapped": (gemma2, "model.layers.1.self_attn.q_proj"),
    "images": (lambda: tiny.vit(1), "vit.layers.1.attention.q_proj"),
}


@pytest.mark.parametrize("kind", TRUNKS)
def test_layers_of_other_models_are_shared_too(tuner, monkeypatch, kind):
    """The head saved whole, which is the usual way for classifiers; last, where reentrant checkpointing would leave
    layers without a gradient if what is shared wanted none."""
    make, layer = TRUNKS[kind]
    peft_config = LoraConfig(target_modules=[layer], modules_to_save=["classifier" if kind == "images" else "lm_head"])

    def run(changes):
        trainer = tuner(make(), peft_config=peft_config, **changes)
        return trainer, course(trainer)

    runs = [run(changes) for changes in (CHECKPOINTED[0], CHECKPOINTED[2])]
    assert all(len(trainer.backbones[0]._trunk._layers) == 1 for trainer, _ in runs)
    monkeypatch.setattr(SharedTrunk, "of", classmethod(lambda cls, network: None))
    _, separate = run({})
    for _, figures in runs:
        assert figures == roughly(separate)


class Skipping(LlamaForCausalLM):
    """Hands the first layer's output on to the last layer, past the others."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        layers, seen = self.model.layers, []
        handles = [
            layers[0].register_forward_hook(lambda module, args, output: seen.append(output)),
            layers[-1].register_forward_pre_hook(lambda module, args: (args[0] + seen[-1], *args[1:])),
        ]
        try:
            return super().forward(input_ids, attention_mask, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def skipping():
    torch.manual_seed(1)
    return Skipping(tiny.llama(1, num_hidden_layers=4).config)


NOT_SHARED = {
    "an adapter of the first layer": (
        lambda: tiny.llama(1),
        LoraConfig(target_modules=["model.layers.0.mlp.down_proj", "lm_head"]),
    ),
    "an adapted embedding": (lambda: tiny.llama(1), LoraConfig(target_modules=["embed_tokens", "lm_head"])),
    "a trained embedding": (
        lambda: tiny.llama(1),
        LoraConfig(target_modules=["model.layers.1.self_attn.q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "dropout": (lambda: tiny.gpt2(1), LoraConfig(target_modules=["transformer.h.1.attn.c_attn"])),
    "more than one stream": (skipping, LoraConfig(target_modules=["model.layers.3.mlp.down_proj", "lm_head"])),
}


@pytest.mark.parametrize("kind", NOT_SHARED)
def test_layers_that_differ_are_not_shared(tuner, monkeypatch, kind):
    model, peft_config = NOT_SHARED[kind]
    model = model()
    trainer = tuner(copy.deepcopy(model), peft_config=peft_config)
    # what is handed past the layers shows only when a batch is computed
    assert (SharedTrunk.of(trainer.model) is None) == (kind != "more than one stream")
    found = course(trainer)
    assert trainer.backbones[0]._trunk is None
    monkeypatch.setattr(SharedTrunk, "of", classmethod(lambda cls, network: None))
    assert found == course(tuner(model, peft_config=peft_config))


# Backbones that are read


@pytest.mark.parametrize("changes", [{"reward_init": "zero"}, {"neftune_noise_alpha": 5.0}])
def test_what_hides_a_difference_is_seen_through(tuner, monkeypatch, changes):
    """Of a zero reward, logits tell nothing; noise on embeddings is for the reward alone."""
    model, peft_config = NOT_SHARED["more than one stream"]
    if "neftune_noise_alpha" in changes:
        model, peft_config = lambda: tiny.llama(1), LoraConfig(target_modules=["model.layers.1.mlp.down_proj"])
    trainer = tuner(model(), peft_config=peft_config, **changes)
    found = course(trainer)
    assert trainer.backbones[0]._trunk is None
    monkeypatch.setattr(SharedTrunk, "of", lambda network: None)
    assert found == course(tuner(model(), peft_config=peft_config, **changes))


ADAPTERS = {
    "LoRA": LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "saved whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "DoRA": LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], init_lora_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_own_base_is_the_network_with_its_adapter_off(tokenizer, kind):
    """As PEFT switches it off; and everything is as it was afterwards."""
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, copy.deepcopy(ADAPTERS[kind]))
    with torch.no_grad():
        for value in reward.network.parameters():
            if value.requires_grad:
                value += 0.5
    network, ids = reward.network.train(), tiny.prompts()
    network.get_submodule("base_model.model.model.layers.0").eval()  # a mixture of modes
    adapted = network(ids).logits
    before = [(value.requires_grad) for value in network.parameters()], [each.training for each in network.modules()]
    own = backbones.OwnBase(reward)
    found = own.logits(backbones.Batch({"input_ids": ids}, None))
    after = [(value.requires_grad) for value in network.parameters()], [each.training for each in network.modules()]
    assert torch.equal(found, tiny.llama(1)(ids).logits) and before == after
    assert torch.equal(network(ids).logits, adapted) and not torch.equal(adapted, found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone on disk, of a padded vocabulary."""
    path = tmp_path_factory.mktemp("gpt2")
    tiny.gpt2(2, vocab_size=128).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def permuted():
    return tiny.resnet(2, names=[tiny.COLOURS[index] for index in (2, 0, 3, 1)])


STORED = {
    "own base": (lambda: tiny.llama(1), {"peft_config": LORA}),
    "own base with shared layers": (lambda: tiny.llama(1, num_hidden_layers=4), {"peft_config": UPPER}),
    "head saved whole": (
        lambda: tiny.llama(1),
        {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    ),
    # Its head is the stored one's equal before the first step, and trained.
    "full": (lambda: tiny.llama(1), {"learning_rate": 1e-2}),
    "tied full": (lambda: tiny.gpt2(1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), {}),
    "tied adapter": (lambda: tiny.llama(1, tie_word_embeddings=True), {"peft_config": LORA}),
    "zero start": (lambda: tiny.llama(1), {"peft_config": LORA, "reward_init": "zero"}),
    "in memory": (lambda: tiny.llama(1), {"peft_config": LORA, "backbone": lambda: tiny.llama(3)}),
    "softcapped": (gemma2, {"peft_config": LORA, "entropy_coef": 0.1, "kl_coef": 2.0}),
    "scaled, whole logits": (lambda: tiny.llama(1), {"backbone": granite, "fused_loss": "never"}),
    "several": (
        lambda: tiny.llama(1),
        {"peft_config": LORA, "backbone": lambda: [None, tiny.gpt2(2), cohere()], "max_steps": 6},
    ),
    "image adapter": (
        lambda: tiny.vit(1),
        {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])},
    ),
    "image full": (lambda: tiny.vit(1), {}),
    "labels in another order": (lambda: tiny.vit(1), {"backbone": permuted}),
}


@pytest.mark.parametrize("kind", STORED)
def test_training_on_stored_states_is_training_on_the_backbone(tuner, kind):
    model, changes = STORED[kind]
    run = course(tuner(model(), **made(changes)))
    stored = tuner(model(), precompute_backbone=True, **made(changes))
    assert course(stored) == roughly(run)
    assert all(backbone.network is None for backbone in stored.backbones), "nothing was run"


@pytest.mark.parametrize("full", [False, True])
def test_stored_states_of_a_folder(tuner, folder, full):
    changes = {"backbone": folder} if not full else {}
    model = (lambda: folder) if full else (lambda: tiny.llama(1))
    changes |= {"peft_config": None if full else LORA, "learning_rate": 1e-2}
    run = course(tuner(model(), **changes))
    stored = tuner(model(), precompute_backbone=True, **changes)
    assert course(stored) == roughly(run)
    assert stored._sources[0].network is None, "not kept in memory"


@pytest.mark.parametrize("peft_config", [LORA, None])
def test_stored_states_in_bfloat16_follow(tuner, peft_config):
    changes = {"bf16": True, "peft_config": peft_config}
    run = course(tuner(tiny.llama(1, initializer_range=0.1), **changes))
    found = course(tuner(tiny.llama(1, initializer_range=0.1), precompute_backbone=True, **changes))
    for (step, name), value in run.items():
        assert found[step, name] == pytest.approx(value, rel=0.02, abs=0.02), (step, name)


@pytest.mark.parametrize("fused_loss", ["always", "never"])
def test_stored_states_of_rows_without_any(tuner, fused_loss):
    """A micro-batch of one row, none of whose labels are supervised."""
    data = texts().map(
        lambda row, index: {"labels": [-100] * len(row["labels"])} if index % 3 == 0 else row, with_indices=True
    )
    run, stored = (
        course(
            tuner(
                tiny.llama(1),
                train_dataset=data,
                peft_config=LORA,
                precompute_backbone=value,
                fused_loss=fused_loss,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                gradient_accumulation_steps=4,
            )
        )
        for value in (False, True)
    )
    assert stored == roughly(run)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_stored_states_of_formatted_and_reordered_rows(tuner, kind):
    """The column that says where a row's states are is not among the named ones."""
    data = texts() if kind == "text" else images().with_format(None)
    data = data.add_column("note", ["unused"] * len(data)).shuffle(seed=1).select(range(10))
    data.set_format("torch", columns=["input_ids", "labels"] if kind == "text" else ["pixel_values", "label"])
    model = {"text": tiny.llama, "images": tiny.vit}[kind]
    run, stored = (course(tuner(model(1), train_dataset=data, precompute_backbone=value)) for value in (False, True))
    assert stored == roughly(run)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "states").iterdir())


def test_a_second_run_neither_loads_nor_computes(tuner, folder, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the backbone was asked")

    def run():
        return course(tuner(tiny.llama(1), backbone=folder, peft_config=LORA, precompute_backbone=True, max_steps=2))

    first, stored = run(), folders(tmp_path)
    monkeypatch.setattr(backbones, "load_pretrained", refuse)
    monkeypatch.setattr(backbones.Backbone, "states", refuse)
    assert run() == first and folders(tmp_path) == stored


@pytest.mark.parametrize("model", [lambda: tiny.llama(1), lambda: tiny.vit(1)])
def test_a_second_run_in_memory_computes_nothing(tuner, monkeypatch, model):
    first = course(tuner(model(), precompute_backbone=True))
    monkeypatch.setattr(backbones.Backbone, "states", None)
    assert course(tuner(model(), precompute_backbone=True)) == first


def test_a_killed_precompute_is_continued(tuner):
    """12 rows in blocks of 2, and 2 passes before them: one that looks at the head, one that tells the width."""
    expected = course(tuner(tiny.llama(1), backbone=tiny.gpt2(2), peft_config=LORA))
    calls = []

    def counting(dies_at=None):
        network = tiny.gpt2(2)

        def count(module, args):
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            calls.append(module)

        network.transformer.register_forward_pre_hook(count)
        return network

    def make(network):
        return tuner(
            tiny.llama(1),
            backbone=network,
            peft_config=LORA,
            precompute_backbone=True,
            per_device_eval_batch_size=2,
        )

    with pytest.raises(KeyboardInterrupt):
        make(counting(dies_at=2 + 4))
    assert len(calls) == 6
    calls.clear()
    trainer = make(counting())
    assert len(calls) == 2 + 2
    assert course(trainer) == roughly(expected)
    assert len(calls) == 4, "training ran the backbone"


class Marked(TokenCollator):
    """Supervises less."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch["labels"][:, :3] = -100
        return batch


def test_what_the_states_depend_on_has_a_place_of_its_own(tuner, tmp_path, folder):
    path = tmp_path / "backbone"

    def write(seed):
        tiny.gpt2(seed).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)

    def places(**changes):
        tuner(tiny.llama(1), **{"backbone": str(path), "precompute_backbone": True} | changes)
        return len(folders(tmp_path))

    write(2)
    assert [places(), places(), places(kl_coef=2.0, peft_config=LORA)] == [1, 1, 1]
    assert places(train_dataset=texts(seed=1)) == 2
    assert places(data_collator=Marked(0)) == 3
    assert places(bf16=True) == 4
    assert places(backbone=folder) == 5
    write(3)
    assert [places(), places()] == [6, 6]
    model = tiny.gpt2(3)
    assert places(backbone=model) == 7
    model.lm_head.weight.data[5, 5] += 1
    assert places(backbone=model) == 8


def test_the_own_base_is_recognised_however_far_its_adapter_is(tuner, tmp_path, monkeypatch):
    """Before and after training, saved and loaded, and as a model of its own: the weights are the same."""
    base = tiny.llama(1)
    trainer = tuner(base, peft_config=LORA, precompute_backbone=True)
    trainer.train()
    trainer.save_model()
    expected = trainer.evaluate()["eval_loss"]
    monkeypatch.setattr(backbones.Backbone, "states", None)
    reward = RewardModel.from_pretrained(tmp_path / "out", base_model=base)
    for backbone in (None, tiny.llama(1)):
        again = tuner(reward, train_dataset=texts(), backbone=backbone, precompute_backbone=True)
        assert again.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert len(folders(tmp_path)) == 1


def test_another_data_set_is_stored_when_it_is_evaluated(tuner, tmp_path, folder):
    run, stored = (
        tuner(tiny.llama(1), backbone=folder, peft_config=LORA, precompute_backbone=value) for value in (False, True)
    )
    others = texts(7, seed=1)
    for data in (None, others, texts(), others):
        assert stored.evaluate(data)["eval_loss"] == pytest.approx(run.evaluate(data)["eval_loss"], rel=1e-5)
    assert len(folders(tmp_path)) == 2
    assert stored._sources[0].network is None
    assert course(stored) == roughly(course(run))


def test_named_data_sets_are_stored(tuner, tmp_path):
    named = {"same": texts(), "other": texts(5, seed=1)}
    run, stored = (
        tuner(tiny.llama(1), eval_dataset=named, peft_config=LORA, precompute_backbone=value).evaluate()
        for value in (False, True)
    )
    for name in named:
        assert stored[f"eval_{name}_loss"] == pytest.approx(run[f"eval_{name}_loss"], rel=1e-5)
    assert len(folders(tmp_path)) == 2


def test_outputs_of_stored_language_models_are_refused(tuner, tmp_path):
    text = (
        "Stored states of a backbone cover supervised positions only.\n"
        "  expected: losses and the trainer's own figures\n"
        r"  found: `predict\(\)` or `compute_metrics`, which need the logits of all positions"
        "\n  remedy: precompute_backbone=False"
    )
    others = texts(7, seed=1)
    with pytest.raises(UnsupportedError, match=text):
        tuner(tiny.llama(1), precompute_backbone=True).predict(others)
    with pytest.raises(UnsupportedError, match=text):
        tuner(tiny.llama(1), precompute_backbone=True, train_dataset=others, compute_metrics=lambda prediction: {})
    assert len(folders(tmp_path)) == 1, "refused after all states were computed"
    assert (
        tuner(tiny.llama(1), precompute_backbone=True, prediction_loss_only=True).predict(others).metrics["test_loss"]
    )


def test_rows_without_labels_have_no_states(tuner):
    unlabelled = images().remove_columns("label")
    with pytest.raises(PRTValueError, match="(?s)The batch has no labels.*found: pixel_values"):
        tuner(tiny.vit(1), precompute_backbone=True).predict(unlabelled)


def test_outputs_of_stored_classifiers_are_the_prt_models(tuner):
    run, stored = (tuner(tiny.vit(1), backbone=permuted(), precompute_backbone=value) for value in (False, True))
    others = images(7, seed=1)
    expected, found = run.predict(others), stored.predict(others)
    torch.testing.assert_close(torch.tensor(found.predictions), torch.tensor(expected.predictions))
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


class Noisy(TokenCollator):
    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"input_ids": (batch["input_ids"] + torch.randint(90, batch["input_ids"].shape)) % 97}


@pytest.mark.parametrize(
    ("data", "changes", "text"),
    [
        (
            lambda: texts().to_iterable_dataset(),
            {},
            "a streamed data set cannot be stored(.|\n)*found: IterableDataset",
        ),
        (lambda: texts().to_list(), {}, "has no fingerprint(.|\n)*found: list(.|\n)*Dataset.from_list"),
        (
            lambda: texts().with_transform(lambda rows: rows),
            {},
            r"augmented differently in every epoch(.|\n)*found: `set_transform` or `with_transform`",
        ),
        (texts, {"data_collator": Noisy(0)}, "gives another batch every time(.|\n)*found: Noisy"),
    ],
)
def test_data_without_an_identity_are_refused(tuner, tmp_path, data, changes, text):
    with pytest.raises(BackboneCacheError, match=text):
        tuner(tiny.llama(1), train_dataset=data(), precompute_backbone=True, **changes)
    assert not (tmp_path / "states").exists()


def test_states_of_a_bent_head_are_refused(tuner):
    text = "The states of this backbone cannot be stored.(.|\n)*precompute_backbone=False(.|\n)*found: Bent has logits"
    with pytest.raises(UnsupportedError, match=text):
        tuner(tiny.llama(1), backbone=bent(), precompute_backbone=True)


# Several backbones


def test_one_backbone_is_drawn_for_each_step(tuner):
    """All micro-batches of a step are judged by the same; in 10 steps all of them come up."""
    networks = [tiny.gpt2(2), tiny.llama(3), tiny.mamba(4)]
    trainer = tuner(
        tiny.llama(1),
        backbone=networks,
        peft_config=LORA,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=10,
    )
    calls = Calls(*(source.network.base_model for source in trainer.backbones))
    trainer.add_callback(calls)
    trainer.train()
    drawn = calls.steps[1:]  # the first step also looks at the networks
    assert all(sorted(counts) == [0, 0, 2] for counts in drawn)
    assert {counts.index(2) for counts in drawn} == {0, 1, 2}


def test_the_loss_of_a_step_is_that_of_the_drawn_backbone(tuner):
    """Without learning, step by step one of the losses that each backbone alone gives."""
    changes = {"learning_rate": 0.0, "max_steps": 6}
    alone = []
    for network in (tiny.gpt2(2), tiny.llama(3)):
        trainer = tuner(tiny.llama(1), backbone=network, **changes)
        trainer.train()
        alone.append(losses(trainer))
    trainer = tuner(tiny.llama(1), backbone=[tiny.gpt2(2), tiny.llama(3)], **changes)
    trainer.train()
    drawn = [
        [index for index in (0, 1) if alone[index][step] == pytest.approx(loss, rel=1e-5)]
        for step, loss in enumerate(losses(trainer))
    ]
    assert sorted({index for step_draws in drawn for index in step_draws}) == [0, 1]
    assert all(len(step_draws) == 1 for step_draws in drawn)


@pytest.mark.parametrize("precompute", [False, True])
def test_resumed_training_draws_the_same_backbones(tuner, tmp_path, precompute):
    """In the middle of an epoch of 6 steps, with dropout."""
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.2)
    changes = {"per_device_train_batch_size": 2, "max_steps": 9, "lr_scheduler_type": "linear"}

    def make(**more):
        return tuner(
            tiny.llama(1),
            backbone=[None, tiny.gpt2(2)],
            peft_config=lora,
            precompute_backbone=precompute,
            **changes,
            **more,
        )

    straight = make(save_strategy="steps", save_steps=4)
    straight.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert losses(resumed)[-5:] == pytest.approx(losses(straight)[-5:], rel=1e-6)
    for name, value in straight.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), value)


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_is_the_mean_over_backbones(tuner, precompute):
    networks = [lambda: tiny.gpt2(2), lambda: tiny.llama(3), lambda: None]
    figures = [tuner(tiny.llama(1), backbone=make()).evaluate() for make in networks]
    several = tuner(tiny.llama(1), backbone=[make() for make in networks], precompute_backbone=precompute).evaluate()
    assert several["eval_loss"] != pytest.approx(figures[0]["eval_loss"], rel=1e-3)
    for name in ("loss", "backbone_loss", "accuracy", "reward_accuracy", "reward_entropy", "reward_abs", "kl"):
        mean = sum(each[f"eval_{name}"] for each in figures) / 3
        assert several[f"eval_{name}"] == pytest.approx(mean, rel=1e-5), name


@pytest.mark.parametrize("precompute", [False, True])
def test_all_backbones_are_written_down(tuner, tmp_path, folder, precompute):
    base = tiny.llama(1)
    trainer = tuner(
        base,
        backbone=[None, folder, tiny.llama(3)],
        peft_config=LORA,
        precompute_backbone=precompute,
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    entries = json.loads((tmp_path / "out" / "prt_config.json").read_text())
    expected = [base, tiny.gpt2(2, vocab_size=128), tiny.llama(3)]
    written = [entries["source_backbone"], *entries["more_source_backbones"]]
    assert [entry["weights"] for entry in written] == [weights_fingerprint(model) for model in expected]
    assert [entry["id"] for entry in written] == [None, folder, None]
    config = RewardModel.from_pretrained(tmp_path / "out", base_model=base).config
    assert (config.source_backbone, *config.more_source_backbones) == tuple(
        type(config.source_backbone)(**entry) for entry in written
    )
