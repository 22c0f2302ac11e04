"""Define the rooms (subpackages) and which may import which, and draw them as docs/rooms.svg.

    python scripts/draw_rooms.py

The table below is the architecture. tests/test_rooms.py checks the imports of every module against it, and
the picture against both: the rooms that a box says it uses are read from the imports.
"""

import ast
import textwrap
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cratelm"
FILE = ROOT / "docs" / "rooms.svg"

GROUND = {"errors", "records", "runs", "stats", "text"}
"""rooms that every room may import; they import only each other"""
LINE = [
    {"corpus"},
    {"tokens"},
    {"models"},
    {"train", "evaluate"},
    {"probes"},
    {"activations"},
    {"explain"},
    {"score"},
    {"steer", "sae", "analysis"},
    {"replace"},
    {"results"},
    {"interop"},
    {"report"},
    {"viewer"},
    {"pipelines"},
]
"""each group may import the groups before it; rooms of one group do not import each other"""
ASKING = {
    "explain", "score", "steer", "replace", "results", "interop", "report", "viewer", "pipelines",
}  # fmt: skip
"""rooms that may import `llm`, which itself imports only the ground"""
TOP = {"cli", "api", "__main__", "__init__"}
PURPOSE = {
    "corpus": "files, folders and Hub data sets as documents",
    "tokens": "documents as token shards, split by hash",
    "models": "CRATE, GPT-2, sizes, and the sites of neurons",
    "train": "models from tokens",
    "evaluate": "loss, accuracy, predictions",
    "probes": "what families of models can do on synthetic tasks",
    "activations": "excerpts and statistics of every neuron",
    "explain": "what each neuron responds to",
    "score": "how well explanations predict held-out activations",
    "steer": "edit neurons, measure effects",
    "sae": "train and measure autoencoders",
    "analysis": "measure CRATE's derivation",
    "replace": "run models on the explanations of their neurons",
    "results": "the one reader of a finished run",
    "interop": "other people's checkpoints and formats, in and out",
    "report": "one page with tables and figures",
    "viewer": "neurons in a web browser",
    "pipelines": "several stages in one command",
    "llm": "requests to language models, and a ledger of their answers",
}
"""purpose of each room, for its box in the picture"""

WIDTH, MARGIN, GAP = 960, 16, 14
SIDE = 190
"""width of the box of `llm`, to the right of the other rooms"""


def modules() -> list[Path]:
    """Return the modules of the package, as paths within it."""
    return sorted(p.relative_to(SOURCE) for p in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """Return the room of a module: its folder, or its own name if it is in no folder."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the names that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(names)


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a module imports, which may include its own."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("cratelm.")}


def allowed(room: str) -> set[str]:
    """Return the rooms that a room may import."""
    if room in GROUND:
        return GROUND
    if room == "llm":
        return GROUND | {"llm"}
    at = next(i for i, group in enumerate(LINE) if room in group)
    before = set().union(*LINE[:at])
    return GROUND | before | {room} | ({"llm"} if room in ASKING else set())


def uses(room: str) -> list[str]:
    """Return the rooms that a room imports, in the order of `LINE`, without the ground."""
    order = [name for group in LINE for name in sorted(group)] + ["llm"]
    used = {name for path in modules() if room_of(path) == room for name in imported_rooms(path)}
    return [name for name in order if name in used - {room}]


def picture() -> str:
    """Return the picture as SVG."""
    parts: list[str] = []
    left, right = MARGIN, WIDTH - MARGIN - SIDE - GAP
    y = llm_top = MARGIN + _text(parts, left, MARGIN + 16, "A room imports only rooms above it, and the ground.", "p")  # fmt: skip
    for group in LINE:
        rooms = sorted(group, key=list(PURPOSE).index)
        width = (right - left - GAP * (len(rooms) - 1)) / len(rooms)
        texts = [_lines(room, width) for room in rooms]
        height = 22 + 15 * max(map(len, texts)) + 8
        if "explain" in group:
            llm_top = y
        for n, (room, lines) in enumerate(zip(rooms, texts, strict=True)):
            _box(parts, left + n * (width + GAP), y, width, height, room, lines)
        y += height + 10
    side = right + GAP
    lines = [("p", line) for line in textwrap.wrap(PURPOSE["llm"], 25)]
    askers = ", ".join(r for r in PURPOSE if "llm" in uses(r))
    lines += [("u", line) for line in textwrap.wrap(f"used by {askers}", 29)]
    _box(parts, side, llm_top, SIDE, 22 + 15 * len(lines) + 8, "llm", lines)
    ground = [("p", "records, errors: what is passed between rooms · runs: stages on disk · stats: intervals, tests · text: tables, visible text")]  # fmt: skip
    _box(parts, left, y, WIDTH - 2 * MARGIN, 45, "the ground", ground)
    y += 45 + MARGIN
    style = "".join(
        [
            "rect{fill:#f6f8fa;stroke:#8b949e}",
            "text{font-family:system-ui,sans-serif;fill:#1f2328}",
            ".n{font-size:15px;font-weight:600}.p{font-size:12px}.u{font-size:11px;fill:#57606a}",
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">\n'
        "<title>Rooms of cratelm and what they import</title>\n"
        f"<style>{style}</style>\n"
        f'<rect width="{WIDTH}" height="{y}" style="fill:#fff;stroke:none"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _lines(room: str, width: float) -> list[tuple[str, str]]:
    """Return the lines of a box below its name, each with its style."""
    lines = [("p", line) for line in textwrap.wrap(PURPOSE[room], int(width / 7))]
    if used := uses(room):
        lines += [
            ("u", line) for line in textwrap.wrap(f"uses {', '.join(used)}", int(width / 6.3))
        ]
    return lines


def _box(
    parts: list[str],
    x: float,
    y: float,
    width: float,
    height: float,
    name: str,
    lines: list[tuple[str, str]],
) -> None:
    parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>')
    _text(parts, x + 10, y + 19, name, "n")
    for n, (style, line) in enumerate(lines):
        _text(parts, x + 10, y + 36 + 15 * n, line, style)


def _text(parts: list[str], x: float, y: float, text: str, style: str) -> int:
    """Append a line of text, and return the height that it takes."""
    parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(text)}</text>')
    return 28


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
