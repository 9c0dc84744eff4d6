"""Ordinary adapters carried over: log pi_ft - log pi_pt wherever a reward is taken, without training."""

import json
import shutil

import pytest
import tiny
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessorList

from prt_hf import (
    BaseModelMismatchError,
    EFTLogitsProcessor,
    PRTConfig,
    PRTForCausalLM,
    PRTLogitsProcessor,
    PRTTrainer,
    RewardFileError,
    RewardModel,
    UnsupportedError,
    VocabularyMismatchError,
)
from prt_hf.cli import main
from prt_hf.errors import PRTValueError

TOKENIZER = tiny.tokenizer()
KINDS = {
    "LoRA": {},
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
}


def save_adapter(base, folder, seed=3, **lora):
    """As any library saves one: PEFT's files, no `prt_config.json`, no tokenizer."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": "all-linear"} | lora)
    network = get_peft_model(type(base).from_pretrained(base.name_or_path), config)
    for name, parameter in network.named_parameters():
        if ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.4)
    network.save_pretrained(folder)
    return network.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`old`, a base with its tokenizer, `new`, a backbone, and `lora`, an adapter of the base."""
    home = tmp_path_factory.mktemp("eft")
    for name, seed in (("old", 2), ("new", 1)):
        tiny.llama(seed, eos_token_id=2).save_pretrained(home / name)
        TOKENIZER.save_pretrained(home / name)
    save_adapter(old(home), home / "lora")
    return home


def old(home):
    return tiny.LlamaForCausalLM.from_pretrained(home / "old").eval()


def new(home):
    return tiny.LlamaForCausalLM.from_pretrained(home / "new").eval()


@torch.no_grad()
def by_definition(backbone, finetuned, pretrained, ids, strength=1.0):
    """In float64, from whole passes of three models."""
    log_probs = [model(ids).logits.double().log_softmax(-1) for model in (backbone, finetuned, pretrained)]
    return (log_probs[0] + strength * (log_probs[1] - log_probs[2])).log_softmax(-1).float()


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_processor_are_emulated_fine_tuning(home, kind, tmp_path):
    finetuned = save_adapter(old(home), tmp_path, seed=5, **KINDS[kind])
    expected = by_definition(new(home), finetuned, old(home), ids := tiny.prompts(), 0.7)
    reward = RewardModel.from_adapter(tmp_path)
    model = PRTForCausalLM.from_parts(new(home), [reward], [0.7], TOKENIZER).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            (new(home)(ids).logits + 0.7 * reward(input_ids=ids)).log_softmax(-1), expected, atol=2e-5, rtol=1e-4
        )
    texts = {
        "model": model.generate(ids, max_new_tokens=9),
        "speculative": torch.cat([model.generate(row[None], max_new_tokens=9, speculative=True) for row in ids]),
    }
    for name, processor in {
        "EFT": EFTLogitsProcessor.from_adapter(tmp_path, TOKENIZER, strength=0.7),
        "reward": PRTLogitsProcessor(reward, TOKENIZER, strength=0.7),
        "EFT of two models": EFTLogitsProcessor(finetuned, TOKENIZER, pretrained=old(home), strength=0.7),
    }.items():
        torch.testing.assert_close(processor(ids, new(home)(ids).logits[:, -1].detach()), expected[:, -1])
        texts[name] = new(home).generate(ids, max_new_tokens=9, logits_processor=LogitsProcessorList([processor]))
    assert all(torch.equal(text, texts["model"]) for text in texts.values())


