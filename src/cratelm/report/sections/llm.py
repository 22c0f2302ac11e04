"""Tables about language models: their scores next to those without one, trial calls, and calls."""

from cratelm.llm.probe import LOW_MASS, ProbeResult
from cratelm.records import CHANCE, METRICS, Control, Metric, NeuronKey
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, mean_cell, without_score
from cratelm.results.run_results import ModelResults, ResultSet, RunResults
from cratelm.stats.scores import ModelStatistics, Policy, model_statistics
from cratelm.text.table import Cell, Column, Table


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the tables of this section."""
    return [
        side_by_side_table(results, resamples, seed),
        probe_table(results),
        calls_table(results),
    ]


def side_by_side_table(results: RunResults, resamples: int, seed: int) -> Table:
    """Return a row per explainer and scorer, on the neurons that a language model was asked about."""
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
        "Rows of one model with the same number of neurons are of the same neurons: those that a language"
        " model was asked about. If only some of these have scores without a language model, further rows"
        " are of those. Every mean is taken over these neurons alone. Top-and-random, random-only and"
        " Anthropic: correlation × 100 of simulated with true activations. Detection, fuzzing and"
        " embedding: area under the ROC curve × 100; intruder: trials won × 100. Chance: the score of an"
        " explanation that says nothing. Shuffled: explanations dealt to other neurons of the layer; the"
        " intruder scorer shows no explanation, so there it is the same trials once more. Random init: the"
        " untrained model under the same explainer, on the neurons of the same layer and index if they"
        f" were scored, else on its own sample. {INTERVAL_NOTE}",
    )


class _Restricted:
    """Statistics of one model over some of its neurons."""

    def __init__(self, m: ModelResults, sample: frozenset[NeuronKey], resamples: int, seed: int):
        self.model, self.sample = m, sample
        self.resamples, self.seed = resamples, seed
        neurons = {of_set.name: of_set.neurons for of_set in m.sets if of_set.scores}
        self.sets = [s for s in m.sets if s.scores and neurons[s.name] >= sample]
        same = [of_set for of_set in self.sets if neurons[of_set.name] == sample]
        self._as_written = {e for of_set in same for e in of_set.explainers}
        self._scores = {
            e: [s for s in of_set.scores if s.explainer == e and s.neuron.key in sample]
            for of_set in self.sets
            for e in of_set.explainers
        }

    def find(
        self,
        explainer: str,
        metric: Metric,
        control: Control = "none",
        policy: Policy = "leave_out",
    ) -> ModelStatistics | None:
        """Return what `cratelm score` wrote if it is of the very same neurons, else compute it."""
        if explainer in self._as_written:
            return self.model.find(explainer, metric, control, policy)
        scores = self._scores.get(explainer, [])
        if not any((s.metric, s.control) == (metric, control) for s in scores):
            return None
        return model_statistics(
            scores,
            explainer=explainer,
            metric=metric,
            control=control,
            policy=policy,
            resamples=self.resamples,
            seed=self.seed,
        )


def _rows(
    m: ModelResults, null: ModelResults | None, sample: _Restricted
) -> list[tuple[Cell, ...]]:
    """Explainers without a language model first."""
    explainers = [e for of_set in sample.sets for e in of_set.explainers]
    untrained = _Restricted(null, sample.sample, sample.resamples, sample.seed) if null else None
    rows: list[tuple[Cell, ...]] = []
    for metric in METRICS:
        for explainer in explainers:
            own = sample.find(explainer, metric)
            if own is None:
                continue
            row: tuple[Cell, ...] = (
                m.name,
                METRIC_NAMES[metric],
                explainer,
                own.counts.total,
                mean_cell(own),
                mean_cell(sample.find(explainer, metric, "shuffled")),
                100 * CHANCE[metric],
                mean_cell(_init(null, untrained, explainer, metric)),
                without_score(own.counts),
                mean_cell(sample.find(explainer, metric, policy="count_zero")),
            )
            rows.append(row)
    return rows


def _init(
    null: ModelResults | None, untrained: _Restricted | None, explainer: str, metric: Metric
) -> ModelStatistics | None:
    if null is None or untrained is None:
        return None
    return untrained.find(explainer, metric) or null.find(explainer, metric)


def _samples(m: ModelResults) -> list[frozenset[NeuronKey]]:
    """The neurons that a language model was asked about, and those of them that the set without one has
    where it has not all; each sample once, the largest first."""
    asked = {of_set.neurons for of_set in m.llm_sets if of_set.scores}
    without = {of_set.neurons for of_set in m.sets if of_set.scores and not of_set.name}
    samples = asked | {sample & other for sample in asked for other in without} - {frozenset()}
    return sorted(samples, key=lambda neurons: (-len(neurons), sorted(neurons)))


def probe_table(results: RunResults) -> Table:
    """Return how levels are read of each language model."""
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
    for of_set in _llm_sets(results):
        if p := of_set.preflight:
            how = "log-probabilities" if p.supports_logprobs else "JSON"
            shares = (_percent(p.mass), _percent(p.lowest_mass))
            levels = f"0 to {p.top_level}"
            rows.append((of_set.label, how, levels, p.tokens_of_ten, *shares, _remark(p)))
    return Table(
        "preflights",
        "How levels are read",
        columns,
        tuple(rows),
        'From two trial calls before the scoring. A level must be one token, so if "10" takes two the'
        " levels run to 9. Probability on the levels: the share of the next token's probability that falls"
        f" on them; below {LOW_MASS:.0%} the model would mostly answer something else.",
    )


def _remark(p: ProbeResult) -> str:
    if not p.supports_logprobs:
        return p.reason
    if p.mass is None:
        return "both trial calls failed"
    return "WARNING: below half" if p.mass < LOW_MASS else ""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def calls_table(results: RunResults) -> Table:
    """Return how much the last commands asked language models."""
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
    for of_set in _llm_sets(results):
        for verb, tally in of_set.calls.items():
            figures = [getattr(tally, c.key) for c in columns[2:-1]]
            failed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(tally.failed.items()))
            rows.append((of_set.label, verb, *figures, failed or "none"))
    return Table(
        "calls",
        "Calls of language models",
        columns,
        tuple(rows),
        "Of the last command of each kind: calls of an interrupted command, or of other workers, count as"
        " answers from the ledger. Tokens: the whole prompt each time. Seconds: spent in calls. Failed: by"
        " kind, among all outcomes including those from the ledger.",
    )


def _llm_sets(results: RunResults) -> list[ResultSet]:
    return [of_set for m in results.models for of_set in m.llm_sets]
