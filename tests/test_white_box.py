"""The report's white-box tables and figures, from files whose figures are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from tiny_run import reseal

from cratelm.analysis.store import (
    CoverageControl,
    CoverageMeasures,
    LayerFigure,
    NeuronCoverage,
    write_layers,
    write_readings,
)
from cratelm.analysis.summary import summarise
from cratelm.records import Estimate, Interval, NeuronId, Status
from cratelm.report.drawing import Series
from cratelm.report.sections import white_box
from cratelm.report.sections.white_box_figures import figures
from cratelm.results.side_results import read_analyses
from cratelm.runs import Run, write_json

MODELS = ("crate-2l", "gpt2-2l")
SHOWN: tuple[tuple[CoverageControl, float], ...] = (
    ("none", 0.5),
    ("none", 0.75),
    ("shuffled", 0.5),
)


def _layers(crate: bool, n_layers: int) -> list[LayerFigure]:
    found = []
    for layer in range(n_layers):
        pairs: dict[tuple[str, str], Any] = {
            ("coding_rate_before", "0.5"): (300 + layer, 1.0),
            ("coding_rate_after", "0.5"): (200.0, 1.0),
            ("coding_rate_change", "0.5"): (-100.0 - layer, 1.5),
            ("nonzero", "before"): (1.0, 0.0),
            ("nonzero", "after"): (0.25, 0.01),
            ("above_tenth", "before"): (0.7, 0.01),
            ("above_tenth", "after"): (0.1, 0.01),
            ("hoyer", "before"): (0.2, 0.01),
            ("hoyer", "after"): (0.6, 0.01),
            ("dead", ""): (0.5, None),
            ("mutual_coherence", ""): (0.4, None),
            ("spectral_norm", ""): (3.0, None),
            ("groups", ""): (2, None),
            ("grouped", ""): (0.25, None),
        }
        if crate:
            pairs |= {("lasso", str(k)): (80.0 / 2**k, 0.5) for k in range(5)}
            pairs |= {("lasso_falls", str(k)): (0.9, 0.01) for k in range(1, 5)}
            pairs |= {("ista_steps", ""): (2, None), ("step_size", ""): (0.1, None)}
            pairs |= {("head_overlap", ""): (0.3, None), ("head_overlap", "random"): (0.25, None)}
            pairs |= {
                (f"{kind}_{when}", "0.5"): (50.0, 1.0)
                for kind in ("compression_rate", "subspace_rate")
                for when in ("before", "after", "change")
            }
        found += [LayerFigure(layer, *key, *value) for key, value in pairs.items()]
    return found


def _readings(model: str, auroc: float, n_layers: int) -> list[NeuronCoverage]:
    """Four neurons a layer: one dead, one without a covered token."""
    found = []
    for layer in range(n_layers):
        for index in range(4):
            reading = CoverageMeasures(Status.DEFINED, 5, 95, 0.9, 1.0, 0.8, 0.7, 0.6, 0.5, auroc)
            reading = {
                2: CoverageMeasures(Status.DEAD, 5, 95),
                3: CoverageMeasures(Status.UNDEFINED, 0, 100),
            }.get(index, reading)
            place = NeuronId(model, "ista", layer, index)
            for control, share in SHOWN:
                found.append(NeuronCoverage(place, "trie", control, share, reading))
    return found


def _write(path: Path, n_layers: int = 2, explained: tuple[str, ...] = MODELS) -> Run:
    run = Run(path)
    for model, auroc in zip(MODELS, (0.9, 0.7), strict=True):
        with run.stage("analysis", model).write({}, {}) as draft:
            write_layers(draft.path, _layers(model == "crate-2l", n_layers))
            readings = _readings(model, auroc, n_layers) if model in explained else []
            if readings:
                write_readings(draft.path, readings)
            told = [vars(s) for s in summarise(readings, 100, 0)]
            write_json(draft.path / "summary.json", {"readings": told})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return _write(tmp_path_factory.mktemp("white") / "run")


def white_box_tables(run: Run, models: Any, *twins: Any, **options: Any) -> dict[str, Any]:
    """By name, those that have a row."""
    made = white_box.tables(read_analyses(run, models), *twins, **options)
    return {table.name: table for table in made if table.rows}


def white_box_figures(run: Run, series: list[tuple[str, Series]]) -> dict[str, Any]:
    found = figures(read_analyses(run, [name for name, _ in series]), dict(series))
    return {figure.name: figure for figure in found}


def _cell(table, key: str, **wanted: Any) -> Any:
    keys = [c.key for c in table.columns]
    rows = [dict(zip(keys, row, strict=True)) for row in table.rows]
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row[key]


def test_cells_are_the_files_figures(run):
    tables = white_box_tables(run, MODELS, [MODELS])
    rates, weights = tables["white_box_rates"], tables["white_box_weights"]
    found = _cell(rates, "coding_rate_before", model="crate-2l", layer=1)
    assert (found.value, found.error) == (301, 1)
    after = _cell(tables["white_box_sparsity"], "nonzero_after", model="gpt2-2l", layer=0)
    assert isinstance(after, Estimate)
    assert (after.value, after.error) == (25, 1)
    assert _cell(weights, "product", model="crate-2l", layer=0) == pytest.approx(0.9)
    assert _cell(weights, "groups", model="gpt2-2l", layer=1) == 2


def test_lasso_by_step(run):
    table = white_box_tables(run, MODELS)["white_box_lasso"]
    at: dict[str, Any] = {"model": "crate-2l", "layer": 1}
    assert [_cell(table, "taken", step=k, **at) for k in range(5)] == ["yes"] * 3 + ["", ""]
    assert _cell(table, "relative", step=2, **at) == 25
    assert _cell(table, "falls", step=0, **at) is None
    assert _cell(table, "falls", step=3, **at).value == 90


def test_what_a_model_has_not_is_a_dash(run):
    tables = white_box_tables(run, MODELS)
    assert (
        _cell(tables["white_box_rates"], "compression_rate_change", model="gpt2-2l", layer=0)
        is None
    )
    assert _cell(tables["white_box_weights"], "product", model="gpt2-2l", layer=0) is None
    models = {row[0] for row in tables["white_box_lasso"].rows}
    assert models == {"crate-2l"}


def test_readings_count_those_without_a_value(run):
    table = white_box_tables(run, MODELS)["white_box_readings"]
    at: dict[str, Any] = {"model": "gpt2-2l", "layer": 1, "explanations": "own"}
    assert _cell(table, "consistency", **at) == Interval(90, 90, 90)
    assert _cell(table, "auroc", **at).value == pytest.approx(0.7)
    assert (_cell(table, "defined", **at), _cell(table, "none", **at)) == (2, "1 / 1")
    shares = white_box_tables(run, MODELS)["white_box_shares"]
    assert {row[2] for row in shares.rows} == {0.5, 0.75}


def test_difference_of_twins_has_an_interval_that_covers(tmp_path):
    """Of readings drawn with a known difference, 95% of the intervals would cover it."""
    run = _write(tmp_path / "run", 1)
    rng = np.random.default_rng(0)
    hits, trials = 0, 60
    for trial in range(trials):
        for model, centre in zip(MODELS, (0.8, 0.7), strict=True):
            drawn = np.clip(rng.normal(centre, 0.05, 40), 0, 1)
            reading = [
                CoverageMeasures(Status.DEFINED, 1, 1, 1, 1, 1, 1, 1, 1, float(v)) for v in drawn
            ]
            rows = [
                NeuronCoverage(NeuronId(model, "s", 0, i), "trie", "none", 0.5, r)
                for i, r in enumerate(reading)
            ]
            write_readings(run.stage("analysis", model).path, rows)
            reseal(run.stage("analysis", model).path)
        table = white_box_tables(run, MODELS, [MODELS], resamples=300, seed=trial)[
            "white_box_twins"
        ]
        found = _cell(table, "difference", measure="AUROC", layer="0")
        hits += found.low <= 0.1 <= found.high
    assert 0.85 <= hits / trials < 1


def test_twins_by_layer_and_over_layers(run):
    table = white_box_tables(run, MODELS, [MODELS])["white_box_twins"]
    assert [row[1] for row in table.rows if row[2] == "AUROC"] == ["0", "1", "mean"]
    found = _cell(table, "difference", measure="AUROC", layer="mean")
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert _cell(table, "n_a", measure="AUROC", layer="mean") == 4
    assert "white_box_twins" not in white_box_tables(run, MODELS)


@pytest.mark.parametrize("n_layers", [1, 2, 12])
def test_figures_are_drawn(tmp_path, n_layers):
    run = _write(tmp_path / "run", n_layers)
    drawn = [(m, Series(m, place)) for place, m in enumerate(MODELS)]
    figures = white_box_figures(run, drawn)
    assert list(figures) == [
        f"white_box_{n}" for n in ("rates", "sparsity", "lasso", "weights", "readings")
    ]
    for figure in figures.values():
        figure.write(tmp_path)
        assert len(figure.svgs()) == len(figure.panels)


def _lines(panel) -> list[tuple[list[float], list[float]]]:
    axes = Canvas().subplots()
    panel.draw(axes)
    data = [line.get_xydata() for line in axes.get_lines()]
    return [(np.array(d)[:, 0].tolist(), np.array(d)[:, 1].tolist()) for d in data]


def test_figures_show_the_files_figures(run):
    figures = white_box_figures(run, [(m, Series(m, place)) for place, m in enumerate(MODELS)])
    expansion = _lines(figures["white_box_rates"].panels[2])
    assert any(y == [300, 200] for _, y in expansion)
    objective = _lines(figures["white_box_lasso"].panels[0])
    assert ([0, 1, 2, 3, 4], [100, 50, 25, 12.5, 6.25]) in objective
    assert ([0, 1, 2], [100, 50, 25]) in objective
    # GPT-2 has neither a compression term nor an objective
    assert len(figures["white_box_lasso"].panels) == 2
    assert len({y[0] for x, y in _lines(figures["white_box_rates"].panels[0]) if len(x) == 2}) == 1
    shown = {s.label for s in figures["white_box_readings"].series}
    assert shown == {*MODELS, *(f"{m}, shuffled" for m in MODELS)}


def test_models_without_explanations_or_analysis(tmp_path):
    run = _write(tmp_path / "run", explained=())
    drawn = [(m, Series(m, place)) for place, m in enumerate((*MODELS, "absent"))]
    assert "white_box_readings" not in white_box_figures(run, drawn)
    tables = white_box_tables(run, [*MODELS, "absent"], [MODELS, ("crate-2l", "absent")])
    assert not tables.keys() & {"white_box_readings", "white_box_twins", "white_box_shares"}
    assert [a.name for a in read_analyses(run, ("absent", "gpt2-2l"))] == ["gpt2-2l"]
    assert white_box_tables(Run(tmp_path / "empty"), MODELS) == {}
    assert white_box_figures(Run(tmp_path / "empty"), drawn) == {}


def test_cells_survive_json(run):
    for table in white_box_tables(run, MODELS, [MODELS]).values():
        json.dumps(table.to_json())
        assert table.to_latex().isascii()
        assert table.to_csv().count("\n") == len(table.rows) + 1
