"""TRL's handling of text data with PRT's objective: what is supervised, and packed documents apart."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from prt_hf import PRTConfig, PRTTrainer, RewardModel
from prt_hf.errors import PRTValueError
from prt_hf.training.sft import PRTSFTConfig, PRTSFTTrainer

BOS, EOS = 1, 2
# Far from its start, where it would not show.
LORA = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} <eos>{% endgeneration %}"
    "{% else %}<bos> {{ message['content'] }} {% endif %}{% endfor %}"
)


prepares_raw_data = pytest.mark.skipif(
    "evaluate" not in vars(SFTTrainer), reason="old TRL evaluates prepared data only"
)


def words(ids):
    return " ".join(f"w{token}" for token in ids)


def documents(rows=9, seed=0):
    """Prompts and completions as token ids, of uneven length."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(3, tiny.VOCABULARY, (count,), generator=generator).tolist()

    return [(some(2 + index % 4), some(3 + index % 5)) for index in range(rows)]


def text(documents):
    return Dataset.from_list([{"text": words(prompt + completion)} for prompt, completion in documents])


def prompt_and_completion(documents):
    return Dataset.from_list([{"prompt": words(p) + " ", "completion": words(c)} for p, c in documents])


def turns(prompt, completion):
    """Two of each side; the last prompt is one token."""
    return [
        {"role": "user", "content": words(prompt)},
        {"role": "assistant", "content": words(completion)},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": words(completion[:2])},
    ]


def messages(documents):
    return Dataset.from_list([{"messages": turns(*document)} for document in documents])


def messages_apart(documents):
    return Dataset.from_list([{"prompt": turns(*each)[:3], "completion": turns(*each)[3:]} for each in documents])


def plain_tokens(p, c, supervised):
    """What text, and prompt and completion, become: token ids and whether each is supervised."""
    return [*p, *c, EOS], [supervised] * len(p) + [True] * (len(c) + 1)


def chat_tokens(p, c, *supervised):
    """What the turns become."""
    parts = [[BOS, *p], [*c, EOS], [BOS, 5], [*c[:2], EOS]]
    return sum(parts, []), sum(([flag] * len(part) for part, flag in zip(parts, supervised, strict=True)), [])


FORMS = {
    "text": (text, {}, lambda p, c: plain_tokens(p, c, True)),
    "prompt and completion": (prompt_and_completion, {}, lambda p, c: plain_tokens(p, c, False)),
    "prompt and completion, both": (
        prompt_and_completion,
        {"completion_only_loss": False},
        lambda p, c: plain_tokens(p, c, True),
    ),
    "messages": (messages, {}, lambda p, c: chat_tokens(p, c, True, True, True, True)),
    "messages, assistant only": (
        messages,
        {"assistant_only_loss": True},
        lambda p, c: chat_tokens(p, c, False, True, False, True),
    ),
    "messages, completion only": (messages_apart, {}, lambda p, c: chat_tokens(p, c, False, False, False, True)),
    "messages, completion and assistant only": (
        messages_apart,
        {"assistant_only_loss": True, "completion_only_loss": False},
        lambda p, c: chat_tokens(p, c, False, True, False, True),
    ),
}


@torch.no_grad()
def reference(trainer, rows, backbone=None, strength=1.0):
    """Mean of -log pi_theta over supervised tokens, row by row, in float64; the reward as it is tuned now.

    Args:
        rows: of token ids and of whether each is supervised.
        backbone: by default the reward's base.
    """
    network = copy.deepcopy(trainer.reward.network).eval().double()
    total, count = 0.0, 0
    for ids, supervised in rows:
        inputs = torch.tensor([ids])
        r = network(input_ids=inputs).logits[0, :-1]
        if backbone is None:
            with network.disable_adapter():
                b = network(input_ids=inputs).logits[0, :-1]
        else:
            b = copy.deepcopy(backbone).double()(input_ids=inputs).logits[0, :-1, : tiny.VOCABULARY]
        nll = F.nll_loss((b.log_softmax(-1) + strength * r).log_softmax(-1), inputs[0, 1:], reduction="none")
        keep = torch.tensor(supervised[1:])
        total, count = total + nll[keep].sum().item(), count + int(keep.sum())
    return total / count


