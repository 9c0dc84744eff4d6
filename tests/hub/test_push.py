"""Rewards, checkpoints and recipes to a Hub on loopback and back, through the real client."""

import io
import json
import resource
import subprocess
import sys
import zipfile

import pytest
import tiny
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from prt_hf import (
    PRTConfig,
    PRTForCausalLM,
    PRTSFTConfig,
    PRTSFTTrainer,
    PRTTrainer,
    RewardFileError,
    RewardModel,
    VocabularyMismatchError,
)
from prt_hf.cli import main
from prt_hf.errors import PRTValueError

TOKENIZER = tiny.tokenizer()
TRANSPORTS = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "prt_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def base(hub, tmp_path):
    tiny.llama(1).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    hub.put("me/base", tmp_path / "base")
    return "me/base"


@pytest.fixture
def reward(base):
    return an_adapter(base)


def an_adapter(base, seed=0):
    torch.manual_seed(seed)
    reward = RewardModel.from_base(base, TOKENIZER, LoraConfig(r=2, init_lora_weights=False))
    reward.network.eval()
    return reward


def logits(reward):
    with torch.no_grad():
        return reward(input_ids=tiny.prompts())


def titles(hub, repo_id, revision="main"):
    return [commit.title for _, commit in hub.repositories[repo_id].history(revision)][::-1]


@TRANSPORTS
def test_what_is_pushed_is_pulled(hub, reward, monkeypatch):
    info = reward.push_to_hub("me/reward", private=True, commit_message="the first")
    assert set(hub.files("me/reward")) == FILES
    assert titles(hub, "me/reward") == ["initial commit", "the first"], "one commit"
    assert info.oid == hub.repositories["me/reward"].resolve("main") and hub.repositories["me/reward"].private
    pulled = RewardModel.from_pretrained("me/reward")
    assert torch.equal(logits(pulled), logits(reward)) and pulled.config == reward.config
    assert pulled.card == hub.files("me/reward")["README.md"].decode()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), "me/reward").eval()
    assert torch.equal(plain(tiny.prompts()).logits, logits(reward))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward", revision=info.oid)), logits(reward))


def test_a_full_image_reward_is_pulled(hub):
    reward = RewardModel.from_base(tiny.vit(3))
    reward.push_to_hub("me/photos")
    assert set(hub.files("me/photos")) == {"README.md", "config.json", "model.safetensors", "prt_config.json"}
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(RewardModel.from_pretrained("me/photos")(pixel_values=pixels), reward(pixel_values=pixels))


@TRANSPORTS
def test_a_recipe_is_pulled(hub, base, reward):
    """With one reward that it names, and one that lies in it."""
    reward.push_to_hub("me/reward")
    model = PRTForCausalLM.from_parts(base, rewards=["me/reward", an_adapter(base, seed=5)], strengths=[0.5, -1]).eval()
    model.push_to_hub("me/recipe", private=True)
    assert titles(hub, "me/recipe") == ["initial commit", "Upload recipe"]
    assert {"config.json", "README.md", "reward-0/prt_config.json"} < {
        name.replace("reward-1", "reward-0") for name in hub.files("me/recipe")
    }
    loaded = AutoModelForCausalLM.from_pretrained("me/recipe")
    with torch.no_grad():
        assert torch.equal(loaded(tiny.prompts()).logits, model(tiny.prompts()).logits)
    inside = RewardModel.from_pretrained("me/recipe", subfolder="reward-1")
    assert torch.equal(logits(inside), logits(model.rewards[1]))
    pipe = pipeline("text-generation", model="me/recipe")
    assert pipe("w3 w4", max_new_tokens=2)[0]["generated_text"].startswith("w3 w4")
    PRTForCausalLM.from_parts(base, rewards=["me/reward"]).push_to_hub("me/recipe")
    assert not [name for name in hub.files("me/recipe") if name.startswith("reward-")], "rewards that are named no more"


def test_another_kind_of_reward_replaces_all_files(hub, base, reward):
    reward.push_to_hub("me/reward")
    full = RewardModel.from_base(tiny.llama(4), TOKENIZER)
    full.push_to_hub("me/reward")
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(hub.files("me/reward"))
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(full))
    reward.push_to_hub("me/reward")
    assert set(hub.files("me/reward")) == FILES
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))


