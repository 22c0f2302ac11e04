"""The room map is the architecture: imports go one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cratelm"
BASE = {"columns", "errors", "records", "runs"}
LINE = ["corpus", "tokens", "models", "train", "evaluate", "activations", "explain", "score", "report", "viewer"]  # fmt: skip
SIDE = {"sae", "steer", "analysis"}
"""rooms that import the line, and are imported by none but the top"""
TOP = {"cli", "demo", "demo_config", "__main__", "__init__"}
MODULES = sorted(p.relative_to(SOURCE) for p in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module == "cratelm" else {module}
    return {name.split(".")[1] for name in found if name.startswith("cratelm.")}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in TOP:
        return
    if room in SIDE:
        earlier = BASE | set(LINE) - {"viewer"} | {room}
    else:
        earlier = BASE if room in BASE else BASE | set(LINE[: LINE.index(room) + 1])
        if room == "viewer":  # the end of the line steers, live
            earlier = earlier | {"steer"}
    assert imported_rooms(path) <= earlier


def test_every_folder_is_a_room():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(LINE) | SIDE


def test_crate_stands_alone():
    """A saved model can carry `crate.py`: it imports torch and transformers, nothing of ours."""
    text = (SOURCE / "models" / "crate.py").read_text()
    assert "cratelm" not in {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
