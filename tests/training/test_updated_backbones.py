"""Rewards tuned on backbones whose vocabulary is an update of theirs, against a brute force over the shared tokens."""

import copy

import families
import pytest
import tiny
import torch
from datasets import Dataset
from families import BACKBONES, REWARD
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from prt_hf import (
    NonFiniteRewardError,
    PRTConfig,
    PRTTrainer,
    UnsupportedError,
    VocabularyMismatchError,
    prt_loss,
)
from prt_hf.functional import reward_entropy
from prt_hf.networks.lm_head import Projection
from prt_hf.training.fused_loss import fused_prt_loss

KINDS = ["extended", "renamed", "moved", "reduced"]
SETTINGS = {"kl_coef": 2.0, "entropy_coef": 0.1}


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        defaults = {"output_dir": str(tmp_path / "out"), "learning_rate": 0.1, "optim": "sgd", "max_steps": 2}
        return PRTConfig(**tiny.TUNING | SETTINGS | defaults | changes)

    return make


def backbone(home, kind, seed=1, model=tiny.gpt2, **config):
    """The folder of a backbone with its own tokenizer."""
    families.build(kind, model, seed, **config).save_pretrained(home / kind)
    BACKBONES[kind].save_pretrained(home / kind)
    return str(home / kind)


def start(seed=2):
    return tiny.llama(seed, vocab_size=len(REWARD))


def pairs_of(kind):
    """The reward's tokens and those of the backbone that they are, by their names and roles."""
    pairs = families.BruteForce(None, BACKBONES[kind]).pairs
    return {old: new for new, old in pairs.items()}


def texts(kind, rows=8):
    """Token rows of the reward with all the added tokens that the backbone has, the end token last."""
    known, generator = pairs_of(kind), torch.Generator().manual_seed(0)
    pool = [index for index in range(len(REWARD)) if index in known and index != REWARD.pad_token_id]
    added = [index for index in pool if index >= len(families.PIECES)]
    examples = []
    for row in range(rows):
        chosen = torch.randint(len(pool), (6 + 3 * (row % 3),), generator=generator).tolist()
        ids = [*(pool[index] for index in chosen), added[row % len(added)], REWARD.eos_token_id]
        prompt = 1 + row % 4
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(examples)


def brute_force(kind, network, reward, rows, teacher=None, teacher_kind=None, entropy_coef=SETTINGS["entropy_coef"]):
    """The mean loss over the tokens that all have, row by row, in float64, with a gradient for `reward`."""
    pairs = pairs_of(kind)
    shared = [old for old in pairs if teacher is None or old in pairs_of(teacher_kind)]
    total, count = 0.0, 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"][1:]
        theirs = torch.tensor([[pairs[index] for index in ids]])
        with torch.no_grad():
            log_pt = network(theirs).logits[0, :-1].double()[:, [pairs[old] for old in shared]].log_softmax(-1)
        r = reward(torch.tensor([ids])).logits[0, :-1]
        log_pi = (log_pt + r[:, shared] / SETTINGS["kl_coef"]).log_softmax(-1)
        rho = r[:, : len(REWARD)].log_softmax(-1)
        entropy = -(rho.exp() * rho).sum(-1)
        if teacher is not None:
            names = pairs_of(teacher_kind)
            with torch.no_grad():
                log_q = teacher(torch.tensor([[names[index] for index in ids]])).logits[0, :-1].double()
            log_q = log_q[:, [names[old] for old in shared]].log_softmax(-1)
        for position, label in enumerate(labels):
            if label == -100:
                continue
            if teacher is None:
                loss = -log_pi[position, shared.index(label)]
            else:
                loss = (log_q[position].exp() * (log_q[position] - log_pi[position])).sum()
            total = total + loss - entropy_coef * entropy[position]
            count += 1
    return total / count


def gradients(network):
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def expected(kind, folder, rows, **kwargs):
    """The loss and the gradients of the reward's weights."""
    network = loaded(folder)
    reward = start().double()
    loss = brute_force(kind, network, reward, rows, **kwargs)
    loss.backward()
    return loss.item(), gradients(reward)


def assert_gradients(found, reference):
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=2e-5, msg=name)


