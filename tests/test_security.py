"""Loading, pushing and serving what others made changes nothing on this machine, and runs nothing of theirs."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prt_hf import PRTConfig, PRTForCausalLM, PRTTrainer, RewardFileError, RewardModel
from prt_hf.cli import main
from prt_hf.hub.publishing import push_reward
from prt_hf.inference.recipe import push_recipe

TOKENIZER = tiny.tokenizer()


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran-by-a-pickle",)


CODE = "import pathlib\npathlib.Path('ran-by-an-import').touch()\nclass Evil:\n    pass\n"


def make_hostile(folder, victim):
    """Put beside a reward or recipe what would harm whoever trusts it: journals of half-done saves that name folders of
    the user, links, pickles, code."""
    for name, names in ((".saving-evil", [str(victim), "../victim"]), (".saved-evil", ["../victim"])):
        for part in ("old", "new"):
            (folder / name / part).mkdir(parents=True)
        (folder / name / "journal.json").write_text(json.dumps(names))
    (folder / ".saving").symlink_to(victim)
    (folder / ".saved").symlink_to(victim)
    (folder / "notes.json").symlink_to(victim / "precious.txt")
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
    for name in ("tokenization_evil.py", "modeling_evil.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(CODE)
    config = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious.txt").write_text("precious")
    return folder


@pytest.fixture
def base(tmp_path):
    tiny.llama(1).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path, base):
    """A reward, a recipe and an ordinary adapter, in folders of these names."""
    torch.manual_seed(0)
    reward = RewardModel.from_base(str(base), TOKENIZER, LoraConfig(r=2, init_lora_weights=False))
    reward.save_pretrained(tmp_path / "reward")
    PRTForCausalLM.from_parts(str(base), [reward]).save_pretrained(tmp_path / "recipe")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    TOKENIZER.save_pretrained(tmp_path / "lora")
    return tmp_path


def contents(folder):
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


# Run in a process of its own, since an audit hook stays. Every door is used once before it watches, so that what
# libraries import and cache at first use is there.
AUDIT = """
import os, sys
from pathlib import Path

home, hub_id = Path(sys.argv[1]), sys.argv[2]
import torch
from transformers import AutoModelForCausalLM
from prt_hf import PRTForCausalLM, PRTError, PRTLogitsProcessor, RewardModel
from prt_hf.contract import RewardConfig
from prt_hf.evaluation.results import PortabilityReport
from prt_hf.hub.publishing import push_reward
from prt_hf.inference.configuration import PRTModelConfig
from prt_hf.inference.recipe import push_recipe
from prt_hf.serving.parts import parts_by_name, parts_of_recipe

def doors(name):
    reward, recipe, lora = (home / f"{kind}{name}" for kind in ("reward", "recipe", "lora"))
    base = str(home / "base")
    yield lambda: RewardModel.from_pretrained(reward)
    yield lambda: RewardModel.from_pretrained(reward, base_model=base, trust_remote_code=True)
    yield lambda: RewardModel.from_pretrained(recipe, subfolder="reward-0")
    yield lambda: RewardModel.from_adapter(lora)
    yield lambda: PRTForCausalLM.from_parts(base, [str(reward), str(lora)])
    yield lambda: PRTForCausalLM.from_pretrained(recipe)
    yield lambda: AutoModelForCausalLM.from_pretrained(recipe)
    yield lambda: parts_of_recipe(recipe, PRTModelConfig.from_pretrained(recipe), base)
    yield lambda: parts_by_name(base, [str(reward)], None, base)
    yield lambda: PortabilityReport.from_folder(reward, RewardConfig.from_json_file(reward / "prt_config.json"))
    yield lambda: RewardModel.from_pretrained(f"{hub_id}{name}")
    yield lambda: push_reward(reward, "me/pushed")
    yield lambda: push_recipe(recipe, "me/pushed-recipe")

def call(door):
    try:
        door()
    except PRTError as error:
        return type(error).__name__ + ": " + str(error).splitlines()[0]

for door in doors(""):
    assert call(door) is None
found, watching = [], True
from huggingface_hub import constants
cache = Path(constants.HF_HUB_CACHE)
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn",
        "pickle.find_class", "ctypes.dlopen"}

