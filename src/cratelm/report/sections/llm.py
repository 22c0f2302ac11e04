"""Tables about what a language model was asked: its scores beside those that need none, and its calls."""

from collections.abc import Sequence

from cratelm.llm.probe import LOW_MASS
from cratelm.records import CHANCE, SCORERS, Control, Metric, NeuronScore
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, mean_cell, without_score
from cratelm.results.run_results import ModelResults, Place, ResultSet, RunResults
from cratelm.stats.scores import ModelStatistics, Policy, model_statistics
from cratelm.text.table import Cell, Column, Table


def side_by_side(results: RunResults, resamples: int, seed: int) -> Table:
    """A row per explainer and scorer, on the neurons that a language model was asked about."""
    columns = (
        Column("model", "model"),
        Column("metric", "scorer"),
        Column("explainer", "explainer"),
        Column("neurons", "neurons", ",d"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("chance", "chance", ".0f"),
        Column("init", "random init", ".1f"),
        Column("none", "undefined / dead / failed"),
        Column("count_zero", "mean with these as chance", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m in results.models:
        for sample in _samples(m):
            rows += _rows(m, results.null(m), _Restricted(m, sample, resamples, seed))
    return Table(
        "side_by_side",
        "Scores on the same neurons",
        columns,
        tuple(rows),
        "Rows of one model with as many neurons are of the same neurons: those that a language model was asked"
        " about; where the scores without a language model are of a part of them, that part stands below."
        " Every mean is taken over these neurons alone. Top-and-random,"
        " random-only and Anthropic: correlation × 100 of simulated with true activations. Detection,"
        " fuzzing and embedding: area under the ROC curve × 100; intruder: trials won × 100. Chance: what an"
        " explanation that says nothing is worth. Shuffled: explanations dealt to other neurons of the"
        " layer; the intruder scorer shows no explanation, so there it is the same trials once more."
        " Random init: the untrained model under the same explainer, on the same places where it was"
        f" scored there, else on its own sample. {INTERVAL_NOTE}",
    )


class _Restricted:
    """Statistics of one model over some of its neurons."""

    def __init__(self, m: ModelResults, sample: frozenset[Place], resamples: int, seed: int):
        self.model, self.sample = m, sample
        self.resamples, self.seed = resamples, seed
        places = {found.name: found.places for found in m.sets if found.scores}
        self.sets = [s for s in m.sets if s.scores and places[s.name] >= sample]
        same = [found for found in self.sets if places[found.name] == sample]
        self._as_written = {e for found in same for e in found.explainers}
        self._scores = {
            e: [s for s in found.scores if s.explainer == e and _place(s) in sample]
            for found in self.sets
            for e in found.explainers
        }

    def figure(
        self,
        explainer: str,
        metric: Metric,
        control: Control = "none",
        policy: Policy = "leave_out",
    ) -> ModelStatistics | None:
        """As `cratelm score` wrote it, where it is of the very same neurons."""
        if explainer in self._as_written:
            return self.model.figure(explainer, metric, control, policy)
        mine = self._scores.get(explainer, [])
        if not any((s.metric, s.control) == (metric, control) for s in mine):
            return None
        return model_statistics(
            mine,
            explainer=explainer,
            metric=metric,
            control=control,
            policy=policy,
            resamples=self.resamples,
            seed=self.seed,
        )


def _rows(m: ModelResults, null: ModelResults | None, here: _Restricted) -> list[tuple[Cell, ...]]:
    """Without a language model first."""
    explainers = [e for found in here.sets for e in found.explainers]
    untrained = _Restricted(null, here.sample, here.resamples, here.seed) if null else None
    rows: list[tuple[Cell, ...]] = []
    for metric in SCORERS:
        for explainer in explainers:
            own = here.figure(explainer, metric)
            if own is None:
                continue
            row: tuple[Cell, ...] = (
                m.name,
                METRIC_NAMES[metric],
                explainer,
                own.counts.total,
                mean_cell(own),
                mean_cell(here.figure(explainer, metric, "shuffled")),
                100 * CHANCE[metric],
                mean_cell(_init(null, untrained, explainer, metric)),
                without_score(own.counts),
                mean_cell(here.figure(explainer, metric, policy="count_zero")),
            )
            rows.append(row)
    return rows


def _init(
    null: ModelResults | None, untrained: _Restricted | None, explainer: str, metric: Metric
) -> ModelStatistics | None:
    if null is None or untrained is None:
        return None
    return untrained.figure(explainer, metric) or null.figure(explainer, metric)


def _samples(m: ModelResults) -> list[frozenset[Place]]:
    """The neurons that a language model was asked about, and those of them that the set without one has
    where it has not all; each sample once, the largest first."""
    asked = {of_set.places for of_set in m.with_model if of_set.scores}
    free = {of_set.places for of_set in m.sets if of_set.scores and not of_set.name}
    found = asked | {sample & other for sample in asked for other in free} - {frozenset()}
    return sorted(found, key=lambda places: (-len(places), sorted(places)))


def _place(s: NeuronScore) -> Place:
    return s.neuron.layer, s.neuron.index


def preflights(results: RunResults) -> Table:
    """How each language model tells levels."""
    columns = (
        Column("model", "model"),
        Column("read", "how levels are read"),
        Column("levels", "levels"),
        Column("tokens_of_ten", 'tokens of "10"', "d"),
        Column("mass", "probability on the levels, %", ".0f"),
        Column("lowest_mass", "least at one token, %", ".0f"),
        Column("remark", "remark"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m, found in _asked(results):
        if p := found.preflight:
            how = "log-probabilities" if p["reads"] else "JSON"
            shares = (_percent(p["mass"]), _percent(p["lowest_mass"]))
            levels = f"0 to {p['top_level']}"
            rows.append((found.label(m.name), how, levels, p["tokens_of_ten"], *shares, _remark(p)))
    return Table(
        "preflights",
        "How levels are read",
        columns,
        tuple(rows),
        'From two trial readings before the scoring. A level must be one token, so where "10" takes two'
        " the levels run to 9. Probability on the levels: what share of the next token's probability falls"
        f" on them; below {LOW_MASS:.0%} what is read is a small part of what the model would say.",
    )


def _remark(found: dict) -> str:
    if not found["reads"]:
        return found.get("reason", "")
    if found["mass"] is None:
        return "both trial readings failed"
    return "WARNING: below half" if found["mass"] < LOW_MASS else ""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def calls(results: RunResults) -> Table:
    """What the last commands asked."""
    columns = (
        Column("model", "model"),
        Column("verb", "command"),
        Column("calls", "calls", ",d"),
        Column("known", "answers from the ledger", ",d"),
        Column("prompt_tokens", "prompt tokens", ",d"),
        Column("completion_tokens", "completion tokens", ",d"),
        Column("seconds", "seconds", ",.1f"),
        Column("failed", "failed"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m, found in _asked(results):
        for verb, tally in found.calls.items():
            figures = [tally[c.key] for c in columns[2:-1]]
            failed = ", ".join(f"{n:,} {kind}" for kind, n in tally["failed"].items())
            rows.append((found.label(m.name), verb, *figures, failed or "none"))
    return Table(
        "calls",
        "Calls of language models",
        columns,
        tuple(rows),
        "Of the last command of each kind: what an interrupted command, or a worker's share, had asked is"
        " among the answers from the ledger. Tokens: the whole prompt each time. Seconds: spent in calls."
        " Failed: by kind, among all outcomes, those from the ledger too.",
    )


def _asked(results: RunResults) -> Sequence[tuple[ModelResults, ResultSet]]:
    return [(m, found) for m in results.models for found in m.with_model]