def test_branches_tags_and_pull_requests(hub, base, reward):
    reward.push_to_hub("me/reward")
    HfApi().create_tag("me/reward", tag="v1")
    second = an_adapter(base, seed=2)
    second.push_to_hub("me/reward", revision="next/try")
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward", revision="v1")), logits(reward))
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward", revision="next/try")), logits(second))
    third = an_adapter(base, seed=3)
    info = third.push_to_hub("me/reward", create_pr=True, token=hub.other_token)
    assert info.pr_url.endswith("/me/reward/discussions/1")
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward", revision="refs/pr/1")), logits(third))


def test_what_users_write_into_the_card_is_kept(hub, base, reward):
    reward.push_to_hub("me/reward")
    card = hub.files("me/reward")["README.md"].decode()
    assert 'RewardModel.from_pretrained("me/reward")' in card
    edited = card.replace("---\n", "---\nlicense: mit\n", 1).replace("## Use", "My words.\n\n## Use", 1)
    hub.put("me/reward", {"README.md": edited.encode()})
    an_adapter(base, seed=2).push_to_hub("me/reward")
    kept = hub.files("me/reward")["README.md"].decode()
    assert "license: mit\n" in kept and "My words." in kept and kept != card


def test_a_card_that_was_edited_here_is_pushed(hub, reward, tmp_path):
    reward.push_to_hub("me/reward")
    reward.save_pretrained(tmp_path / "reward")
    path = tmp_path / "reward" / "README.md"
    path.write_text(path.read_text() + "\nWhat it is good for.\n")
    RewardModel.from_pretrained(tmp_path / "reward").push_to_hub("me/reward")
    card = hub.files("me/reward")["README.md"].decode()
    assert card.endswith("What it is good for.\n") and 'from_pretrained("me/reward")' in card


def test_cards_pass_the_hubs_check(hub, reward):
    reward.push_to_hub("me/reward")
    checks = [request for request in hub.requests if request.path == "/api/validate-yaml"]
    assert [check.status for check in checks] == [200]
    info = HfApi().model_info("me/reward")
    assert (info.library_name, info.pipeline_tag) == ("prt_hf", "text-generation")
    assert info.card_data["base_model"] == "me/base" and info.card_data["base_model_relation"] == "adapter"


# What goes wrong


def test_without_a_right_nothing_is_pushed(hub, base, reward, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="403"):
        reward.push_to_hub("me/reward", token=hub.read_token)
    with pytest.raises(HfHubHTTPError, match="403"):
        reward.push_to_hub("other/reward")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        reward.push_to_hub("me/reward", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401"):
        reward.push_to_hub("me/reward", token=False)
    assert set(hub.repositories) == {"me/base"}
    reward.push_to_hub("me/reward")
    first = hub.repositories["me/reward"].resolve("main")
    with pytest.raises(HfHubHTTPError, match="403"):
        an_adapter(base, 2).push_to_hub("me/reward", token=hub.other_token)
    assert hub.repositories["me/reward"].resolve("main") == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        reward.push_to_hub("me/reward")


def test_private_and_gated_rewards_are_hidden(hub, reward):
    reward.push_to_hub("me/reward", private=True)
    with pytest.raises(RepositoryNotFoundError):
        RewardModel.from_pretrained("me/reward", token=hub.other_token)
    HfApi().update_repo_settings("me/reward", private=False, gated="manual")
    with pytest.raises(GatedRepoError):
        RewardModel.from_pretrained("me/reward", token=hub.other_token)
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward", token=hub.read_token)), logits(reward))


def test_what_is_to_be_private_is_not_pushed_where_all_can_read(hub, reward):
    reward.push_to_hub("me/reward")
    with pytest.raises(PRTValueError, match="(?s)me/reward is public.*expected: a private repository"):
        reward.push_to_hub("me/reward", private=True)
    assert titles(hub, "me/reward") == ["initial commit", "Upload reward"]


@pytest.mark.parametrize(
    "files, found",
    [
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}, r"a model of another kind \(llama\)"),
        ({"config.json": b"{", "model.safetensors": b"x"}, r"a model of another kind \(None\)"),
        ({"adapter_config.json": b"{}"}, "an adapter that is no reward"),
        ({"config.json": b'{"model_type": "prt"}'}, "a recipe"),
        ({"model.safetensors": b"x", "open_clip_config.json": b"{}"}, r"weights of another kind \(model.safetensors\)"),
    ],
)
def test_a_name_that_is_taken(hub, reward, files, found):
    hub.put("me/taken", files)
    with pytest.raises(RewardFileError, match=f"me/taken holds {found}; saving a reward there would spoil it"):
        reward.push_to_hub("me/taken")
    assert hub.files("me/taken") == files