@pytest.fixture
def tuner(tmp_path):
    """Makes trainers: its keywords are the trainer's, the others those of its arguments."""

    def make(model, data, *, evaluated=None, backbone=None, peft_config=LORA, **changes):
        keywords = {"formatting_func": changes.pop("formatting_func")} if "formatting_func" in changes else {}
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "backbone_cache_dir": str(tmp_path / "states"),
            "per_device_eval_batch_size": 2,
            "learning_rate": 3e-3,
            "max_steps": 3,
            "bf16": False,
        }
        torch.manual_seed(0)
        return PRTSFTTrainer(
            model,
            PRTSFTConfig(**tiny.TUNING | defaults | changes),
            train_dataset=data,
            eval_dataset=data if evaluated is None else evaluated,
            processing_class=tiny.tokenizer(chat_template=TEMPLATE),
            backbone=backbone,
            peft_config=peft_config,
            **keywords,
        )

    return make


def course(trainer):
    trainer.train()
    figures = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(figures) == 3
    return [*figures, trainer.evaluate()["eval_loss"]]


# What is supervised


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl_coef", [1.0, 2.0])
def test_the_loss_is_that_of_the_supervised_tokens(tuner, form, kl_coef):
    """Own base first, then another backbone."""
    make, changes, tokens = FORMS[form]
    data = documents()
    rows = [tokens(*document) for document in data]
    for backbone in (None, tiny.gpt2(2, vocab_size=104)):
        trainer = tuner(tiny.llama(1), make(data), backbone=backbone, kl_coef=kl_coef, **changes)
        expected = reference(trainer, rows, backbone, 1 / kl_coef)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert expected != pytest.approx(reference(trainer, rows, backbone, 0.0), rel=1e-2), "the reward counts"


def test_the_forms_differ_in_what_they_supervise():
    """Else the test above could not tell them apart."""
    counts = {form: sum(sum(tokens(*each)[1]) for each in documents()) for form, (_, _, tokens) in FORMS.items()}
    assert counts == {
        "text": 82,
        "prompt and completion": 52,
        "prompt and completion, both": 82,
        "messages": 136,
        "messages, assistant only": 79,
        "messages, completion only": 27,
        "messages, completion and assistant only": 79,
    }


def test_long_documents_are_cut(tuner):
    data = documents()
    trainer = tuner(tiny.llama(1), text(data), max_length=6)
    rows = [tuple(part[:6] for part in plain_tokens(p, c, True)) for p, c in data]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference(trainer, rows), rel=1e-5)


def test_rows_can_be_formatted(tuner):
    data = documents()
    raw = Dataset.from_list([{"question": words(p), "answer": words(c)} for p, c in data])
    trainer = tuner(tiny.llama(1), raw, formatting_func=lambda row: f"{row['question']} {row['answer']}")
    rows = [plain_tokens(p, c, True) for p, c in data]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference(trainer, rows), rel=1e-5)


