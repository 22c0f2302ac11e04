"""`cratelm report`: one page, tables and figures about all models of a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cratelm.report.cells import METRIC_NAMES
from cratelm.report.config import ReportConfig
from cratelm.report.drawing import Figure
from cratelm.report.figures import all_figures, own_series
from cratelm.report.gallery import AFTER, BEFORE, Gallery, galleries, neuron_table
from cratelm.report.reproduce import commands, facts
from cratelm.report.sections.autoencoder_figures import autoencoder_figures
from cratelm.report.sections.autoencoder_tables import autoencoder_tables
from cratelm.report.sections.autoencoders import evaluation_inputs, missing_evaluations
from cratelm.report.sections.effects import effects_figure, effects_table, interventions_table
from cratelm.report.sections.white_box import white_box_figures, white_box_tables
from cratelm.report.stale import Stale
from cratelm.report.tables import all_tables
from cratelm.results.run_results import RunResults, gather, inputs_of, missing, model_names
from cratelm.runs import Run, versions, write_json
from cratelm.text.shading import faint_marks
from cratelm.text.table import Table

PAGE, TABLES, COMPARISON = "report.html", "tables.json", "comparison.txt"
_SECTIONS = (
    ("comparison", "Comparison"),
    ("run", "What was run"),
    ("models", "Loss"),
    ("scores", "Scores"),
    ("twins", "Twins"),
    ("autoencoders", "Autoencoders"),
    ("white-box", "White box"),
    ("effects", "Effects"),
    ("with-model", "With a language model"),
    ("sparsity", "Sparsity"),
    ("neurons", "Neurons"),
    ("ledger", "Undefined"),
    ("leakage", "Leakage"),
    ("published", "Published"),
    ("reproduce", "Reproduce"),
)


@dataclass(frozen=True)
class ReportResult:
    """Where the report lies, and its first table."""

    path: Path
    """folder of the report"""
    page: Path
    """self-contained HTML: opens from disk, loads nothing"""
    tables: Path
    """every table as JSON; `tables/NAME.csv` and `tables/NAME.tex` beside it"""
    figures: tuple[Path, ...]
    """PNG and PDF"""
    comparison: tuple[dict[str, Any], ...]
    """rows of the comparison table, one a model, at full precision"""

    def __str__(self) -> str:
        return f"{comparison_table(self)}\n\nreport  {self.page}"


def report(config: ReportConfig) -> ReportResult:
    """Writes `report/` of a run: page, tables and figures; a finished report of the same inputs is kept.

    Raises `InputError` where no model of the run is scored.
    """
    run = Run(config.run)
    names = model_names(run, config)
    stage = run.stage("report")
    inputs = inputs_of(run, names) | evaluation_inputs(run, names)
    if stage.is_finished(config, inputs, force=config.force):
        return _read(stage.path)
    results = gather(run, config)
    shown = galleries(results, config)
    tables = all_tables(results, config.resamples, config.seed)
    if shown:
        tables["neurons"] = neuron_table(shown, results.metrics)
    figures = all_figures(results)
    _add_sides(results, config, tables, figures)
    stale = Stale(run, names)
    tables, figures, shown = stale.tables(tables), stale.figures(figures), stale.galleries(shown)
    with stage.write(config, inputs) as draft:
        _write_tables(draft.path, tables, stale.lines)
        (draft.path / "figures").mkdir()
        for figure in figures.values():
            figure.write(draft.path / "figures")
        page = _page(results, config, tables, figures, shown, stale.lines)
        (draft.path / PAGE).write_text(page, encoding="utf-8")
    return _read(stage.path)


def _add_sides(
    results: RunResults, config: ReportConfig, tables: dict[str, Table], figures: dict[str, Figure]
) -> None:
    """What the side rooms measured, where it is there."""
    run, names = results.run, [m.name for m in results.models]
    series = [(m.name, own_series(m)) for m in results.models]
    pairs = [(a.name, b.name) for a, b in results.twins()]
    tables |= white_box_tables(run, names, pairs, resamples=config.resamples, seed=config.seed)
    figures |= white_box_figures(run, series)
    tables |= autoencoder_tables(results, config.resamples, config.seed)
    figures |= autoencoder_figures(results, series)
    made = (effects_table(run, names), interventions_table(run, names))
    tables |= {t.name: t for t in made if t is not None}
    drawn = effects_figure(run, series)
    if drawn is not None:
        figures[drawn.name] = drawn


def comparison_table(result: ReportResult) -> str:
    """The comparison of the models as plain text: losses, scores with intervals, nulls, counts; what is stale."""
    return (result.path / COMPARISON).read_text(encoding="utf-8").rstrip("\n")


def _read(folder: Path) -> ReportResult:
    tables = json.loads((folder / TABLES).read_text(encoding="utf-8"))
    return ReportResult(
        path=folder,
        page=folder / PAGE,
        tables=folder / TABLES,
        figures=tuple(sorted((folder / "figures").iterdir())),
        comparison=tuple(tables["comparison"]["rows"]),
    )


def _write_tables(folder: Path, tables: dict[str, Table], stale: Sequence[str]) -> None:
    write_json(folder / TABLES, {name: table.to_json() for name, table in tables.items()})
    lines = [tables["comparison"].to_text(), *([""] if stale else []), *stale]
    (folder / COMPARISON).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tables").mkdir()
    for name, table in tables.items():
        (folder / "tables" / f"{name}.csv").write_text(table.to_csv(), encoding="utf-8")
        (folder / "tables" / f"{name}.tex").write_text(table.to_latex(), encoding="utf-8")


def _page(
    results: RunResults,
    config: ReportConfig,
    tables: dict[str, Table],
    figures: dict[str, Figure],
    shown: Sequence[Gallery],
    stale: Sequence[str],
) -> str:
    """The page. Every value is escaped but our own CSS and SVG."""
    here = resources.files("cratelm.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marks"] = faint_marks
    absent = {name for name in ("twins", "sparsity") if name not in tables}
    absent |= set() if shown else {"neurons"}
    absent |= set() if any(name.startswith("white_box") for name in tables) else {"white-box"}
    absent |= set() if "sae_policies" in tables else {"autoencoders"}
    absent |= set() if {"effects", "interventions"} & set(tables) else {"effects"}
    absent |= set() if any(m.with_model for m in results.models) else {"with-model"}
    return environment.from_string((here / "page.html.j2").read_text(encoding="utf-8")).render(
        css=Markup((here / "style.css").read_text(encoding="utf-8")),
        title=_title(results),
        lead=_lead(results),
        sections=[(anchor, name) for anchor, name in _SECTIONS if anchor not in absent],
        with_model="with-model" not in absent,
        white_box="white-box" not in absent,
        effects="effects" not in absent,
        autoencoders="autoencoders" not in absent,
        stale=stale,
        missing=missing(results) + missing_evaluations(results),
        tables=tables,
        figures=figures,
        facts=facts(results),
        galleries=shown,
        gallery_note=_gallery_note(results, config),
        audit=_audit(results),
        commands=commands(results, config),
        version=versions().get("cratelm", ""),
    )


def _title(results: RunResults) -> str:
    names = [m.name for m in results.principal]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"How well the neurons of {listed} can be explained"


def _lead(results: RunResults) -> str:
    n = sum(len({s.neuron for s in m.scores}) for m in results.principal)
    count = f"{n:,} neurons of {len(results.principal)} model{'s' * (len(results.principal) > 1)}"
    asked = [e for e in results.with_model if e not in results.explainers and "+" not in e]
    sample = f", some of them also by {' and '.join(asked)}" if asked else ""
    return (
        f"Run {results.run.path.resolve().name}: {count}, explained from one set of documents by"
        f" {' and '.join(results.explainers)}{sample}, and scored on documents that no explainer saw."
    )


def _gallery_note(results: RunResults, config: ReportConfig) -> str:
    return (
        f"Named by layer and index, with the score × 100 by {METRIC_NAMES[results.rank_by(config)]} and the"
        f" explanation by {results.explainer}; open one to see its excerpts. The best are chosen by the"
        " very scores shown, so these flatter them; those at random are drawn from all neurons, without"
        " a score or with one. Shade, and thickness of the line below, give the level 0 to 10 of the"
        " largest activation among the excerpts shown of the neuron (of the largest simulated one in"
        " simulated rows: correlation does not depend on scale). The frame marks the token that the"
        f" excerpt was chosen for; {BEFORE} tokens before it and {AFTER} from it on are shown."
        " ␣ is a space, ⏎ a line's end, ⇥ a tab; \\x.. and \\u.. stand for bytes and characters that do"
        " not show."
    )


def _audit(results: RunResults) -> dict[str, Any]:
    audits = [found.audit for m in results.models for found in m.sets if found.audit]
    shared = sum(len(audit["shared"]) for audit in audits)
    if shared or results.shared_ordinals:
        verdict = (
            f"{shared:,} documents were both explained from and scored on, and"
            f" {results.shared_ordinals:,} are in more than one split: these scores are not to be trusted."
        )
    else:
        verdict = (
            "No document was both explained from and scored on, in any model, and none is in more than"
            " one split of train, fit and held-out."
            if results.tokens
            else "No document was both explained from and scored on, in any model."
        )
    return {"clean": not shared and not results.shared_ordinals, "verdict": verdict}