def test_a_recipe_does_not_replace_a_reward(hub, base, reward):
    reward.push_to_hub("me/reward")
    with pytest.raises(RewardFileError, match="me/reward holds a reward; saving a recipe there would spoil it"):
        PRTForCausalLM.from_parts(base, rewards=["me/reward"]).push_to_hub("me/reward")
    assert set(hub.files("me/reward")) == FILES


def test_a_name_without_namespace(hub, reward):
    reward.push_to_hub("reward")
    assert 'RewardModel.from_pretrained("me/reward")' in hub.files("me/reward")["README.md"].decode()


def test_metadata_that_was_changed_on_the_hub_stays(hub, reward, tmp_path):
    reward.card = "---\nlicense: mit\n---\n"
    reward.push_to_hub("me/reward")
    card = hub.files("me/reward")["README.md"].decode()
    assert "license: mit\n" in card
    hub.put("me/reward", {"README.md": card.replace("license: mit", "license: apache-2.0").encode()})
    reward.push_to_hub("me/reward")
    assert "license: apache-2.0\n" in hub.files("me/reward")["README.md"].decode()


def test_a_card_that_cannot_be_read_stops_a_push_and_no_save(hub, base, tmp_path, caplog):
    broken = "---\ntitle: a: b\n---\nMine.\n"
    trainer = a_trainer(base, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text(broken)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "README.old.md").read_text() == broken and "is kept as README.old.md" in caplog.text
    RewardModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(RewardModel.from_pretrained(tmp_path / "again")), logits(RewardModel.from_pretrained(tmp_path / "out"))
    )
    trainer.push_to_hub()
    broken = "---\ntags: &tags [mine]\nothers: *tags\n---\nMine.\n"
    hub.put("me/out", {"README.md": broken.encode()})
    with pytest.raises(RewardFileError, match="The card's metadata cannot be read"):
        trainer.push_to_hub()
    assert hub.files("me/out")["README.md"] == broken.encode()


def test_a_recipe_leaves_others_folders(hub, base, reward):
    others = {"reward-notes/a.txt": b"mine", "reward-1/prt_config.json": b"{}"}
    hub.put("me/recipe", others)
    PRTForCausalLM.from_parts(base, rewards=[reward]).push_to_hub("me/recipe")
    assert "reward-0/prt_config.json" in hub.files("me/recipe")
    two = PRTForCausalLM.from_parts(base, rewards=[reward, an_adapter(base, 2)])
    with pytest.raises(RewardFileError, match="me/recipe holds reward-1, which the recipe would overwrite"):
        two.push_to_hub("me/recipe")
    reward.push_to_hub("me/reward")
    PRTForCausalLM.from_parts(base, rewards=["me/reward"]).push_to_hub("me/recipe")
    inside = {name: text for name, text in hub.files("me/recipe").items() if name.startswith("reward-")}
    assert inside == others


def test_two_pushes_at_once(hub, base, reward, monkeypatch):
    """The second was based on what is not there any more."""
    reward.push_to_hub("me/reward")
    from prt_hf.hub import publishing

    def late(*args, **kwargs):
        hub.put("me/reward", {"README.md": b"words that came between"})
        return commit_files(*args, **kwargs)

    commit_files = publishing.commit_files
    monkeypatch.setattr(publishing, "commit_files", late)
    with pytest.raises(HfHubHTTPError, match="412"):
        an_adapter(base, 2).push_to_hub("me/reward")
    assert hub.files("me/reward")["README.md"] == b"words that came between"
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))


@pytest.mark.parametrize(
    "method, path",
    [("PUT", "/storage/*"), ("POST", "*/objects/batch"), ("POST", "*/preupload/*"), ("POST", "*/commit/*")],
)
def test_a_push_that_is_cut_off_changes_nothing(hub, base, reward, method, path):
    reward.push_to_hub("me/reward")
    second = an_adapter(base, seed=2)
    hub.fail(method, path, status=403)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        second.push_to_hub("me/reward")
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    second.push_to_hub("me/reward")
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(second))


