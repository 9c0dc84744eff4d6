"""Check that the rooms of prt_hf import from the floors below them only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "prt_hf"
# Rooms on one floor do not import each other; `__init__` is the package's own, which `from .. import` reads.
FLOORS = """_version errors < functional vocabulary < contract < hub < networks < reward
    < training inference < baking evaluation serving < __init__ < demo benchmark playground < cli"""
FLOOR = {room: number for number, rooms in enumerate(FLOORS.split("<")) for room in rooms.split()}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path):
    """Yield the room of everything that a module imports from the package, inside functions as well."""
    package = ["prt_hf", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            names = [[*parents, *filter(None, (node.module or "").split(".")), alias.name] for alias in node.names]
        else:
            names = [alias.name.split(".") for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name[1] if name[1:2] and name[1] in FLOOR else "__init__" for name in names if name[0] == "prt_hf")


def test_imports_go_down_only():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert {room_of(path) for path in modules} == set(FLOOR)
    arrows = {(path, room) for path in modules for room in imported_rooms(path) if room != room_of(path)}
    assert (PACKAGE / "cli" / "train.py", "training") in arrows, "which it imports inside functions only"
    arrows -= {(PACKAGE / "reward" / "model.py", "inference")}  # `RewardModel.processor`, the one door upwards
    assert [f"{path} imports {room}" for path, room in sorted(arrows) if FLOOR[room] >= FLOOR[room_of(path)]] == []
