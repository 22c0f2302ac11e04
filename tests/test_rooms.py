"""The room map is the architecture: imports go one way, and never in a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cratelm"
GROUND = {"columns", "errors", "records", "runs", "stats", "text"}
"""anyone may import these; they import each other alone"""
LINE = [
    {"corpus"},
    {"tokens"},
    {"models"},
    {"train", "evaluate"},
    {"activations"},
    {"explain"},
    {"score"},
    {"steer", "sae", "analysis"},
    {"results"},
    {"interop"},
    {"report"},
    {"viewer"},
    {"pipelines"},
]
"""each group may import the groups before it; rooms of one group do not import each other"""
ASKING = {"explain", "score", "steer", "results", "interop", "report", "viewer", "pipelines"}
"""rooms that may import `llm`, which itself imports the ground alone"""
TOP = {"cli", "api", "__main__", "__init__"}
MODULES = sorted(p.relative_to(SOURCE) for p in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def module_of(path: Path) -> str:
    return ".".join(("cratelm", *path.with_suffix("").parts)).removesuffix(".__init__")


@cache
def imports(path: Path) -> frozenset[str]:
    """Names that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(names)


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("cratelm.")}


def allowed(room: str) -> set[str]:
    """Rooms that a room may import."""
    if room in GROUND:
        return GROUND
    if room == "llm":
        return GROUND | {"llm"}
    at = next(i for i, group in enumerate(LINE) if room in group)
    before = set().union(*LINE[:at])
    return GROUND | before | {room} | ({"llm"} if room in ASKING else set())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    room = room_of(path)
    if room not in TOP:
        assert imported_rooms(path) <= allowed(room)


def test_no_circle_of_imports():
    """Over modules, imports inside functions included: a lazy import hides a circle, it does not open it."""
    modules = {module_of(path): path for path in MODULES}
    graph = {name: set(imports(path)) & set(modules) - {name} for name, path in modules.items()}
    while graph:
        leaves = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert leaves, f"these import each other: {', '.join(sorted(graph))}"
        for name in leaves:
            del graph[name]


def test_every_folder_is_a_room():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set().union(*LINE) | {"llm", "runs", "stats", "text"}


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
    assert not any(n.split(".")[0] == "cratelm" for n in imports(Path("models/crate.py")))
