"""Rewards and their bases from a Hub on loopback, through the real client and the real Auto classes."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig

from prt_hf import PRTConfig, PRTTrainer, RewardModel
from prt_hf.cli import main
from prt_hf.reward.batch import Batch


@pytest.fixture
def repositories(hub, tmp_path):
    """`me/base` and `me/reward`, which names it at its commit; and the rewards that it gives."""
    put_model(hub, "me/base", tiny.llama(1), tmp_path / "base")
    torch.manual_seed(0)
    reward = RewardModel.from_base("me/base", peft_config=LoraConfig(init_lora_weights=False))
    reward.save_pretrained(tmp_path / "reward")
    hub.put("me/reward", tmp_path / "reward")
    return reward.network.eval()(tiny.prompts()).logits


def put_model(hub, repo_id, model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return hub.put(repo_id, folder)


def test_a_reward_and_its_base_come_from_the_hub(hub, repositories, monkeypatch):
    base_commit = hub.repositories["me/base"].resolve("main")
    files = hub.files("me/reward")
    entries = json.loads(files["prt_config.json"])
    assert (entries["reward_base"]["id"], entries["reward_base"]["revision"]) == ("me/base", base_commit)
    assert json.loads(files["adapter_config.json"])["revision"] == base_commit
    hub.requests.clear()
    reward = RewardModel.from_pretrained("me/reward")
    torch.testing.assert_close(reward(input_ids=tiny.prompts()), repositories)
    asked = [request.path for request in hub.requests]
    assert not [path for path in asked if path.startswith("/me/base/resolve/main")], "the base is pinned"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = RewardModel.from_pretrained("me/reward", revision=hub.repositories["me/reward"].resolve("main"))
    torch.testing.assert_close(again(input_ids=tiny.prompts()), repositories)


def test_a_fit_is_told_from_small_files_of_the_hub(hub, repositories, tmp_path, capsys):
    put_model(hub, "me/new", tiny.llama(2), tmp_path / "new")
    base_commit = hub.repositories["me/base"].resolve("main")
    hub.requests.clear()
    assert main(["check", "me/reward", "me/new"]) == 0
    assert f"base       me/base at {base_commit[:12]}, LlamaForCausalLM" in capsys.readouterr().out
    read = [request.path for request in hub.requests if request.method == "GET"]
    assert read and not [path for path in read if "safetensors" in path]
    assert main(["check", "me/reward", "me/nothing"]) == 1
    assert "Repository Not Found" in capsys.readouterr().err
    hub.put("they/gated", hub.files("me/new"), gated=True)
    for arguments in (
        ["check", "me/reward", "they/gated"],
        ["generate", "they/gated", "--reward", "me/reward", "--prompt", "w5"],
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and "gated" in captured.err and "Traceback" not in captured.err
    assert main(["generate", "me/new", "--reward", "me/reward", "--prompt", "w5 w6", "--max_new_tokens", "4"]) == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_the_hubs_errors_reach_the_user(repositories):
    with pytest.raises(RepositoryNotFoundError):
        RewardModel.from_pretrained("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        RewardModel.from_pretrained("me/reward", revision="v9")


def test_a_reward_of_the_hub_is_tuned_on(hub, repositories, tmp_path, monkeypatch):
    """And its states are stored by the commit of their backbone, so that no weights are asked for again."""
    rows = Dataset.from_list([{"input_ids": list(range(index, index + 9))} for index in range(3, 15)])
    shared = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    args = PRTConfig(str(tmp_path / "out"), learning_rate=1e-2, **shared)
    trainer = PRTTrainer("me/reward", args, None, rows, rows)
    logits = tiny.llama(1)(tiny.prompts()).logits
    torch.testing.assert_close(trainer.reward(input_ids=tiny.prompts()), repositories)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.reward.config.source_backbone.revision == hub.repositories["me/base"].resolve("main")
    assert torch.equal(trainer.backbones[0].logits(Batch({"input_ids": tiny.prompts()}, None)), logits)

    commit = put_model(hub, "me/other", tiny.gpt2(2), tmp_path / "other")
    args = PRTConfig(
        str(tmp_path / "out"), precompute_backbone=True, backbone_cache_dir=str(tmp_path / "states"), **shared
    )
    first = PRTTrainer("me/reward", args, None, rows, rows, backbone="me/other").evaluate()["eval_loss"]
    monkeypatch.setattr("prt_hf.reward.backbones.load_pretrained", None)
    again = PRTTrainer("me/reward", args, None, rows, rows, backbone="me/other")
    assert again.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)
    again.train()
    assert again.reward.config.source_backbone.id == "me/other"
    assert again.reward.config.source_backbone.revision == commit


def test_errors_name_the_place_that_was_asked_for(hub, repositories):
    """A mistyped folder is asked for at the Hub, which does not say so."""
    for door in (
        lambda: RewardModel.from_pretrained("my/reward-folder"),
        lambda: RewardModel.from_base("my/base-folder"),
        lambda: RewardModel.from_pretrained("me/reward", base_model="my/base-folder"),
    ):
        with pytest.raises(RepositoryNotFoundError, match="(?s)no folder my/(reward|base)-folder here.*404"):
            door()
    with pytest.raises(RevisionNotFoundError, match="(?s)no folder me/reward here, and the Hub does not give it.*404"):
        RewardModel.from_pretrained("me/reward", revision="no-such-branch")
