"""What the documentation's site takes from the code while it is built, so that it cannot differ.

A page `verbs/NAME.md` holds `<!-- options -->`: the verb's options stand there, read from its
configuration dataclass. `verbs.md` holds `<!-- verbs -->`: the table of all verbs.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from cratelm.cli import VERBS, config_class


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    path = page.file.src_uri
    if path.startswith("verbs/"):
        return markdown.replace("<!-- options -->", options(path[len("verbs/") : -len(".md")]))
    return markdown.replace("<!-- verbs -->", overview())


def file_name(verb: str) -> str:
    """Name of a verb's page: `import records` has `import-records`."""
    return verb.replace(" ", "-")


def overview() -> str:
    """Table of all verbs, each with a link to its page."""
    rows = [
        f"| [`{verb}`](verbs/{file_name(verb)}.md) | {found.summary} |"
        for verb, found in VERBS.items()
    ]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def options(name: str) -> str:
    """A verb's options as a table: flag, default, what it means."""
    config = config_class(next(verb for verb in VERBS if file_name(verb) == name))
    told = documented(config)
    rows = [
        f"| {_flag(field)} | {_default(field)} | {told.get(field.name, '')} |"
        for field in dataclasses.fields(config)
    ]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def documented(config: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those it inherits from, on one line."""
    told: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                text = ast.literal_eval(below.value)
                told[field.target.id] = " ".join(text.split()).replace("|", "\\|")
    return told


def _flag(field: dataclasses.Field) -> str:
    if "Positional" in str(field.type):
        return f"`{field.name.upper().replace('_', '-')}`"
    return f"`--{field.name.replace('_', '-')}`"


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{re.sub('^True$|^False$', lambda m: m[0].lower(), str(value))}`"
