"""The benchmark times what it says, and computes its ratios as it says. No test is about how fast anything is."""

import json
from importlib.util import find_spec

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import ViTImageProcessorPil

from prt_hf import PRTForImageClassification, RewardModel
from prt_hf.benchmark import train, vision
from prt_hf.benchmark.decode import (
    ASSISTED,
    BARE,
    EFT,
    ROWS,
    SAME_BASE,
    SEQUENTIAL,
    SPECULATIVE,
    DecodeTimings,
    time_decoding,
)
from prt_hf.cli import main
from prt_hf.demo.timing import TimingSettings, grow, timing_task
from prt_hf.demo.training import Steps
from prt_hf.errors import PRTValueError


def test_figures_by_hand():
    """Two prompts, two rounds, 10 tokens each; the fastest round of every prompt counts."""
    timings = DecodeTimings("float32", tokens=10)
    seconds = {BARE: (1, 3), SEQUENTIAL: (2, 3), SPECULATIVE: (1, 1), EFT: (3, 5), ASSISTED: (1, 1), SAME_BASE: (4, 4)}
    for row, (first, second) in seconds.items():
        timings.rows[row] = [[first, first + 7.0], [second + 0.5, second]]
    timings.forwards = {"backbone": [[4.0, 5.0], [6.0, 4.0]], "reward": [[1.0], [1.0]], "source": [[3.0], [3.0]]}
    assert timings.speed(BARE) == pytest.approx(20 / 4)
    assert timings.c == pytest.approx(1 / 4) and timings.limit == pytest.approx(0.8)
    assert timings.eft_limit == pytest.approx((4 + 1 + 3) / (4 + 1))
    assert timings.figures == pytest.approx(
        {
            "sequential_of_limit": 4 / 5 / 0.8,
            "vs_eft_of_limit": 8 / 5 / (8 / 5),
            "speculative_vs_sequential": 5 / 2,
            "speculative_vs_bare": 4 / 2,
            "same_base_vs_bare": 4 / 8,
        }
    )


def test_every_row_is_timed(tokenizer):
    source = tiny.llama(2)
    reward = RewardModel.from_base(source, tokenizer, LoraConfig(target_modules="all-linear"))
    reward.network.eval()
    timings = time_decoding(
        tiny.llama(1), source, reward, tokenizer, [tiny.prompts(1), tiny.prompts(1, 5)], new_tokens=3, rounds=2
    )
    assert tuple(timings.rows) == ROWS
    for seconds in (*timings.rows.values(), *timings.forwards.values()):
        assert [len(rounds) for rounds in seconds] == [2, 2] and min(map(min, seconds)) > 0
    assert timings.is_same_text
    with pytest.raises(PRTValueError, match="a reward adapter"):
        time_decoding(tiny.llama(1), source, RewardModel.from_base(source, tokenizer), tokenizer, [tiny.prompts(1)])


