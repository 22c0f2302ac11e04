"""Records that the pages show. Text is as in the corpus: pages make it visible and escape it.

Units: scores are x 100; activations are raw values of the neuron.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cratelm.errors import InputError
from cratelm.records import ExcerptKind, Interval, Split
from cratelm.runs.names import twin_name

ExcerptChoice = Literal["some", "all", "top"]
"""excerpts of a neuron: the first of each kind and bin, all, or the first of the strongest"""


class NotFound(InputError):
    """A run, model, layer or neuron that does not exist."""


@dataclass(frozen=True)
class MetricCard:
    """One model under one metric, its principal explainer."""

    metric: str
    mean: Interval | None
    by_layer: Mapping[int, Interval]
    shuffled: Interval | None
    """null: explanations dealt to other neurons"""
    defined: int
    undefined: int
    dead: int
    failed: int


@dataclass(frozen=True)
class ModelCard:
    """One model of a run, for the overview."""

    name: str
    family: str
    """`crate`, `gpt2`, or empty"""
    site: str
    neurons: Mapping[int, int]
    """H of each layer, by its number"""
    null_of: str
    """the model whose untrained null control this is; empty for others"""
    parameters: int | None
    loss: float | None
    """validation loss, nats per token"""
    loss_error: float | None
    explainer: str
    """whose scores are shown; empty where there are none"""
    metrics: tuple[MetricCard, ...]
    firing: Mapping[int, float]
    """mean firing rate of a layer, 0 to 1, held-out"""
    dead: Mapping[int, int]
    """neurons of a layer never above 0, held-out"""
    missing: tuple[str, ...]
    """what a full run would have, with the command that makes it"""
    stale: tuple[str, ...] = ()
    """what is not of today's inputs, with the command that makes it again"""

    def metric(self, name: str) -> MetricCard | None:
        """Return the figures under a metric; None where the model was not scored by it."""
        return next((m for m in self.metrics if m.metric == name), None)


@dataclass(frozen=True)
class RunCard:
    """One run, for the overview."""

    key: str
    """its name in addresses"""
    path: str
    models: tuple[ModelCard, ...]
    problems: tuple[str, ...]
    """files that cannot be read"""

    def model(self, name: str) -> ModelCard:
        """Return the card of a model. Raises `NotFound` if the run has none of it."""
        for card in self.models:
            if card.name == name:
                return card
        names = ", ".join(c.name for c in self.models) or "none"
        raise NotFound(f"{self.key} has no harvest of {name}: it has {names}")

    def null(self, card: ModelCard) -> ModelCard | None:
        """Return the untrained null control of a model; None if there is none."""
        return next((c for c in self.models if c.null_of == card.name), None)

    def twin(self, name: str) -> str:
        """Return the harvested model of the same size of the other family; empty if there is none."""
        twin = twin_name(name)
        return twin if any(c.name == twin and c.neurons for c in self.models) else ""


@dataclass(frozen=True)
class LayerQuery:
    """Which neurons of a layer, in which order."""

    sort: str = ""
    """`index`, `firing_rate`, `maximum`, `token` or a metric; empty: the best explained first"""
    descending: bool = False
    text: str = ""
    """words that the explanation must contain"""
    token: str = ""
    """a token that the neuron must fire on"""
    only: Literal["all", "explained", "alive", "dead"] = "all"
    page: int = 1
    per_page: int = 100


@dataclass(frozen=True)
class NeuronRow:
    """One line of a layer's table."""

    index: int
    explanation: str
    scores: Mapping[str, float | None]
    """by metric; None where there is no value"""
    status: Mapping[str, str]
    firing_rate: float
    maximum: float
    on_token: float | None = None
    """mean activation on the token searched for, as a fraction of the neuron's maximum"""

    @property
    def dead(self) -> bool:
        """Return whether the neuron never fired on the held-out split."""
        return self.maximum <= 0


@dataclass(frozen=True)
class LayerPage:
    """One page of the table of a layer."""

    model: str
    layer: int
    rows: tuple[NeuronRow, ...]
    total: int
    """neurons that match"""
    n_neurons: int
    query: LayerQuery
    metrics: tuple[str, ...]
    explainer: str
    note: str = ""


