"""The room map is the architecture: imports go one way, and never in a circle."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "scripts" / "draw_rooms.py")
assert _spec is not None
assert _spec.loader is not None
rooms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rooms)
SOURCE, LINE, GROUND = rooms.SOURCE, rooms.LINE, rooms.GROUND
MODULES = rooms.modules()
WALK = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def module_of(path: Path) -> str:
    return ".".join(("cratelm", *path.with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    room = rooms.room_of(path)
    if room not in rooms.TOP:
        assert rooms.imported_rooms(path) <= rooms.allowed(room)


def test_no_circle_of_imports():
    """Over modules, imports inside functions included: a lazy import hides a circle, it does not open it."""
    modules = {module_of(path): path for path in MODULES}
    graph = {
        name: set(rooms.imports(path)) & set(modules) - {name} for name, path in modules.items()
    }
    while graph:
        leaves = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert leaves, f"these import each other: {', '.join(sorted(graph))}"
        for name in leaves:
            del graph[name]


def test_every_folder_is_a_room():
    data = {"__pycache__", "minis"}  # folders without code
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name not in data}
    assert folders | GROUND == set().union(*LINE) | GROUND | {"llm"}
    assert set(rooms.PURPOSE) == set().union(*LINE) | {"llm"}


def test_the_picture_is_that_of_the_imports():
    """Else type `python scripts/draw_rooms.py`."""
    assert rooms.FILE.read_text(encoding="utf-8") == rooms.picture()


def test_the_reading_order_is_short_and_never_goes_back():
    """At most 25 files that exist; each in the room of the one before it, or in a later one."""
    files = [Path(name) for name in re.findall(r"^\d+\. `([\w/]+\.py)`: ", WALK, re.MULTILINE)]
    assert len(files) == len(set(files)) == len(re.findall(r"^\d+\. ", WALK, re.MULTILINE))
    assert 10 <= len(files) <= 25
    assert set(files) <= set(MODULES)
    places = [next(n for n, g in enumerate(LINE) if rooms.room_of(f) in g) for f in files]
    assert places == sorted(places)


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
    """A saved model carries the file of its family: it imports torch and transformers; `crate.py` also `tssa.py`."""
    for name in ("crate", "tssa", "gpt2_activation", "sparse_gpt"):
        imported = rooms.imports(Path(f"models/{name}.py"))
        ours = {n for n in imported if n.startswith("cratelm")}
        assert {n.split(".")[2] for n in ours} == ({"tssa"} if name == "crate" else set())
