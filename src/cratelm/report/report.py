"""`cratelm report`: write one page, tables and figures about all models of a run."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cratelm.report.cells import METRIC_NAMES, series_of
from cratelm.report.config import ReportConfig
from cratelm.report.drawing import Figure
from cratelm.report.gallery import AFTER, BEFORE, Gallery, galleries, neuron_table
from cratelm.report.reproduce import commands, facts
from cratelm.report.sections import (
    all_tokens,
    autoencoders,
    comparisons,
    effects,
    leakage,
    llm,
    models,
    overview,
    positions,
    replacement,
    sae_controls,
    scores,
    seeds,
    white_box,
    white_box_figures,
)
from cratelm.report.stale import Stale
from cratelm.results.finding import finding
from cratelm.results.run_results import (
    RunResults,
    input_identities,
    missing_results,
    read_results,
    scored_models,
)
from cratelm.results.run_summary import run_card
from cratelm.results.seeds import excluded_seeds
from cratelm.runs import Run, versions, write_json
from cratelm.runs.reading import read_json, verified
from cratelm.text.shading import faint_marks
from cratelm.text.table import Table

PAGE, TABLES, COMPARISON = "report.html", "tables.json", "comparison.txt"
_WIDTH = 78
"""characters of a line of the sentence above the printed comparison"""
_WIDE = 4
"""models that the printed comparison has side by side; of more, it has one line each with the main figures"""
_SECTIONS = (
    ("comparison", "Comparison"),
    ("replacement", "On explanations"),
    ("run", "Settings"),
    ("models", "Loss"),
    ("scores", "Scores"),
    ("twins", "Twins"),
    ("pairs", "Any two"),
    ("seeds", "Several seeds"),
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
    """Result of `cratelm report`: the files written, and the comparison table."""

    path: Path
    """folder of the report"""
    page: Path
    """self-contained HTML: opens from disk and loads no other file"""
    tables: Path
    """every table as JSON; each is also written as `tables/NAME.csv` and `tables/NAME.tex`"""
    figures: tuple[Path, ...]
    """every figure as PNG and as PDF"""
    comparison: tuple[dict[str, Any], ...]
    """rows of the comparison table, one per model, at full precision"""

    def __str__(self) -> str:
        return f"{comparison_table(self)}\n\nreport  {self.page}"


def report(config: ReportConfig) -> ReportResult:
    """Write `report/` of a run: page, tables and figures. A finished report of the same inputs is not rewritten.

    Raises `InputError` if no model of the run is scored.
    """
    run = Run(config.run)
    names = scored_models(run, config.models)
    stage = run.stage("report")
    inputs = input_identities(run, names)
    if stage.is_finished(config, inputs, force=config.force):
        return _read(stage.path)
    results = read_results(run, names, config.explainer)
    of_models = galleries(results, config)
    tables = _tables(results, config)
    if of_models:
        tables["neurons"] = neuron_table(of_models, results.metrics)
    figures = _figures(results)
    stale = Stale(results)
    tables, figures = stale.tables(tables), stale.figures(figures)
    of_models = stale.galleries(of_models)
    with stage.write(config, inputs) as draft:
        sentence = _sentence(results)
        _write_tables(draft.path, tables, sentence, stale.lines)
        (draft.path / "figures").mkdir()
        for figure in figures.values():
            figure.write(draft.path / "figures")
        page = _page(results, config, tables, figures, of_models, sentence, stale.lines)
        (draft.path / PAGE).write_text(page, encoding="utf-8")
    return _read(stage.path)


def _tables(results: RunResults, config: ReportConfig) -> dict[str, Table]:
    """Return all tables by name, without empty ones."""
    twins = [(a.name, b.name) for a, b in results.twins()]
    seeded = {"resamples": config.resamples, "seed": config.seed}
    made = [
        *scores.tables(results),
        *overview.tables(results, **seeded),
        *replacement.tables(results),
        *all_tokens.tables(results),
        *models.tables(results),
        *positions.tables(results),
        *comparisons.tables(results, **seeded),
        *seeds.tables(results, **seeded),
        *llm.tables(results, **seeded),
        *leakage.tables(results),
        *white_box.tables(results.analyses, twins, **seeded),
        *autoencoders.tables(results, **seeded),
        *sae_controls.tables(results, **seeded),
        *effects.tables(results),
    ]
    return {table.name: table for table in made if table.rows}


def _figures(results: RunResults) -> dict[str, Figure]:
    """Return all figures by name, without those that have no data."""
    series = {m.name: series_of(m) for m in results.models}
    made = [
        *scores.figures(results),
        *replacement.figures(results),
        *all_tokens.figures(results),
        *models.figures(results),
        *white_box_figures.figures(results.analyses, series),
        *autoencoders.figures(results),
        *effects.figures(results),
    ]
    return {figure.name: figure for figure in made if figure is not None}


def comparison_table(result: ReportResult) -> str:
    """Return the comparison of the models as plain text: losses, scores, null controls, counts, and what is stale."""
    return verified(result.path / COMPARISON).read_text(encoding="utf-8").rstrip("\n")


def _read(folder: Path) -> ReportResult:
    tables = read_json(folder / TABLES)
    return ReportResult(
        path=folder,
        page=folder / PAGE,
        tables=folder / TABLES,
        figures=tuple(sorted((folder / "figures").iterdir())),
        comparison=tuple(tables["comparison"]["rows"]),
    )


def _sentence(results: RunResults) -> str:
    """Return what the run shows in one sentence; empty if that is nothing."""
    names = {m.name for m in results.models}
    card = run_card("", results.run)
    found = finding(replace(card, models=tuple(m for m in card.models if m.name in names)))
    return found.sentence if found else ""


def _write_tables(
    folder: Path, tables: dict[str, Table], sentence: str, stale: Sequence[str]
) -> None:
    write_json(folder / TABLES, {name: table.to_json() for name, table in tables.items()})
    lines = [*textwrap.wrap(sentence, _WIDTH), *([""] if sentence else [])]
    printed = tables["overview"] if len(tables["comparison"].rows) > _WIDE else tables["comparison"]
    lines.append(printed.to_text())
    lines += [*([""] if stale else []), *stale]
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
    of_models: Sequence[Gallery],
    sentence: str,
    stale: Sequence[str],
) -> str:
    """Return the page as HTML. Every value is escaped except the package's own CSS and SVG."""
    folder = resources.files("cratelm.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marks"] = faint_marks
    absent = {name for name in ("twins", "pairs", "sparsity") if name not in tables}
    absent |= set() if {"seeds", "seed_matches"} & set(tables) else {"seeds"}
    absent |= set() if "replacement" in tables else {"replacement"}
    absent |= set() if of_models else {"neurons"}
    absent |= set() if any(name.startswith("white_box") for name in tables) else {"white-box"}
    absent |= set() if "sae_policies" in tables else {"autoencoders"}
    absent |= set() if {"effects", "interventions"} & set(tables) else {"effects"}
    absent |= set() if any(m.llm_sets for m in results.models) else {"with-model"}
    return environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8")).render(
        css=Markup((folder / "style.css").read_text(encoding="utf-8")),
        title=_title(results),
        lead=_lead(results),
        finding=sentence,
        sections=[(anchor, name) for anchor, name in _SECTIONS if anchor not in absent],
        with_model="with-model" not in absent,
        white_box="white-box" not in absent,
        effects="effects" not in absent,
        several_seeds="seeds" not in absent,
        autoencoders="autoencoders" not in absent,
        stale=stale,
        crowded=positions.warnings(results),
        missing=[*missing_results(results), *excluded_seeds(results)],
        tables=tables,
        figures=figures,
        facts=facts(results),
        galleries=of_models,
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
    n = sum(len(m.scores.neurons()) for m in results.principal)
    count = f"{n:,} neurons of {len(results.principal)} model{'s' * (len(results.principal) > 1)}"
    by_llm = [e for e in results.llm_explainers if e not in results.explainers and "+" not in e]
    sample = f", some of them also by {' and '.join(by_llm)}" if by_llm else ""
    return (
        f"Run {results.run.path.resolve().name}: {count}, explained from one set of documents by"
        f" {_listed(results.explainers)}{sample}, and scored on documents that no explainer has seen."
    )


