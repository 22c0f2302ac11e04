"""Frozen records that the rooms exchange; rooms pass nothing else to each other.

Shape legend: n tokens of an excerpt, N tokens of a corpus split, H neurons of a layer.
Units: an *activation* is the raw value of a neuron at one token; a *level* is the integer 0..10
that a language model sees (`levels`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

Split = Literal["train", "fit", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "fit", "held_out")
"""`train` trains the model, `fit` explains its neurons, `held_out` scores the explanations.
A document belongs to exactly one, by the hash of its text."""

ExcerptKind = Literal["top", "random", "openai_bin", "anthropic_bin", "out_of_context"]
EXCERPT_KINDS: tuple[ExcerptKind, ...] = (
    "top",
    "random",
    "openai_bin",
    "anthropic_bin",
    "out_of_context",
)

Metric = Literal[
    "top_and_random",
    "random_only",
    "anthropic",
    "all_tokens_estimate",
    "detection",
    "detection_hard",
    "fuzzing",
    "fuzzing_hard",
    "intruder",
    "embedding",
]
SIMULATION_METRICS: tuple[Metric, ...] = ("top_and_random", "random_only", "anthropic")
"""metrics of the paper: correlation of simulated with true activations"""
CORRELATIONS: tuple[Metric, ...] = (*SIMULATION_METRICS, "all_tokens_estimate")
"""all metrics that are computed from a simulation"""
HARD_METRICS: dict[Metric, Metric] = {"detection": "detection_hard", "fuzzing": "fuzzing_hard"}
"""metrics with other negatives: texts that carry the same token, on which the neuron is silent there"""
METRICS: tuple[Metric, ...] = get_args(Metric)
"""these metrics, and those from the literature, which need a language model but no simulation"""
CHANCE: dict[Metric, float] = {
    "top_and_random": 0.0,
    "random_only": 0.0,
    "anthropic": 0.0,
    "all_tokens_estimate": 0.0,
    "detection": 0.5,
    "detection_hard": 0.5,
    "fuzzing": 0.5,
    "fuzzing_hard": 0.5,
    "intruder": 0.2,
    "embedding": 0.5,
}
"""score of an uninformative explanation under each metric"""

Control = Literal["none", "shuffled", "constant"]
CONTROLS: tuple[Control, ...] = ("none", "shuffled", "constant")
"""`none`: the neuron's own explanation; `shuffled`: that of another neuron of its layer; `constant`: a
simulation that is the same at every token, whose correlation is undefined by construction"""
CONTROLS_WITHOUT_SIMULATION: tuple[Control, ...] = ("none", "shuffled")
"""the controls of metrics that compute no simulation"""

EvidenceKind = Literal["top", "anthropic"]
"""excerpts that a language model explains from. A new kind also needs an entry in `evidence_for`, in
`explain/config.py`, in `explain/llm_explainer.py` and in `report/llm_explanations.py`"""


def evidence_for(metric: Metric) -> EvidenceKind:
    """Return what a language model's explanation is made from so that `metric` may score it.

    `anthropic`, the whole range of activations, for the metric of that name; else `top`, the strongest
    excerpts. As in the paper, each metric has an explanation from its own kind of excerpts.
    """
    return "anthropic" if metric == "anthropic" else "top"


MAX_LEVEL = 10
"""highest integer level that a language model sees"""


def levels(activations: ArrayLike, max_activation: float) -> NDArray[np.int64]:
    """Return the integers 0..10 that a language model sees: min(10, floor(10 relu(a) / max)).

    This is the discretisation of Bills et al. (2023). All levels are 0 if `max_activation` is not above
    0. Raises `InputError` for a value that is not finite.
    """
    raw = np.asarray(activations, dtype=np.float64)
    if not (np.isfinite(raw).all() and np.isfinite(max_activation)):
        raise InputError("activations contain NaN or infinity: all values must be finite")
    if max_activation <= 0:
        return np.zeros(raw.shape, dtype=np.int64)
    with np.errstate(over="ignore"):  # infinity becomes level 10, too
        scaled = np.floor(MAX_LEVEL * np.maximum(raw, 0) / max_activation)
    return np.minimum(MAX_LEVEL, scaled).astype(np.int64)


BOTH_ENDS = ":both"
"""end of the name of a site at whose neurons both signs count. Neuron i then has two ends, which are explained and
scored by themselves: `i+` has index 2 i and the activation max(a, 0), `i-` has index 2 i + 1 and max(-a, 0)"""
ENDS = ("+", "-")


END_WORDS = ("plus", "minus")
"""names of the ends where a sign cannot stand, such as in folders of exports"""


def has_both_ends(site: str) -> bool:
    """Return whether the indices of a site called `site` count ends of neurons and not neurons."""
    return site.endswith(BOTH_ENDS)


def neuron_name(index: int, site: str) -> str:
    """Return how a neuron of a site is written: `17`, or `17+` and `17-` for indices 34 and 35 of a site with both ends."""
    return f"{index // 2}{ENDS[index % 2]}" if has_both_ends(site) else str(index)


def named_index(name: str, site: str) -> int:
    """Return the index of the neuron of a site that is written as `name`; `17` is `17+` at a site with both ends.

    Raises `InputError` for any other form, and for an end of a neuron that has only one.
    """
    match = re.fullmatch(r"([0-9]{1,9})([+-]?)", name)
    if match is None:
        raise InputError(
            f"neuron {name[:40]!r}: write a number such as 17, or one of its ends, 17+ or 17-"
        )
    number, end = int(match[1]), match[2]
    if has_both_ends(site):
        return 2 * number + ENDS.index(end or "+")
    if end:
        raise InputError(
            f"neuron {name}: the neurons of site {site} have one end, so write {number}"
        )
    return number


class NeuronKey(NamedTuple):
    """A neuron within one site of one model: layer and index, both from 0."""

    layer: int
    index: int  # type: ignore[assignment]  (hides tuple.index, which a key does not need)

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"


def parse_neuron_ids(option: str, texts: Iterable[str], site: str | None = None) -> list[NeuronKey]:
    """Return the neurons of a site named by texts such as `0:17`, sorted and without duplicates.

    On a site with both ends `0:17+` and `0:17-` name one end each, and `0:17` names both. Without a `site` only the
    form is checked, and the keys hold the numbers as written. Raises `InputError`, which names `option`, for any
    form other than LAYER:INDEX, with or without an end, and for an end of a neuron that has only one.
    """
    keys = set()
    for text in texts:
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})([+-]?)", text)
        if match is None:
            raise InputError(
                f"{option} {text}: write a neuron as LAYER:INDEX, such as 0:17 (one of its ends: 0:17+ or 0:17-)"
            )
        layer, index, end = int(match[1]), int(match[2]), match[3]
        if site is not None and has_both_ends(site):
            ends = [ENDS.index(end)] if end else [0, 1]
            keys |= {NeuronKey(layer, 2 * index + number) for number in ends}
        elif site is not None and end:
            raise InputError(
                f"{option} {text}: the neurons of site {site} have one end here: type {layer}:{index}, or harvest"
                " them with --polarity both"
            )
        else:
            keys.add(NeuronKey(layer, index))
    return sorted(keys)


def names_an_end(texts: Iterable[str]) -> bool:
    """Return whether one of the texts names one end of a neuron: `0:17+` or `0:17-`."""
    return any(text.endswith(ENDS) for text in texts)


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95% interval; the field or the caller says over what."""

    value: float
    low: float | None
    """None if there is no interval, as for a single value"""
    high: float | None
    n: int | None = None
    """number of values that the figure is the mean of; None if not recorded"""

    def show(self, form: str) -> str:
        """Return the figure and its bounds in a format such as `.2f`."""
        if self.low is None or self.high is None:
            return format(self.value, form)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def in_words(self, form: str, scale: float = 1) -> str:
        """Return the figure and its bounds, times `scale`, in words and a format such as `.1f`: 1.0 (0.5 to 1.5)."""
        value = format(scale * self.value, form)
        if self.low is None or self.high is None:
            return value
        low, high = sorted((scale * self.low, scale * self.high))  # a negative scale swaps them
        return f"{value} ({low:{form}} to {high:{form}})"


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; the field or the caller says over what."""

    value: float
    error: float | None
    """at least 0; None if there is none, as for a single document"""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a negative standard error."""
        if self.error is not None and self.error < 0:
            raise ValueError(f"the standard error is {self.error}: it must be at least 0")

    def show(self, form: str) -> str:
        """Return the figure and its error in a format such as `.4f` or `.2%`."""
        value = format(self.value, form)
        if self.error is None:
            return value
        return f"{value} ± {format(self.error, form.removeprefix('+')).removesuffix('%')}"