def is_allowed(path, folder=-1):
    if isinstance(folder, int) and folder >= 0:
        path = Path(os.readlink(f"/proc/self/fd/{folder}")) / os.fsdecode(path)
    path = os.path.abspath(os.fsdecode(path))
    return path == os.devnull or Path(path).is_relative_to(cache)

def watch(event, args):
    if not watching:
        return
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes and not isinstance(path, int) and not is_allowed(path):
            found.append((event, str(path)))
    elif event in CHANGES:
        changed = args[1:2] if event in ("os.link", "os.symlink") else args
        paths = [path for path in changed if isinstance(path, (str, bytes, os.PathLike))]
        if not all(is_allowed(path, args[-1]) for path in paths):
            found.append((event, str(args)))
    elif event in RUNS:
        found.append((event, str(args)[:200]))

modules = set(sys.modules)
sys.addaudithook(watch)
said = [call(door) for door in doors("-hostile")]
watching = False
roots = [Path(sys.prefix), Path(sys.base_prefix), Path(torch.__file__).parent, Path(sys.argv[3])]
for name in set(sys.modules) - modules:
    file = getattr(sys.modules[name], "__file__", None)
    if file and not any(Path(file).is_relative_to(root) for root in roots):
        found.append(("import", file))
print(*said, sep="\\n")
assert not found, found[:10]
"""


def test_no_door_changes_or_runs_anything(hub, saved, victim, tmp_path, monkeypatch):
    """While hostile folders and a hostile repository are loaded, pushed and served, nothing outside the cache is
    opened for writing, removed or renamed, no process is started, nothing is unpickled, and no code is imported."""
    hub.put("me/reward", saved / "reward")
    for name in ("reward", "recipe", "lora"):
        shutil.copytree(saved / name, saved / f"{name}-hostile")
        make_hostile(saved / f"{name}-hostile", victim)
    make_hostile(saved / "recipe-hostile" / "reward-0", victim)
    with monkeypatch.context() as patch:  # its hostile files, without links, which no repository has
        patch.setattr(Path, "symlink_to", lambda *_: None)
        shutil.copytree(saved / "reward", tmp_path / "repository")
        make_hostile(tmp_path / "repository", victim)
    hub.put("me/reward-hostile", tmp_path / "repository")
    before = contents(saved)
    (tmp_path / "run").mkdir()
    code = [sys.executable, "-c", AUDIT, str(saved), "me/reward", str(Path(__file__).parents[1])]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path / "run", env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: content for path, content in contents(saved).items() if path in before} == before
    assert not list((tmp_path / "run").iterdir()) and contents(victim) == {Path("precious.txt"): b"precious"}
    fetched = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if "snapshots" in path.parts}
    assert "prt_config.json" in fetched and not fetched & {"journal.json", "adapter_model.bin", "modeling_evil.py"}
    pushed = {*hub.files("me/pushed"), *hub.files("me/pushed-recipe")}
    assert "reward-0/prt_config.json" in pushed
    assert not [name for name in pushed if name.endswith((".bin", ".pt", ".py", "notes.json")) or "/." in f"/{name}"]


@pytest.mark.parametrize("kind", ["reward", "recipe"])
def test_saving_into_a_hostile_folder_stays_in_it(saved, victim, kind):
    """A save does write, but nothing beside its own files."""
    make_hostile(saved / kind, victim)
    (saved / kind / ".saved").unlink()
    (saved / kind / ".saved").mkdir()
    (saved / kind / ".saved" / "precious").mkdir()
    (saved / kind / ".saved" / "mine.txt").write_text("another's")
    (saved / kind / ".saved" / "vocab.txt").symlink_to(victim / "precious.txt")
    (saved / kind / "precious").mkdir()
    (saved / kind / "precious" / "mine.txt").write_text("mine")
    (saved / kind / "mine.txt").write_text("mine")
    reward = RewardModel.from_base(str(saved / "base"), TOKENIZER, LoraConfig(r=2))
    saver = reward if kind == "reward" else PRTForCausalLM.from_parts(str(saved / "base"), [reward])
    saver.save_pretrained(saved / kind)
    assert contents(victim) == {Path("precious.txt"): b"precious"}
    assert (saved / kind / "precious" / "mine.txt").read_text() == "mine"
    assert (saved / kind / "mine.txt").read_text() == "mine"
    loaded = (RewardModel if kind == "reward" else PRTForCausalLM).from_pretrained(saved / kind)
    assert loaded.processing_class.get_vocab() == TOKENIZER.get_vocab()


def test_a_full_disk_is_a_clear_error(saved):
    """Whichever library meets it; what was saved there before stays whole."""
    before = contents(saved / "reward")
    reward = RewardModel.from_base(str(saved / "base"), TOKENIZER, LoraConfig(r=2))

    def save_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(RewardFileError, match="(?s)could not be saved: .*too large.*remedy: save again once"):
            reward.save_pretrained(saved / "reward")

    assert not tiny.killed_after(10**6, save_on_a_full_disk)
    assert contents(saved / "reward") == before


# What leaves the machine


def test_only_files_of_a_reward_are_pushed(hub, saved, capsys):
    """Others have to be named; they are listed before they go."""
    for name in ("token.txt", "credentials.json", "notes.md", ".env", "rng_state.pth"):
        (saved / "reward" / name).write_text("secret")
    assert main(["push", str(saved / "reward"), "me/reward"]) == 0
    files = set(hub.files("me/reward"))
    assert files == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "prt_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert set(capsys.readouterr().err.split()) >= files
    assert main(["push", str(saved / "reward"), "me/reward", "--include", "notes.md"]) == 0
    assert set(hub.files("me/reward")) == {*files, "notes.md"} and "notes.md" in capsys.readouterr().err
    for name in ("../base/config.json", str(saved / "base" / "config.json"), "nothing.txt", "recipe\0"):
        with pytest.raises(RewardFileError, match="cannot be pushed"):
            push_reward(saved / "reward", "me/reward", include=[name])


@pytest.mark.parametrize("kind", ["reward", "recipe"])
def test_links_are_not_pushed(hub, saved, victim, kind):
    (saved / kind / "vocab.json").symlink_to(victim / "precious.txt")
    with pytest.raises(RewardFileError, match="(?s)vocab.json cannot be pushed.*found: a link"):
        (push_reward if kind == "reward" else push_recipe)(saved / kind, "me/pushed")
    (saved / kind / "vocab.json").unlink()
    (saved / kind / "additional_chat_templates").symlink_to(victim)
    (victim / "secret.jinja").write_text("secret")
    with pytest.raises(RewardFileError, match="(?s)secret.jinja cannot be pushed.*found: a link"):
        (push_reward if kind == "reward" else push_recipe)(saved / kind, "me/pushed")
    assert "me/pushed" not in hub.repositories


# Checkpoints


def a_trainer(folder):
    args = PRTConfig(str(folder), **tiny.TUNING | {"max_steps": 3, "save_steps": 1, "save_strategy": "steps"})
    return PRTTrainer(
        tiny.llama(1), args, train_dataset=tiny.texts(), processing_class=TOKENIZER, peft_config=LoraConfig(r=2)
    )


def test_training_that_is_killed_while_it_saves_goes_on(tmp_path):
    """From the last checkpoint that is complete, at every moment of a save."""
    whole = a_trainer(tmp_path / "whole")
    whole.train()
    expected = whole.model.state_dict()
    is_resumed = []
    for steps in range(0, 100, 17):
        folder = tmp_path / f"killed-{steps}"
        if not tiny.killed_after(steps, lambda folder=folder: a_trainer(folder).train()):
            break
        again = a_trainer(folder)
        try:
            again.train(resume_from_checkpoint=True)
        except ValueError as error:
            assert "There is no checkpoint to resume from." in str(error)
            is_resumed.append(False)
            continue
        is_resumed.append(True)
        for name, value in again.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)
    assert len(is_resumed) > 3 and is_resumed == sorted(is_resumed) and is_resumed[-1]


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1.0, "glo'])
def test_half_written_checkpoints_are_skipped(tmp_path, state, caplog):
    trainer = a_trainer(tmp_path)
    trainer.train()
    last = tmp_path / "checkpoint-3"
    (last / "trainer_state.json").unlink()
    if state is not None:
        (last / "trainer_state.json").write_text(state)
    again = a_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert f"Skipping the incomplete checkpoint {last}" in caplog.text
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], msg=name)
