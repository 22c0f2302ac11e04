"""Tables about language models: scores compared with those without one, probe calls, and calls."""

from collections.abc import Sequence

from cratelm.llm.probe import LOW_MASS, ProbeResult
from cratelm.records import CHANCE, METRICS, Control, Metric, NeuronKey
from cratelm.report.cells import (
    DERIVED_NULLS,
    INTERVAL_NOTE,
    METRIC_NAMES,
    derived_kinds,
    mean_cell,
    without_score,
)
from cratelm.results.run_results import ModelResults, ResultSet, RunResults
from cratelm.runs.names import NullKind
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
    """Return a row per explainer and scorer, restricted to the neurons for which a language model was used."""
    others = derived_kinds(results)
    columns = (
        Column("model", "model"),
        Column("metric", "scorer"),
        Column("explainer", "explainer"),
        Column("neurons", "neurons", ",d"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("chance", "chance", ".0f"),
        Column("init", "random init", ".1f"),
        *(Column(kind, DERIVED_NULLS[kind][0], ".1f") for kind in others),
        Column("none", "undefined / dead / failed"),
        Column("count_zero", "mean, these counted as chance", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m in results.models:
        kinds: tuple[NullKind, ...] = ("init", *others)
        nulls = [results.null(m, kind) for kind in kinds]
        for sample in _samples(m):
            rows += _rows(m, nulls, _Restricted(m, sample, resamples, seed))
    return Table(
        "side_by_side",
        "Scores on the same neurons",
        columns,
        tuple(rows),
        "Rows of one model with the same number of neurons refer to the same neurons, those for which a language"
        " model was used. If only some of these have scores without a language model, additional rows refer to"
        " those. Every mean is over these neurons only. Top-and-random, random-only and Anthropic: correlation"
        " × 100 of simulated with true activations. Detection, fuzzing and embedding: area under the ROC curve"
        " × 100; hard negatives: texts with the same token, on which the neuron is silent; intruder: trials won × 100. Chance: the score of an explanation without information. Shuffled:"
        " each neuron is scored with the explanation of another neuron of the layer; the intruder scorer uses no"
        " explanation, so its shuffled score repeats the same trials. Random init: the untrained model with the"
        " same explainer, on the neurons of the same layer and index if they were scored, else on its own"
        f" sample.{''.join(DERIVED_NULLS[kind][1] for kind in others)} {INTERVAL_NOTE}",
    )


class _Restricted:
    """Statistics of one model, restricted to a sample of its neurons."""

    def __init__(self, m: ModelResults, sample: frozenset[NeuronKey], resamples: int, seed: int):
        self.model, self.sample = m, sample
        self.resamples, self.seed = resamples, seed
        neurons = {of_set.name: of_set.neurons for of_set in m.sets if len(of_set.scores)}
        self.sets = [s for s in m.sets if len(s.scores) and neurons[s.name] >= sample]
        same = [of_set for of_set in self.sets if neurons[of_set.name] == sample]
        self._as_written = {e for of_set in same for e in of_set.explainers}
        self._scores = {
            e: of_set.scores.select(explainer=e).of_neurons(sample)
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
        """Return the statistics that `cratelm score` wrote if they cover exactly this sample, else compute them.

        None if the explainer has no such scores.
        """
        if explainer in self._as_written:
            return self.model.find(explainer, metric, control, policy)
        scores = self._scores.get(explainer)
        if scores is None or not len(scores.select(metric=metric, control=control)):
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
    m: ModelResults, nulls: Sequence[ModelResults | None], sample: _Restricted
) -> list[tuple[Cell, ...]]:
    """Return the rows of one sample by metric, explainers without a language model first."""
    explainers = [e for of_set in sample.sets for e in of_set.explainers]
    restricted = [
        _Restricted(null, sample.sample, sample.resamples, sample.seed) if null else None
        for null in nulls
    ]
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
                *(mean_cell(_of_null(null, explainer, metric)) for null in restricted),
                without_score(own.counts),
                mean_cell(sample.find(explainer, metric, policy="count_zero")),
            )
            rows.append(row)
    return rows


def _of_null(null: _Restricted | None, explainer: str, metric: Metric) -> ModelStatistics | None:
    """Return the statistics of a null control on the same neurons, else on its own sample; None without any."""
    if null is None:
        return None
    return null.find(explainer, metric) or null.model.find(explainer, metric)


def _samples(m: ModelResults) -> list[frozenset[NeuronKey]]:
    """Return the samples of neurons to compare, each once, the largest first.

    These are the neurons for which a language model was used, and those of them that also have scores
    without one.
    """
    with_llm = {of_set.neurons for of_set in m.llm_sets if len(of_set.scores)}
    without = {of_set.neurons for of_set in m.sets if len(of_set.scores) and not of_set.name}
    samples = with_llm | {sample & other for sample in with_llm for other in without} - {
        frozenset()
    }
    return sorted(samples, key=lambda neurons: (-len(neurons), sorted(neurons)))


def probe_table(results: RunResults) -> Table:
    """Return how activation levels are read from each language model."""
    columns = (
        Column("model", "model"),
        Column("read", "how levels are read"),
        Column("levels", "levels"),
        Column("tokens_of_ten", 'tokens of "10"', "d"),
        Column("mass", "probability on the levels, %", ".0f"),
        Column("lowest_mass", "lowest at one token, %", ".0f"),
        Column("remark", "remark"),
    )
    rows: list[tuple[Cell, ...]] = []
    for of_set in _llm_sets(results):
        if p := of_set.preflight:
            method = "log-probabilities" if p.supports_logprobs else "JSON"
            shares = (_percent(p.mass), _percent(p.lowest_mass))
            levels = f"0 to {p.top_level}"
            rows.append((of_set.label, method, levels, p.tokens_of_ten, *shares, _remark(p)))
    return Table(
        "preflights",
        "How levels are read",
        columns,
        tuple(rows),
        'From two probe calls before scoring. A level must be a single token, so if "10" takes two tokens the'
        " levels end at 9. Probability on the levels: the fraction of the next-token probability that is on"
        f" levels; below {LOW_MASS:.0%}, the model would mostly answer something else.",
    )


def _remark(p: ProbeResult) -> str:
    if not p.supports_logprobs:
        return p.reason
    if p.mass is None:
        return "both probe calls failed"
    return "WARNING: below half" if p.mass < LOW_MASS else ""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def calls_table(results: RunResults) -> Table:
    """Return the number and cost of the calls that the last commands made to language models."""
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
            counts = [getattr(tally, c.key) for c in columns[2:-1]]
            failed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(tally.failed.items()))
            rows.append((of_set.label, verb, *counts, failed or "none"))
    return Table(
        "calls",
        "Calls of language models",
        columns,
        tuple(rows),
        "Counts are of the last command of each kind: calls of an interrupted command or of other workers count"
        " as answers from the ledger. Prompt tokens: the whole prompt of every call. Seconds: time spent in calls."
        " Failed: by kind, among all results including those from the ledger.",
    )


def _llm_sets(results: RunResults) -> list[ResultSet]:
    return [of_set for m in results.models for of_set in m.llm_sets]
