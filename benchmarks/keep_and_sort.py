"""Excerpts of all neurons by keeping all activations and sorting them: what `small_harvest.py` compares a harvest with.

    python benchmarks/keep_and_sort.py RUN MODEL TOKENS OUT

This is what somebody would write who has a model and tokens, and no `cratelm harvest`: run the model, keep the
activations of all layers in memory, sort them neuron by neuron, cut out the excerpts, and write them as Parquet. It
searches the tokens that a harvest with the same TOKENS searches, and writes as many excerpts of the same lengths. It
does less than a harvest: one document may have several of the highest excerpts, neurons have no statistics, no top
token is run again out of its context, and no file is hashed. Of cratelm it imports the class of CRATE models only.

Shape legend: N text tokens of a split, H neurons of a layer, n excerpts, W tokens of an excerpt.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

BATCH_TOKENS = 8_192
TOP, RANDOM, PER_BIN = 50, 50, 20
CONTEXT, SHORT_CONTEXT = 32, 4
QUANTILES = (0, 0.5, 0.9, 0.99, 0.999, 1)
EQUAL_BINS = 12


@dataclass
class Tokens:
    """Tokens of the searched sequences of a split, one sequence after another."""

    rows: list[np.ndarray]
    """token ids of each sequence"""
    ids: np.ndarray
    """[N] all of them"""
    first: np.ndarray
    """[N] first token of the text that each token is in: of one document, in one sequence"""
    last: np.ndarray
    """[N] one past the last token of that text"""
    text: np.ndarray
    """numbers of the tokens that are no end-of-text token"""


def load_model(folder: Path) -> tuple[torch.nn.Module, list[torch.nn.Module], bool]:
    """Return a model without its head, the modules whose tensor is kept, and whether that is their input."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "crate":
        from cratelm.models.crate import CrateForCausalLM

        model = CrateForCausalLM.from_pretrained(folder).eval().model
        return model, [layer.ista.code for layer in model.layers], False
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval().transformer
    return model, [block.mlp.c_proj for block in model.h], True