@TRANSPORTS
def test_a_push_into_full_storage(hub, base, reward):
    reward.push_to_hub("me/reward")
    hub.storage_full = True
    with pytest.raises((HfHubHTTPError, RuntimeError, OSError)):
        an_adapter(base, seed=2).push_to_hub("me/reward")
    hub.storage_full = False
    assert titles(hub, "me/reward") == ["initial commit", "Upload reward"]
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))


def test_a_push_outlives_a_dropped_connection(hub, reward):
    hub.fail("PUT", "/storage/*", drop=True)
    reward.push_to_hub("me/reward")
    assert titles(hub, "me/reward") == ["initial commit", "Upload reward"]
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))


def test_a_download_that_is_cut_off_is_not_loaded(hub, reward, monkeypatch):
    """Offline, the client would give the half of it that is there."""
    reward.push_to_hub("me/reward")
    hub.fail("GET", "*/adapter_model.safetensors", status=403)
    hub.fail("HEAD", "*/adapter_model.safetensors", status=403, times=None)
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        RewardModel.from_pretrained("me/reward")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((RewardFileError, LocalEntryNotFoundError), match="(?s)incomplete.*adapter_model.safetensors"):
        RewardModel.from_pretrained("me/reward")


def test_a_full_disk(hub, reward):
    """No file may grow beyond a kilobyte: the error says so, and there is nothing half-read afterwards."""
    reward.push_to_hub("me/reward")
    load = "from prt_hf import RewardModel; RewardModel.from_pretrained('me/reward')"
    run = subprocess.run(
        [sys.executable, "-c", load],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert run.returncode == 1 and "File too large" in run.stderr
    again = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


# What others may have put there


def changed(hub, name, edit):
    files = hub.files("me/reward")
    entries = json.loads(files[name])
    edit(entries)
    hub.put("me/reward", {name: json.dumps(entries).encode()})


def test_an_adapter_that_names_another_base(hub, reward):
    reward.push_to_hub("me/reward")
    changed(hub, "adapter_config.json", lambda entries: entries.update(base_model_name_or_path="evil/base"))
    with pytest.raises(RewardFileError, match="(?s)name different bases.*expected: me/base.*found: evil/base"):
        RewardModel.from_pretrained("me/reward")
    changed(hub, "prt_config.json", lambda entries: entries["reward_base"].update(id="evil/base"))
    with pytest.raises(RepositoryNotFoundError):
        RewardModel.from_pretrained("me/reward")


def test_a_base_that_was_exchanged(hub, base, reward, tmp_path):
    """The revision is pinned; where it is taken out, the weights are not those that the reward names."""
    reward.push_to_hub("me/reward")
    tiny.llama(9).save_pretrained(tmp_path / "evil")
    hub.put("me/base", tmp_path / "evil")
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    changed(hub, "prt_config.json", lambda entries: entries["reward_base"].update(revision=None))
    with pytest.raises(PRTValueError.__base__, match="not the one that was used before"):
        RewardModel.from_pretrained("me/reward")


def test_an_adapter_larger_than_its_weights(hub, reward):
    reward.push_to_hub("me/reward")
    changed(hub, "adapter_config.json", lambda entries: entries.update(r=10**9))
    with pytest.raises(RewardFileError, match=r"describes larger weights than there are(?s:.*)found: \[1000000000\]"):
        RewardModel.from_pretrained("me/reward")
    changed(hub, "adapter_config.json", lambda entries: entries.update(r=2, rank_pattern={"q_proj": 10**9}))
    with pytest.raises(RewardFileError, match="larger weights"):
        RewardModel.from_pretrained("me/reward")
    changed(hub, "adapter_config.json", lambda entries: entries.update(peft_type="NEWEST", rank_pattern={}))
    with pytest.raises(RewardFileError, match=r"adapter_config.json cannot be read"):
        RewardModel.from_pretrained("me/reward")


def test_other_peoples_code_is_not_run(hub, reward, monkeypatch):
    """Nor is anybody asked whether it may be."""
    reward.push_to_hub("me/reward")
    monkeypatch.setattr("builtins.input", None)
    changed(
        hub,
        "tokenizer_config.json",
        lambda entries: entries.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    )
    hub.put("me/reward", {"evil.py": b"raise SystemExit('run')"})
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    full = RewardModel.from_base(tiny.vit(3))
    full.push_to_hub("me/full")
    files = hub.files("me/full")
    hub.put("me/evil", files | {"evil.py": b"raise SystemExit('run')"})
    entries = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForImageClassification": "evil.Evil"}}
    hub.put("me/evil", {"config.json": json.dumps(entries).encode()})
    assert isinstance(RewardModel.from_pretrained("me/evil").network, type(full.network))


def test_a_full_reward_with_an_adapter_beside_it(hub, reward):
    """transformers would load both."""
    reward.push_to_hub("me/reward")
    full = RewardModel.from_base(tiny.llama(4), TOKENIZER)
    full.push_to_hub("me/full")
    adapter = {name: hub.files("me/reward")[name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    hub.put("me/full", adapter)
    with pytest.raises(RewardFileError, match="holds a full reward and an adapter"):
        RewardModel.from_pretrained("me/full")


def test_an_adapter_for_megatron(hub, reward):
    reward.push_to_hub("me/reward")
    changed(hub, "adapter_config.json", lambda entries: entries.update(megatron_config={}, megatron_core="antigravity"))
    with pytest.raises(RewardFileError, match="is for Megatron"):
        RewardModel.from_pretrained("me/reward")


def test_an_initialisation_that_changes_the_base(base):
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights="pissa"))
    with pytest.raises(PRTValueError, match="(?s)initialisation would change the base's weights.*found: 'pissa'"):
        RewardModel.from_base(network, TOKENIZER)


def test_tokenizers_come_with_the_token_and_the_revision_of_their_model(hub, base, reward, tmp_path, monkeypatch):
    """Else one that cannot be read would be taken to be the reward's."""
    reward.push_to_hub("me/reward")
    tiny.llama(2).save_pretrained(tmp_path / "other")
    tiny.tokenizer(changed={"w5": "five"}).save_pretrained(tmp_path / "other")
    first = hub.put("other/model", tmp_path / "other", private=True)
    right = hub.put("other/model", {"tokenizer.json": hub.files("me/base")["tokenizer.json"]})
    hub.put("other/model", {"tokenizer.json": hub.files("other/model", first)["tokenizer.json"]})
    with pytest.raises(VocabularyMismatchError):
        PRTForCausalLM.from_parts("other/model", rewards=[reward], token=hub.other_token)
    model = PRTForCausalLM.from_parts("other/model", rewards=["me/reward"], token=hub.other_token, revision=right)
    assert torch.equal(logits(model.rewards[0]), logits(reward)), "on its own base's revision"


def test_shards_outside_the_folder(tmp_path):
    reward = RewardModel.from_base(tiny.llama(1), TOKENIZER)
    reward.save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "model.safetensors").unlink()
    index = tmp_path / "reward" / "model.safetensors.index.json"
    for names in (
        ["../secret.safetensors"],
        ["/secret.safetensors"],
        ["weights.bin"],
        [3],
        [],
        ["..\0.safetensors"],
        [".."],
    ):
        index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        with pytest.raises(RewardFileError, match="(?s)index.json cannot be used.*a `weight_map` to safetensors"):
            RewardModel.from_pretrained(tmp_path / "reward")
    index.write_text("{")
    with pytest.raises(RewardFileError, match="index.json cannot be used"):
        RewardModel.from_pretrained(tmp_path / "reward")


