"""Addresses of the pages: on a server from its root, in an exported folder relative to the page."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode


@dataclass(frozen=True)
class Links:
    """Addresses as a page at `here` writes them."""

    here: tuple[str, ...] = ()
    static: bool = False
    """for a folder: files that end in .html, and no queries"""

    def to(self, *parts: str | int, **query: str | int) -> str:
        """The page of these parts, such as ("r", "demo", "layer", "crate-2l", 0)."""
        asked = {k: v for k, v in query.items() if v != ""}
        if self.static:
            return self._relative(file_of(tuple(map(str, parts))))
        path = "/" + "/".join(quote(str(p), safe="") for p in parts)
        return f"{path}?{urlencode(asked)}" if asked else path

    def asset(self, name: str) -> str:
        if self.static:
            return self._relative(f"assets/{name}")
        return f"/assets/{name}"

    def _relative(self, file: str) -> str:
        start = posixpath.dirname(file_of(self.here)) or "."
        return quote(posixpath.relpath(file, start))


def file_of(parts: Sequence[str]) -> str:
    """File of a page in an exported folder."""
    return "/".join(parts) + ".html" if parts else "index.html"