def test_adalora_is_carried_over_and_saved(home, tmp_path):
    torch.manual_seed(0)
    ranks = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8}
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **ranks)
    network, ids = get_peft_model(old(home), config), tiny.prompts()
    for step in range(8):  # ranks are cut down on the way
        network(ids, labels=ids).loss.backward()
        torch.optim.SGD(network.parameters(), 0.5).step()
        network.base_model.update_and_allocate(step)
    network.save_pretrained(tmp_path / "adalora")
    finetuned = PeftModel.from_pretrained(old(home), tmp_path / "adalora").eval()
    model = PRTForCausalLM.from_parts(str(home / "new"), [tmp_path / "adalora"]).eval()
    model.save_pretrained(tmp_path / "recipe")
    with torch.no_grad():
        expected = by_definition(new(home), finetuned, old(home), ids)
        for each in (model, PRTForCausalLM.from_pretrained(tmp_path / "recipe")):
            torch.testing.assert_close(each(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_what_adapters_say_of_their_making_does_not_matter(home, tmp_path, monkeypatch):
    shutil.copytree(home / "lora", tmp_path / "lora")
    edited(tmp_path / "lora", init_lora_weights="eva", base_model_name_or_path="../old")
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    model = PRTForCausalLM.from_parts(str(home / "old"), [tmp_path / "lora", home / "lora"], [1, -1]).eval()
    assert [len(each.parts) for each in model._mixed] == [5]  # one base for all
    with torch.no_grad():
        expected = old(home)(ids := tiny.prompts()).logits.log_softmax(-1)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_embeddings_beside_an_adapter_of_them_may_be_in_another_precision(home, tmp_path):
    half = old(home).bfloat16()
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["embed_tokens", "q_proj"])
    network = get_peft_model(half, config)
    network.save_pretrained(tmp_path)  # with the base's embeddings, rounded
    reward = RewardModel.from_adapter(tmp_path)
    with torch.no_grad():
        difference = network.float().eval()(ids := tiny.prompts()).logits.log_softmax(-1)
        found = (old(home)(ids).logits + reward(input_ids=ids)).log_softmax(-1)
    assert float((found - difference).abs().mean()) < 0.1 < float(reward(input_ids=ids).abs().mean())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.base_layer.weight"))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelMismatchError, match=f"do not fit its base(?s:.)*{name}"):
        RewardModel.from_adapter(tmp_path)


def test_heads_of_the_two_models_may_be_padded(home):
    finetuned, pretrained, ids = tiny.llama(5, vocab_size=128), old(home), tiny.prompts()
    scores = new(home)(ids).logits[:, -1].detach()
    for first, second in ((finetuned, pretrained), (pretrained, finetuned)):
        with torch.no_grad():
            logits = [model(ids).logits[:, -1, : tiny.VOCABULARY] for model in (first, second)]
        expected = (scores + logits[0] - logits[1]).log_softmax(-1)
        processor = EFTLogitsProcessor(first, TOKENIZER, pretrained=second)
        torch.testing.assert_close(processor(ids, scores), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(VocabularyMismatchError, match="does not belong to its tokenizer(?s:.)*80"):
        EFTLogitsProcessor(pretrained, TOKENIZER, pretrained=tiny.llama(2, vocab_size=80))


def test_an_adapter_in_memory_that_has_changed_its_base_wants_it_beside_itself(home):
    pissa = LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", target_modules=["q_proj"], r=2)
    network = get_peft_model(old(home), pissa).eval()
    torch.nn.init.normal_(network.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    biases = LoraConfig(task_type="CAUSAL_LM", bias="all", target_modules=["c_attn"], fan_in_fan_out=True)
    twice = LoraConfig(task_type="CAUSAL_LM", layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj"])
    for each in (network, get_peft_model(tiny.gpt2(), biases), get_peft_model(old(home), twice)):
        with pytest.raises(UnsupportedError, match="has changed its base(?s:.)*pretrained="):
            EFTLogitsProcessor(each, TOKENIZER)
    processor = EFTLogitsProcessor(network, TOKENIZER, pretrained=old(home))
    scores = new(home)(ids := tiny.prompts()).logits[:, -1].detach()
    expected = by_definition(new(home), network, old(home), ids)[:, -1]
    torch.testing.assert_close(processor(ids, scores), expected, atol=2e-5, rtol=1e-4)
    prefix = get_peft_model(old(home), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="PREFIX_TUNING"):
        EFTLogitsProcessor(prefix, TOKENIZER, pretrained=old(home))


def test_on_and_off_are_two_rows_of_one_pass(home):
    reward = RewardModel.from_adapter(home / "lora")
    assert [len(each.parts) for each in PRTForCausalLM.from_parts(new(home), [reward])._mixed] == [1, 2]
    own = RewardModel.from_adapter(home / "lora", base_model=(base := old(home)))
    model = PRTForCausalLM.from_parts(base, [own]).eval()
    assert [len(each.parts) for each in model._mixed] == [3]
    with torch.no_grad():  # its own base with it is the fine-tuned model
        expected = own.network(ids := tiny.prompts()).logits.log_softmax(-1)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)
    processor = EFTLogitsProcessor.from_adapter(home / "lora", TOKENIZER)
    processor(ids, new(home)(ids).logits[:, -1].detach())
    assert [state._of for state in processor._states._states] == ["both"]


def test_the_adapter_may_be_switched_off_between_calls(home):
    processor = EFTLogitsProcessor(network := RewardModel.from_adapter(home / "lora").network, TOKENIZER)
    scores = new(home)(ids := tiny.prompts()).logits[:, -1].detach()
    first = processor(ids, scores)
    with network.disable_adapter():
        torch.testing.assert_close(processor(ids, scores), scores.log_softmax(-1))
    assert torch.equal(processor(ids, scores), first)
    network.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged into weights that its base"):
        processor(ids, scores)


def test_a_recipe_has_the_adapter_in_it_and_pins_its_base(home, tmp_path):
    model = PRTForCausalLM.from_parts(str(home / "new"), [str(home / "lora")], [0.5]).eval()
    model.save_pretrained(tmp_path / "recipe")
    saved = json.loads((tmp_path / "recipe" / "reward-0" / "prt_config.json").read_text())
    assert saved["terms"] == ["network", "-base"]
    assert saved["reward_base"]["id"] == str(home / "old") and len(saved["reward_base"]["weights"]) == 64
    assert saved["distilled_from"]["id"] == str(home / "lora")
    card = (tmp_path / "recipe" / "reward-0" / "README.md").read_text()
    assert "log pi_ft - log pi_pt" in card and "| carried over from (adapter) | " in card
    again = PRTForCausalLM.from_pretrained(tmp_path / "recipe")
    reward = RewardModel.from_pretrained(tmp_path / "recipe" / "reward-0")
    with torch.no_grad():
        assert torch.equal(again(ids := tiny.prompts()).logits, model(ids).logits)
        assert torch.equal(reward(input_ids=ids), model.rewards[0](input_ids=ids))
    tiny.llama(9).save_pretrained(shutil.copytree(home / "old", tmp_path / "other"))
    with pytest.raises(BaseModelMismatchError, match="not the one that was used before"):
        RewardModel.from_pretrained(tmp_path / "recipe" / "reward-0", base_model=str(tmp_path / "other"))


def test_beside_a_reward_of_the_same_base_and_below_zero(home, tmp_path):
    torch.manual_seed(4)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(home / "old"), peft_config=config).save_pretrained(tmp_path / "reward")
    places = [tmp_path / "reward", home / "lora"]
    model = PRTForCausalLM.from_parts(str(home / "new"), places, [0.8, -0.5]).eval()
    assert [len(each.parts) for each in model._mixed] == [1, 3]
    ids = tiny.prompts()
    with torch.no_grad():
        terms = [0.8 * model.rewards[0](input_ids=ids), -0.5 * model.rewards[1](input_ids=ids)]
        expected = (new(home)(ids).logits + sum(terms)).log_softmax(-1)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_strengths_per_prompt_are_those_of_each_prompt_by_itself(home, tmp_path):
    save_adapter(old(home), tmp_path, seed=7)
    model = PRTForCausalLM.from_parts(str(home / "new"), [home / "lora", tmp_path]).eval()
    ids, strengths = tiny.prompts(3), torch.tensor([[1.0, 0.0, -0.5], [0.3, 1.0, 0.7]])
    for each, kwargs in ((strengths, {}), (strengths.tolist(), {"num_beams": 3})):
        model.strengths = each
        together = model.generate(ids, max_new_tokens=6, **kwargs)
        processors = [
            PRTLogitsProcessor(reward, TOKENIZER, strength=row)
            for reward, row in zip(model.rewards, strengths, strict=True)
        ]
        assert torch.equal(new(home).generate(ids, max_new_tokens=6, logits_processor=processors, **kwargs), together)
        for index, row in enumerate(ids):
            model.strengths = strengths[:, index].tolist()
            assert torch.equal(model.generate(row[None], max_new_tokens=6, **kwargs)[0], together[index])
    for wrong, text in (
        ([1.0], r"expected: 2, one for each reward\s+found: \[1.0\]"),
        (1.0, "expected: 2, one for each reward"),
        ([float("nan"), 1.0], "expected: a finite number, or one per prompt\\s+found: nan"),
        ([1.0, "0.5"], "found: '0.5'"),
        (torch.ones(2, 3, 1), "a finite number, or one per prompt"),
    ):
        with pytest.raises(PRTValueError, match=text):
            model.strengths = wrong
    model.strengths = torch.tensor([1.0, 0.5])
    assert model.strengths == [1.0, 0.5]
    model.strengths = [[1.0, 0.0], 0.5]
    with pytest.raises(PRTValueError, match="one per prompt of a batch of 3 rows"):
        model(ids)
    with pytest.raises(PRTValueError, match="2 finite numbers, one for each reward"):
        model.save_pretrained(tmp_path / "recipe")


def test_several_processors_are_several_rewards_in_any_order(home, tmp_path):
    save_adapter(old(home), tmp_path, seed=7)
    model = PRTForCausalLM.from_parts(new(home), [home / "lora", tmp_path], [1.2, -0.4], TOKENIZER).eval()
    processors = [
        PRTLogitsProcessor(reward, TOKENIZER, strength=strength)
        for reward, strength in zip(model.rewards, model.strengths, strict=True)
    ]
    scores = new(home)(ids := tiny.prompts()).logits[:, -1].detach()
    for order in (processors, processors[::-1]):
        torch.testing.assert_close(
            LogitsProcessorList(order)(ids, scores), model(ids).logits[:, -1].detach(), atol=2e-5, rtol=1e-4
        )


def test_the_command_takes_adapters_where_it_takes_rewards(home, capfd):
    arguments = ["--prompt", "w5 w6 w7", "--max_new_tokens", "5", "--no_stream"]
    assert main(["generate", str(home / "new"), "--reward", str(home / "lora"), "--strength", "-0.5", *arguments]) == 0
    output = capfd.readouterr().out
    processor = EFTLogitsProcessor.from_adapter(home / "lora", TOKENIZER, strength=-0.5)
    inputs = TOKENIZER("w5 w6 w7", return_tensors="pt")
    text = new(home).generate(**inputs, max_new_tokens=5, logits_processor=[processor], pad_token_id=0)
    assert output == TOKENIZER.decode(text[0, 3:], skip_special_tokens=True) + "\n"


def test_the_contract_is_that_of_the_adapters_base(home):
    other = tiny.tokenizer(changed={"w5": "other"})
    with pytest.raises(VocabularyMismatchError, match=r"'w5' \(5 -> absent\)"):
        EFTLogitsProcessor.from_adapter(home / "lora", other)
    with pytest.raises(VocabularyMismatchError, match=r"'w5' \(5 -> absent\)"):
        PRTForCausalLM.from_parts(new(home), [home / "lora"], tokenizer=other)


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_carried_over_is_refused(home, tmp_path):
    def refused(kind, text, **kwargs):
        with pytest.raises(kind, match=text):
            RewardModel.from_adapter(tmp_path / "it", **kwargs)
        shutil.rmtree(tmp_path / "it")

    get_peft_model(old(home), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "it"
    )
    refused(UnsupportedError, "cannot be switched on and off side by side.*(?s:.)*PREFIX_TUNING")
    for changes, kind, text in (
        ({"alora_invocation_tokens": [5]}, UnsupportedError, "LORA with alora_invocation_tokens"),
        ({"task_type": "SEQ_CLS"}, PRTValueError, "task_type CAUSAL_LM"),
        ({"base_model_name_or_path": None}, PRTValueError, "names no base"),
        ({"init_lora_weights": "pissa"}, PRTValueError, "would change the base's weights(?s:.)*distil it"),
        ({"rank_pattern": [1]}, RewardFileError, "adapter_config.json cannot be read"),
        ({"target_modules": ["("]}, RewardFileError, "adapter_config.json cannot be read(?s:.)*target_modules"),
        ({"target_modules": ["nothing"]}, BaseModelMismatchError, "cannot be put on its base(?s:.)*'nothing'"),
    ):
        shutil.copytree(home / "lora", tmp_path / "it")
        edited(tmp_path / "it", **changes)
        refused(kind, text)
    gpt2 = tiny.gpt2(2)
    gpt2.save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    save_adapter(tiny.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), tmp_path / "it", bias="lora_only")
    refused(UnsupportedError, "changes its base's own weights or modules")
    shutil.copytree(home / "lora", tmp_path / "it")
    refused(BaseModelMismatchError, "do not fit its base", base_model=tiny.llama(2, num_hidden_layers=1))
    shutil.copytree(home / "lora", tmp_path / "it")
    (tmp_path / "it" / "adapter_model.safetensors").rename(tmp_path / "it" / "adapter_model.bin")
    refused(RewardFileError, "pickled weights can run code")
    RewardModel.from_base(str(home / "old"), peft_config=LoraConfig()).save_pretrained(tmp_path / "it")
    refused(PRTValueError, "is a reward, which is no model by itself")


def test_it_is_no_reward_to_be_tuned_on(home, tmp_path):
    with pytest.raises(UnsupportedError, match="(?s)of two networks.*distill_from"):
        PRTTrainer(RewardModel.from_adapter(home / "lora"), PRTConfig(str(tmp_path)), train_dataset=tiny.texts())


def test_adapters_of_the_hub_name_their_base_at_its_revision(hub, tmp_path):
    tiny.llama(2).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    hub.put("me/base", tmp_path / "base")
    first = hub.repositories["me/base"].resolve("main")
    network = save_adapter(tiny.LlamaForCausalLM.from_pretrained("me/base"), tmp_path / "lora" / "best")
    edited(tmp_path / "lora" / "best", base_model_name_or_path="me/base", revision=first)
    hub.put("me/lora", tmp_path / "lora")
    tiny.llama(8).save_pretrained(tmp_path / "base")
    hub.put("me/base", tmp_path / "base")  # a newer commit, which the adapter does not mean
    reward = RewardModel.from_adapter("me/lora", subfolder="best")
    assert (reward.config.reward_base.id, reward.config.reward_base.revision) == ("me/base", first)
    origin = reward.config.distilled_from
    assert (origin.id, origin.revision) == ("me/lora", hub.repositories["me/lora"].resolve("main"))
    ids = tiny.prompts()
    with torch.no_grad(), network.disable_adapter():
        pretrained = network(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(reward(input_ids=ids), network(ids).logits - pretrained, atol=2e-5, rtol=1e-4)
    hub.put("me/lora", tmp_path / "lora" / "best")
    PRTForCausalLM.from_parts("me/base", ["me/lora"]).save_pretrained(tmp_path / "recipe")
    (entry,) = json.loads((tmp_path / "recipe" / "config.json").read_text())["reward_references"]
    assert (entry["id"], entry["folder"]) == (None, "reward-0")  # the adapter's own repository pins nothing
    again = PRTForCausalLM.from_pretrained(tmp_path / "recipe")
    assert again.rewards[0].config.reward_base.revision == first
