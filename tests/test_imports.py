"""`import prt_hf` is free, and offers the same names to users, type checkers and `from prt_hf import *`."""

import ast
import subprocess
import sys
from pathlib import Path

import prt_hf

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "huggingface_hub", "matplotlib", "sklearn", "evaluate")


def loaded_by(code: str) -> list[str]:
    code = f"import sys\n{code}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_package_loads_nothing_by_itself():
    assert loaded_by("import prt_hf; prt_hf.__version__; dir(prt_hf)") == []
    assert "trl" not in loaded_by("from prt_hf import RewardModel, PRTLogitsProcessor, PRTForCausalLM")


def test_type_checkers_see_the_names_that_are_exported():
    tree = ast.parse(Path(prt_hf.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == prt_hf._EXPORTS
    for module, names in seen.items():
        for name in names:
            assert getattr(prt_hf, name) is getattr(sys.modules[f"prt_hf.{module}"], name)


def test_unknown_names_are_attribute_errors():
    assert not hasattr(prt_hf, "nothing") and set(dir(prt_hf)) == set(prt_hf.__all__)


def test_transformers_knows_what_was_saved():
    """PRT models after an import of `prt_hf.inference`, zero-shot classifiers after any that loads models."""
    code = "\nfrom transformers import CONFIG_MAPPING\nassert {!r} in CONFIG_MAPPING"
    loaded_by("import prt_hf.inference" + code.format("prt"))
    loaded_by("from prt_hf import RewardModel" + code.format("prt_zero_shot"))