def test_a_grown_model_has_the_same_function():
    small = tiny.llama(3, initializer_range=0.2, num_key_value_heads=2, tie_word_embeddings=True)
    grown = grow(small, 96, 5)
    assert grown.num_parameters() > 5 * small.num_parameters()
    ids = tiny.prompts(3, 12)
    torch.testing.assert_close(grown(ids).logits, small(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_command_with_models_of_ones_own(tmp_path, tokenizer, capsys):
    for name, model in (("backbone", tiny.llama(1)), ("source", tiny.llama(2))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    reward = RewardModel.from_base(str(tmp_path / "source"), peft_config=LoraConfig(target_modules="all-linear"))
    reward.save_pretrained(tmp_path / "reward")
    own = ["--reward", str(tmp_path / "reward"), "--backbone", str(tmp_path / "backbone"), "--prompt", "w5 w6 w7"]
    few = ["--new-tokens", "3", "--rounds", "1", "--dtype", "float32"]
    assert main(["bench", "decode", "--json", *own, *few]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"hardware", "versions", "settings", "timings", "figures"}
    assert set(record["figures"]) == {
        "sequential_of_limit",
        "vs_eft_of_limit",
        "speculative_vs_sequential",
        "speculative_vs_bare",
        "same_base_vs_bare",
    }
    assert all(value > 0 for value in record["figures"].values())
    assert [len(rounds) for rounds in record["timings"][0]["rows"]["bare"]] == [1]
    assert main(["bench", "decode", *own, *few]) == 0
    assert "limit of sequential PRT" in capsys.readouterr().out
    assert main(["bench", "decode", *own[:2]]) == 1
    assert "--reward, --backbone and --prompt" in capsys.readouterr().err


def test_models_made_here_draft_for_each_other():
    """A few steps: the parts fit, and the grown model is the larger one."""
    steps = Steps(2, 1e-3, batch_size=2)
    settings = TimingSettings(
        grown={"hidden_size": 128, "num_hidden_layers": 4},
        old_pretraining=steps,
        new_pretraining=steps,
        tuning=steps,
        texts=8,
        prompts=2,
    )
    task = timing_task(settings, seed=0)
    assert task.backbone.config.hidden_size == 2 * task.source.config.hidden_size
    assert task.reward.config.is_adapter and task.backbone.generation_config.use_cache
    assert [prompt.shape for prompt in task.prompts] == [(1, 12)] * 2
    assert task.tokenizer.unk_token_id is None or (task.prompts[0] != task.tokenizer.unk_token_id).all()


# Tuning


SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300, "batch_size": 2, "length": 12}


def test_training_figures_by_hand():
    """The fastest round counts; the top quarter is held against its own baseline."""
    timings = train.TrainTimings(train.TrainSettings())
    seconds = {
        train.PLAIN: 2.0,
        train.PLAIN_CHUNKED: 1.9,
        train.OTHER_BASE: 3.0,
        train.SAME_BASE: 2.5,
        train.CACHED: 2.1,
        train.CACHED_OTHER: 2.2,
        train.PLAIN_TOP: 1.0,
        train.SHARED_TRUNK: 1.2,
        train.NAIVE: 5.0,
    }
    timings.rows = {row: [value + 1, value, value + 3] for row, value in seconds.items()}
    assert set(seconds) == set(train.ROWS)
    assert timings.figures == pytest.approx(
        {"step_other_base": 1.5, "step_same_base": 1.25, "step_shared_trunk": 1.2, "step_cached_second_epoch": 1.05}
    )
    timings.memory = dict.fromkeys(train.ROWS, 100) | {train.OTHER_BASE: 102, train.SHARED_TRUNK: 50}
    assert timings.figures["memory_vs_plain"] == pytest.approx(1.02)
    assert timings.memory_ratio(train.SHARED_TRUNK) == pytest.approx(0.5)


def test_every_row_of_training_makes_steps():
    timings = train.time_training(train.TrainSettings(**SMALL, dtype="float32"), rounds=2)
    assert tuple(timings.rows) == train.ROWS
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.rows.values())


def test_the_chunked_baseline_is_plain_fine_tuning(tmp_path):
    """Its loss is the model's own, with no trace of a backbone."""
    settings = train.TrainSettings(**SMALL, dtype="float32")
    trainer = train._trainer(train.PLAIN_CHUNKED, settings, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.model(**batch, use_cache=False).loss.item()
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, rel=1e-5)


def test_memory_of_a_step_is_that_of_its_logits():
    """Two tables of logits and their gradient are what the naive path holds and the fused one does not."""
    settings = train.TrainSettings(**SMALL | {"vocab_size": 40_000, "length": 64}, dtype="float32")
    logits = 4 * settings.batch_size * settings.length * settings.vocab_size
    fused, naive = (train.peak_memory(row, settings) for row in (train.OTHER_BASE, train.NAIVE))
    assert naive > 3 * logits
    assert naive - fused > logits


def test_bench_train_prints_one_object(capsys, monkeypatch):
    monkeypatch.setattr(train, "peak_memory", lambda row, settings: 1000)
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "num_hidden_layers"]
    arguments = ["bench", "train", "--layers=4", *shape, "--rounds=1", "--dtype=float32"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["figures"]) == {
        "step_other_base",
        "step_same_base",
        "step_shared_trunk",
        "step_cached_second_epoch",
        "memory_vs_plain",
    }
    assert all(isinstance(value, float) for value in found["figures"].values())
    assert found["versions"]["torch"] and found["hardware"]["threads"] and set(found["memory"]) == set(train.ROWS)
    assert main([*arguments, "--growth"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} x 2" in out for name in ("length", "vocab_size", "batch_size"))


# Images


TINY = {"image_size": 8, "patch_size": 4, "num_labels": 5}
SIZES = {
    "COMMON": TINY,
    "LARGE": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2},
    "SMALL": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1},
}