@dataclass(frozen=True, order=True)
class NeuronId:
    """A neuron: coordinate `index` of site `site` in layer `layer` (both from 0) of `model`."""

    model: str
    """name of the model in its run, such as `crate-2l`"""
    site: str
    """where in the layer the neuron lives: `ista`, `mssa`, `mlp` or a module path; it ends in `:both` if both ends of
    the neurons count"""
    layer: int
    index: int
    """from 0; at a site with both ends 2 i is the end `i+`, and 2 i + 1 the end `i-`"""

    @property
    def name(self) -> str:
        """Return how the neuron is written within its layer: `17`, or `17+` and `17-` for the ends of neuron 17."""
        return neuron_name(self.index, self.site)

    @property
    def number(self) -> int:
        """Return the number of the neuron among the activations of its layer: 17 for both `17+` and `17-`."""
        return self.index // self.n_ends

    @property
    def end(self) -> int:
        """Return 0 for the end `+`, or if the neuron has one end, and 1 for the end `-`."""
        return self.index % self.n_ends

    @property
    def n_ends(self) -> int:
        """Return the number of ends that the neurons of the site have: 1 or 2."""
        return 2 if has_both_ends(self.site) else 1

    @property
    def opposite(self) -> "NeuronId | None":
        """Return the other end of the same neuron; None at a site whose neurons have one end."""
        if not has_both_ends(self.site):
            return None
        return NeuronId(self.model, self.site, self.layer, self.index ^ 1)

    @property
    def key(self) -> NeuronKey:
        """Return layer and index, which identify the neuron within its model and site."""
        return NeuronKey(self.layer, self.index)

    def __str__(self) -> str:
        return f"{self.model}/{self.site}.{self.layer}.{self.name}"


