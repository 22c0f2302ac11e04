"""Scores as columns: equal to the objects, and the memory of `score` does not grow with the model."""

import gc
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import ExplanationFile, write_explanations
from cratelm.records import (
    CONTROLS,
    METRICS,
    Explanation,
    NeuronId,
    NeuronKey,
    NeuronScore,
    Score,
    Status,
)
from cratelm.runs.columns import FileColumn
from cratelm.score import store
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import ExplanationSet
from cratelm.score.score import score
from cratelm.score.store import SCORES, read_score_columns, read_scores, write_scores
from cratelm.stats.score_table import ScoreTable


def drawn(seed: int) -> list[NeuronScore]:
    """Up to 40 scores with fields drawn from few values, so that rows share neurons, words and reasons."""
    rng = np.random.default_rng(seed)

    def number() -> float | None:
        return None if rng.random() < 0.3 else float(rng.uniform(-1, 1))

    def row() -> NeuronScore:
        words = [str(w) for w in rng.choice(["", "a", "b/c", "ö"], 4)]
        result = Score(
            number(),
            list(Status)[rng.integers(4)],
            words[0],
            r2=number(),
            accuracy=number(),
            n_duplicates=int(rng.integers(3)),
            without_duplicates=number(),
        )
        return NeuronScore(
            NeuronId("m", "ista", *rng.integers(0, 4, 2).tolist()),
            words[1],
            METRICS[rng.integers(len(METRICS))],
            CONTROLS[rng.integers(3)],
            result,
            tuple(rng.integers(0, 6, rng.integers(3)).tolist()),
            explained_by=("lookup", "trie")[rng.integers(2)],
            simulator=words[2],
            variant=words[3],
        )

    return [row() for _ in range(0 if seed == 0 else rng.integers(1, 40))]


def made(layer: int, index: int, explainer: str = "trie", **fields) -> NeuronScore:
    neuron = NeuronId("m", "ista", layer, index)
    return NeuronScore(neuron, explainer, "anthropic", "none", Score(0.5), **fields)


@pytest.mark.parametrize("seed", range(8))
def test_a_table_is_the_list_of_its_scores(seed):
    scores = drawn(seed)
    table = ScoreTable.of(scores)
    assert table == scores
    assert list(table) == scores
    assert [table[i] for i in range(len(scores))] == scores
    assert table[2:7] == scores[2:7]
    assert table[::-1] == scores[::-1]
    for name, value in (("explainer", "b/c"), ("control", "none"), ("metric", "intruder")):
        assert table.select(**{name: value}) == [s for s in scores if getattr(s, name) == value]
    assert table.select(layer=2) == [s for s in scores if s.neuron.layer == 2]
    assert table.where(table.has("value")) == [s for s in scores if s.score.value is not None]
    assert table.neurons() == {s.neuron.key for s in scores}
    wanted = {NeuronKey(0, 1), NeuronKey(3, 2)}
    assert table.of_neurons(wanted) == [s for s in scores if s.neuron.key in wanted]
    groups: dict[tuple[str, ...], list[NeuronScore]] = {}
    for s in scores:
        groups.setdefault((s.explainer, str(s.score.status)), []).append(s)
    assert list(table.groups("explainer", "status").items()) == list(groups.items())
    assert table.counts("explainer", "status") == {key: len(g) for key, g in groups.items()}
    assert table.labelled("!") == [replace(s, explainer=s.explainer + "!") for s in scores]
    assert ScoreTable.concatenated([table, table[:2]]) == scores + scores[:2]


@pytest.mark.parametrize("seed", range(3))
def test_files_hold_every_field(tmp_path, seed):
    scores = drawn(seed)
    write_scores(tmp_path, scores)
    assert read_scores(tmp_path) == scores
    assert pq.read_schema(tmp_path / "scores.parquet").equals(SCORES.schema)
    some = read_score_columns(tmp_path, ["value"])
    assert [s.score.value for s in some] == [s.score.value for s in scores]
    assert all(s.documents == () for s in some)


def test_a_field_is_stored_by_one_line(tmp_path, monkeypatch):
    """All that a stored field of `Score` needs is its line in `SCORES`: without `r2` there, it is not stored."""
    columns = tuple(c for c in SCORES.columns if c.name != "r2")
    monkeypatch.setattr(store, "SCORES", replace(SCORES, columns=columns))
    row = replace(made(0, 1), score=Score(0.5, r2=0.25), explained_by="trie")
    write_scores(tmp_path, [row])
    assert [s.score.r2 for s in read_scores(tmp_path)] == [None]
    columns = (*columns, FileColumn("r2", pa.float64(), "again"))
    monkeypatch.setattr(store, "SCORES", replace(SCORES, columns=columns))
    write_scores(tmp_path, [row])
    assert read_scores(tmp_path) == [row]