def test_vision_figures_by_hand():
    """The fastest round of every row counts: bare 4 s, reward 1 s, source 3 s for 8 images."""
    timings = vision.VisionTimings("float32", images=8)
    seconds = {vision.BARE: 4.0, vision.PRT: 6.25, vision.EFT: 10.0, vision.REWARD: 1.0, vision.SOURCE: 3.0}
    timings.rows = {row: [value + 1, value, value + 2] for row, value in seconds.items()}
    assert set(seconds) == set(vision.ROWS)
    assert timings.speed(vision.BARE) == 2 and timings.ratio(vision.PRT) == pytest.approx(4 / 6.25)
    assert timings.limit == pytest.approx(4 / 5) and timings.eft_limit == pytest.approx(4 / 8)
    assert timings.figures == pytest.approx({"prt_of_limit": 0.8, "prt_vs_eft": 1.6})


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj", "v_proj"])], ids=["full", "adapter"])
def test_every_row_of_vision_runs_what_it_says(adapter):
    """Two networks for PRT, three for EFT, each once; labels in another order and other pixels for the reward."""
    names = tiny.COLOURS[::-1]
    reward = RewardModel.from_base(tiny.vit(1, image_size=12), peft_config=adapter)
    model = PRTForImageClassification.from_parts(tiny.resnet(2, names=names), [reward])
    calls = []
    for name, network in (("backbone", model.backbone), ("reward", reward.network)):
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    pixels = {"pixel_values": torch.randn(3, 1, 8, 8), "reward_0_pixel_values": torch.randn(3, 1, 12, 12)}
    timings = vision.time_vision(model, pixels, rounds=2)
    assert tuple(timings.rows) == vision.ROWS and timings.images == 3
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.rows.values())
    # The source of a full reward is a copy, hook and all; an adapter's is its bare base.
    source_calls = [] if adapter else ["reward"]
    a_round = ["backbone", "backbone", "reward", *["reward", *source_calls, "backbone"], "reward", *source_calls]
    assert calls == 3 * a_round


def test_vision_times_one_reward_only():
    rewards = [RewardModel.from_base(tiny.vit(seed)) for seed in (1, 2)]
    model = PRTForImageClassification.from_parts(tiny.vit(3), rewards)
    with pytest.raises(PRTValueError, match="one reward, 1 round or more\n  found: 2 rewards, 5 rounds"):
        vision.time_vision(model, vision.pixels_for(model, 1, seed=0))


def test_bench_vision_prints_one_object(capsys, monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setattr(vision, name, size)
    arguments = ["bench", "vision", "--batch-size=2", "--rounds=1", "--dtype", "float32", "bfloat16"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"hardware", "versions", "settings", "timings", "figures"}
    assert set(record["figures"]) == {"prt_of_limit", "prt_vs_eft"} and min(record["figures"].values()) > 0
    assert [timing["dtype"] for timing in record["timings"]] == ["float32", "bfloat16"]
    assert record["settings"]["pixels"] == {"pixel_values": [3, 8, 8]}
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "limits of PRT t_b / (t_b + t_r) = " in out and out.count("source by itself") == 2


def test_bench_vision_with_models_that_want_other_pixels(tmp_path, capsys):
    for name, size in (("backbone", 8), ("source", 12)):
        tiny.vit(1, image_size=size, num_channels=3).save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(tmp_path / name)
    RewardModel.from_base(str(tmp_path / "source")).save_pretrained(tmp_path / "reward")
    own = ["--reward", str(tmp_path / "reward"), "--backbone", str(tmp_path / "backbone")]
    assert main(["bench", "vision", "--json", *own, "--batch-size=2", "--rounds=1", "--dtype=float32"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["pixels"] == {"pixel_values": [3, 8, 8], "reward_0_pixel_values": [3, 12, 12]}
    assert main(["bench", "vision", *own[:2]]) == 1
    assert "expected: --reward and --backbone" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_bench_serve_says_what_it_needs(capsys):
    assert main(["bench", "serve", "recipe"]) == 1
    assert (
        "vLLM is not installed.\n  expected: vllm 0.32\n  found: none\n  remedy: pip install vllm"
        in capsys.readouterr().err
    )
