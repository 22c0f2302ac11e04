"""What the pages show. Text is as the corpus has it: it is made visible and escaped where it is shown.

Units: scores are x 100; activations are raw values of the neuron.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cratelm.errors import InputError
from cratelm.records import ExcerptKind, Split
from cratelm.runs.names import twin_name

Shown = Literal["some", "all", "top"]
"""excerpts of a neuron: the first of each kind and bin, all, or the first of the strongest"""


class NotFound(InputError):
    """A run, model, layer or neuron that is not there."""


@dataclass(frozen=True)
class Value:
    """A mean x 100 with its 95% interval, where it has one."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MetricCard:
    """One model under one metric, its principal explainer."""

    metric: str
    mean: Value | None
    by_layer: Mapping[int, Value]
    shuffled: Value | None
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
    """the model whose untrained null this is; empty for others"""
    parameters: int | None
    loss: float | None
    """validation loss, nats a token"""
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

    def metric(self, name: str) -> MetricCard | None:
        """Under a metric; None where it was not scored by it."""
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
        for card in self.models:
            if card.name == name:
                return card
        names = ", ".join(c.name for c in self.models) or "none"
        raise NotFound(f"{self.key} has no harvest of {name}: it has {names}")

    def null(self, card: ModelCard) -> ModelCard | None:
        return next((c for c in self.models if c.null_of == card.name), None)

    def twin(self, name: str) -> str:
        """The model of the same size of the other family; empty where there is none."""
        other = twin_name(name)
        return other if any(c.name == other and c.neurons for c in self.models) else ""


@dataclass(frozen=True)
class LayerQuery:
    """Which neurons of a layer, in which order."""

    sort: str = ""
    """`index`, `firing_rate`, `maximum`, `token` or a metric; empty: the best explained first"""
    descending: bool = False
    text: str = ""
    """words that the explanation holds"""
    token: str = ""
    """a token that the neuron fires on"""
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
    """mean activation on the token searched for, of the neuron's maximum"""

    @property
    def dead(self) -> bool:
        return self.maximum <= 0


@dataclass(frozen=True)
class LayerPage:
    """A part of the table of a layer."""

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
    """How the scores of a layer under one metric are spread."""

    metric: str
    mean: Value | None
    defined: int
    neurons: int
    """to be scored"""
    shares: tuple[float, ...]
    """of those defined, 0 to 1, in equal bins from 0 to 100; what is below 0 counts in the first"""


class ShadedToken(NamedTuple):
    """One of thousands on a page: a tuple is made in a third of the time."""

    text: str
    value: float
    """raw activation"""
    level: int
    """0 to 10 of the neuron's largest activation among the excerpts shown"""


@dataclass(frozen=True)
class ExcerptView:
    kind: ExcerptKind
    bin: int
    rank: int
    peak: int
    """offset of the token that it was chosen for"""
    document: str
    """where the text is from"""
    true: tuple[ShadedToken, ...]
    simulated: tuple[ShadedToken, ...]
    """empty where no simulator ran"""

    def plain(self) -> dict[str, Any]:
        """Tokens, activations and simulated ones as lists of one length, to six digits."""
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
    metric: str
    value: float | None
    status: str
    reason: str


@dataclass(frozen=True)
class ExplanationView:
    explainer: str
    set_name: str
    """of the language model's set; empty without a language model"""
    text: str
    scores: tuple[ScoreView, ...]


@dataclass(frozen=True)
class TokenValue:
    text: str
    value: float
    """activation or logit"""
    count: int = 0


@dataclass(frozen=True)
class Neighbour:
    model: str
    layer: int
    index: int
    similarity: float
    """cosine of the profiles over tokens, -1 to 1"""
    explanation: str


@dataclass(frozen=True)
class NeuronView:
    """All that is known of one neuron."""

    run: str
    model: str
    site: str
    layer: int
    index: int
    split: Split
    explainer: str
    """which simulates the excerpts; empty where none does"""
    explanations: tuple[ExplanationView, ...]
    statistics: Mapping[str, float]
    """of the split: firing_rate, mean, variance, skew, kurtosis, maximum, n_tokens"""
    histogram: tuple[int, ...]
    histogram_low: float
    histogram_high: float
    excerpts: tuple[ExcerptView, ...]
    held_back: int
    """excerpts that are not shown"""
    tokens: tuple[TokenValue, ...]
    """tokens it fires on most: mean activation, how often seen"""
    promoted: tuple[TokenValue, ...]
    suppressed: tuple[TokenValue, ...]
    nearest: tuple[Neighbour, ...]
    previous: int | None
    following: int | None
    problems: tuple[str, ...] = ()

    @property
    def dead(self) -> bool:
        return self.statistics.get("maximum", 0.0) <= 0


@dataclass(frozen=True)
class MapPoint:
    index: int
    x: float
    y: float
    score: float | None
    label: str


@dataclass(frozen=True)
class SearchHit:
    model: str
    layer: int
    index: int
    explanation: str
    value: float
    """of the token: mean activation on it over the neuron's maximum; of words: the first score"""
    count: int
    """times that the token was seen; 0 for words"""
    firing_rate: float
    """0 to 1, held-out: one that is always on fires on every token"""


@dataclass(frozen=True)
class SearchResults:
    hits: tuple[SearchHit, ...]
    note: str


@dataclass(frozen=True)
class IndexState:
    """How far the index of a run is."""

    ready: bool
    done: int
    total: int
    """row groups of excerpts"""
    problem: str = ""


def plain(value: Any) -> Any:
    """A record as JSON values."""
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
