"""Writes src/cratelm/api.py: every verb as a function with the fields of its configuration.

    python scripts/write_api.py

An editor and pyright read signatures from source text, so they are written out and not made at import;
a test compares the file with the dataclasses. Paths may be given as text, too.
"""

import ast
import dataclasses
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cratelm.cli import VERBS, config_class, function_name, option_texts

FILE = Path(__file__).parents[1] / "src" / "cratelm" / "api.py"
WIDTH = 100
HEAD = '''"""Every verb of the command line as a function: `api.train(run="runs/mine", steps=500)`.

Arguments are the options of `cratelm VERB`, by the same names; `import records` is `import_records`.
Every function returns what the command prints, as a dataclass, and raises `InputError` for bad
input. Nothing heavy is imported before a function is called.

Written by scripts/write_api.py from the configurations of the verbs: change those, and run it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from cratelm.cli import config_class, run_verb

if TYPE_CHECKING:
{imports}

__all__ = [
{names}
]


def _run(verb: str, options: Mapping[str, Any]) -> Any:
    """Run a verb with its options, of which paths may be text."""
    config = config_class(verb)
    types = get_type_hints(config)
    return run_verb(verb, config(**{{k: _path(types[k], v) for k, v in options.items()}}))


def _path(kind: Any, value: Any) -> Any:
    if kind in (Path, Path | None):
        return Path(value) if isinstance(value, str) else value
    return tuple(map(Path, value)) if kind == tuple[Path, ...] else value
'''


def api_source() -> str:
    """Return the text of api.py."""
    results: dict[str, set[str]] = {}
    for verb in VERBS:
        for name, module in returned(verb).items():
            if module != "typing":
                results.setdefault(module, set()).add(name)
    imports = [f"    from {m} import {', '.join(sorted(n))}" for m, n in sorted(results.items())]
    names = sorted(f'    "{function_name(verb)}",' for verb in VERBS)
    head = HEAD.format(imports="\n".join(imports), names="\n".join(names))
    source = "\n\n".join([head, *map(function_source, VERBS)])
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def function_source(verb: str) -> str:
    """Return the text of a verb's function."""
    config = config_class(verb)
    types, texts = get_type_hints(config), option_texts(config)
    fields = dataclasses.fields(config)
    parameters = [f"    {f.name}: {type_text(types[f.name])}{_default(f)}," for f in fields]
    about = [
        textwrap.fill(
            f"{f.name}: {texts[f.name]}",
            WIDTH,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for f in fields
    ]
    first, _, more = (config.__doc__ or "").strip().partition("\n")
    paragraphs = [first, textwrap.dedent(more).strip()]
    doc = textwrap.indent("\n\n".join(filter(None, paragraphs)), " " * 4).strip()
    result = " | ".join(returned(verb))
    lines = [
        f"def {function_name(verb)}(",
        "    *,",
        *parameters,
        f') -> "{result}":',
        f'    """{doc}',
        "",
        "    Args:",
        *about,
        '    """',
        f'    return _run("{verb}", locals())',
    ]
    return "\n".join(lines) + "\n"


def returned(verb: str) -> dict[str, str]:
    """Return the classes of what a verb's function returns, and their modules.

    They are read from the source, because importing every verb takes half a minute.
    """
    spec = importlib.util.find_spec(VERBS[verb].module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    imported = {
        alias.name: node.module or ""
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    function = next(
        node
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name == function_name(verb)
    )
    assert function.returns is not None, f"{verb}: its function says nothing of what it returns"
    names = ast.unparse(function.returns).split(" | ")
    return {name: imported.get(name, spec.name) for name in names}


def type_text(kind: Any) -> str:
    """Return a field's type as it is written; where it is a path, text will do."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Path:
        return "str | Path"
    if origin in (Union, UnionType):
        return " | ".join(map(type_text, arguments))
    if origin is Literal:
        return f"Literal[{', '.join(map(_quoted, arguments))}]"
    if origin is tuple and arguments[1:] == (...,):
        return f"tuple[{type_text(arguments[0])}, ...]"
    if kind is NoneType:
        return "None"
    assert origin is None, f"{kind}: say here how this type is written"
    return kind.__name__


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    return f" = {_value(field.default)}"


def _value(value: Any) -> str:
    if isinstance(value, Path):
        return f"Path({_quoted(str(value))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' * (len(value) == 1)})"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if value >= 10_000 else str(value)
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    FILE.write_text(api_source(), encoding="utf-8")
