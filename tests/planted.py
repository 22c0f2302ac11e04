"""Neurons whose meaning is known, harvested from a made-up corpus, for the tests of explain and score.

N tokens of the corpus, H neurons. Documents are `LENGTH` tokens; those of the fit split are even
ordinals, those of the held-out split odd ones.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.activations.store import write_records
from cratelm.corpus.documents import Document
from cratelm.records import (
    OPENAI_QUANTILES,
    Excerpt,
    ExcerptKind,
    NeuronId,
    NeuronRecord,
    NeuronSummary,
    Split,
)
from cratelm.runs import Run
from cratelm.tokens.shards import StoreWriter

VOCABULARY = 50
LENGTH = 60
N_DOCUMENTS = 120
STRINGS = [f" w{i}" for i in range(VOCABULARY)]
STRINGS[1], STRINGS[2], STRINGS[3] = "\n", " import", "\tfrom"


def corpus(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N] and the ordinal of each token's document [N]; token 1 is often followed by 2."""
    odd = int(split == "held_out")
    rng = np.random.default_rng([7, odd])
    tokens = rng.integers(0, VOCABULARY, N_DOCUMENTS * LENGTH)
    follows = np.flatnonzero((tokens[:-1] == 1) & (rng.uniform(size=len(tokens) - 1) < 0.2))
    tokens[follows + 1] = 2
    return tokens, 2 * np.repeat(np.arange(N_DOCUMENTS), LENGTH) + odd


def on_token(tokens: np.ndarray, wanted: int) -> np.ndarray:
    """[N] 1 on a token, 0 elsewhere, with a little noise."""
    noise = np.random.default_rng(wanted).uniform(0.9, 1.1, len(tokens))
    return (tokens == wanted) * noise


def on_pair(tokens: np.ndarray, before: int, wanted: int) -> np.ndarray:
    """[N] 1 on a token where another precedes it in the document, 0 elsewhere."""
    preceded = np.append(False, tokens[:-1] == before) & (np.arange(len(tokens)) % LENGTH > 0)
    return ((tokens == wanted) & preceded).astype(float)


def harvested(
    activations: np.ndarray,
    split: Split = "fit",
    index: int = 0,
    layer: int = 0,
    model: str = "m",
    n_openai: int = 0,
) -> NeuronRecord:
    """The record of a neuron with these activations [N] on `corpus(split)`.

    Of the quantile bins it has `n_openai` excerpts each, on the held-out split alone.
    """
    tokens, documents = corpus(split)
    values = np.asarray(activations, dtype=np.float32)
    draw = np.random.default_rng(3)

    def cut(kind: ExcerptKind, rank: int, bin_: int, at: int, before: int, after: int) -> Excerpt:
        first = at - at % LENGTH
        start, stop = max(first, at - before), min(first + LENGTH, at + after)
        span = slice(start, stop)
        ids = tokens[span].astype(np.int32)
        return Excerpt(kind, rank, bin_, ids, values[span], at - start, int(documents[at]), int(at))

    excerpts = []
    best = np.argsort(-values.reshape(-1, LENGTH).max(axis=1), kind="stable")[:50]
    peaks = [d * LENGTH + int(values[d * LENGTH : (d + 1) * LENGTH].argmax()) for d in best]
    tops = [at for at in peaks if values[at] > 0]
    excerpts += [cut("top", rank, -1, at, 32, 32) for rank, at in enumerate(tops)]
    random = draw.choice(len(tokens), 50, replace=False)
    excerpts += [cut("random", rank, -1, at, 32, 32) for rank, at in enumerate(random)]
    edges = np.linspace(values.min(), values.max(), 13)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 11)
    for bin_ in range(12):
        inside = draw.permutation(np.flatnonzero(place == bin_))[:20]
        excerpts += [cut("anthropic_bin", rank, bin_, at, 4, 4) for rank, at in enumerate(inside)]
    ranks = [int(q * (len(values) - 1)) for q in OPENAI_QUANTILES]
    quantiles = np.sort(values)[ranks]
    in_bin = np.searchsorted(quantiles[:-1], values, side="right") - 1
    if split == "held_out":
        for bin_ in range(len(ranks) - 1):
            inside = draw.permutation(np.flatnonzero(in_bin == bin_))[:n_openai]
            excerpts += [
                cut("openai_bin", rank, bin_, at, 32, 32) for rank, at in enumerate(inside)
            ]
        excerpts += [cut("out_of_context", rank, -1, at, 1, 2) for rank, at in enumerate(tops[:10])]
    summary = NeuronSummary(
        neuron=NeuronId(model, "ista", layer, index),
        n_tokens=len(values),
        mean=float(values.mean()),
        variance=float(values.var()),
        skew=0.0,
        kurtosis=3.0,
        firing_rate=float((values > 0).mean()),
        maximum=float(values.max()),
        histogram=np.zeros(64, np.int64),
        histogram_low=0.0,
        histogram_high=1.0,
        openai_edges=quantiles,
        anthropic_edges=edges.astype(np.float32),
        openai_counts=np.bincount(in_bin, minlength=len(ranks) - 1),
    )
    return NeuronRecord(summary, tuple(excerpts))


def activations(split: Split, index: int) -> np.ndarray:
    """Neuron 0 is dead on fit alone, 1 fires on pairs, 2 at one place; the others each on a token."""
    tokens, _ = corpus(split)
    if index == 0 and split == "fit":
        return np.zeros(len(tokens))
    if index == 1:
        return on_pair(tokens, 1, 2)
    if index == 2:
        return (np.arange(len(tokens)) == 77).astype(float)
    return on_token(tokens, index)


def write_shards(folder: Path) -> None:
    """The two splits as shards, documents in the order of their ordinals.

    A document's last token gives way to the end-of-text token, so that positions stay as they are.
    """
    vocabulary = {text: i for i, text in enumerate([*STRINGS, "<|endoftext|>"])}
    writer = StoreWriter(folder, Tokenizer(WordLevel(vocabulary, STRINGS[0])), VOCABULARY)
    splits: tuple[Split, Split] = ("fit", "held_out")
    tokens = {split: corpus(split)[0].reshape(N_DOCUMENTS, LENGTH) for split in splits}
    for number in range(N_DOCUMENTS):
        for split in splits:
            ids = tokens[split][number, :-1].tolist()
            writer.append(split, ids, Document("", "made up", "", 0, ""))
    writer.close()


def run_with_harvest(
    path: Path, n_neurons: int = 12, layers: int = 2, documents_overlap: bool = False
) -> Run:
    """A run whose harvest of model `m` is finished; with `documents_overlap` its splits are not disjoint."""
    run = Run(path)
    with run.stage("tokens").write({}, {}) as draft:
        write_shards(draft.path)
    with run.stage("activations", "m").write({}, {}) as draft:
        splits: tuple[Split, Split] = ("fit", "held_out")
        for split in splits:
            source: Split = "fit" if documents_overlap else split
            records = [
                harvested(activations(source, index), source, index, layer, n_openai=4)
                for layer in range(layers)
                for index in range(n_neurons)
            ]
            write_records(draft.path, split, records)
    return run