@prepares_raw_data
@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 32}, {"precompute_backbone": True}])
def test_other_raw_data_are_prepared_when_they_are_evaluated(tuner, changes):
    trainer = tuner(tiny.llama(1), prompt_and_completion(documents()), **changes)
    others = documents(5, seed=1)
    expected = reference(trainer, [plain_tokens(p, c, False) for p, c in others])
    assert trainer.evaluate(prompt_and_completion(others))["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_tokens_are_trained_on_as_by_the_plain_trainer(tuner, tmp_path):
    """Same rows, same order, same figures."""
    data = documents()
    prepared = tuner(tiny.llama(1), prompt_and_completion(data), gradient_checkpointing=False, kl_coef=2.0)
    rows = [plain_tokens(p, c, False) for p, c in data]
    tokenized = [
        {"input_ids": ids, "labels": [token if flag else -100 for token, flag in zip(ids, flags, strict=True)]}
        for ids, flags in rows
    ]
    names = ("per_device_train_batch_size", "learning_rate", "max_steps", "logging_steps", "lr_scheduler_type")
    names += ("weight_decay", "report_to", "disable_tqdm", "use_cpu", "save_strategy", "kl_coef")
    args = PRTConfig(str(tmp_path / "plain"), **{name: getattr(prepared.args, name) for name in names})
    torch.manual_seed(0)
    tokens = Dataset.from_list(tokenized)
    plain = PRTTrainer(tiny.llama(1), args, None, tokens, tokens, tiny.tokenizer(), peft_config=LORA)
    plain.reward.network.load_state_dict(prepared.reward.network.state_dict())
    assert course(prepared) == pytest.approx(course(plain), rel=1e-5)


# Documents side by side


SIDE_BY_SIDE = {
    "packed": {"packing": True, "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
@pytest.mark.parametrize("make", [None, lambda: tiny.gpt2(2), lambda: tiny.llama(3)])
@pytest.mark.parametrize("fused_loss", ["always", "never"])
def test_documents_in_a_row_do_not_see_each_other(tuner, kind, make, fused_loss):
    """The trap: where a cache is made, the borders of the documents are lost, and the loss is another."""
    data = documents(12)
    backbone = make and make()
    trainer = tuner(
        tiny.llama(1, max_position_embeddings=16),  # for a document, not for a row of them
        prompt_and_completion(data),
        backbone=backbone,
        fused_loss=fused_loss,
        per_device_eval_batch_size=3,
        **SIDE_BY_SIDE[kind],
    )
    rows = [plain_tokens(p, c, False) for p, c in data]
    batches = list(trainer.get_eval_dataloader())
    assert all(len(batch["input_ids"]) == 1 and (batch["position_ids"] == 0).sum() > 1 for batch in batches)
    expected = reference(trainer, rows, backbone)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert sum(lengths) == sum(len(ids) for ids, _ in rows)
    joined = [(batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()) for batch in batches]
    wrong = reference(trainer, joined, backbone)
    assert abs(wrong / expected - 1) > 0.005, "500 times the tolerance below"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference(trainer, rows, backbone), rel=1e-5)


UPPER = LoraConfig(target_modules=["model.layers.1.self_attn.q_proj", "lm_head"], init_lora_weights=False)


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
@pytest.mark.parametrize("peft_config", [LORA, UPPER])
def test_training_side_by_side_is_training_apart(tuner, kind, peft_config):
    """One batch of all documents, so that both see the same in a step; with layers shared by both models, too."""
    data = prompt_and_completion(documents(6))
    changes = {"per_device_train_batch_size": 6, "entropy_coef": 0.1, "peft_config": peft_config}
    apart = course(tuner(tiny.llama(1), data, **changes))
    beside = tuner(tiny.llama(1), data, **changes, **SIDE_BY_SIDE[kind])
    assert course(beside) == pytest.approx(apart, rel=2e-5)
    assert (beside.backbones[0]._trunk is not None) == (peft_config is UPPER)


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
@pytest.mark.parametrize("make", [None, lambda: tiny.gpt2(2)])
def test_stored_states_of_documents_in_a_row(tuner, kind, make):
    def run(precompute):
        trainer = tuner(
            tiny.llama(1),
            prompt_and_completion(documents(12)),
            backbone=make and make(),
            precompute_backbone=precompute,
            **SIDE_BY_SIDE[kind],
        )
        return trainer, course(trainer)

    (stored, found), (_, expected) = run(True), run(False)
    assert found == pytest.approx(expected, rel=2e-5)
    assert stored.backbones[0].network is None


# What is trained and written


def test_an_adapter_of_the_head_is_trained(tuner):
    """TRL's own trainer refuses it, as its loss reads the head's weights past the adapter."""
    trainer = tuner(tiny.llama(1), text(documents()), peft_config=LoraConfig(target_modules=["lm_head"]))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {f"base_model.model.lm_head.lora_{side}.default.weight" for side in "AB"}
    assert trainer._is_fused


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 32}])
def test_a_full_reward(tuner, changes):
    data = documents()
    rows = [plain_tokens(p, c, True) for p, c in data]
    trainer = tuner(tiny.llama(1), text(data), peft_config=None, **changes)
    before = reference(trainer, rows, tiny.llama(1))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    after = reference(trainer, rows, tiny.llama(1))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before, "of a backbone that stays"


def test_bf16_follows_float32(tuner):
    """TRL's default, with gradient checkpointing."""
    full, mixed = (
        course(tuner(tiny.llama(1, initializer_range=0.1), text(documents()), bf16=bf16)) for bf16 in (False, True)
    )
    assert mixed == pytest.approx(full, rel=0.02) and mixed != full


