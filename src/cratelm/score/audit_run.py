"""Audit of metrics on a run: which of them notice that the explanations are half missing, or twice too broad?

    missing labels   half of the single tokens of each look-up table or trie, drawn at random, are dropped, with all
                     contexts that end in them
    extra labels     as many single tokens as an explanation has are added from that of another neuron of the layer (the
                     donor of the shuffled control), with their contexts; their values are rescaled, so that the
                     donor's highest becomes the neuron's highest

A metric notices a change if the mean over neurons falls by more than 0.001 of its range, by its whole 95% interval.

Memory: the explanations of one layer, and the figures of all neurons.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.store import ExplanationSource, Kind, StoredExplanation
from cratelm.explain.trie import ROOT
from cratelm.records import CORRELATIONS, Explanation, NeuronId, NeuronScore
from cratelm.score.audit import FALL, Change
from cratelm.score.contexts import Nodes
from cratelm.score.controls import shuffled
from cratelm.score.simulators import TOKEN_EXPLAINERS
from cratelm.score.whole_records import FIGURES, WholeScore
from cratelm.stats.layers import LayeredMean, layered_mean
from cratelm.text.table import align

Payload = Mapping[str, Any]
_COLUMNS = ("tokens", "values", "counts", "parents")
AUDITED = tuple(name for name in FIGURES if not name.startswith("chance"))
"""figures over all held-out tokens that an explanation can change"""
RANGES = {"correlation": 2.0, "cosine": 2.0}
"""highest minus lowest value of figures; 1 for all others"""


class ChangedExplanations:
    """The look-up tables and tries of a set, each with half of its labels missing, or as many added."""

    def __init__(self, source: ExplanationSource, change: Change, seed: int):
        """`seed` is that of the shuffled control, whose donors the extra labels are from."""
        self._source, self._seed = source, seed
        self._change: Change = change

    def kinds(self) -> Collection[Kind]:
        """Return all kinds in the set."""
        return {kind for kind in self._source.kinds() if kind[0] in TOKEN_EXPLAINERS}

    def of_layer(self, layer: int) -> Iterator[tuple[Kind, StoredExplanation]]:
        """Yield the changed explanations of a layer with their kinds."""
        by_kind: dict[Kind, dict[NeuronId, StoredExplanation]] = {}
        for kind, stored in self._source.of_layer(layer):
            if kind[0] not in TOKEN_EXPLAINERS:
                continue
            by_kind.setdefault(kind, {})[stored.neuron] = stored
        for kind, of_kind in by_kind.items():
            donors = shuffled(list(of_kind), self._seed)
            for neuron, stored in of_kind.items():
                donor = of_kind.get(donors.get(neuron, neuron))
                assert donor is not None
                yield kind, StoredExplanation(neuron, self._reader(stored, donor))

    def _reader(
        self, stored: StoredExplanation, donor: StoredExplanation
    ) -> Callable[[], Explanation]:
        change = self._change

        def read() -> Explanation:
            explanation = stored.read()
            rng = np.random.default_rng([self._seed, *explanation.neuron.key])
            payload = changed_payload(explanation.payload, donor.read().payload, change, rng)
            return replace(explanation, payload=payload)

        return read


def changed_payload(
    payload: Payload, donor: Payload, change: Change, rng: np.random.Generator
) -> dict[str, Any]:
    """Return a look-up table or trie with half of its single tokens missing, or with as many of another's added."""
    if change == "missing":
        roots = _single(payload)
        kept = rng.permutation(roots)[: len(roots) - len(roots) // 2]
        return {**payload, **_below(payload, kept)}
    own = {payload["tokens"][root] for root in _single(payload)}
    others = [root for root in _single(donor) if donor["tokens"][root] not in own]
    added = _below(donor, rng.permutation(np.array(others, np.int64))[: len(own)])
    default, reach = float(payload["default"]), _reach(payload)
    scale = reach / _reach(donor) if _reach(donor) > 0 else 0.0
    added["values"] = [default + scale * (v - float(donor["default"])) for v in added["values"]]
    n = len(payload["tokens"])
    if "parents" in payload:
        added["parents"] = [p if p == ROOT else p + n for p in added["parents"]]
    return {**payload, **{name: [*payload[name], *column] for name, column in added.items()}}


def _reach(payload: Payload) -> float:
    """Return how far the highest value is above the default."""
    return max(payload["values"], default=0.0) - float(payload["default"])


def _single(payload: Payload) -> NDArray[np.int64]:
    """Return the nodes that are single tokens."""
    parents = payload.get("parents")
    n = len(payload["tokens"])
    return np.arange(n) if parents is None else np.flatnonzero(np.asarray(parents, int) == ROOT)


def _below(payload: Payload, roots: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Return the columns of some single tokens and of all contexts that end in them."""
    kept = np.flatnonzero(np.isin(Nodes.of([payload]).roots, roots))
    number = np.full(len(payload["tokens"]) + 1, ROOT)  # the last is for `ROOT`, which is -1
    number[kept] = np.arange(len(kept))
    columns = {name: payload[name] for name in _COLUMNS if name in payload}
    found = {name: [column[i] for i in kept] for name, column in columns.items()}
    if "parents" in found:
        found["parents"] = number[np.asarray(found["parents"], int)].tolist()
    return found


@dataclass(frozen=True)
class RunAudit:
    """How a figure changes if the explanations of a run do."""

    explainer: str
    figure: str
    """a metric of `scores.parquet`, or a figure of `all_tokens.parquet`"""
    change: Change
    fell: float
    """share of neurons whose figure fell by more than 0.001 of its range"""
    delta: LayeredMean
    """change in parts of the range, paired over neurons"""

    @property
    def noticed(self) -> bool:
        """Return whether the whole interval of the mean change is a fall of more than 0.001 of the range."""
        mean = self.delta.mean
        return mean is not None and mean.high is not None and mean.high < -FALL


Figures = Mapping[tuple[str, str], Mapping[NeuronId, float]]
"""value of each neuron that has one, by explainer and figure"""


def figures_of(scores: Iterable[NeuronScore], whole: Iterable[WholeScore]) -> Figures:
    """Return the figures of the neurons' own explanations."""
    found: dict[tuple[str, str], dict[NeuronId, float]] = {}
    for score in scores:
        if score.control == "none" and score.score.value is not None:
            found.setdefault((score.explainer, score.metric), {})[score.neuron] = score.score.value
    for of in whole:
        if of.control == "none":
            for name in AUDITED:
                value = getattr(of, name)
                if value is not None:
                    found.setdefault((of.explainer, name), {})[of.neuron] = value
    return found


def compare(
    before: Figures, after: Figures, change: Change, *, resamples: int, seed: int
) -> list[RunAudit]:
    """Return the change of each figure, paired over neurons that have both values."""
    found = []
    for (explainer, figure), of in before.items():
        later = after.get((explainer, figure), {})
        both = sorted(set(of) & set(later))
        extent = RANGES.get(figure, 2.0 if figure in CORRELATIONS else 1.0)
        deltas = np.array([(later[n] - of[n]) / extent for n in both])
        layers = [n.layer for n in both]
        fell = float((deltas < -FALL).mean()) if len(deltas) else 0.0
        ends = both[0].n_ends if both else 1
        numbers = [n.index // ends for n in both] if ends > 1 else None
        mean = layered_mean(
            deltas, layers, numbers_in_layer=numbers, resamples=resamples, seed=seed
        )
        found.append(RunAudit(explainer, figure, change, fell, mean))
    return found


def table(audits: Sequence[RunAudit]) -> list[str]:
    """Return the audit as lines of text."""
    rows = [["explainer", "figure", "change", "mean delta", "neurons that fell", "noticed"]]
    for a in audits:
        mean = "none" if a.delta.mean is None else a.delta.mean.show("+.4f")
        cells = [a.explainer, a.figure, a.change, mean, f"{a.fell:.0%}"]
        rows.append([*cells, "yes" if a.noticed else "no"])
    return align(rows, [False, False, False, True, True, False])
