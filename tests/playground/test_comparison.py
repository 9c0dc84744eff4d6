"""Every figure of the playground equals its definition in float64, and its answers are those of `generate`."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prt_hf import ContextLengthError, PRTForCausalLM, PRTForImageClassification, RewardModel
from prt_hf.errors import PRTValueError
from prt_hf.playground.comparison import ALONE, CARRIED_OVER, REWARDED, Comparison

STRENGTHS = [0.8, -0.9]
NEW = 5  # tokens that the reward does not know, "w20 w21" and so on, at the end of the backbone's vocabulary
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A tuned reward, and a LoRA of the same base carried over."""
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear")
    get_peft_model(tiny.llama(2), config).save_pretrained(folder)
    carried = RewardModel.from_adapter(folder, base_model=tiny.llama(2), processing_class=tiny.tokenizer())
    return RewardModel.from_base(tiny.gpt2(4), tiny.tokenizer()), carried


@pytest.fixture(scope="module", params=[0, NEW], ids=["one vocabulary", "updated vocabulary"])
def comparison(request, loras):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"w{index} w{index + 1}" for index in range(20, 20 + request.param)])
    backbone = tiny.llama(1, vocab_size=len(tokenizer))
    return Comparison(PRTForCausalLM.from_parts(backbone, list(loras), [1.0, 1.0], tokenizer))


@torch.no_grad()
def parts_of(comparison, ids):
    """log pi_pt and r of each reward at the last position, in float64; a reward reads what it does not know as two."""
    model, size = comparison.model, comparison.model.config.vocab_size
    before = model.backbone(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    spelled = {tiny.VOCABULARY + index: [20 + index, 21 + index] for index in range(NEW)}
    known = torch.tensor([[each for index in ids for each in spelled.get(index, [index])]])
    rewards = []
    for reward in model.rewards:
        r = sum(term.sign * term.network(known).logits[0, -1].double() for term in reward.terms)
        rewards.append(torch.cat([r, r.new_zeros(size - tiny.VOCABULARY)]))
    return before, rewards


def tilted(before, exponent):
    """log pi_theta: known tokens share their mass as pi_pt exp(sum of strength r); others keep their probability."""
    known = slice(tiny.VOCABULARY)
    share = before[known].logsumexp(-1)
    after = before.clone()
    after[known] = (before[known] + exponent[known]).log_softmax(-1) + share
    return after


def by_definition(comparison, ids, strengths):
    before, rewards = parts_of(comparison, ids)
    after = tilted(before, sum(strength * r for strength, r in zip(strengths, rewards, strict=True)))
    return before, after, [tilted(before, r) - before for r in rewards]  # Prop. 3.1: E_pt[exp(r)] = 1


def answer_of(comparison):
    """With tokens in it that the reward does not know, where there are any."""
    last = comparison.model.config.vocab_size - 1
    return [9, last, 4, 10, last - 1, 11]


def test_moved_is_log_pi_before_and_after_at_every_token(comparison):
    answer = answer_of(comparison)
    found = comparison.moved(PROMPT, answer, STRENGTHS)
    assert found.shape == (2, len(answer))
    for position, token in enumerate(answer):
        before, after, _ = by_definition(comparison, [*PROMPT, *answer[:position]], STRENGTHS)
        expected = torch.stack([before[token], after[token]])
        torch.testing.assert_close(found[:, position].double(), expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_next_tokens_are_the_likeliest_before_and_after_with_r(comparison):
    ids = [*PROMPT, *answer_of(comparison)]
    found = comparison.next_tokens(ids, STRENGTHS, 10)
    before, after, rewards = by_definition(comparison, ids, STRENGTHS)
    likeliest = {*before.topk(10).indices.tolist(), *after.topk(10).indices.tolist()}
    assert [each.index for each in found] == sorted(likeliest, key=lambda index: -after[index])
    assert len(found) > 10
    for each in found:
        assert each.before == pytest.approx(before[each.index].exp().item(), rel=1e-4)
        assert each.after == pytest.approx(after[each.index].exp().item(), rel=1e-4)
        assert each.rewards == pytest.approx([r[each.index].item() for r in rewards], abs=1e-4)


def test_r_has_its_normalisation_and_neutral_tokens_have_none(comparison):
    size = comparison.model.config.vocab_size
    found = comparison.next_tokens(PROMPT, STRENGTHS, size)
    assert len(found) == size
    for reward in range(2):
        assert sum(each.before * torch.tensor(each.rewards[reward]).exp() for each in found) == pytest.approx(
            1, rel=1e-5
        )
    new = [each for each in found if each.index >= tiny.VOCABULARY]
    assert len(new) == size - tiny.VOCABULARY
    for each in new:
        assert each.before == pytest.approx(each.after, rel=1e-6) and each.rewards == pytest.approx((0, 0), abs=1e-6)


def test_answers_are_those_of_generate_for_each_side(comparison):
    model, sides = comparison.model, comparison.sides(STRENGTHS)
    assert sides == {ALONE: [0, 0], REWARDED: [0.8, 0], CARRIED_OVER: [0, -0.9]}
    steps = list(comparison.answers(PROMPT, list(sides.values()), 12))
    assert model.strengths == [1.0, 1.0], "the model's own are back"
    assert len({tuple(answer) for answer in steps[-1]}) == 3
    for step, earlier in zip(steps[1:], steps, strict=False):
        assert all(new[: len(old)] == old for new, old in zip(step, earlier, strict=True))
    for answer, setting in zip(steps[-1], sides.values(), strict=True):
        ids = torch.tensor([PROMPT])
        model.strengths = setting
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert answer == alone[0, len(PROMPT) :].tolist()
    model.strengths = [1.0, 1.0]


def test_at_strength_zero_all_sides_are_the_backbone(comparison):
    sides = comparison.sides([0.0, 0.0])
    *_, found = comparison.answers(PROMPT, list(sides.values()), 12)
    ids = torch.tensor([PROMPT])
    alone = comparison.model.backbone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert found == [alone[0, len(PROMPT) :].tolist()] * 3
    before, after = comparison.moved(PROMPT, found[0], [0.0, 0.0])
    assert torch.equal(before, after)


def test_an_answer_stops_at_its_end_while_others_go_on(loras):
    """Each side by itself, whatever `generate` pads it with."""
    ends = list(range(3, tiny.VOCABULARY, 3))
    backbone = tiny.llama(1, eos_token_id=ends)
    comparison = Comparison(PRTForCausalLM.from_parts(backbone, list(loras), None, tiny.tokenizer()))
    *_, found = comparison.answers(PROMPT, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 1.0]], 40)
    assert len({len(answer) for answer in found}) > 1
    assert all(token not in ends for answer in found for token in answer[:-1])
    assert all(answer[-1] in ends or len(answer) == 40 for answer in found)