def test_code_and_pickles_are_neither_pushed_nor_pulled(hub, base, tmp_path):
    reward = an_adapter(base)
    reward.save_pretrained(tmp_path / "reward")
    for name in ("training_args.bin", "optimizer.pt", "model.py", "merged.safetensors", ".secret.json"):
        (tmp_path / "reward" / name).write_bytes(b"x")
    from prt_hf.hub.publishing import push_reward

    push_reward(tmp_path / "reward", "me/reward")
    assert set(hub.files("me/reward")) == FILES
    hub.put("me/reward", {"adapter_model.bin": b"x", "modeling.py": b"x", "last-checkpoint/prt_config.json": b"{}"})
    hub.requests.clear()
    RewardModel.from_pretrained("me/reward")
    asked = {request.path.rsplit("/", 1)[-1] for request in hub.requests if "/me/reward/resolve/" in request.path}
    assert asked == FILES


# Trainers


ARGUMENTS = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps"}


def a_trainer(base, folder, trainer=PRTTrainer, args=PRTConfig, **kwargs):
    args = args(str(folder), **tiny.TUNING | ARGUMENTS | kwargs)
    return trainer(base, args, train_dataset=tiny.texts(), processing_class=TOKENIZER, peft_config=LoraConfig(r=2))


@TRANSPORTS
def test_a_trainer_pushes(hub, base, tmp_path):
    trainer = a_trainer(base, tmp_path / "my-reward")
    trainer.train()
    info = trainer.push_to_hub("tuned", private=True)
    assert titles(hub, "me/my-reward") == ["initial commit", "tuned"] and hub.repositories["me/my-reward"].private
    assert info.oid == hub.repositories["me/my-reward"].resolve("main")
    assert set(hub.files("me/my-reward")) == FILES
    pulled = RewardModel.from_pretrained("me/my-reward")
    trainer.reward.network.eval()
    assert torch.equal(logits(pulled), logits(trainer.reward)) and pulled.config == trainer.reward.config
    card = hub.files("me/my-reward")["README.md"].decode()
    assert "## Training" in card and "| `learning_rate` | `0.01` |" in card
    assert (tmp_path / "my-reward" / "README.md").read_text() == card


