"""Docstrings and names can be understood at first reading, as far as a machine can tell."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prt_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# A docstring opens with a verb and its object; a class, a module or a property may name what it is.
BANNED = re.compile(r"(Of|As|What|Raises|Args|Attributes|Returns|For)\b")


def named(module: Path):
    return pytest.param(module, id=module.relative_to(PACKAGE).as_posix())


def definitions(node: ast.AST, is_public: bool = True):
    """Yield classes and functions, and whether users see them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            seen = is_public and not child.name.startswith("_") and not isinstance(node, ast.FunctionDef)
            yield child, seen
            yield from definitions(child, seen)
        elif not isinstance(child, ast.expr):
            yield from definitions(child, is_public)


@pytest.mark.parametrize("module", map(named, MODULES))
def test_docstrings(module):
    tree = ast.parse(module.read_text())
    everything = [(tree, True), *definitions(tree)]
    odd = [
        f"{getattr(node, 'name', 'module')}: {docstring.splitlines()[0]}"
        for node, _ in everything
        if (docstring := ast.get_docstring(node)) and BANNED.match(docstring)
    ]
    assert not odd
    assert not [
        node.name
        for node, seen in everything[1:]
        if seen and isinstance(node, ast.ClassDef) and not ast.get_docstring(node)
    ]


@pytest.mark.parametrize("module", map(named, MODULES))
def test_names(module):
    """`backbone_logits`, not `of_backbone`."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names |= {getattr(node, field, None) for field in ("id", "arg", "attr", "name")}
    assert not sorted(name for name in names if isinstance(name, str) and re.match(r"_?of_[a-z]", name))