@pytest.mark.parametrize(
    ("name", "cells", "what"),
    [
        ("status", pa.array(["better"]), "'better' is not a valid Status"),
        ("metric", pa.array([None], pa.string()), "column metric has empty cells"),
        ("layer", pa.array([0.5]), "column layer has type double"),
    ],
)
def test_a_file_with_other_content_is_one_line(tmp_path, name, cells, what):
    write_scores(tmp_path, [made(0, 1)])
    path = tmp_path / "scores.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, cells), path)
    with pytest.raises(InputError, match=what):
        read_scores(tmp_path)


def test_scores_are_written_as_they_come(tmp_path, monkeypatch):
    """No more than one row group of scores exists at a time."""
    monkeypatch.setattr(store, "_ROWS_A_GROUP", 10)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Watched(NeuronScore):
        __hash__ = object.__hash__

    def stream():
        nonlocal most
        for index in range(200):
            row = Watched(NeuronId("m", "ista", 0, index), "trie", "anthropic", "none", Score(0.5))
            alive.add(row)
            most = max(most, len(alive))
            yield row
            del row

    write_scores(tmp_path, stream())
    assert 10 <= most <= 22
    assert len(read_scores(tmp_path)) == 200
    assert pq.read_metadata(tmp_path / "scores.parquet").num_row_groups == 20


def explained(layers: int, neurons: int) -> list[Explanation]:
    return [
        Explanation(
            NeuronId("m", "ista", layer, index), name, f"{layer}.{index}", payload, (index, 7)
        )
        for layer in range(layers)
        for index in range(neurons)
        for name, payload in (
            ("trie", {"default": layer + index / 10}),
            ("llm", {"evidence": "top"}),
            ("llm", {"evidence": "anthropic"}),
        )
        if (layer, index, payload.get("evidence")) != (1, 2, "anthropic")
    ]


def test_explanations_of_a_file_are_those_of_a_list(tmp_path):
    """By layer from a file, and from a list: the same explanation or reason for every row of the scores."""
    given = explained(layers=3, neurons=5)
    write_explanations(tmp_path, given)
    sets = [ExplanationSet(source, [], seed=4) for source in (given, ExplanationFile(tmp_path))]
    for layer in (0, 1, 2, 0):
        for index in range(6):
            for name in ("trie", "llm", "none"):
                for metric in METRICS:
                    for control in CONTROLS:
                        args = NeuronId("m", "ista", layer, index), name, metric, control
                        a, b = (s.find(*args) for s in sets)
                        if isinstance(a, Score):
                            assert a == b
                        else:
                            assert vars(a) | {"documents": ()} == vars(b)
    file = ExplanationFile(tmp_path)
    assert {d for part in file.documents() for d in part} == {0, 1, 2, 3, 4, 7}
    assert {k: v.tolist() for k, v in file.documents_of(1).items()} == {
        NeuronKey(1, index): [index, 7] for index in range(5)
    }


def test_one_layer_of_explanations_is_held(tmp_path):
    write_explanations(tmp_path, explained(layers=4, neurons=3))
    held = ExplanationSet(ExplanationFile(tmp_path), None, seed=0)
    for layer in range(4):
        found = held.find(NeuronId("m", "ista", layer, 1), "trie", "anthropic", "shuffled")
        assert isinstance(found, Explanation)
        assert found.neuron.layer == layer
        stored = [s for of_kind in held._explanations.values() for s in of_kind]
        assert {n.layer for n in stored} == {layer}


def test_memory_of_score_does_not_grow_with_neurons(tmp_path, monkeypatch):
    """From 24 to 96 neurons, less than 8 kB per neuron more; one neuron's scores as objects take 20 kB.

    Arrow's buffers are not counted, such as the columns of the scores: 60 bytes per score.
    """
    monkeypatch.setattr(store, "_ROWS_A_GROUP", 27)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import large_scores
    from explain_score import generated_run

    from cratelm.score import simulators

    extended = {**simulators.SIMULATORS, large_scores.THIRD: simulators.TrieSimulator()}
    monkeypatch.setattr(simulators, "SIMULATORS", extended)
    small = generated_run(tmp_path / "small", 4, 20_000)
    explain(ExplainConfig(run=small.path, model="m", quiet=True))
    peaks = []
    for neurons in (4, 16):
        run = large_scores.large(small, tmp_path / f"large-{neurons}", 6, neurons)
        gc.collect()
        tracemalloc.start()
        result = score(
            ScoreConfig(run=run.path, model=large_scores.MODEL, resamples=100, quiet=True)
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.n_scores == 6 * neurons * 27
    assert (peaks[1] - peaks[0]) / 72 < 8_000
