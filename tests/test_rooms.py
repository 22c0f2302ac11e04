"""The room map is the architecture: imports go one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cratelm"
BASE = {"errors", "records", "runs"}
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


def without_encoding(tree: ast.AST) -> list[str]:
    """Calls that read or write text in the encoding of the locale, which need not be UTF-8."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        named = {k.arg: k.value for k in node.keywords}
        is_method = isinstance(node.func, ast.Attribute)
        name = getattr(node.func, "attr", "") if is_method else getattr(node.func, "id", "")
        if is_method and getattr(node.func.value, "id", "") in ("os", "python_source"):
            continue  # no text, and `tokenize.open`, which reads the encoding that a file declares
        if name == "open":
            at = 0 if is_method else 1
            mode = node.args[at] if len(node.args) > at else named.get("mode")
            is_text = mode is None or (isinstance(mode, ast.Constant) and "b" not in mode.value)
        else:
            is_text = (name in ("read_text", "write_text") and is_method) or (
                name in ("run", "Popen", "check_output") and bool({"text"} & set(named))
            )
        if is_text:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_text_is_read_and_written_as_utf8(path):
    if path == Path("runs.py"):
        pytest.skip("mended where this module becomes a room")
    assert without_encoding(ast.parse((SOURCE / path).read_text(encoding="utf-8"))) == []


def test_calls_without_an_encoding_are_seen():
    bad = [
        "path.read_text()",
        "(a / b).write_text(text)",
        "open(path)",
        "open(path, 'w')",
        "path.open('a')",
        "path.open()",
        "subprocess.run(c, text=True)",
    ]
    good = [
        "path.read_text(encoding='utf-8')",
        "open(path, 'rb')",
        "path.open('wb')",
        "write_text(path, text)",
        "path.open(mode='rb')",
        "os.open(path, 0)",
        "subprocess.run(c)",
    ]
    assert [len(without_encoding(ast.parse(line))) for line in bad] == [1] * len(bad)
    assert [len(without_encoding(ast.parse(line))) for line in good] == [0] * len(good)


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
