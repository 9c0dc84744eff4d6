"""Help needs no libraries, and what libraries tell their developers does not reach users."""

import subprocess
import sys
import warnings

import pytest

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
