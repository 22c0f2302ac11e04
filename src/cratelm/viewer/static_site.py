"""The pages as a folder that any web host serves, or that a browser opens from disk."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.results.views import LayerQuery
from cratelm.runs import atomic_folder
from cratelm.viewer.links import file_of
from cratelm.viewer.pages import Pages
from cratelm.viewer.run_reader import Library

_MARK = "cratelm-view.txt"
"""by which a folder is known as one of ours"""
Place = tuple[str, str, int]


@dataclass(frozen=True)
class Exported:
    """Where the pages are."""

    path: Path
    pages: int
    bytes: int
    neurons: int
    of: int
    """neurons in the layers, with a page or without"""

    def __str__(self) -> str:
        left = (
            ""
            if self.neurons == self.of
            else f" ({self.of - self.neurons:,} have none: --neurons 0 gives all one)"
        )
        return (
            f"{self.pages:,} pages, {self.bytes / 1e6:.1f} MB, {self.neurons:,} neurons with a page{left}\n"
            f"open {self.path / 'index.html'}"
        )


def export(
    library: Library, folder: Path, neurons: int, force: bool, *, quiet: bool = False
) -> Exported:
    """Writes all pages of a library into a new folder.

    Raises `InputError` where the folder holds something else, or something and not `force`.
    """
    _check(folder, force)
    target = folder.resolve()  # "." has no name
    with atomic_folder(target) as draft:
        chosen = {place: _chosen(library, *place, neurons) for place in _layers(library)}
        pages = Pages(
            library,
            static=True,
            paged=lambda run, model, layer, index: index in chosen.get((run, model, layer), ()),
        )
        count = _write_all(library, pages, chosen, draft, quiet)
        (draft / _MARK).write_text("Written by `cratelm view --static`.\n", encoding="utf-8")
        size = sum(p.stat().st_size for p in draft.rglob("*") if p.is_file())
    total = sum(library.run(r).model(m).neurons[layer] for r, m, layer in chosen)
    shown = folder if folder.is_dir() else target  # a/../b is no path where a is not there
    return Exported(shown, count, size, sum(map(len, chosen.values())), total)


def _check(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--static {folder} is a file: name a folder that is not there yet")
    above = next((p for p in folder.resolve().parents if p.exists()), folder)
    if not above.is_dir():
        raise InputError(
            f"--static {folder}: {above} is a file, a folder was expected: name another folder"
        )
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            raise InputError(
                f"--static {folder} holds other files: name a folder that is not there yet"
            )
        if not force:
            raise InputError(
                f"--static {folder} holds pages already: add --force to write them again"
            )


def _layers(library: Library) -> list[Place]:
    return [
        (key, card.name, layer)
        for key in library.keys
        for card in library.run(key).models
        for layer in card.neurons
    ]


def _chosen(library: Library, run: str, model: str, layer: int, most: int) -> set[int]:
    """The best explained of a layer, then the first; all where `most` is 0."""
    columns = library.columns(run, model)
    here = columns.rows_of(layer)
    index = columns.index[here]
    if not most or most >= len(index):
        return set(index.tolist())
    score = columns.score(columns.metrics[0]) if columns.metrics else None
    values = score.values[here] if score else np.full(len(index), np.nan)
    order = np.lexsort((index, np.nan_to_num(-values, nan=np.inf)))
    return set(index[order[:most]].tolist())


def _write_all(
    library: Library, pages: Pages, chosen: dict[Place, set[int]], folder: Path, quiet: bool
) -> int:
    def write(parts: tuple[str, ...], html: str) -> None:
        path = folder / file_of(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")

    (folder / "assets").mkdir()
    for name in ("style.css", "app.js"):
        content = (resources.files("cratelm.viewer") / "assets" / name).read_bytes()
        (folder / "assets" / name).write_bytes(content)
    write((), pages.overview())
    for key in library.keys:
        write(("r", key), pages.overview(key))
    count = 1 + len(library.keys)
    total = len(chosen) + sum(map(len, chosen.values()))
    with tqdm(total=total, desc="pages", unit="page", disable=quiet) as bar:
        for (run, model, layer), members in chosen.items():
            everything = LayerQuery(per_page=10**9)
            write(
                ("r", run, "layer", model, str(layer)), pages.layer(run, model, layer, everything)
            )
            for index in sorted(members):
                view = library.neuron(run, model, layer, index)
                write(("r", run, "neuron", model, str(layer), str(index)), pages.neuron(view))
            bar.update(1 + len(members))
            count += 1 + len(members)
    return count
