"""An index of a run for the browser: the neurons that fire on a token, similar neurons, a map of each layer.

A neuron's *profile* is its mean activation on each token, over its excerpts of the fit split (each position
counts once), relative to its largest activation. The index stores the `_TOKENS` largest entries of each profile,
among tokens that occur at least `_LEAST` times. The similarity of two neurons, of the same model or of two models,
is the cosine of their profiles in the span of the first `_DIMENSIONS` singular vectors of all profiles of the run.
Next to the profiles are the tokens that a neuron fires on most, and its strongest excerpt (`cratelm.viewer.peaks`).
Maps are computed by t-SNE (van der Maaten & Hinton 2008) on the same vectors.

The index is built once, in `viewer/` of the run, one row group of excerpts at a time. It is rebuilt after a
harvest or the tokens have changed. Building it takes 14 bytes of memory per entry (50 MB for 36,864 neurons with
96 entries each) and about 300 bytes per neuron. Using it takes only the memory of the data that a request reads.

Shape legend: N neurons of all models, V tokens of the vocabulary, E entries, D dimensions.
"""

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.activations.store import excerpts_path
from cratelm.errors import InputError, missing_extra, one_line
from cratelm.records import NeuronKey, Split
from cratelm.results.neuron_table import NeuronTable, read_neuron_table
from cratelm.results.stages import READ_ERRORS, changed_at
from cratelm.results.views import IndexState
from cratelm.runs import Run, atomic_folder, atomic_path, hash_json, write_json
from cratelm.runs.atomic import clear_interrupted
from cratelm.runs.reading import verified
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.peaks import PEAK_FILES, Peaks, favourites

_FORMAT = 4
"""Raise it with any change of a constant or formula below: an index of this format is used as it is."""
_TOKENS = 96
_DIMENSIONS = 64
_LEAST = 2
"""minimum number of occurrences of a token in a profile"""
_SEED = 0
_MAP_STEPS = 500
"""iterations of t-SNE"""