@dataclass(frozen=True, eq=False)
class Excerpt:
    """A stretch of one document, within one sequence, with one neuron's activation at each token."""

    kind: ExcerptKind
    rank: int
    """rank within its kind (and bin): for `top`, 0 is the strongest; for other kinds, the order of drawing"""
    bin: int
    """bin that it was drawn from, -1 if the kind has no bins"""
    token_ids: IntArray
    """[n]"""
    activations: FloatArray
    """[n], raw activations"""
    peak: int
    """offset, within the excerpt, of the token that it was chosen for"""
    document: int
    """ordinal of the document in the run's shards (`tokens/documents.parquet`)"""
    position: int
    """position, in tokens within the split, of the token that it was chosen for"""

    def __len__(self) -> int:
        return len(self.token_ids)

    def narrowed(self, before: int, after: int) -> "Excerpt":
        """Return the `before` tokens before the peak and `after` tokens from it on, peak included."""
        start, stop = max(0, self.peak - before), min(len(self), self.peak + after)
        return Excerpt(
            kind=self.kind,
            rank=self.rank,
            bin=self.bin,
            token_ids=self.token_ids[start:stop],
            activations=self.activations[start:stop],
            peak=self.peak - start,
            document=self.document,
            position=self.position,
        )


HISTOGRAM_BINS = 64
"""number of equal bins in a neuron's histogram"""
OPENAI_QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
"""quantiles that bound the bins of the OpenAI metrics (Bills et al. 2023, as used in arXiv 2410.16443)"""
ANTHROPIC_BINS = 12
"""number of equal bins of the activation range (Bricken et al. 2023)"""


@dataclass(frozen=True, eq=False)
class NeuronSummary:
    """Statistics of one neuron over the tokens of a split."""

    neuron: NeuronId
    n_tokens: int
    """number of tokens searched"""
    mean: float
    variance: float
    """population variance, raw activation squared"""
    skew: float
    """standardised third moment; NaN if the variance is 0"""
    kurtosis: float
    """standardised fourth moment (3 for a normal distribution); NaN if the variance is 0"""
    firing_rate: float
    """fraction of tokens on which the neuron fires: see `firing_threshold`"""
    maximum: float
    histogram: NDArray[np.int64]
    """[64] counts over equal bins between `histogram_low` and `histogram_high`; the outer bins also count values beyond"""
    histogram_low: float
    histogram_high: float
    openai_edges: FloatArray
    """[6] raw activations at the quantiles 0, .5, .9, .99, .999, 1 of a pilot sample"""
    anthropic_edges: FloatArray
    """[13] edges of 12 equal bins of the activation range of a pilot sample"""
    openai_counts: NDArray[np.int64] | None = None
    """[5] number of tokens in each bin between `openai_edges`; the outer bins also count values beyond. None if unknown, as
    for harvests by older versions"""
    firing_threshold: float | None = None
    """lowest activation that counts as firing: the largest power of two that is at most a tenth of `maximum`. None: the
    neuron fires wherever it is above 0, since its activations are exactly 0 elsewhere"""
    opposite_maximum: float | None = None
    """`maximum` of the other end of the same neuron; None at a site whose neurons have one end"""

    @property
    def silent(self) -> bool:
        """Return True if the activation was never above 0 on the tokens searched, so that there is nothing to explain."""
        return self.maximum <= 0

    @property
    def dead(self) -> bool:
        """Return True if the neuron never fired on the tokens searched: at a site with both ends, at neither of them."""
        return self.silent and not (self.opposite_maximum or 0) > 0


