"""Last hidden states times heads against the networks' own logits; heads that are something else are told apart."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from prt_hf import RewardModel
from prt_hf.networks.lm_head import Head, last_hidden_state, projection, why_not_projected
from prt_hf.reward.backbones import OwnBase
from prt_hf.reward.batch import Batch

SIZES = tiny._ATTENTION


def gemma2(**config):
    """Logits that reach the cap, so that leaving it out would show."""
    torch.manual_seed(1)
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0, "eos_token_id": 2} | config)
    ).eval()


def cohere(**config):
    torch.manual_seed(1)
    return CohereForCausalLM(CohereConfig(**SIZES | {"logit_scale": 0.25, "eos_token_id": 2} | config)).eval()


def granite(**config):
    torch.manual_seed(1)
    return GraniteForCausalLM(GraniteConfig(**SIZES | {"logits_scaling": 3.0} | config)).eval()


def with_bias(model):
    nn.init.normal_(model.lm_head.bias)  # zero at first
    return model.eval()


def phi(**config):
    torch.manual_seed(1)
    return with_bias(PhiForCausalLM(PhiConfig(**SIZES | config)))


def gptj(**config):
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": tiny.CONTEXT, "rotary_dim": 4}
    return with_bias(GPTJForCausalLM(GPTJConfig(**tiny._TEXT | sizes | {"initializer_range": 0.3} | config)))


MODELS = {
    "llama": lambda **config: tiny.llama(1, **config),
    "gpt2": lambda **config: tiny.gpt2(1, **config),  # its head is its embedding
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
    "phi": phi,
    "gptj": gptj,
}
LAYER = {"gpt2": "c_attn"}  # adapted beside the head
ADAPTERS = {
    "none": lambda layer: None,
    "LoRA below the head": lambda layer: LoraConfig(target_modules=[layer], init_lora_weights=False),
    "LoRA of the head": lambda layer: LoraConfig(target_modules=[layer, "lm_head"], init_lora_weights=False),
    "head saved whole": lambda layer: LoraConfig(
        target_modules=[layer], init_lora_weights=False, modules_to_save=["lm_head"]
    ),
}


def network_of(model, name, kind):
    """A reward's network, its adapter far from where it starts."""
    config = ADAPTERS[kind](LAYER.get(name, "q_proj"))
    network = RewardModel.from_base(model, tiny.tokenizer(), config).network.eval()
    if kind == "head saved whole":
        head = network.get_base_model().get_output_embeddings().modules_to_save["default"]
        with torch.no_grad():
            for value in head.parameters():
                value.add_(torch.randn_like(value))
    return network


def inputs_of(rows=2):
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": tiny.prompts(rows), "attention_mask": mask, "use_cache": False}


def switched_off(network):
    return network.disable_adapter() if hasattr(network, "disable_adapter") else torch.no_grad()


CHOSEN = torch.zeros(2, 7, dtype=torch.bool)
CHOSEN[0, 1:4] = CHOSEN[1, 5] = True


# The very logits


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_projections_are_the_networks_logits(name, kind):
    """At chosen positions, adapter on, off and on again; with a vocabulary that is padded to 104 columns."""
    bare = MODELS[name](vocab_size=104)
    network, inputs = network_of(bare, name, kind), inputs_of()
    found = []
    for state in (torch.no_grad(), switched_off(network), torch.no_grad()):
        with state:
            expected = network(**inputs).logits[CHOSEN]
            hidden = last_hidden_state(network, inputs)[CHOSEN]
            whole = projection(network, hidden).logits()
            cut = projection(network, hidden, slice(tiny.VOCABULARY)).logits()
            assert why_not_projected(network, inputs) is None
        torch.testing.assert_close(whole, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(cut, expected[:, : tiny.VOCABULARY], atol=2e-5, rtol=2e-5)
        found.append(whole)
    assert torch.equal(found[0], found[2])
    if kind != "none":
        assert (found[0] - found[1]).abs().max() > 0.05 * found[1].abs().max()
        torch.testing.assert_close(found[1], MODELS[name](vocab_size=104)(**inputs).logits[CHOSEN], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "change"),
    [(gemma2, {"softcap": None}), (cohere, {"scale": 1.0}), (granite, {"scale": 1.0}), (phi, {"bias": None})],
)
@torch.no_grad()
def test_each_part_of_a_head_counts(make, change):
    """Else the test above would not see it left out."""
    model, inputs = make(), inputs_of()
    expected, hidden = model(**inputs).logits[CHOSEN], last_hidden_state(model, inputs)[CHOSEN]
    head = Head.of(model)
    torch.testing.assert_close(head.project([hidden]).logits(), expected, atol=2e-5, rtol=2e-5)
    wrong = head._replace(**change).project([hidden]).logits()
    assert (wrong - expected).abs().max() > 0.02 * expected.abs().max()


@torch.no_grad()
def test_a_scaled_heads_bias_is_scaled():
    """No model of transformers has both; what scales the logits scales all of them."""
    head = Head((torch.eye(3),), torch.tensor([1.0, 2.0, 3.0]), scale=0.5)
    assert head.project([torch.ones(1, 3)]).logits().tolist() == [[1.0, 1.5, 2.0]]


