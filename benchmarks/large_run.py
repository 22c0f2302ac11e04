"""Generate a run of any size for the neuron browser by tiling a small real run.

    cratelm demo --run runs/demo
    python benchmarks/large_run.py runs/demo runs/large --layers 12 --neurons 3072

Every neuron of the large run is a copy of a neuron of the small run, with its statistics, held-out excerpts,
explanations and scores, under another number. Therefore files are as large, and as slow to read, as those of a real
model of that size. 12 x 3,072 neurons take 2 GB and a few minutes. The fit split is omitted. There is no model, so the
live page cannot be used.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.activations.store import NEURONS_PER_GROUP, SUMMARIES_PER_GROUP
from cratelm.explain.store import ROWS_A_GROUP
from cratelm.runs import Run


class Tiles:
    """Maps each neuron of the large model to a neuron of the small model, cycling over layers and indices."""

    def __init__(self, table: pa.Table):
        self.layers = int(np.max(table["layer"].to_numpy())) + 1
        self.neurons = int(np.max(table["index"].to_numpy())) + 1

    def of(self, layer: int, index: int) -> tuple[int, int]:
        """Return layer and index of the small model's neuron."""
        return layer % self.layers, index % self.neurons


def renumbered(table: pa.Table, layer: int, shift: int, name: str) -> pa.Table:
    """Return rows as rows of model `name` and layer `layer`, with `shift` added to their indices."""
    n = len(table)
    columns = {
        "model": pa.array([name] * n),
        "layer": pa.array(np.full(n, layer, np.int32)),
        "index": pa.array((table["index"].to_numpy() + shift).astype(np.int32)),
    }
    for column, values in columns.items():
        position = table.schema.get_field_index(column)
        table = table.set_column(position, table.schema.field(position), values)
    return table


def tiled(table: pa.Table, layers: int, neurons: int, name: str) -> Iterator[pa.Table]:
    """Yield the rows of the large model, one tile at a time, sorted by layer and index."""
    tiles = Tiles(table)
    by_layer = [table.filter(pa.array(table["layer"].to_numpy() == n)) for n in range(tiles.layers)]
    for layer in range(layers):
        for shift in range(0, neurons, tiles.neurons):
            tile = renumbered(by_layer[layer % tiles.layers], layer, shift, name)
            yield tile.filter(pa.array(tile["index"].to_numpy() < neurons))


def write_tiled(source: Path, target: Path, layers: int, neurons: int, name: str) -> None:
    """Write a table of the large model."""
    table = pq.read_table(source)
    with pq.ParquetWriter(target, table.schema) as writer:
        for part in tiled(table, layers, neurons, name):
            size = ROWS_A_GROUP if "payload" in part.column_names else SUMMARIES_PER_GROUP
            writer.write_table(part, row_group_size=size)


def write_excerpts(source: Path, target: Path, layers: int, neurons: int, name: str) -> None:
    """Write the excerpts of the large model, in row groups of as many neurons as in a harvest."""
    table = pq.read_table(source)
    with pq.ParquetWriter(target, table.schema, compression="zstd") as writer:
        for part in tiled(table, layers, neurons, name):
            groups = part["index"].to_numpy() // NEURONS_PER_GROUP
            edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(part)]
            for low, high in pairwise(edges):
                writer.write_table(part.slice(low, high - low))


def large(source: Path, out: Path, layers: int, neurons: int, names: tuple[str, ...]) -> None:
    """Write the run. Each of the large models `names` is tiled from a small model of the same family."""
    small, run = Run(source), Run(out)
    shutil.copytree(source / "tokens", out / "tokens")
    for name in names:
        family = name.partition("-")[0]
        tiled_from = next(
            n for n in small.models("scores") if n.startswith(family) and "init" not in n
        )
        print(f"{name} from {tiled_from}", flush=True)
        stages = ("activations", "explanations", "scores")
        paths = {s: small.stage(s, tiled_from).path for s in stages}
        with run.stage("activations", name).write({"model": name}, {}) as draft:
            for file, write in (("summaries", write_tiled), ("excerpts", write_excerpts)):
                path = f"{file}-held_out.parquet"
                write(paths["activations"] / path, draft.path / path, layers, neurons, name)
        for stage, file in (("explanations", "explanations"), ("scores", "scores")):
            with run.stage(stage, name).write({}, {}) as draft:
                path = f"{file}.parquet"
                write_tiled(paths[stage] / path, draft.path / path, layers, neurons, name)
                if stage == "scores":
                    summary = json.loads(
                        (paths["scores"] / "summary.json").read_text(encoding="utf-8")
                    )
                    for s in summary["statistics"]:
                        s["layers"] = [
                            {**s["layers"][n % len(s["layers"])], "layer": n} for n in range(layers)
                        ]
                    (draft.path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the run that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="directory of the small run")
    parser.add_argument("out", type=Path, help="directory of the large run")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--models", nargs="+", default=["crate-12l"])
    options = parser.parse_args(arguments)
    large(options.source, options.out, options.layers, options.neurons, tuple(options.models))


if __name__ == "__main__":
    main()