def _listed(names: Sequence[str]) -> str:
    """Return names as `a`, `a and b` or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _gallery_note(results: RunResults, config: ReportConfig) -> str:
    metric = METRIC_NAMES[config.ranking_metric(results.metrics)]
    return (
        f"Each line shows a neuron's layer and index, its score × 100 by {metric} and its explanation by"
        f" {results.explainer}. Open a line to see excerpts. The best neurons are selected by the scores shown,"
        " so their scores are biased upwards. The random neurons are drawn from all neurons, with or without a"
        " score. The shading and the thickness of the underline show the level 0 to 10, relative to the"
        " neuron's largest activation among the excerpts shown (in simulated rows: relative to the largest"
        " simulated activation, since correlation does not depend on scale). The frame marks the token for"
        f" which the excerpt was chosen; {BEFORE} tokens before it and {AFTER} from it on are shown. ␣ is a"
        " space, ⏎ a line break, ⇥ a tab; \\x.. and \\u.. stand for bytes and characters that cannot be displayed."
    )


def _audit(results: RunResults) -> dict[str, Any]:
    audits = [of_set.audit for m in results.models for of_set in m.sets if of_set.audit]
    shared = sum(len(audit.shared) for audit in audits)
    if shared or results.shared_ordinals:
        verdict = (
            f"{shared:,} documents were both explained from and scored on, and"
            f" {results.shared_ordinals:,} are in more than one split: do not trust these scores."
        )
    else:
        verdict = (
            "No document was both explained from and scored on, in any model, and none is in more than"
            " one split of train, fit and held-out."
            if results.tokens
            else "No document was both explained from and scored on, in any model."
        )
    return {"clean": not shared and not results.shared_ordinals, "verdict": verdict}