class Index:
    """The index of one run: absent, being built, or ready."""

    def __init__(self, run: Run):
        self.run = run
        self.state = IndexState(False, 0, 0)
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._meta: dict[str, Any] = {}
        self._texts: dict[str, list[int]] = {}
        self._arrays: dict[str, Any] = {}
        self._changed_at: int | None = None
        """time of the run's last change when the index was built; None before that"""
        self._built = ""
        """identity of the tokens and harvests from which the index was built"""

    # ---- building ---------------------------------------------------------------------------------

    def build(self) -> None:
        """Open the index, or build it if it does not exist. Errors are not raised but reported in `state`."""
        with self._lock:
            self._changed_at = changed_at(self.run)
            try:
                self._built = key = self._key()
                folder = self._root() / f"index-{key[:16]}"
                for place in (folder.parent, folder):
                    clear_interrupted(place, "meta.json")
                if not (folder / "meta.json").is_file():
                    self._make(folder)
                self._open(folder)
                self._make_maps(folder)
            except (*READ_ERRORS, InputError, MemoryError, ImportError) as error:
                total = self.state.total
                self.state = IndexState(self.state.ready, self.state.done, total, one_line(error))

    def follow(self) -> None:
        """Rebuild the index in the background if harvests or tokens have changed since it was built."""
        now = changed_at(self.run)
        if self._changed_at in (None, now) or self._lock.locked():
            return
        self._changed_at = now
        with contextlib.suppress(*READ_ERRORS, InputError):  # `build` reports these errors
            if self._key() == self._built:
                return
        self.state = IndexState(False, 0, 0)
        threading.Thread(target=self.build, daemon=True).start()

    def _models(self) -> list[str]:
        """Return the models that were harvested from the present tokens; ids of other tokens would be misread."""
        tokens = self.run.stage("tokens").completion()
        harvests = {
            n: self.run.stage("activations", n).completion() for n in self.run.models("activations")
        }
        return [
            name
            for name, done in harvests.items()
            if tokens is None or (done and done.inputs.get("tokens") in (None, tokens.identity))
        ]

    def _key(self) -> str:
        tokens = self.run.stage("tokens").completion()
        records = {n: self.run.stage("activations", n).completion() for n in self._models()}
        harvests = {n: done.identity for n, done in records.items() if done is not None}
        return hash_json(
            {"format": _FORMAT, "tokens": tokens.identity if tokens else "", "of": harvests}
        )

    def _root(self) -> Path:
        """Return `viewer/` of the run, or a temporary folder if that is not writable."""
        folder = self.run.path / "viewer"
        try:
            folder.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            self._temporary = tempfile.TemporaryDirectory(prefix="cratelm-index-")
            return Path(self._temporary.name)
        return folder

    def _make(self, folder: Path) -> None:
        models = self._models()
        files = {n: pq.ParquetFile(verified(self._file(n))) for n in models}
        groups = {n: f.num_row_groups for n, f in files.items()}
        self.state = IndexState(False, 0, sum(groups.values()))
        neurons, tokens, values, counts = [], [], [], []
        offsets, start = {}, 0
        peaks = []
        for name in models:
            table = read_neuron_table(self.run, name)
            offsets[name] = start
            peaks.append(Peaks.empty(len(table.layer)))
            for group in range(groups[name]):
                excerpts = read_excerpts(files[name], group)
                entries = profile_entries(excerpts, table)
                peaks[-1].add(excerpts, table)
                for column, part in zip((neurons, tokens, values, counts), entries, strict=True):
                    column.append(part)
                neurons[-1] = neurons[-1] + start
                done = self.state.done + 1
                self.state = IndexState(False, done, self.state.total)
            start += len(table.layer)
        arrays = [
            np.concatenate(parts) if parts else np.zeros(0)
            for parts in (neurons, tokens, values, counts)
        ]
        with atomic_folder(folder) as draft:
            _write(draft, *arrays, n_neurons=start)
            Peaks.joined(peaks).save(draft)
            np.save(draft / "favourites.npy", favourites(*arrays, n_neurons=start))
            write_json(draft / "meta.json", {"offsets": offsets, "neurons": start})
        for old in folder.parent.glob("index-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _file(self, name: str) -> Path:
        """Return the file of the fit excerpts; for a harvest without them, that of the held-out excerpts."""
        folder = self.run.stage("activations", name).path
        splits: tuple[Split, ...] = ("fit", "held_out")
        return next(
            (p for s in splits if (p := excerpts_path(folder, s)).is_file()),
            excerpts_path(folder, "fit"),
        )

    def _open(self, folder: Path) -> None:
        self._meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        names = ("starts", "neurons", "values", "counts", "vectors", "favourites", *PEAK_FILES)
        self._arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in names}
        self._folder = folder
        self._texts = {}
        self.state = IndexState(True, self.state.total, self.state.total)

    def _make_maps(self, folder: Path) -> None:
        """Compute the maps of all layers that do not exist yet, one after another."""
        for name in self._models():
            table = read_neuron_table(self.run, name)
            for layer in np.unique(table.layer).tolist():
                path = folder / map_name(name, layer)
                if not path.is_file():
                    points = plane(self._vectors(name)[table.rows_of(layer)])
                    with atomic_path(path) as temporary, temporary.open("wb") as file:
                        np.save(file, points)

    # ---- queries ----------------------------------------------------------------------------------

    def _vectors(self, model: str) -> NDArray[np.float32]:
        """Return the vectors [n, D] of the n neurons of a model, of unit length or 0."""
        return self._arrays["vectors"][self._rows(model)]

    def favourites(self, model: str) -> NDArray[np.int32] | None:
        """Return the ids [n, FAVOURITES] of the tokens that each neuron fires on most, -1 where it has fewer.

        None until the index is ready.
        """
        rows = self._rows(model)
        return None if rows is None else np.asarray(self._arrays["favourites"][rows])

    def peaks(self, model: str) -> Peaks | None:
        """Return the strongest excerpt of each neuron of a model; None until the index is ready."""
        rows = self._rows(model)
        return None if rows is None else Peaks(*(self._arrays[f][rows] for f in PEAK_FILES))

    def _rows(self, model: str) -> slice | None:
        """Return the rows of a model's neurons among those of all models; None if it is not in the index."""
        if not self.state.ready or model not in self._meta["offsets"]:
            return None
        start = self._meta["offsets"][model]
        later = [o for o in self._meta["offsets"].values() if o > start]
        return slice(start, min(later, default=self._meta["neurons"]))

    def on_token(self, model: str, text: str) -> tuple[Mapping[NeuronKey, tuple[float, int]], str]:
        """Return the neurons of a model that fire on a token, and a note in words on the tokens that were matched.

        The values of a neuron are its mean activation on the token divided by its maximum, and the number of
        occurrences of the token.
        """
        if not self.state.ready or model not in self._meta["offsets"]:
            return {}, "The index of tokens is not ready yet."
        ids, matched = self._ids(text)
        if not ids:
            return {}, f"There is no token {text!r}."
        low = self._meta["offsets"][model]
        high = low + len(self._vectors(model))
        starts = self._arrays["starts"]
        best: dict[int, tuple[float, int]] = {}
        for token in ids:
            if token + 1 >= len(starts):  # no neuron has an entry of this token or of a later one
                continue
            span = slice(int(starts[token]), int(starts[token + 1]))
            neurons = self._arrays["neurons"][span]
            here = (neurons >= low) & (neurons < high)
            entries = zip(
                (neurons[here] - low).tolist(),
                self._arrays["values"][span][here].tolist(),
                self._arrays["counts"][span][here].tolist(),
                strict=True,
            )
            for neuron, value, count in entries:
                if value > best.get(neuron, (0.0, 0))[0]:
                    best[neuron] = (float(value), int(count))
        layers, indices = self._neurons(model)
        keys = {n: NeuronKey(int(layers[n]), int(indices[n])) for n in best}
        return {keys[n]: value_count for n, value_count in best.items()}, matched

    def _neurons(self, model: str) -> tuple[NDArray, NDArray]:
        """Return layer [n] and index [n] of the neurons of a model."""
        name = f"neurons of {model}"
        if name not in self._arrays:
            table = read_neuron_table(self.run, model)
            self._arrays[name] = (table.layer, table.index)
        return self._arrays[name]

    def _beginnings(self, text: str) -> dict[str, list[int]]:
        """Return the ids of the longest tokens that hold a part of the first character of `text`, by their text."""
        strings = TokenStore(self.run.path / "tokens").token_strings
        first = text[0].encode()
        parts = {i: b.lstrip(b" ") for i, b in enumerate(strings.bytes)}
        parts = {i: b for i, b in parts.items() if b and b != first and first.startswith(b)}
        longest = max(map(len, parts.values()), default=0)
        found: dict[str, list[int]] = {}
        for token, part in parts.items():
            if len(part) == longest:
                found.setdefault(strings[token], []).append(token)
        return found

    def _ids(self, text: str) -> tuple[list[int], str]:
        """Return the ids of the tokens that match `text`, and a note on how they were matched.

        These are the tokens equal to `text`, else those that differ only in spaces, else those that begin with it,
        else those that hold the first bytes of its first character.
        """
        if not self._texts:
            store = TokenStore(self.run.path / "tokens")
            ids: dict[str, list[int]] = {}
            for token, string in enumerate(store.token_strings):
                ids.setdefault(string, []).append(token)
            self._texts = ids
        if text in self._texts:
            return (
                self._texts[text],
                f"Neurons that fire on the token {text!r}: mean activation on it, in % of the neuron's maximum.",
            )
        bare = text.strip()
        near = {t: ids for t, ids in self._texts.items() if t.strip() == bare and bare}
        how = "ignoring spaces"
        if not near and bare:
            near = {t: ids for t, ids in self._texts.items() if t.strip().startswith(bare)}
            how = "by prefix"
        if not near and bare:
            near = self._beginnings(bare)
            how = "by its first bytes"
        examples = ", ".join(map(repr, sorted(near)[:6])) + (" ..." if len(near) > 6 else "")
        matched = [token for tokens in near.values() for token in tokens]
        return matched, f"There is no token {text!r}; matched {how}: {examples}."

    def nearest(
        self,
        model: str,
        neuron: tuple[int, int],
        other: str,
        n: int,
        table: NeuronTable,
        other_table: NeuronTable,
    ) -> list[tuple[int, float]]:
        """Return the rows of `other` with the highest positive cosine to a neuron of `model`, with the cosines.

        The neuron itself is excluded. Empty until the index is ready.
        """
        if not self.state.ready:
            return []
        row = table.row(*neuron)
        offsets = self._meta["offsets"]
        if row is None or model not in offsets or other not in offsets:
            return []
        vector = np.asarray(self._vectors(model)[row])
        if not vector.any():
            return []
        # not by BLAS, whose threads wait actively for more work long after a product that memory bounds
        cosines = np.einsum("nd,d->n", np.asarray(self._vectors(other)), vector)
        if other == model:
            cosines[row] = -2
        least = np.partition(cosines, -n)[-n] if n < len(cosines) else -2
        best = np.flatnonzero(cosines >= least)
        best = best[np.argsort(-cosines[best], kind="stable")][:n]
        return [(int(r), float(cosines[r])) for r in best if cosines[r] > 0]

    def map(self, model: str, layer: int) -> NDArray[np.float32] | None:
        """Return the points [H, 2] of a layer's neurons, from 0 to 1; None until they are computed."""
        path = self.map_path(model, layer)
        return None if path is None else np.load(path)

    def map_path(self, model: str, layer: int) -> Path | None:
        """Return the file of a map; None until it is computed."""
        path = self._folder / map_name(model, layer) if self._folder is not None else None
        return path if path is not None and path.is_file() else None