@dataclass(frozen=True)
class ScoreHistogram:
    """Distribution of the scores of a layer under one metric."""

    metric: str
    mean: Interval | None
    defined: int
    neurons: int
    """that were to be scored"""
    shares: tuple[float, ...]
    """fraction of those defined in each of several equal bins from 0 to 100; below 0 counts in the first"""


class ShadedToken(NamedTuple):
    """One token of an excerpt. A tuple, since a page has thousands and a dataclass takes three times as long."""

    text: str
    value: float
    """raw activation"""
    level: int
    """0 to 10 of the neuron's largest activation among the excerpts shown"""


@dataclass(frozen=True)
class ExcerptView:
    """One excerpt with true and simulated activations."""

    kind: ExcerptKind
    bin: int
    rank: int
    peak: int
    """offset of the token that it was chosen for"""
    document: str
    """name of the document"""
    true: tuple[ShadedToken, ...]
    simulated: tuple[ShadedToken, ...]
    """empty where no simulator ran"""

    def plain(self) -> dict[str, Any]:
        """Return JSON values: tokens, true and simulated activations as lists, to six digits."""
        return {
            "kind": self.kind,
            "bin": self.bin,
            "rank": self.rank,
            "peak": self.peak,
            "document": self.document,
            "tokens": [t.text for t in self.true],
            "activations": [float(f"{t.value:.6g}") for t in self.true],
            "simulated": [float(f"{t.value:.6g}") for t in self.simulated],
        }


@dataclass(frozen=True)
class ScoreView:
    """A score of one explanation."""

    metric: str
    value: float | None
    status: str
    reason: str


@dataclass(frozen=True)
class ExplanationView:
    """An explanation of a neuron with its scores."""

    explainer: str
    set_name: str
    """of the language model's set; empty without a language model"""
    text: str
    scores: tuple[ScoreView, ...]


@dataclass(frozen=True)
class TokenValue:
    """A token with what a neuron does on it or to it."""

    text: str
    value: float
    """mean activation, or change of the logit"""
    count: int = 0
    """times that it was seen"""


@dataclass(frozen=True)
class Neighbour:
    """A neuron that fires on the same tokens as another."""

    model: str
    layer: int
    index: int
    similarity: float
    """cosine of the profiles over tokens, -1 to 1"""
    explanation: str


@dataclass(frozen=True)
class NeuronView:
    """One neuron, as its page shows it."""

    run: str
    model: str
    site: str
    layer: int
    index: int
    split: Split
    explainer: str
    """whose explanation simulates the excerpts; empty where none does"""
    explanations: tuple[ExplanationView, ...]
    statistics: Mapping[str, float]
    """of the split: firing_rate, mean, variance, skew, kurtosis, maximum, n_tokens"""
    histogram: tuple[int, ...]
    histogram_low: float
    histogram_high: float
    excerpts: tuple[ExcerptView, ...]
    held_back: int
    """number of excerpts that are not shown"""
    tokens: tuple[TokenValue, ...]
    """tokens it fires on most"""
    promoted: tuple[TokenValue, ...]
    suppressed: tuple[TokenValue, ...]
    nearest: tuple[Neighbour, ...]
    previous: int | None
    following: int | None
    problems: tuple[str, ...] = ()
    """what cannot be shown, and why"""

    @property
    def dead(self) -> bool:
        """Return whether the neuron never fired on the split."""
        return self.statistics.get("maximum", 0.0) <= 0


@dataclass(frozen=True)
class MapPoint:
    """A neuron on the map of its layer; x and y are 0 to 1."""

    index: int
    x: float
    y: float
    score: float | None
    label: str


@dataclass(frozen=True)
class SearchHit:
    """A neuron that a search found."""

    model: str
    layer: int
    index: int
    explanation: str
    value: float
    """of a token: mean activation on it over the neuron's maximum; of words: the first score"""
    count: int
    """times that the token was seen; 0 for words"""
    firing_rate: float
    """0 to 1, held-out: a neuron that is always on fires on every token"""


@dataclass(frozen=True)
class SearchResults:
    """What a search found, best first."""

    hits: tuple[SearchHit, ...]
    note: str
    """which tokens were matched, in words"""


@dataclass(frozen=True)
class IndexState:
    """Progress of the index of a run."""

    ready: bool
    done: int
    total: int
    """row groups of excerpts"""
    problem: str = ""


def plain(value: Any) -> Any:
    """Return a record as JSON values; NaN becomes null."""
    if isinstance(value, ExcerptView):
        return value.plain()
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value