def loss_and_gradients(trainer):
    """Of all rows in one batch of the trainer's own loader."""
    (inputs,) = trainer.get_train_dataloader()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(inputs)))
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize("way", ["plain", "fused", "stored", "stored unfused"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_over_the_shared_tokens(config, tmp_path, kind, way):
    rows, folder = texts(kind), backbone(tmp_path, kind)
    changes = {
        "fused_loss": "never" if way in ("plain", "stored unfused") else "always",
        "precompute_backbone": way.startswith("stored"),
        "backbone_cache_dir": str(tmp_path / "cache"),
        "per_device_train_batch_size": len(rows),
    }
    trainer = PRTTrainer(start(), config(**changes), None, rows, processing_class=REWARD, backbone=folder)
    loss, found = loss_and_gradients(trainer)
    assert trainer._is_fused == (changes["fused_loss"] == "always")
    reference, reference_gradients = expected(kind, folder, rows)
    assert loss == pytest.approx(reference, rel=1e-5)
    assert_gradients(found, reference_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_stored_states_and_figures(config, tmp_path, kind):
    """Ways of one run end at the same weights, and evaluation is over the shared tokens."""
    rows, folder = texts(kind), backbone(tmp_path, kind)
    ways = {
        "large": {"per_device_train_batch_size": 8},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "unfused": {"per_device_train_batch_size": 8, "fused_loss": "never"},
        "stored": {"per_device_train_batch_size": 8, "precompute_backbone": True},
    }
    found = {}
    for name, changes in ways.items():
        args = config(**changes, backbone_cache_dir=str(tmp_path / "cache"), per_device_eval_batch_size=3)
        trainer = PRTTrainer(start(), args, None, rows, rows, REWARD, backbone=folder)
        trainer.train()
        found[name] = trainer.model.state_dict()
        figures = trainer.evaluate()
        network = loaded(folder)
        with torch.no_grad():
            loss = brute_force(kind, network, copy.deepcopy(trainer.model).double(), rows, entropy_coef=0)
        assert figures["eval_loss"] == pytest.approx(loss.item(), rel=1e-5), name
        assert all(torch.isfinite(torch.tensor(value)) for value in figures.values()), figures
    for name, state in found.items():
        for key, value in state.items():
            torch.testing.assert_close(value, found["large"][key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("where", ["label", "context"])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_token_that_the_backbone_lacks_is_refused(config, tmp_path, where, precompute):
    reserved = REWARD.get_vocab()["<|reserved_1|>"]
    row = {"input_ids": [3, reserved, 5, 6], "labels": [-100, reserved if where == "label" else -100, 5, 6]}
    args = config(precompute_backbone=precompute, backbone_cache_dir=str(tmp_path / "cache"))
    folder = backbone(tmp_path, "reduced")
    with pytest.raises(VocabularyMismatchError) as error:
        PRTTrainer(start(), args, None, Dataset.from_list([row] * 4), None, REWARD, backbone=folder).train()
    assert f"found: '<|reserved_1|>', id {reserved} of the reward\n" in str(error.value)
    assert "reduced" not in str(error.value) and "2 of the reward's are not used" in str(error.value)


def test_padding_that_the_backbone_lacks(config, tmp_path):
    """It is masked, so it need not be known."""
    tokenizer = families.tokenizer(after=[name for name in families.ADDED if name != "<pad>"], pad_token=None)
    families.build("identical", tiny.gpt2, 1).save_pretrained(tmp_path / "unpadded")
    tokenizer.save_pretrained(tmp_path / "unpadded")
    rows = texts("identical")
    trainer = PRTTrainer(
        start(), config(per_device_train_batch_size=8), None, rows, None, REWARD, backbone=str(tmp_path / "unpadded")
    )
    loss, _ = loss_and_gradients(trainer)
    pairs = {old: tokenizer.get_vocab().get(name) for name, old in REWARD.get_vocab().items()}
    known = [old for old, new in pairs.items() if new is not None]
    losses = []
    for row in rows:
        ids = torch.tensor([pairs[index] for index in row["input_ids"]])
        with torch.no_grad():
            log_pt = loaded(tmp_path / "unpadded")(ids[None]).logits[0, :-1].double()[:, [pairs[old] for old in known]]
            r = start()(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        log_pi = (log_pt.log_softmax(-1) + r[:, known] / 2).log_softmax(-1)
        rho = r.log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                entropy = -(rho.exp() * rho).sum(-1)[position]
                losses.append(-log_pi[position, known.index(label)] - 0.1 * entropy)
    assert loss == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)


def gemma2(seed=0, **config):
    """Its logits are soft-capped."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**sizes | config)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_softcap_is_fused_unless_tokens_are_absent(config, tmp_path, kind):
    rows, folder = texts(kind), backbone(tmp_path, kind, model=gemma2)
    has_absent = kind != "extended"
    args = config(per_device_train_batch_size=8)
    trainer = PRTTrainer(start(), args, None, rows, processing_class=REWARD, backbone=folder)
    loss, found = loss_and_gradients(trainer)
    assert trainer._is_fused == (not has_absent)
    reference, reference_gradients = expected(kind, folder, rows)
    assert loss == pytest.approx(reference, rel=1e-5)
    assert_gradients(found, reference_gradients)
    if has_absent:
        stored = config(precompute_backbone=True, backbone_cache_dir=str(tmp_path / "cache"))
        with pytest.raises(UnsupportedError, match="a softcap, behind which tokens of the reward are absent"):
            PRTTrainer(start(), stored, None, rows, processing_class=REWARD, backbone=folder)


@pytest.mark.parametrize("fused_loss", ["never", "always"])
@pytest.mark.parametrize("teacher_kind", KINDS)
@pytest.mark.parametrize("kind", ["identical", "reduced", "moved"])
def test_distillation_is_over_the_tokens_that_all_have(config, tmp_path, kind, teacher_kind, fused_loss):
    known = pairs_of(kind).keys() & pairs_of(teacher_kind).keys()
    rows = [row for row in texts("moved", 12) if known >= set(row["input_ids"])]
    assert len(rows) >= 3
    folder, taught = backbone(tmp_path, kind), backbone(tmp_path / "teacher", teacher_kind, 7)
    args = config(fused_loss=fused_loss, per_device_train_batch_size=len(rows), per_device_eval_batch_size=2)
    dataset = Dataset.from_list(rows)
    trainer = PRTTrainer(start(), args, None, dataset, dataset, REWARD, backbone=folder, distill_from=taught)
    loss, found = loss_and_gradients(trainer)
    teacher = {"teacher": loaded(taught), "teacher_kind": teacher_kind}
    reference, reference_gradients = expected(kind, folder, rows, **teacher)
    assert loss == pytest.approx(reference, rel=1e-4)
    assert_gradients(found, reference_gradients)
    with torch.no_grad():
        divergence = brute_force(kind, loaded(folder), start().double(), rows, entropy_coef=0, **teacher)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(divergence.item(), rel=1e-4)


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("kind", ["moved", "reduced"])
def test_predictions_are_in_the_rewards_order(config, tmp_path, kind, has_labels):
    """With probability 0 of what the backbone lacks."""
    row, folder = texts(kind)[0], backbone(tmp_path, kind)
    trainer = PRTTrainer(start(), config(), None, None, [row], REWARD, backbone=folder)
    ids = torch.tensor([row["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if has_labels else {})
    _, found, _ = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=False)
    pairs, expected = pairs_of(kind), torch.zeros(ids.shape[1], len(REWARD), dtype=torch.float64)
    with torch.no_grad():
        log_pt = loaded(folder)(torch.tensor([[pairs[index] for index in row["input_ids"]]])).logits[0].double()
        r = start()(ids).logits[0].double()
    weights = torch.stack([(log_pt[:, new] + r[:, old] / 2).exp() for old, new in pairs.items()], 1)
    expected[:, list(pairs)] = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found[0].double().exp(), expected, rtol=1e-4, atol=1e-7)


def test_one_of_several_backbones_is_of_another_vocabulary(config, tmp_path):
    rows, folder = texts("moved"), backbone(tmp_path, "moved")
    trainer = PRTTrainer(start(), config(), None, None, rows, REWARD, backbone=[None, folder])
    with torch.no_grad():
        losses = [
            brute_force(kind, network, start().double(), rows, entropy_coef=0).item()
            for kind, network in (("identical", start()), ("moved", loaded(folder)))
        ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("is_taught", [False, True])
def test_absent_tokens_in_the_fused_loss(monkeypatch, entropy_coef, is_taught):
    """In several chunks; a reward that is not finite is still found, in whatever way the sum is formed."""
    monkeypatch.setattr("prt_hf.networks.lm_head._CHUNK_ON_CPU", 40)
    torch.manual_seed(0)
    backbone, reward, teacher = (Projection((torch.randn(7, 4),), (torch.randn(11, 4),)) for _ in range(3))
    reward.hidden[0].requires_grad_()
    backbone = backbone._replace(bias=torch.zeros(11).index_fill(0, torch.tensor([1, 5]), -torch.inf))
    teacher = teacher._replace(bias=torch.zeros(11).index_fill(0, torch.tensor([5, 8]), -torch.inf))
    labels, settings = torch.tensor([0, 2, 3, 4, 6, 7, 9]), {"kl_coef": 2.0, "entropy_coef": entropy_coef}
    fused = fused_prt_loss(backbone, reward, labels, **settings, teacher=teacher if is_taught else None)
    logits = reward.hidden[0] @ reward.weights[0].T
    taught = {"teacher_logits": teacher.logits()} if is_taught else {}
    plain = prt_loss(backbone.logits(), logits, labels, **settings, **taught)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, reward.hidden[0])[0] for loss in (fused, plain)))
    kept = [column for column in range(11) if column not in ([1, 5, 8] if is_taught else [1, 5])]
    cut = {"teacher_logits": teacher.logits()[:, kept]} if is_taught else {}
    renumbered = torch.tensor([kept.index(label) for label in labels])
    reference = prt_loss(backbone.logits()[:, kept], logits[:, kept], renumbered, kl_coef=2.0, **cut)
    entropies = entropy_coef * reward_entropy(logits).mean()
    torch.testing.assert_close(fused, reference - entropies)
    for value in (torch.nan, torch.inf):
        broken = reward._replace(bias=torch.zeros(11).index_fill(0, torch.tensor([3]), value))
        with pytest.raises(NonFiniteRewardError, match="id 3"):
            fused_prt_loss(backbone, broken, labels, **settings, teacher=teacher if is_taught else None)


# Text classifiers


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_read_the_backbones_tokens(config, tmp_path, kind, precompute):
    """Its labels are in another order as well."""
    order = ["blue", "grey", "red", "green"]
    folder = backbone(tmp_path, kind, model=tiny.bert, names=order)
    rows = [{"input_ids": row["input_ids"], "label": index % 4} for index, row in enumerate(texts(kind))]
    args = config(per_device_train_batch_size=8, precompute_backbone=precompute, backbone_cache_dir=str(tmp_path / "c"))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    reward = tiny.bert(2, vocab_size=len(REWARD), pad_token_id=REWARD.pad_token_id, **still)
    tokenizer = copy.deepcopy(REWARD)
    tokenizer.padding_side = "right"  # BERT counts positions from the first column
    trainer = PRTTrainer(reward, args, None, Dataset.from_list(rows), None, tokenizer, backbone=folder)
    loss, found = loss_and_gradients(trainer)
    network, twin = AutoModelForSequenceClassification.from_pretrained(folder).eval(), copy.deepcopy(reward).double()
    twin.zero_grad()
    total, pairs = 0.0, pairs_of(kind)
    for row in rows:
        with torch.no_grad():
            log_pt = network(torch.tensor([[pairs[index] for index in row["input_ids"]]])).logits[0].double()
        r = twin(torch.tensor([row["input_ids"]])).logits[0]
        log_pi = (log_pt[[order.index(name) for name in tiny.COLOURS]].log_softmax(-1) + r / 2).log_softmax(-1)
        total = total - log_pi[row["label"]] + 0.1 * (r.softmax(-1) * r.log_softmax(-1)).sum()
    (total / len(rows)).backward()
    assert loss == pytest.approx(total.item() / len(rows), rel=1e-5)
    assert_gradients(found, gradients(twin))