def map_name(model: str, layer: int) -> str:
    """Return the file name of a layer's map."""
    return f"map-{model}-{layer}.npy"


def read_excerpts(file: pq.ParquetFile, group: int) -> pa.Table:
    """Return the excerpts of a row group, the columns that the index reads."""
    columns = ["layer", "index", "kind", "peak", "position", "token_ids", "activations"]
    return file.read_row_group(group, columns=columns, use_threads=False).combine_chunks()


def profile_entries(
    excerpts: pa.Table, table: NeuronTable
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float16], NDArray[np.uint16]]:
    """Return the profile entries [E] of the neurons of `excerpts`: neuron (row of `table`), token, value, count."""
    if not len(excerpts):
        return (np.zeros(0, np.int32),) * 2 + (np.zeros(0, np.float16), np.zeros(0, np.uint16))  # type: ignore[return-value]
    ids, activations = excerpts["token_ids"].chunk(0), excerpts["activations"].chunk(0)
    lengths = np.diff(ids.offsets.to_numpy())
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    start = excerpts["position"].to_numpy() - excerpts["peak"].to_numpy()
    position = np.repeat(start, lengths) + inside
    rows = table.rows(excerpts["layer"].to_numpy(), excerpts["index"].to_numpy())
    alone = excerpts["kind"].to_numpy() == "out_of_context"
    neuron = np.repeat(np.where(alone, -1, rows), lengths)
    first, last = ids.offsets[0].as_py(), ids.offsets[-1].as_py()
    token = ids.values.to_numpy()[first:last].astype(np.int64)
    value = activations.values.to_numpy()[first:last].astype(np.float64)
    # The excerpts of a neuron overlap, but each position must count once. Neuron and position are packed into
    # one integer, so that one sort finds the duplicates; 40 bits hold the positions of 10^12 tokens.
    packed = (neuron.astype(np.int64) + 1) << 40 | position
    distinct = np.unique(packed, return_index=True)[1]
    distinct = distinct[neuron[distinct] >= 0]  # without tokens out of context
    return _strongest(neuron[distinct], token[distinct], value[distinct])


