"""The page of a study as Markdown, with its figures as PNG and every figure as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.report.drawing import Figure, Panel, Series, scatter
from cratelm.report.study.claims import MEASURES, Tested, tested_claims
from cratelm.report.study.tables import (
    ablations_table,
    claims_table,
    figures_table,
    models_table,
    plane,
    seeds_table,
    trained_groups,
)
from cratelm.results.study import ALL, CONTEXT, LOST, StudyGroup, StudyModel, StudyResults
from cratelm.runs import Run, write_json, write_text
from cratelm.text.table import Table

RESULTS, PAGE = "results.json", "study"


@dataclass(frozen=True, eq=False)
class StudyPage:
    """Everything that a page of a study consists of."""

    text: str
    """Markdown; `{figure:NAME}` stands for the file of a figure"""
    figures: tuple[Figure, ...]
    results: dict[str, Any]
    """tables by name, and every figure of every group, at full precision"""
    verdicts: str
    """the claims as plain text"""

    def write(self, folder: Path, name: str = PAGE) -> Path:
        """Write `NAME.md`, `NAME-FIGURE.png` and `NAME.json` into a folder; return the page."""
        text = self.text
        for figure in self.figures:
            drawn = Figure(
                f"{name}-{figure.name}", figure.title, figure.caption, figure.panels, figure.series
            )
            drawn.write_png(folder)
            text = text.replace(f"{{figure:{figure.name}}}", f"{drawn.name}.png")
        write_json(folder / f"{name}.json", self.results)
        page = folder / f"{name}.md"
        write_text(page, text)
        return page


def study_page(
    run: Run,
    models: Sequence[StudyModel],
    questions: Sequence[str],
    settings: Mapping[str, Any],
    *,
    resamples: int,
) -> StudyPage:
    """Return the page about models that are finished. Raises `InputError` as `StudyResults` does."""
    results = StudyResults(run, models, resamples=resamples)
    groups = trained_groups(results)
    tested = tested_claims(results)
    tables = [models_table(results)]
    if tested:
        tables.append(claims_table(tested))
    sizes = list(dict.fromkeys(g.first.size for g in groups))
    by_size = {
        size: figures_table(results, _of_size(results, groups, size), f"study_figures_{size}")
        for size in sizes
    }
    figures = [f for size in sizes if (f := _frontier(results, groups, size)) is not None]
    ablations = {size: t for size in sizes if (t := ablations_table(results, size)) is not None}
    seeds = seeds_table(results)
    parts = [
        _head(results, groups, questions, settings),
        _claims(tested),
        _frontier_part(figures, by_size, ablations),
        _seeds_part(seeds),
        _limits(results, groups, tested, settings),
        _reproduce(settings),
    ]
    every = [*tables, *by_size.values(), *ablations.values(), *([seeds] if seeds else [])]
    return StudyPage(
        "\n\n".join(part for part in parts if part) + "\n",
        tuple(figures),
        {
            "settings": dict(settings),
            "tables": {table.name: table.to_json() for table in every},
            "figures": _all_figures(results),
        },
        claims_table(tested).to_text() if tested else by_size[sizes[0]].to_text(),
    )


def _of_size(results: StudyResults, groups: Sequence[StudyGroup], size: str) -> list[StudyGroup]:
    """Return the trained groups of a size, then its null controls."""
    controls = [g for g in results.groups.values() if g.first.control and g.first.size == size]
    return [g for g in groups if g.first.size == size] + controls


def _all_figures(results: StudyResults) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in results.groups:
        of = {key: results.figure(name, key) for key in MEASURES}
        found[name] = {
            key: {
                "value": f.value,
                "low": f.interval.low,
                "high": f.interval.high,
                "by_seed": list(f.by_seed),
            }
            for key, f in of.items()
            if f is not None
        }
    return found


def _section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *(p for p in paragraphs if p)])


def _head(
    results: StudyResults,
    groups: Sequence[StudyGroup],
    questions: Sequence[str],
    settings: Mapping[str, Any],
) -> str:
    tokens = results.run.stage("tokens").completion()
    counts = tokens.results.get("tokens", {}) if tokens else {}
    seeds = sorted({seed for g in groups for seed in g.models})
    tokenize = next(iter(settings["stages"].get("tokenize", [])), {})
    corpus = (
        "the sources of the Python standard library"
        if settings["corpus"] == "builtin"
        else f"`{Path(str(settings['corpus'])).name}`"
    )
    return "\n\n".join(
        [
            f"# Study: {' and '.join(settings['recipes'])}",
            *questions,
            f"Corpus: {corpus}; {counts.get('train', 0):,} training tokens, {counts.get('fit', 0):,} from which neurons"
            f" are explained, {counts.get('held_out', 0):,} held out; vocabulary"
            f" {tokenize.get('vocab_size', 4096):,}. All models saw the same tokens in the same order. Seeds:"
            f" {', '.join(map(str, seeds))}. Scores are those of the explainer `{results.explainer}`"
            + (
                f"; models run on explanations by `{results.replaced_by}`, which lose the fewest nats over all models."
                if results.replaced_by
                else "."
            ),
            "Intervals are 95% bootstrap intervals over seeds and neurons (losses: seeds and documents), paired by"
            " seed in every difference. Curves that have bent fall little in the last fifth of the steps: 100% in the"
            " last but one column would be a straight line.",
            models_table(results).to_markdown(),
        ]
    )


def _claims(tested: Sequence[Tested]) -> str:
    if not tested:
        return ""
    by = {
        verdict: [t for t in tested if t.verdict == verdict]
        for verdict in ("holds", "contradicted", "undecided")
    }
    sentence = (
        f"Of {len(tested)} comparisons {len(by['holds'])} hold, {len(by['contradicted'])} are contradicted, and"
        f" {len(by['undecided'])} are undecided at this budget. A comparison is decided if its interval excludes 0"
        " and its p-value, adjusted for all comparisons (Holm), is below .05."
    )
    contradicted = "; ".join(
        f"{t.claim.text} at {t.claim.size} ({MEASURES[t.claim.measure].label})"
        for t in by["contradicted"]
    )
    return _section(
        "The paper's claims",
        sentence,
        f"Contradicted: {contradicted}." if contradicted else "",
        claims_table(tested).to_markdown(),
        "Comparisons without a figure of the paper are ours: the same claim under stricter measures. Ours are scores of"
        " explanations without a language model, so the paper's levels are not comparable, but its differences are.",
    )


def _frontier(results: StudyResults, groups: Sequence[StudyGroup], size: str) -> Figure | None:
    """Return loss against two kinds of interpretability for the models of one size; None with fewer than two of them."""
    of_size = [g for g in groups if g.first.size == size]
    panels = []
    series = tuple(Series(g.name, number) for number, g in enumerate(of_size))
    titles = {LOST: "Run on explanations", CONTEXT: "Beyond the last token", ALL: "All tokens"}
    for measure, title in titles.items():
        points = plane(results, of_size, measure)
        if sum(point is not None for point in points) > 1:
            panels.append(
                Panel(title, scatter(series, points, "loss, nats", MEASURES[measure].label))
            )
    if not panels:
        return None
    caption = (
        "Each point is a model, the mean over its seeds; bars are 95% intervals in both directions."
    )
    return Figure(
        f"frontier-{size}", f"Loss and interpretability, {size}", caption, tuple(panels), series
    )


def _frontier_part(
    figures: Sequence[Figure], by_size: Mapping[str, Table], ablations: Mapping[str, Table]
) -> str:
    parts = []
    for size, table in by_size.items():
        drawn = next((f for f in figures if f.name.endswith(f"-{size}")), None)
        parts.append(f"### {size}")
        if drawn is not None:
            parts.append(f"![{drawn.title}: {drawn.caption}]({{figure:{drawn.name}}})")
        parts.append(table.to_markdown())
        if size in ablations:
            parts += [
                "Each family and switch minus the model that it changes, paired by seed:",
                ablations[size].to_markdown(),
            ]
    return _section(
        "Loss and interpretability",
        "Lower is better for losses and nats lost, higher for the rest. Nats lost alone can mislead: where the codes carry"
        " little, replacing them costs little. So read it beside what the codes carry and what explanations give back."
        " *Explained beyond the last token* is the fraction of the variance that a look-up of the last token leaves, and"
        " that the explanations explain.",
        *parts,
    )


def _seeds_part(table: Table | None) -> str:
    if table is None:
        return ""
    return _section(
        "Seeds",
        "Neurons of two seeds are matched one to one by the correlation of their activations over held-out tokens. An"
        " explanation transfers if it predicts the match of its neuron, too.",
        table.to_markdown(),
    )


def _limits(
    results: StudyResults,
    groups: Sequence[StudyGroup],
    tested: Sequence[Tested],
    settings: Mapping[str, Any],
) -> str:
    n_seeds = min((len(g.models) for g in groups), default=0)
    trainings = [t for g in groups for m in g.models.values() if (t := results.training(m))]
    lines = []
    if n_seeds < 6:
        lines.append(
            f"{n_seeds} seed{'s' * (n_seeds != 1)} of the model with the fewest: intervals over so few seeds are too narrow,"
            " and another seed may lie outside."
        )
    late = [t.late_fall for t in trainings if t.late_fall is not None]
    if late:
        lines.append(
            f"At the end of training the losses still fell by {min(late):.3f} to {max(late):.3f} nats in the last fifth of"
            f" the steps, at most {max(t.tokens for t in trainings) / 1e6:.1f} million tokens. Models trained to the end may"
            " differ."
        )
    lines.append(
        "Explanations are those of programs, not of a language model; a person's or a language model's may rank models"
        " otherwise."
    )
    undecided = sum(t.verdict == "undecided" for t in tested)
    if undecided:
        lines.append(
            f"{undecided} comparisons are undecided: neither their presence nor their absence is shown."
        )
    if settings["missing"]:
        lines.append(f"Not finished, and so not on this page: {', '.join(settings['missing'])}.")
    return _section("What this budget cannot tell", "\n".join(f"- {line}" for line in lines))


def _reproduce(settings: Mapping[str, Any]) -> str:
    corpus = "" if settings["corpus"] == "builtin" else " --corpus CORPUS"
    recipes = " ".join(settings["recipes"])
    return _section(
        "Reproduce",
        f"```sh\ncratelm study {recipes} --run runs/study{corpus}\n```",
        "Every figure, with its interval and the value of each seed, is in the JSON file beside this page.",
    )