@dataclass(frozen=True, eq=False)
class NeuronRecord:
    """One neuron as harvested from one split: its statistics and its excerpts."""

    summary: NeuronSummary
    excerpts: Sequence[Excerpt]
    """sorted by kind, bin and rank"""

    @property
    def neuron(self) -> NeuronId:
        """Return the neuron that the record is about."""
        return self.summary.neuron

    def of_kind(self, kind: ExcerptKind) -> tuple[Excerpt, ...]:
        """Return the excerpts of one kind, sorted by bin and rank."""
        return tuple(e for e in self.excerpts if e.kind == kind)


@dataclass(frozen=True, eq=False)
class Explanation:
    """An explainer's account of a neuron, readable by people and by the simulator of the same name."""

    neuron: NeuronId
    explainer: str
    """`lookup`, `trie`, `concepts`, `lookup+concepts`, or the name of a language model"""
    text: str
    """a sentence, for people and for language models that simulate from it: the claim, then its evidence"""
    payload: dict[str, object]
    """exactly what the simulator needs, as JSON, so that it can be read, stored and shared"""
    documents: tuple[int, ...]
    """ordinals of the documents that the explainer saw, for the leakage audit"""
    claim_variance: float | None = None
    """fraction of the variance over the fit evidence that the claim in `text` explains; None if it was not measured"""

    @property
    def evidence(self) -> str:
        """Return the `EvidenceKind` it was made from; empty if one explanation serves all metrics."""
        return str(self.payload.get("evidence", ""))

    def serves(self, metric: Metric) -> bool:
        """Return whether `metric` may score this explanation."""
        return self.evidence in ("", evidence_for(metric))


class Status(StrEnum):
    """Whether a score has a value, and if not, why. The four are counted separately and never merged."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    """the correlation does not exist: the truth or the simulation is constant"""
    DEAD = "dead"
    """the neuron never fired on the split, so there is nothing to explain or to score"""
    FAILED = "failed"
    """the explainer or the simulator did not answer, or answered about too few excerpts"""


@dataclass(frozen=True)
class Score:
    """How well an explanation predicts a neuron on held-out excerpts."""

    value: float | None
    """None if there is none. Simulation: Pearson correlation pooled over all tokens, -1..1.
    Detection, fuzzing, embedding: area under the ROC curve, 0..1 (of yes-or-no answers: their balanced
    accuracy). Intruder: fraction of trials won, 0..1"""
    status: Status = Status.DEFINED
    reason: str = ""
    """why there is no value, in words; empty if there is one"""
    r2: float | None = None
    """1 - mean squared error / mean squared truth, uncalibrated as in OpenAI's published scorer"""
    absolute_deviation: float | None = None
    """1 - mean absolute error / mean absolute truth, likewise"""
    accuracy: float | None = None
    """detection and fuzzing: balanced accuracy of the answer that the model considered more likely, 0..1"""
    n_tokens: int = 0
    n_records: int = 0
    n_failed: int = 0
    """number of further records whose call to a language model failed, and which are left out"""
    n_duplicates: int = 0
    """number of these records that are near-duplicates of text that the explainer saw"""
    without_duplicates: float | None = None
    """the value over the other records; None if it does not exist or there are no duplicates"""
    low: float | None = None
    """bounds of the 95% interval over the draws of excerpts: `all_tokens_estimate` alone"""
    high: float | None = None


@dataclass(frozen=True)
class NeuronScore:
    """A score with the neuron, explainer, metric and control that it belongs to."""

    neuron: NeuronId
    explainer: str
    """label in tables: the explainer, `/` and the simulator if another language model read the
    explanation, and the variant; for display and comparison, never to be parsed"""
    metric: Metric
    control: Control
    """`none`: the neuron's own explanation; otherwise the null control"""
    score: Score
    documents: tuple[int, ...] = field(default=())
    """ordinals of the documents of the excerpts scored, for the leakage audit"""
    explained_by: str = ""
    """the explainer whose explanation was read: `Explanation.explainer`"""
    simulator: str = ""
    """name of the language model that read it; empty if the explainer's own simulator did"""
    variant: str = ""
    """variant of the simulation, if there are several: empty, or `+paper-compat`"""