def _strongest(
    neuron: NDArray[np.int64], token: NDArray[np.int64], value: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float16], NDArray[np.uint16]]:
    """Return the profile entries of each neuron, at most `_TOKENS`: neuron, token, value, count.

    The value is the mean over the occurrences of a token, relative to the largest value of the neuron.
    """
    base = int(token.max(initial=0)) + 1
    keys, at, counts = np.unique(neuron * base + token, return_inverse=True, return_counts=True)
    means = np.bincount(at, value, len(keys)) / counts
    neurons, tokens = keys // base, keys % base
    top = np.zeros(int(neurons.max(initial=0)) + 1)
    np.maximum.at(top, neuron, value)
    kept = (counts >= _LEAST) & (means > 0)
    neurons, tokens, means, counts = neurons[kept], tokens[kept], means[kept], counts[kept]
    means = means / np.maximum(top[neurons], 1e-30)
    order = np.lexsort((-means, neurons))
    neurons, tokens, means, counts = neurons[order], tokens[order], means[order], counts[order]
    # rank of an entry in its neuron: its position minus that of the neuron's first entry
    begins = np.searchsorted(neurons, neurons)
    best = np.arange(len(neurons)) - begins < _TOKENS
    return (
        neurons[best].astype(np.int32),
        tokens[best].astype(np.int32),
        means[best].astype(np.float16),
        np.minimum(counts[best], 65535).astype(np.uint16),
    )