def load_tokens(folder: Path, split: str, length: int, wanted: int) -> Tokens:
    """Return the tokens of the sequences that a harvest of `wanted` tokens with seed 0 searches."""
    meta = json.loads((folder / "meta.json").read_text())
    stored = np.fromfile(folder / f"{split}-00000.bin", meta["dtype"]).astype(np.int64)
    sequences = np.arange(-(-len(stored) // length))
    if wanted < len(stored):
        generator = np.random.default_rng(0)
        sequences = np.sort(generator.choice(len(sequences), max(1, wanted // length), False))
    rows = [stored[i * length : (i + 1) * length] for i in sequences]
    ids = np.concatenate(rows)
    is_end = ids == meta["eot_id"]
    begins = np.zeros(len(ids) + 1, bool)
    begins[np.cumsum([0] + [len(row) for row in rows])] = True
    begins[1:] |= is_end  # the token after an end of text begins another document
    begins[:-1] |= is_end
    edges = np.flatnonzero(begins)
    number = np.cumsum(begins[:-1]) - 1
    return Tokens(rows, ids, edges[number], edges[number + 1], np.flatnonzero(~is_end))


@torch.no_grad()
def activations_of(
    model: torch.nn.Module, modules: list[torch.nn.Module], is_input: bool, tokens: Tokens
) -> list[np.ndarray]:
    """Return the activations of each layer [H, N]: all of them, in memory."""
    kept: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(layer: int, tensor: torch.Tensor) -> None:
        kept[layer].append(tensor.flatten(0, 1))

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: keep(layer, inputs[0]))
        if is_input
        else module.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
        for layer, module in enumerate(modules)
    ]
    length = len(tokens.rows[0])
    whole = [row for row in tokens.rows if len(row) == length]
    size = max(1, BATCH_TOKENS // length)
    batches = [np.stack(whole[i : i + size]) for i in range(0, len(whole), size)]
    for batch in batches + [row[None] for row in tokens.rows[len(whole) :]]:
        model(input_ids=torch.from_numpy(batch), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).T.contiguous().numpy() for parts in kept]


def choose(
    values: np.ndarray, text: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield the kind, bin and tokens [n] of the excerpts of a neuron with activations `values` [N]."""
    order = text[np.argsort(values[text])]
    ascending, n = values[order], len(order)
    yield "top", -1, order[: -TOP - 1 : -1]
    yield "random", -1, generator.choice(text, min(RANDOM, n), replace=False)
    quantiles = [int(q * (n - 1)) for q in QUANTILES[:-1]]
    equal = np.searchsorted(ascending, ascending[-1] * np.arange(EQUAL_BINS) / EQUAL_BINS, "right")
    for kind, edges in (("quantile", [*quantiles, n]), ("equal", [*equal, n])):
        for number, (low, high) in enumerate(pairwise(edges)):
            if high > low:
                drawn = generator.choice(high - low, min(PER_BIN, high - low), replace=False)
                yield kind, number, order[low + drawn]


def excerpts_of(values: np.ndarray, tokens: Tokens, generator: np.random.Generator) -> dict:
    """Return the excerpts of a neuron as columns [n]; lists as all their elements and their lengths."""
    columns: dict[str, list] = {
        name: [] for name in ("kind", "bin", "position", "length", "token_ids", "activations")
    }
    chosen = list(choose(values, tokens.text, generator))
    for short in (False, True):
        parts = [part for part in chosen if (part[0] == "equal") == short]
        if not parts:
            continue
        context = SHORT_CONTEXT if short else CONTEXT
        position = np.concatenate([part[2] for part in parts])
        window = position[:, None] + np.arange(-context, context)
        inside = (window >= tokens.first[position, None]) & (window < tokens.last[position, None])
        window = window[inside]
        for kind, number, of_bin in parts:
            columns["kind"] += [kind] * len(of_bin)
            columns["bin"].append(np.full(len(of_bin), number, np.int8))
        columns["position"].append(position)
        columns["length"].append(inside.sum(1))
        columns["token_ids"].append(tokens.ids[window].astype(np.int32))
        columns["activations"].append(values[window])
    return columns


def table_of(layer: int, neurons: list[dict]) -> pa.Table:
    """Return the excerpts of all neurons of a layer."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part for neuron in neurons for part in neuron[name]])

    kinds = [kind for neuron in neurons for kind in neuron["kind"]]
    index = np.repeat(np.arange(len(neurons)), [len(neuron["kind"]) for neuron in neurons])
    offsets = np.concatenate([[0], np.cumsum(joined("length"))]).astype(np.int32)
    return pa.table(
        {
            "layer": np.full(len(kinds), layer, np.int32),
            "index": index.astype(np.int32),
            "kind": pa.array(kinds).dictionary_encode(),
            "bin": joined("bin"),
            "position": joined("position"),
            "token_ids": pa.ListArray.from_arrays(offsets, joined("token_ids")),
            "activations": pa.ListArray.from_arrays(offsets, joined("activations")),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the excerpts of both splits."""
    words = sys.argv[1:] if arguments is None else arguments
    run, name, wanted, out = Path(words[0]), words[1], int(words[2]), Path(words[3])
    model, modules, is_input = load_model(run / "model" / name)
    length = min(model.config.max_position_embeddings, 2_048)
    generator = np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    n_excerpts = 0
    for split in ("fit", "held_out"):
        tokens = load_tokens(run / "tokens", split, length, wanted)
        layers = activations_of(model, modules, is_input, tokens)
        writer = None
        for layer, activations in enumerate(layers):
            table = table_of(
                layer, [excerpts_of(values, tokens, generator) for values in activations]
            )
            writer = writer or pq.ParquetWriter(out / f"excerpts-{split}.parquet", table.schema)
            writer.write_table(table)
            n_excerpts += table.num_rows
        if writer:
            writer.close()
    print(f"{n_excerpts:,} excerpts")


if __name__ == "__main__":
    main()
