"""Tables of a study's page."""

from collections.abc import Sequence

from cratelm.records import Interval
from cratelm.report.cells import interval_cell
from cratelm.report.study.claims import MEASURES, Tested
from cratelm.results.study import (
    LOSS,
    STEADINESS,
    StudyGroup,
    StudyResults,
)
from cratelm.stats.replicates import Replicates
from cratelm.text.table import Cell, Column, Table


def trained_groups(results: StudyResults) -> list[StudyGroup]:
    """Return the groups of trained models, by size, in the order of the recipe."""
    groups = [g for g in results.groups.values() if not g.first.control]
    sizes = list(dict.fromkeys(g.first.size for g in groups))
    return sorted(groups, key=lambda g: sizes.index(g.first.size))


def cell(figure: Replicates | None, measure: str) -> Cell:
    """Return a figure with its interval, in the unit of its measure; an interval needs two seeds or more neurons."""
    return None if figure is None else interval_cell(figure.interval, MEASURES[measure].scale)


def models_table(results: StudyResults) -> Table:
    """Return what was trained, and how far its curves have bent."""
    rows: list[tuple[Cell, ...]] = []
    for group in trained_groups(results):
        trainings = [t for t in map(results.training, group.models.values()) if t is not None]
        if not trainings:
            continue
        first = trainings[0]
        bends = [t.bend for t in trainings if t.bend is not None]
        falls = [t.late_fall for t in trainings if t.late_fall is not None]
        rows.append(
            (
                group.name,
                len(group.models),
                first.parameters,
                group.first.flops / 1e6,
                first.steps,
                first.tokens / 1e6,
                f"{first.optimizer} {first.learning_rate:g}",
                sum(falls) / len(falls) if falls else None,
                100 * sum(bends) / len(bends) if bends else None,
                results.without_score(group),
            )
        )
    columns = (
        Column("model", "model"),
        Column("seeds", "seeds", "d"),
        Column("parameters", "parameters", ",d"),
        Column("mflops", "MFLOPs per token", ".2f"),
        Column("steps", "steps", ",d"),
        Column("tokens", "million tokens", ".2f"),
        Column("rate", "optimizer, peak rate"),
        Column("late", "fall of the loss in the last fifth, nats", ".3f"),
        Column("bend", "of a straight line, %", ".0f"),
        Column("none", "undefined/dead/failed neurons, by seed"),
    )
    return Table("study_models", "What was trained", columns, tuple(rows))


def claims_table(tested: Sequence[Tested]) -> Table:
    """Return the claims, each with both figures, their difference and the verdict."""
    rows = tuple(
        (
            t.claim.size,
            t.claim.text,
            MEASURES[t.claim.measure].label,
            t.claim.published or None,
            *(_number(of.value, t.claim.measure) for of in (t.crate, t.gpt2)),
            _shown(t.difference.interval, t.claim.measure),
            t.p,
            t.verdict,
        )
        for t in tested
    )
    columns = (
        Column("size", "size"),
        Column("claim", "claim"),
        Column("measure", "measure"),
        Column("published", "paper, CRATE / GPT-2"),
        Column("crate", "CRATE"),
        Column("gpt2", "GPT-2"),
        Column("difference", "CRATE − GPT-2 [95%]"),
        Column("p", "p (Holm)", ".3f"),
        Column("verdict", "verdict"),
    )
    return Table("study_claims", "The claims", columns, rows)


def _number(value: float, measure: str) -> str:
    of = MEASURES[measure]
    return Column("", "", of.form).show(of.scale * value)


def _shown(interval: Interval, measure: str) -> str:
    of = MEASURES[measure]
    return Column("", "", of.form).show(interval_cell(interval, of.scale))


def figures_table(results: StudyResults, groups: Sequence[StudyGroup], name: str) -> Table:
    """Return every figure of these groups, one column per group; figures that no group has are left out."""
    measured = [
        key for key in MEASURES if any(results.figure(g.name, key) is not None for g in groups)
    ]
    columns = [Column("model", "model")] + [
        Column(key, MEASURES[key].label, MEASURES[key].form) for key in measured
    ]
    rows = tuple(
        (g.name, *(cell(results.figure(g.name, key), key) for key in measured)) for g in groups
    )
    return Table(name, "Every figure", tuple(columns), rows, flipped=False)


def ablations_table(results: StudyResults, size: str) -> Table | None:
    """Return each family and switch minus the plain family that it changes, at one size; None if there are none."""
    rows: list[tuple[Cell, ...]] = []
    measures = [m for m in MEASURES if m not in STEADINESS]
    for group in trained_groups(results):
        first = group.first
        reference = _reference(results, group)
        if first.size != size or not reference:
            continue
        differences = [results.difference(group.name, reference, m) for m in measures]
        rows.append(
            (
                group.name,
                reference,
                *(cell(d, m) for d, m in zip(differences, measures, strict=True)),
            )
        )
    if not rows:
        return None
    columns = [Column("model", "a"), Column("reference", "b")] + [
        Column(m, MEASURES[m].label, MEASURES[m].form) for m in measures
    ]
    return Table(f"study_ablations_{size}", "Ablations", tuple(columns), tuple(rows))


def _reference(results: StudyResults, group: StudyGroup) -> str:
    """Return the group that this one changes: its plain family, or the family that its family varies; empty for none."""
    first = group.first
    if first.switch or first.budget:
        base = f"{first.family}-{first.size}"
    else:
        root = next((f for f in ("crate", "gpt2") if first.family.startswith(f"{f}-")), "")
        base = f"{root}-{first.size}" if root else ""
    return base if base in results.groups and base != group.name else ""


def seeds_table(results: StudyResults) -> Table | None:
    """Return how alike the neurons of two seeds are, and how far explanations transfer; None without such figures."""
    rows: list[tuple[Cell, ...]] = []
    for of in results.seed_studies:
        pairs = [m for m in of.matches if m.similarity == "activations"]
        transfers = [t for t in of.transfers if t.explainer == results.explainer]
        if not pairs:
            continue

        def mean(values: Sequence[float]) -> float | None:
            return sum(values) / len(values) if values else None

        rows.append(
            (
                of.model,
                len({(m.model_a, m.model_b) for m in pairs}),
                mean([m.mean for m in pairs]),
                mean([m.untrained for m in pairs]),
                mean([t.transfer.value for t in transfers if t.transfer is not None]),
                mean([t.random.value for t in transfers if t.random is not None]),
            )
        )
    if not rows:
        return None
    columns = (
        Column("model", "model"),
        Column("pairs", "pairs of seeds", "d"),
        Column("match", "mean correlation of matched neurons", ".3f"),
        Column("untrained", "untrained", ".3f"),
        Column("transfer", "score of an explanation on the match, over its own", ".3f"),
        Column("random", "on a random neuron", ".3f"),
    )
    return Table("study_seeds", "Seeds", columns, tuple(rows))


def plane(
    results: StudyResults, groups: Sequence[StudyGroup], measure: str
) -> list[tuple[Interval, Interval] | None]:
    """Return loss and another figure of each group, with intervals; None where one is missing."""
    points: list[tuple[Interval, Interval] | None] = []
    for g in groups:
        a, b = results.figure(g.name, LOSS), results.figure(g.name, measure)
        points.append(None if a is None or b is None else (a.interval, _scaled(b, measure)))
    return points


def _scaled(figure: Replicates, measure: str) -> Interval:
    by = MEASURES[measure].scale
    low, high = figure.bounds
    return Interval(by * figure.value, by * low, by * high, len(figure.by_seed))