@torch.no_grad()
def test_the_head_of_a_lora_is_two_pieces():
    """The rank's product is never added to the base's weights: vocabulary times hidden size once more."""
    network = network_of(tiny.llama(1), "llama", "LoRA of the head")
    head = Head.of(network)
    base = network.get_base_model().lm_head
    assert [tuple(weight.shape) for weight in head.weights] == [(97, 32), (97, 8)]
    assert head.weights[0] is base.get_base_layer().weight
    with network.disable_adapter():
        assert [id(weight) for weight in Head.of(network).weights] == [id(base.get_base_layer().weight)]


def test_gradients_reach_the_head_and_its_lora():
    network, inputs = network_of(tiny.llama(1), "llama", "LoRA of the head"), inputs_of()
    lora = {name: value for name, value in network.named_parameters() if value.requires_grad}

    def gradients(logits):
        return torch.autograd.grad(logits.square().mean(), lora.values())

    expected = gradients(network(**inputs).logits[CHOSEN])
    made = projection(network, last_hidden_state(network, inputs)[CHOSEN])
    found = gradients(sum(hidden @ weight.T for hidden, weight in zip(made.hidden, made.weights, strict=True)))
    assert any("lm_head.lora_A" in name for name in lora)
    for name, value, other in zip(lora, found, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4, msg=name)


# Other heads


class Bent(LlamaForCausalLM):
    """Something of its own behind the head."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, attention_mask, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.square()
        return output


class Shut(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_logits_that_are_something_else_are_told():
    assert why_not_projected(Bent(tiny.llama(1).config), inputs_of()).startswith("Bent has logits that differ by ")
    assert why_not_projected(tiny.llama(1), inputs_of()) is None


def test_a_model_that_makes_all_logits_is_told():
    expected = "Shut has no `logits_to_keep`, or no separate decoder"
    assert why_not_projected(Shut(tiny.llama(1).config), inputs_of()) == expected


def test_dora_of_the_head_is_told():
    config = LoraConfig(target_modules=["lm_head"], use_dora=True)
    network = RewardModel.from_base(tiny.llama(1), tiny.tokenizer(), config).network.eval()
    assert why_not_projected(network, inputs_of()).startswith(
        "LlamaForCausalLM has an adapter of the head that is not plain LoRA: "
    )
    with network.disable_adapter():  # the base's head is what it was
        assert why_not_projected(network, inputs_of()) is None


def test_a_state_space_model_has_a_plain_head():
    model = tiny.mamba(1)
    inputs = {"input_ids": tiny.prompts(), "use_cache": False}
    assert why_not_projected(model, inputs) is None
    with torch.no_grad():
        found = projection(model, last_hidden_state(model, inputs)[CHOSEN]).logits()
        torch.testing.assert_close(found, model(**inputs).logits[CHOSEN], atol=2e-5, rtol=2e-5)


# What a look leaves behind


def state_of(network):
    modes = {name: module.training for name, module in network.named_modules()}
    return modes, {name: value.requires_grad for name, value in network.named_parameters()}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", ["none", "LoRA of the head"])
def test_the_look_changes_nothing_and_draws_nothing(kind, is_training):
    """Dropout in the model, in its layers' adapters and in the head's: random numbers that the look drew, or a mode
    that it left, would change what training does next."""
    config = None
    if kind != "none":
        config = LoraConfig(target_modules=["c_attn", "lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = tiny.gpt2(1, resid_pdrop=0.5, embd_pdrop=0.5)
    network = RewardModel.from_base(model, tiny.tokenizer(), config).network.train(is_training)
    next(value for value in network.parameters() if value.requires_grad).requires_grad_(False)
    before, random = state_of(network), torch.get_rng_state()
    assert why_not_projected(network, inputs_of()) is None
    assert torch.equal(torch.get_rng_state(), random) and state_of(network) == before


def test_the_own_base_leaves_the_adapter_as_it_is():
    """PEFT switches an adapter back on as trainable as a whole."""
    config = LoraConfig(target_modules=["c_attn", "lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = tiny.gpt2(1, resid_pdrop=0.5)
    reward = RewardModel.from_base(model, tiny.tokenizer(), config)
    network = reward.network.train()
    for name, value in network.named_parameters():
        if "lora_A" in name:
            value.requires_grad_(False)
    base, batch = OwnBase(reward), Batch(inputs_of(), tiny.prompts()[:, 1:])
    before, random = state_of(network), torch.get_rng_state()
    with torch.no_grad():
        expected = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    for look in (base.prepare, base.why_not_projected, base.logits, base.states, lambda batch: base.companions()):
        look(batch)
        assert torch.equal(torch.get_rng_state(), random) and state_of(network) == before
    made = base.projection(batch)
    torch.testing.assert_close(made.logits(), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(torch.get_rng_state(), random) and state_of(network) == before
    assert not any(value.requires_grad for value in made.hidden)