def test_closing_the_answers_stops_the_model(comparison):
    counted = []
    handle = comparison.model.backbone.register_forward_hook(lambda *_: counted.append(1))
    answers = comparison.answers(PROMPT, [[0.0, 0.0]], 200)
    next(answers)
    answers.close()
    handle.remove()
    assert len(counted) < 100
    assert comparison.model.strengths == [1.0, 1.0]
    assert len([*comparison.answers(PROMPT, [[0.0, 0.0]], 5)]) == 5, "and it can be asked again"


def test_errors_of_the_model_reach_the_caller(comparison):
    with pytest.raises(PRTValueError, match="strengths"):
        list(comparison.answers(PROMPT, [[0.0]], 5))
    with pytest.raises(ContextLengthError, match="no room"):
        list(comparison.answers([5] * tiny.CONTEXT, [[0.0, 0.0]], 5))
    assert len([*comparison.answers([5] * (tiny.CONTEXT - 3), [[0.0, 0.0]], 50)]) == 3


@torch.no_grad()
def test_labels_before_and_after():
    backbone, reward = tiny.vit(1), RewardModel.from_base(tiny.resnet(2, names=tiny.COLOURS[::-1]))
    comparison = Comparison(PRTForImageClassification.from_parts(backbone, [reward], [1.0]))
    pixels = tiny.images(1)["pixel_values"][:1]
    pixels = torch.stack(list(pixels))
    before = backbone(pixels).logits[0].double().log_softmax(-1)
    r = reward.network(pixels).logits[0].double().flip(0)
    after = (before + 0.5 * r).log_softmax(-1)
    found = comparison.candidates({"pixel_values": pixels}, [0.5])
    assert [each.index for each in found] == after.argsort(descending=True).tolist()
    for each in found:
        assert each.before == pytest.approx(before[each.index].exp().item(), rel=1e-5)
        assert each.after == pytest.approx(after[each.index].exp().item(), rel=1e-5)
        assert each.rewards[0] == pytest.approx((r - (before.exp() * r.exp()).sum().log())[each.index].item(), abs=1e-5)
    assert comparison.sides([0.5]) == {ALONE: [0], REWARDED: [0.5]}


@torch.no_grad()
def test_a_recurrent_backbone_is_read_the_same_way():
    """It has no attention cache; figures and answers are still its own."""
    reward = RewardModel.from_base(tiny.llama(2), tiny.tokenizer())
    comparison = Comparison(PRTForCausalLM.from_parts(tiny.mamba(1), [reward], [1.0], tiny.tokenizer()))
    *_, (alone, rewarded) = comparison.answers(PROMPT, [[0.0], [1.0]], 8)
    assert alone == tiny.greedy(comparison.model.backbone, PROMPT, 8)
    assert rewarded == tiny.greedy(comparison.model, PROMPT, 8)
    before, after, _ = by_definition(comparison, [*PROMPT, *rewarded[:-1]], [1.0])
    expected = torch.stack([before, after])[:, rewarded[-1]]
    torch.testing.assert_close(
        comparison.moved(PROMPT, rewarded, [1.0])[:, -1].double(), expected, rtol=1e-4, atol=1e-5
    )


def bytes_tokenizer():
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_letters_of_several_tokens_are_shown_with_the_last(comparison, monkeypatch):
    monkeypatch.setattr(comparison.model, "processing_class", bytes_tokenizer())
    text = "a \u00f1\n\U0001f600b"
    ids = comparison.encode(text)
    assert comparison.pieces(ids) == ["a", " ", "", "\u00f1", "\n", "", "", "", "\U0001f600", "b"]
    with pytest.raises(PRTValueError, match="no tokens"):
        comparison.encode("")


def test_a_chat_is_written_in_the_template(comparison, monkeypatch):
    template = "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    monkeypatch.setattr(comparison.tokenizer, "chat_template", template)
    assert comparison.encode("w7 w8", is_chat=True) == [3, 7, 8, 4, 9]
    assert comparison.encode("w7 w8") == [7, 8]