def test_a_trainer_takes_what_scripts_give_it(hub, base, tmp_path):
    """Those of transformers and of TRL."""
    trainer = a_trainer(base, tmp_path / "out", hub_model_id="me/named", hub_revision="run-1")
    trainer.train()
    trainer.push_to_hub(dataset_name="me/stories", tags=["mine"], language="en", license="mit", tasks="text-generation")
    data = HfApi().model_info("me/named", revision="run-1").card_data
    assert (data.datasets, data.language, data.license) == (["me/stories"], "en", "mit") and "mine" in data.tags
    assert not hub.files("me/named"), "the main branch was not asked for"
    job = trainer.push_to_hub(blocking=False, revision="run-2", tags="second", dataset_tags="me/news", dataset="News")
    assert job.result(60).oid == hub.repositories["me/named"].resolve("run-2")
    data = HfApi().model_info("me/named", revision="run-2").card_data
    assert data.datasets == ["me/stories", "me/news"] and {"mine", "second"} < set(data.tags)


@pytest.mark.parametrize("trainer, args", [(PRTTrainer, PRTConfig), (PRTSFTTrainer, PRTSFTConfig)])
@pytest.mark.parametrize(
    "strategy, folders",
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_pushes_while_training(hub, base, tmp_path, caplog, trainer, args, strategy, folders):
    """Every commit is a whole reward, and so is every checkpoint in it; no pickled states."""
    kwargs = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True, "save_total_limit": 1}
    kwargs |= {} if args is PRTConfig else {"bf16": False, "gradient_checkpointing": False}
    tuned = a_trainer(base, tmp_path / "out", trainer, args, **kwargs)
    tuned.train()
    during = [f"Training in progress, step {step}" for step in ((2, 4) if strategy != "end" else ())]
    assert titles(hub, "me/out") == ["initial commit", *during]
    assert not list((tmp_path / "out").glob(".pushing*"))
    if strategy != "end":
        files = hub.files("me/out")
        assert {name for name in files if "/" not in name} == FILES
        assert {name.split("/")[0] for name in files if "/" in name} == folders
        tuned.reward.network.eval()
        assert torch.equal(logits(RewardModel.from_pretrained("me/out")), logits(tuned.reward))
    for folder in folders:
        assert {name.removeprefix(f"{folder}/") for name in files if name.startswith(folder)} == FILES
        inside = RewardModel.from_pretrained("me/out", subfolder=folder)
        if folder != "checkpoint-2":
            assert torch.equal(logits(inside), logits(tuned.reward))
    said = "Checkpoints are pushed as rewards, without the optimizer's states" in caplog.text
    assert said == bool(folders)
    tuned.push_to_hub()
    assert titles(hub, "me/out") == ["initial commit", *(during or ["End of training"])], "nothing new, nothing pushed"


