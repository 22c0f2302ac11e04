"""A run of any size for the neuron browser, tiled from a small real one.

    cratelm demo --run runs/demo
    python benchmarks/large_run.py runs/demo runs/large --layers 12 --neurons 3072

Every neuron of the large run is one of the small run's, with its statistics, held-out excerpts,
explanations and scores as they are, under another number: files are as large, and as slow to read,
as those of a real model of that size. 12 x 3,072 neurons take 2 GB and some minutes. The fit
split is left out. The model itself is not made: live pages need a real one.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.activations.store import NEURONS_PER_GROUP
from cratelm.runs import Run


class Tiles:
    """Which neuron of the small model stands for each of the large one: layer and index in turn."""

    def __init__(self, table: pa.Table):
        self.layers = int(np.max(table["layer"].to_numpy())) + 1
        self.neurons = int(np.max(table["index"].to_numpy())) + 1

    def of(self, layer: int, index: int) -> tuple[int, int]:
        return layer % self.layers, index % self.neurons


def renumbered(table: pa.Table, layer: int, shift: int, name: str) -> pa.Table:
    """The rows of one layer as those of another, their indices moved up."""
    n = len(table)
    columns = {
        "model": pa.array([name] * n),
        "layer": pa.array(np.full(n, layer, np.int32)),
        "index": pa.array((table["index"].to_numpy() + shift).astype(np.int32)),
    }
    for column, values in columns.items():
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place), values)
    return table


def tiled(table: pa.Table, layers: int, neurons: int, name: str) -> Iterator[pa.Table]:
    """A whole table, a tile at a time, sorted by layer and index."""
    tiles = Tiles(table)
    by_layer = [table.filter(pa.array(table["layer"].to_numpy() == n)) for n in range(tiles.layers)]
    for layer in range(layers):
        for shift in range(0, neurons, tiles.neurons):
            whole = renumbered(by_layer[layer % tiles.layers], layer, shift, name)
            yield whole.filter(pa.array(whole["index"].to_numpy() < neurons))


def write_tiled(source: Path, target: Path, layers: int, neurons: int, name: str) -> None:
    table = pq.read_table(source)
    with pq.ParquetWriter(target, table.schema) as writer:
        for part in tiled(table, layers, neurons, name):
            writer.write_table(part, row_group_size=256 if "payload" in part.column_names else 4096)


def write_excerpts(source: Path, target: Path, layers: int, neurons: int, name: str) -> None:
    """In row groups of as many neurons as a harvest writes."""
    table = pq.read_table(source)
    with pq.ParquetWriter(target, table.schema, compression="zstd") as writer:
        for part in tiled(table, layers, neurons, name):
            groups = part["index"].to_numpy() // NEURONS_PER_GROUP
            edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(part)]
            for low, high in pairwise(edges):
                writer.write_table(part.slice(low, high - low))


def large(source: Path, out: Path, layers: int, neurons: int, names: tuple[str, ...]) -> None:
    """Writes the run. `names` of the large models, each of a small one of the same family."""
    small, run = Run(source), Run(out)
    shutil.copytree(source / "tokens", out / "tokens")
    for name in names:
        family = name.partition("-")[0]
        of = next(n for n in small.models("scores") if n.startswith(family) and "init" not in n)
        print(f"{name} from {of}", flush=True)
        paths = {s: small.stage(s, of).path for s in ("activations", "explanations", "scores")}
        with run.stage("activations", name).write({"model": name}, {}) as draft:
            for file, write in (("summaries", write_tiled), ("excerpts", write_excerpts)):
                path = f"{file}-held_out.parquet"
                write(paths["activations"] / path, draft.path / path, layers, neurons, name)
        for stage, file in (("explanations", "explanations"), ("scores", "scores")):
            with run.stage(stage, name).write({}, {}) as draft:
                path = f"{file}.parquet"
                write_tiled(paths[stage] / path, draft.path / path, layers, neurons, name)
                if stage == "scores":
                    told = json.loads(
                        (paths["scores"] / "summary.json").read_text(encoding="utf-8")
                    )
                    for s in told["statistics"]:
                        s["layers"] = [
                            {**s["layers"][n % len(s["layers"])], "layer": n} for n in range(layers)
                        ]
                    (draft.path / "summary.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--models", nargs="+", default=["crate-12l"])
    given = parser.parse_args()
    large(given.source, given.out, given.layers, given.neurons, tuple(given.models))