def test_checkpoints_are_rewards_and_cards_keep_their_words(tuner, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my own words")
    base = tiny.llama(1)
    trainer = tuner(base, text(documents()), kl_coef=2.0, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in (out / "checkpoint-2", out):
        files = {path.name for path in folder.iterdir()}
        assert {"prt_config.json", "adapter_config.json", "adapter_model.safetensors"} <= files
        assert "config.json" not in files
    assert (out / "README.md").read_text().endswith("\n---\nmy own words")
    assert "## Training" in (out / "checkpoint-2" / "README.md").read_text()
    reward = RewardModel.from_pretrained(out, base_model=base)
    assert reward.config.kl_coef == 2.0
    expected = trainer.reward.network.eval()(tiny.prompts()).logits
    torch.testing.assert_close(reward(input_ids=tiny.prompts()), expected)
    plain = PeftModel.from_pretrained(tiny.llama(1), out).eval()
    torch.testing.assert_close(plain(tiny.prompts()).logits, expected)


@pytest.mark.parametrize("peft_config", [LORA, None])
def test_the_models_own_forward_stays(tuner, peft_config):
    """TRL puts a head of its own into the model that it is given."""
    base = tiny.llama(1)
    trainer = tuner(base, text(documents()), peft_config=peft_config)
    inner = trainer.model.get_base_model() if peft_config else trainer.model
    for model in (base, inner):
        assert "forward" not in vars(model) and "get_output_embeddings" not in vars(model)
    assert "get_output_embeddings" not in vars(trainer.model)
    assert inner(tiny.prompts()).logits.shape == (2, 7, tiny.VOCABULARY)


# Arguments


def test_arguments_that_would_be_something_else(tmp_path):
    text = "`loss_type` is not usable in reward tuning.\n  expected: 'nll', of the PRT model\n  found: dft"
    with pytest.raises(PRTValueError, match=text):
        PRTSFTConfig(str(tmp_path), loss_type="dft", use_cpu=True, bf16=False)
    text = (
        "Another model's chat template may add tokens, but a reward keeps its base's vocabulary.\n"
        "  expected: `chat_template_path` a .jinja or .j2 file\n"
        "  found: Qwen/Qwen3-0.6B\n"
        "  remedy: set `tokenizer.chat_template`, or save the template to a file"
    )
    with pytest.raises(PRTValueError, match=text):
        PRTSFTConfig(str(tmp_path), chat_template_path="Qwen/Qwen3-0.6B", use_cpu=True, bf16=False)
    with pytest.raises(PRTValueError, match="`kl_coef` is not usable"):
        PRTSFTConfig(str(tmp_path), kl_coef=0.0, use_cpu=True, bf16=False)


def test_a_chat_template_from_a_file(tuner, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE.replace("<bos> ", "<eos> "))
    data = documents()
    trainer = tuner(tiny.llama(1), messages(data), chat_template_path=str(path))
    rows = [chat_tokens(p, c, True, True, True, True) for p, c in data]
    rows = [([EOS if token == BOS else token for token in ids], flags) for ids, flags in rows]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference(trainer, rows), rel=1e-5)


def test_arguments_of_another_trainer_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"train_dataset": text(documents()), "processing_class": tiny.tokenizer()}
    for args in (SFTConfig(str(tmp_path), use_cpu=True, bf16=False), PRTConfig(str(tmp_path), use_cpu=True)):
        message = f"(?s)of another trainer.*a PRTSFTConfig.*found: {type(args).__name__}"
        with pytest.raises(PRTValueError, match=message):
            PRTSFTTrainer(tiny.llama(1), args, **given)
    trainer = PRTSFTTrainer(tiny.llama(1), **given)
    assert isinstance(trainer.args, PRTSFTConfig) and trainer.args.output_dir == "tmp_trainer"
    can = is_torch_bf16_gpu_available()
    assert trainer.args.bf16 is can and PRTSFTConfig("out", bf16=False).bf16 is False
    assert not PRTSFTConfig("out", use_cpu=True, fp16=True).bf16


def test_a_reward_knows_whether_it_was_tuned_on_messages(tuner, tmp_path):
    """In its card and after it was loaded and saved; the last training counts."""
    data = documents()
    for make, is_chat in ((messages, True), (messages_apart, True), (text, False)):
        trainer = tuner(tiny.llama(1), make(data), max_steps=1)
        trainer.train()
        assert trainer.reward.config.is_chat is is_chat
        trainer.save_model()
        assert ("prt-hf chat" in (tmp_path / "out" / "README.md").read_text()) is is_chat
        (tmp_path / "out" / "README.md").unlink()
