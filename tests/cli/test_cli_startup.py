"""Help needs no libraries, what libraries tell their developers does not reach users, and mistakes come with a hint."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from prt_hf import __version__
from prt_hf.cli import COMMANDS, demo, main

HEAVY = ("torch", "transformers", "huggingface_hub", "datasets", "peft", "trl", "numpy")
NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["bench", "decode", "--help"],
        *([name, "--help"] for name in NAMES if name != "train"),
    ],
    ids=" ".join,
)
def test_help_imports_no_heavy_library(arguments):
    code = (
        "import sys; from prt_hf.cli import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit as end: print(end.code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.splitlines()[-1] == "0 []", finished.stderr


def test_future_warnings_are_not_shown_and_others_are(monkeypatch):
    def warn(args):
        warnings.warn("deprecated in some library", FutureWarning, stacklevel=2)
        warnings.warn("about your data", UserWarning, stacklevel=2)

    monkeypatch.setattr(demo, "run", warn)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["demo"]) == 0
        warnings.warn("after the command", FutureWarning, stacklevel=2)
    assert [str(each.message) for each in shown] == ["about your data", "after the command"]
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        main(["demo"])
    assert len(shown) == 2, "the user asks for them with -W"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "train"])
def test_options_have_both_spellings(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    options = {word for word in words if word.startswith("--")}
    assert {option.replace("_", "-") for option in options} | {
        f"--{name[2:].replace('-', '_')}" for name in options
    } == options


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (
            ["generate", "b", "--promt", "x"],
            "prt-hf generate: error: unrecognized arguments: --promt x; did you mean --prompt?",
        ),
        (["generate", "b", "--max-tokens", "9"], "did you mean --max_new_tokens?"),
        (["demo", "--output_dr=x"], "did you mean --output_dir?"),
        (["bench", "decode", "--new_token", "9"], "did you mean --new_tokens?"),
        (["check", "a", "b", "c"], "prt-hf check: error: unrecognized arguments: c\n"),
        (
            ["generate", "--reward", "r", "b"],
            "required: backbone\nput them first: --reward, --strength, --prompt take every",
        ),
        (["check", "a"], "required: backbone\n"),
    ],
)
def test_wrong_options_leave_with_2_and_a_hint(arguments, hint, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2 and hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 7 has 70 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "MPS", "Python"],
)
@pytest.mark.parametrize(("name", "remedy"), [("train", "--gradient_checkpointing"), ("demo", "--dtype bfloat16")])
def test_too_little_memory_comes_with_a_remedy(error, name, remedy, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(f"prt_hf.cli.{name}.run", fail)
    assert main([name]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"prt-hf {name}: There is not enough memory.\n") and remedy in printed
    assert (str(error).split("\n")[0] in printed) and "Process 7" not in printed and "Traceback" not in printed


def test_a_package_for_reports_that_is_missing_is_told_and_bugs_are_not_hidden(monkeypatch, capsys):
    def fail(args):
        raise RuntimeError(message)

    monkeypatch.setattr(demo, "run", fail)
    message = "WandbCallback requires wandb to be installed. Run `pip install wandb`."
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"prt-hf demo: {message}\n"
    message = "shape mismatch"
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["demo"])


def test_env_prints_versions_and_hardware(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prt_hf"], found["torch"]) == (__version__, torch.__version__)
    assert {"python", "transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "vllm"} < found.keys()
    assert {"system", "machine", "processor", "threads", "gpu"} < found.keys()
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["prt_hf", __version__] and len(lines) == len(found)
