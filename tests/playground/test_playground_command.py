"""`prt-hf playground` serves the page to this machine, or writes it as a Space that runs by itself."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny
import yaml
from peft import LoraConfig

from prt_hf import RewardModel
from prt_hf.cli import main


@pytest.fixture
def models(hub, tmp_path):
    """A backbone and a reward on the Hub, and in folders of the same names."""
    for name, seed in (("old", 2), ("new", 1)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
        tiny.llama(seed).push_to_hub(f"me/{name}")
        tiny.tokenizer().push_to_hub(f"me/{name}")
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base("me/old", peft_config=config).save_pretrained(tmp_path / "reward")
    RewardModel.from_pretrained(tmp_path / "reward").push_to_hub("me/reward")
    return tmp_path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def labels_at(port, process):
    """What the page shows, once it is there."""
    for _ in range(600):
        assert process.poll() is None, process.communicate()[1]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                config = json.load(answer)
            return {part["props"].get("label") or part["props"].get("value") for part in config["components"]}, config
        except OSError:
            time.sleep(0.2)
    raise AssertionError("no page")


@pytest.fixture
def started():
    """Start processes, and end them after the test."""
    running = []

    def start(*command, **kwargs):
        running.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **kwargs))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_the_page_is_served_to_this_machine(models, started):
    pytest.importorskip("gradio")
    port = free_port()
    arguments = ["new", "--reward", "reward", "--strength", "0.5", "--port", str(port), "--device", "cpu"]
    process = started(sys.executable, "-m", "prt_hf.cli", "playground", *arguments, cwd=models)
    shown, config = labels_at(port, process)
    assert {"Backbone alone", "With the rewards", "Strength of reward"} <= shown and "EFT" not in shown
    assert any("**new** with **reward**" in str(each) for each in shown)
    (slider,) = [part for part in config["components"] if part["props"].get("label") == "Strength of reward"]
    assert slider["props"]["value"] == 0.5
    assert config["analytics_enabled"] is False
    assert process.stdout.readline() == f"The playground is at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # taken, if all addresses of this machine were served


def test_a_space_shows_the_same_page_from_ids(models, started, capsys):
    pytest.importorskip("gradio")
    space = models / "space"
    arguments = ["me/new", "--reward", "me/reward", "--strength", "0.5", "--dtype", "float32"]
    assert main(["playground", *arguments, "--space_dir", str(space)]) == 0
    assert f"hf upload <user>/<space> {space} --repo-type space" in capsys.readouterr().out
    matter = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert matter["sdk"] == "gradio" and matter["app_file"] == "app.py" and matter["models"] == ["me/new", "me/reward"]
    needed = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("transformers>=") for line in needed)
    assert not any("prt" in line or "extra" in line for line in needed), "the package is in the folder, on no index"

    copied = space / "prt_hf" / "playground" / "comparison.py"
    copied.write_text(copied.read_text().replace('"Backbone alone"', '"This copy\'s own"'))
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = started(sys.executable, "app.py", cwd=space, env=environment | {"GRADIO_SERVER_PORT": str(port)})
    shown, _ = labels_at(port, process)
    assert {"This copy's own", "With the rewards", "Strength of me/reward"} <= shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["new", "--reward", "me/reward"], "A Space cannot read folders of this machine."),
        (["me/new", "--reward", "me/reward", "--strength", "1", "2"], "`strengths` is not usable."),
        (["me/new", "--reward", "../reward"], "Repo id must"),
        (["me/new", "--reward", "me/reward", "--space_dir", "new"], "new is not empty."),
    ],
)
def test_a_space_that_could_not_run_is_refused(arguments, problem, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").touch()
    assert main(["playground", "--space_dir", "space", *arguments]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "space").exists() and len(list((tmp_path / "new").iterdir())) == 1


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["playground", "no/backbone", "--reward", "no/reward"]) == 1
    assert 'pip install -e ".[playground]"' in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_a_port_that_there_is_not_is_refused_at_once(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["playground", "no/backbone", "--reward", "no/reward", "--port", port])
    assert "--port" in capsys.readouterr().err