def test_the_token_is_neither_pushed_nor_kept(hub, base, tmp_path):
    kwargs = {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_token": hub.token, "hub_always_push": True}
    trainer = a_trainer(base, tmp_path / "out", **kwargs)
    trainer.train()
    assert trainer.args.hub_token == hub.token
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert tmp_path / "out" / "checkpoint-4" / "training_args.bin" in kept
    for name, content in [*hub.files("me/out").items(), *kept.items()]:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = b"".join(archive.read(part) for part in archive.namelist())
        assert hub.token.encode() not in content, name


def test_a_push_in_the_background_that_fails_is_told(hub, base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("prt_hf.training.saving.logger.error", said.append)
    trainer = a_trainer(base, tmp_path / "out", push_to_hub=True)
    hub.fail("POST", "*/commit/*", status=403)
    trainer.train()
    assert len(said) == 1 and said[0].startswith("A push to the Hub has failed: ") and "403" in said[0]
    trainer.push_to_hub()
    assert torch.equal(
        load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.lora_A.weight"],
        load_file(tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors")[
            "base_model.model.lm_head.lora_A.weight"
        ],
    )


def test_a_local_base_is_told(hub, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("prt_hf.hub.publishing.logger.warning", said.append)
    tiny.llama(1).save_pretrained(tmp_path / "base")
    an_adapter(str(tmp_path / "base")).push_to_hub("me/reward")
    assert len(said) == 1 and "is not on the Hub: users have to pass `base_model=` to load what is pushed" in said[0]
    files = hub.files("me/reward")
    assert str(tmp_path) not in files["README.md"].decode()
    assert torch.equal(
        logits(RewardModel.from_pretrained("me/reward", base_model=tiny.llama(1))),
        logits(an_adapter(str(tmp_path / "base"))),
    )


# The command


def test_the_command(hub, base, reward, tmp_path, capsys):
    """Without a base in memory, which it does not need."""
    reward.save_pretrained(tmp_path / "reward")
    PRTForCausalLM.from_parts(base, rewards=[reward]).save_pretrained(tmp_path / "recipe")
    hub.requests.clear()
    assert main(["push", str(tmp_path / "reward"), "me/reward", "--private", "--commit_message", "mine", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["commit"] == hub.repositories["me/reward"].resolve("main") and printed["url"].startswith("http")
    assert hub.repositories["me/reward"].private and titles(hub, "me/reward")[-1] == "mine"
    assert main(["push", str(tmp_path / "recipe"), "me/recipe", "--revision", "v2"]) == 0
    assert not [request for request in hub.requests if request.path.startswith("/me/base")]
    assert torch.equal(logits(RewardModel.from_pretrained("me/reward")), logits(reward))
    AutoModelForCausalLM.from_pretrained("me/recipe", revision="v2")
    for folder, said in (
        (tmp_path / "nothing", "holds no reward"),
        (tmp_path, "holds no reward"),
    ):
        assert main(["push", str(folder), "me/reward"]) == 1
        assert f"prt-hf push: {folder} {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault, said",
    [
        ({"method": "POST", "path_pattern": "/api/repos/create", "status": 403}, "403 Forbidden"),
        ({"method": "PUT", "path_pattern": "/storage/*", "status": 507}, "Error while uploading"),
        ({"method": "POST", "path_pattern": "*/commit/*", "drop": True}, "disconnected"),
    ],
)
def test_a_command_that_the_hub_refuses(hub, reward, tmp_path, capsys, fault, said):
    reward.save_pretrained(tmp_path / "reward")
    hub.fail(**fault)
    assert main(["push", str(tmp_path / "reward"), "me/reward"]) == 1
    error = capsys.readouterr().err
    assert "prt-hf push: " in error and said in error and "Traceback" not in error


def test_a_command_that_trains_and_pushes(hub, base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"w{index} w{index + 1} w{index + 2}"}) for index in range(3, 15)))
    train = f"train --model_name_or_path {base} --dataset_name {rows} --output_dir {tmp_path / 'tuned'} --use_cpu"
    train += " --max_steps 2 --lora_r 2 --report_to none --push_to_hub --hub_model_id me/tuned --hub_private_repo true"
    assert main([*train.split(), "--save_steps", "1", "--hub_strategy", "every_save", "--hub_always_push"]) == 0
    assert "prt-hf push" not in capsys.readouterr().out
    assert titles(hub, "me/tuned")[:2] == ["initial commit", "Training in progress, step 1"]
    assert set(hub.files("me/tuned")) == FILES and hub.repositories["me/tuned"].private
    here = RewardModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(RewardModel.from_pretrained("me/tuned")), logits(here))
    card = hub.files("me/tuned")["README.md"].decode()
    assert str(tmp_path) not in card and "datasets:" not in card.partition("\n---\n")[0]
