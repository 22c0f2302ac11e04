"""Build the documentation's site in `site/`: `python docs/build.py`, or `make docs`.

Pages are first written to `build/docs/`, with tables from the code instead of these markers, so that a
page cannot differ from the code:

`<!-- options -->`       on `verbs/NAME.md`: the verb's options, read from its configuration dataclass
`<!-- verbs -->`         all verbs, with links to their pages
`<!-- columns: PATH -->` the columns of a Parquet file, read from its `TableFile`

Zensical builds the site from them, and stops at a broken link, a missing anchor or a missing docstring.
`problems` then checks what Zensical does not check.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa

import cratelm
from cratelm.cli import VERBS, config_class
from cratelm.runs.columns import TableFile

ROOT = Path(__file__).parents[1]
SOURCE, PAGES, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "site"
CONFIG = ROOT / "zensical.toml"


def main() -> int:
    """Build the site. Return 0, or print the problems and return 1."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(SOURCE, PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in PAGES.rglob("*.md"):
        page.write_text(generated(page.relative_to(PAGES).as_posix(), page.read_text()))
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run([*command, "--config-file", str(CONFIG)], check=False)
    if built.returncode:
        return 1
    failures = [*pages_outside_navigation(), *problems(SITE)]
    stream = sys.stderr if failures else sys.stdout
    print("\n".join(failures) or f"{SITE / 'index.html'}", file=stream)
    return bool(failures)


# Tables from the code


def generated(path: str, markdown: str) -> str:
    """Return the text of a page with its markers replaced by tables."""
    if path.startswith("verbs/"):
        verb = next(v for v in VERBS if file_name(v) == Path(path).stem)
        markdown = markdown.replace("<!-- options -->", options(verb))
    markdown = markdown.replace("<!-- verbs -->", overview())
    return re.sub(r"<!-- columns: (\S+) -->", lambda m: columns(table_files()[m[1]]), markdown)


def file_name(verb: str) -> str:
    """Return the name of a verb's page, such as `import-records` for `import records`."""
    return verb.replace(" ", "-")


def overview() -> str:
    """Return a table of all verbs, each with a link to its page."""
    rows = [
        f"| [`{name}`](verbs/{file_name(name)}.md) | {verb.summary} |"
        for name, verb in VERBS.items()
    ]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def options(verb: str) -> str:
    """Return a table of a verb's options: flag, default, meaning."""
    config = config_class(verb)
    meanings = field_docstrings(config)
    rows = [
        f"| {_flag(field)} | {_default(field)} | {meanings.get(field.name, '')} |"
        for field in dataclasses.fields(config)
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def field_docstrings(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of its bases, each on one line."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                text = ast.literal_eval(below.value)
                texts[field.target.id] = " ".join(text.split()).replace("|", "\\|")
    return texts


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


@functools.cache
def table_files() -> dict[str, TableFile]:
    """Return every Parquet file that cratelm declares, by its path in the run directory."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(cratelm.__path__, "cratelm.")
        if not module.name.endswith("__main__")
    ]
    declared = [v for m in modules for v in vars(m).values() if isinstance(v, TableFile)]
    return {file.path: file for file in declared}


def columns(file: TableFile) -> str:
    """Return a table of a Parquet file's columns."""
    rows = [
        f"| `{column.name}` | {type_name(column.type)} | {column.meaning} |"
        for column in file.columns
    ]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def type_name(kind: pa.DataType) -> str:
    """Return the name of a column's type in pandas and polars."""
    if pa.types.is_list(kind):
        return f"list of {type_name(kind.value_type)}"
    if pa.types.is_dictionary(kind):
        return "category"
    return {"double": "float64", "float": "float32"}.get(str(kind), str(kind))


# What Zensical does not check


def pages_outside_navigation() -> Iterator[str]:
    """Yield the pages that `zensical.toml` does not list, and its entries without a page."""
    listed = set(re.findall(r'= "([\w/-]+\.md)"', CONFIG.read_text()))
    assert listed, "the pattern does not fit the file"
    pages = {page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md")}
    yield from (f"docs/{page} is not in the navigation of zensical.toml" for page in pages - listed)
    yield from (f"zensical.toml lists {page}, which docs/ does not have" for page in listed - pages)


def problems(site: Path) -> Iterator[str]:
    """Yield links to files that the site does not have, and anything that a page would load from elsewhere."""
    for page in sorted(site.rglob("*.html")):
        for tag, address in _addresses(page):
            link = f"{page.relative_to(site)}: <{tag}> of {address}"
            url = urlsplit(address)
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    yield f"{link} is loaded from another site"
                continue
            target = site if url.path.startswith("/") else page.parent
            target = target / unquote(url.path).lstrip("/")
            if not (target.is_file() or (target / "index.html").is_file()):
                yield f"{link} is not a file of the site"


def _addresses(page: Path) -> list[tuple[str, str]]:
    """Return tag and address of everything that a page links to or loads."""
    addresses: list[tuple[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            addresses.extend((tag, v) for k, v in attrs if k in ("src", "href") and v)

    Reader().feed(page.read_text())
    return addresses


if __name__ == "__main__":
    sys.exit(main())