def _write(
    folder: Path,
    neurons: NDArray[Any],
    tokens: NDArray[Any],
    values: NDArray[Any],
    counts: NDArray[Any],
    *,
    n_neurons: int,
) -> None:
    """Write the entries sorted by token, and the vectors of the neurons.

    `starts` ends at the largest token that has an entry, not at the size of the vocabulary. Neurons are
    numbered by their row in `read_neuron_table`, model after model.
    """
    neurons, tokens = neurons.astype(np.int32), tokens.astype(np.int32)
    np.save(folder / "vectors.npy", vectors(neurons, tokens, values, n_neurons))
    order = np.lexsort((-values.astype(np.float32), tokens))
    n_tokens = int(tokens.max(initial=-1)) + 1
    starts = np.searchsorted(tokens[order], np.arange(n_tokens + 1))
    np.save(folder / "starts.npy", starts.astype(np.int64))
    np.save(folder / "neurons.npy", neurons[order])
    np.save(folder / "values.npy", values[order].astype(np.float16))
    np.save(folder / "counts.npy", counts[order].astype(np.uint16))


def vectors(
    neurons: NDArray[np.int32], tokens: NDArray[np.int32], values: NDArray[Any], n_neurons: int
) -> NDArray[np.float32]:
    """Return vectors [N, D] of unit length whose cosines approximate those of the profiles; 0 without entries."""
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import norm, svds

    shape = (n_neurons, int(tokens.max(initial=0)) + 1)
    profiles = csr_matrix((values.astype(np.float32), (neurons, tokens)), shape=shape)
    lengths = norm(profiles, axis=1)
    profiles = diags(1 / np.maximum(lengths, 1e-12)) @ profiles
    dimensions = min(_DIMENSIONS, min(shape) - 1)
    if dimensions < 1 or not len(neurons):
        return np.zeros((n_neurons, 1), np.float32)
    first = np.random.default_rng(_SEED).standard_normal(min(shape)).astype(np.float32)
    left, sizes, _ = svds(profiles, dimensions, v0=first)
    projected = left * sizes
    norms = np.linalg.norm(projected, axis=1, keepdims=True)
    unit = np.divide(projected, norms, out=np.zeros_like(projected), where=norms > 1e-6)
    return unit.astype(np.float32)


def plane(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a t-SNE map [H, 2] of vectors [H, D], each axis from 0 to 1. Raises `InputError` without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise missing_extra("viewer", "it", "scikit-learn") from None
    points = np.asarray(vectors)
    if len(points) < 5 or not points.any():
        placed = np.zeros((len(points), 2), np.float32)
        placed[:, 0] = np.arange(len(points))
    else:
        perplexity = min(30.0, (len(points) - 1) / 3)
        start = "pca" if points.shape[1] >= 2 else "random"
        placed = TSNE(
            2,
            perplexity=perplexity,
            init=start,
            max_iter=_MAP_STEPS,
            random_state=_SEED,
            method="barnes_hut",
        ).fit_transform(points)
    low, high = placed.min(0), placed.max(0)
    return ((placed - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
