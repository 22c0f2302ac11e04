"""Write the pages into a folder that any web host can serve, or that a browser opens from disk."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.results.views import LayerQuery
from cratelm.runs import atomic_folder
from cratelm.runs.atomic import settle
from cratelm.runs.storage import check_target
from cratelm.viewer.pages import Pages, file_of
from cratelm.viewer.run_reader import Library

_MARK = "cratelm-view.txt"
"""file that marks a folder as written by this export"""
LayerKey = tuple[str, str, int]
"""run, model, layer"""


@dataclass(frozen=True)
class Exported:
    """Result of `cratelm view --static`: the folder, and the number of pages."""

    path: Path
    pages: int
    bytes: int
    """size of all files"""
    neurons: int
    """number of neurons with a page"""
    of: int
    """number of neurons in the layers, with or without a page"""

    def __str__(self) -> str:
        without = self.of - self.neurons
        note = f" ({without:,} have none: add --neurons 0 to write all)" if without else ""
        return (
            f"{self.pages:,} pages, {self.bytes / 1e6:.1f} MB, {self.neurons:,} neurons with a page{note}\n"
            f"open {self.path / 'index.html'}"
        )


def export(
    library: Library, folder: Path, neurons: int, force: bool, *, quiet: bool = False
) -> Exported:
    """Write all pages of a library into a new folder, with the pages of at most `neurons` per layer (0: all).

    Raises `InputError` if the folder contains other files, or if it contains an earlier export and `force` is false.
    """
    check_folder(folder, force)
    target = folder.resolve()  # "." has no name of its own
    with atomic_folder(target) as draft:
        chosen = {key: _chosen(library, *key, neurons) for key in _layers(library)}
        pages = Pages(
            library,
            static=True,
            paged=lambda run, model, layer, index: index in chosen.get((run, model, layer), ()),
        )
        count = _write_all(library, pages, chosen, draft, quiet)
        (draft / _MARK).write_text("Written by `cratelm view --static`.\n", encoding="utf-8")
        size = sum(p.stat().st_size for p in draft.rglob("*") if p.is_file())
    tables = ((library.table(r, m), layer) for r, m, layer in chosen)
    total = sum(
        len(range(*table.rows_of(layer).indices(len(table.layer)))) for table, layer in tables
    )
    path = folder if folder.is_dir() else target  # a/../b is not a valid path if a does not exist
    return Exported(path, count, size, sum(map(len, chosen.values())), total)


def check_folder(folder: Path, force: bool) -> None:
    """Raise `InputError` if the pages cannot be written into `folder`; see `export`."""
    check_target(folder, "--static", "folder")
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--static {folder} is a file: name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            raise InputError(
                f"--static {folder} contains other files: name a folder that does not exist yet"
            )
        if not force:
            raise InputError(
                f"--static {folder} already contains pages: add --force to replace them"
            )


def _layers(library: Library) -> list[LayerKey]:
    return [
        (key, card.name, layer)
        for key in library.keys
        for card in library.run(key).models
        for layer in card.neurons
    ]


def _chosen(library: Library, run: str, model: str, layer: int, most: int) -> set[int]:
    """Return the indices of the neurons that get a page: the best explained, then the first; all if `most` is 0."""
    table = library.table(run, model)
    here = table.rows_of(layer)
    index = table.index[here]
    if not most or most >= len(index):
        return set(index.tolist())
    score = table.best_score()
    values = score.values[here] if score else np.full(len(index), np.nan)
    order = np.lexsort((index, np.nan_to_num(-values, nan=np.inf)))
    return set(index[order[:most]].tolist())


def _write_all(
    library: Library, pages: Pages, chosen: dict[LayerKey, set[int]], folder: Path, quiet: bool
) -> int:
    def write(parts: tuple[str, ...], html: str) -> None:
        path = folder / file_of(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")

    (folder / "assets").mkdir()
    for name in ("style.css", "app.js", "map.js"):
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
                write(("r", run, "neuron", model, str(layer), view.name), pages.neuron(view))
            bar.update(1 + len(members))
            count += 1 + len(members)
    return count
