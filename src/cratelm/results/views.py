"""Records that the pages show. Text is the raw text of the corpus: pages make it printable and escape it.

Units: scores are multiplied by 100; activations are raw values of the neuron.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cratelm.errors import InputError
from cratelm.records import ExcerptKind, Interval, Split, has_both_ends
from cratelm.replace.store import ReplacementRow
from cratelm.results.neuron_groups import NO_GROUP, NeuronGroup
from cratelm.runs.names import NullKind, twin_name, untrained_name

ExcerptChoice = Literal["some", "all", "top"]
"""excerpts of a neuron: the first of each kind and bin, all, or the first with the largest activations"""


class NotFound(InputError):
    """Raised for a run, model, layer or neuron that does not exist."""


@dataclass(frozen=True)
class MetricCard:
    """Scores of one model under one metric, for one explainer."""

    metric: str
    mean: Interval | None
    by_layer: Mapping[int, Interval]
    shuffled: Interval | None
    """null control: each neuron is scored with the explanation of another neuron"""
    defined: int
    undefined: int
    dead: int
    failed: int
    look_up: Interval | None = None
    """mean score of a look-up of the last token alone, of the same set; None if it was not scored, or is the explainer"""


@dataclass(frozen=True)
class ExplainerCard:
    """Scores of one model for one explainer."""

    explainer: str
    """label, which ends with the name of the set in brackets if its scores were named"""
    metrics: tuple[MetricCard, ...]


@dataclass(frozen=True)
class ModelCard:
    """One model of a run, for the overview."""

    name: str
    family: str
    """`crate`, `gpt2`, or empty"""
    site: str
    neurons: Mapping[int, int]
    """number of neurons H by layer"""
    null_of: str
    """the trained model for which this is a null control; empty for any other model"""
    parameters: int | None
    loss: float | None
    """validation loss, nats per token"""
    loss_error: float | None
    """standard error of `loss`"""
    explainer: str
    """explainer of the scores; empty if there are none"""
    metrics: tuple[MetricCard, ...]
    """scores of `explainer`"""
    firing: Mapping[int, float]
    """mean firing rate by layer, 0 to 1, held-out"""
    dead: Mapping[int, int]
    """number of neurons that are never above 0, by layer, held-out"""
    missing: tuple[str, ...]
    """results that the model lacks, each with the command that produces it"""
    stale: tuple[str, ...] = ()
    """stages whose inputs have changed since, each with the command that redoes it"""
    stale_stages: tuple[str, ...] = ()
    """labels of these stages, such as `scores/crate-2l`"""
    replaced: ReplacementRow | None = None
    """losses on the explanations that lose the fewest nats, all layers; None if the model was not run on them"""
    by_llm: tuple[ExplainerCard, ...] = ()
    """scores of the explainers that are language models, other than `explainer`"""

    def metric(self, name: str, explainer: str = "") -> MetricCard | None:
        """Return the scores of an explainer, by default the model's `explainer`, under a metric; None without scores."""
        own = ExplainerCard(self.explainer, self.metrics)
        metrics = {e.explainer: e.metrics for e in (*self.by_llm, own)}
        of = metrics.get(explainer or self.explainer, ())
        return next((m for m in of if m.metric == name), None)


@dataclass(frozen=True)
class RunCard:
    """One run, for the overview."""

    key: str
    """name of the run in addresses"""
    path: str
    models: tuple[ModelCard, ...]
    problems: tuple[str, ...]
    """messages about files that cannot be read"""

    def model(self, name: str) -> ModelCard:
        """Return the card of a model. Raises `NotFound` if the run does not have the model."""
        for card in self.models:
            if card.name == name:
                return card
        names = ", ".join(c.name for c in self.models) or "none"
        raise NotFound(f"{self.key} has no harvest of {name}: it has {names}")

    def null(self, card: ModelCard, kind: NullKind = "init") -> ModelCard | None:
        """Return a null control of a model, by default the untrained one; None if there is none."""
        name = untrained_name(card.name, kind)
        return next((c for c in self.models if c.name == name and c.null_of == card.name), None)

    def has_null(self, kind: NullKind) -> bool:
        """Return whether any model has a null control of this kind."""
        return any(self.null(card, kind) for card in self.models)

    def twin(self, name: str) -> str:
        """Return the name of the harvested model of the same size and the other family; empty if there is none."""
        twin = twin_name(name)
        return twin if any(c.name == twin and c.neurons for c in self.models) else ""


@dataclass(frozen=True)
class LastToken:
    """What the last token alone explains of a neuron on all held-out tokens. None where there is no figure."""

    token_share: float | None
    """fraction of the variance, at most 1; below 0 if the fit split misleads"""
    context_share: float | None
    """1 - the token share"""
    token_entropy: float | None
    """nats"""
    correlations: Mapping[str, float | None]
    """by explainer without a language model, over all held-out tokens, x 100"""
    gains: Mapping[str, float | None]
    """by explainer other than the look-up: its correlation minus that of the look-up"""


@dataclass(frozen=True)
class LayerQuery:
    """Filter and order of the neurons of a layer."""

    sort: str = ""
    """`index`, `firing_rate`, `maximum`, `token_share`, `context_share`, `token_entropy`, `token` or a metric; empty:
    the best explained neurons first"""
    descending: bool = False
    text: str = ""
    """words that the explanation must contain"""
    token: str = ""
    """a token on which the neuron must fire"""
    only: Literal["all", "explained", "alive", "dead"] = "all"
    page: int = 1
    per_page: int = 100


@dataclass(frozen=True)
class NeuronRow:
    """One row of a layer's table."""

    index: int
    explanation: str
    scores: Mapping[str, float | None]
    """by metric; None if there is no value"""
    status: Mapping[str, str]
    """by metric; empty if the neuron was not selected for scoring"""
    firing_rate: float
    """0 to 1, held-out"""
    maximum: float
    """largest raw activation on the held-out split"""
    on_token: float | None = None
    """mean activation on the token searched for, as a fraction of the neuron's maximum"""
    last_token: LastToken | None = None
    """None if it was not measured"""
    name: str = ""
    """how the neuron is written: its index, or `17+` and `17-` for the ends of neuron 17"""
    dead: bool = False
    """never fires on the held-out split, at neither end"""

    @property
    def silent(self) -> bool:
        """Return whether the neuron, or this end of it, was never above 0 on the held-out split."""
        return self.maximum <= 0


@dataclass(frozen=True)
class LayerPage:
    """One page of the table of a layer."""

    model: str
    layer: int
    rows: tuple[NeuronRow, ...]
    total: int
    """number of neurons that match the query, on all pages"""
    n_neurons: int
    """number of neurons of the layer; of ends, at a site with both"""
    query: LayerQuery
    metrics: tuple[str, ...]
    explainer: str
    """explainer of the explanations and scores; empty if there are none"""
    note: str = ""
    """which tokens the search matched, in words"""
    has_last_token: bool = False
    """whether the rows say what the last token explains"""
    has_ends: bool = False
    """whether the rows are ends of neurons"""


@dataclass(frozen=True)
class ScoreHistogram:
    """Distribution of the scores of a layer under one metric."""

    metric: str
    mean: Interval | None
    defined: int
    neurons: int
    """number of neurons selected for scoring"""
    shares: tuple[float, ...]
    """fraction of the defined scores in each of several equal bins from 0 to 100; scores below 0 count in the
    first bin"""


class ShadedToken(NamedTuple):
    """One token of an excerpt, or several that make a character (`cratelm.text.units`).

    A tuple, because a page has thousands and a dataclass takes three times as long.
    """

    text: str
    value: float
    """raw activation; the largest one of several tokens"""
    level: int
    """0 to 10, relative to the neuron's largest activation among the excerpts shown"""
    parts: str = ""
    """bytes and activation of each of several tokens, in words; empty for one token"""


@dataclass(frozen=True)
class ExcerptView:
    """One excerpt with true and simulated activations."""

    kind: ExcerptKind
    bin: int
    rank: int
    peak: int
    """offset in `true` of the token for which the excerpt was chosen"""
    document: str
    """name of the document"""
    true: tuple[ShadedToken, ...]
    simulated: tuple[ShadedToken, ...]
    """empty if the excerpt was not simulated"""

    def plain(self) -> dict[str, Any]:
        """Return JSON values: tokens, true and simulated activations as lists, rounded to six digits."""
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
    """x 100; None if there is no score"""
    status: str
    reason: str
    """why there is no score; empty if there is one"""


@dataclass(frozen=True)
class ExplanationView:
    """An explanation of a neuron with its scores."""

    explainer: str
    set_name: str
    """name of the language model's set; empty without a language model"""
    text: str
    scores: tuple[ScoreView, ...]


@dataclass(frozen=True)
class TokenValue:
    """A token with the neuron's activation on it, or the neuron's effect on its logit."""

    text: str
    value: float
    """mean activation, or change of the logit"""
    count: int = 0
    """number of occurrences among the excerpts"""


@dataclass(frozen=True)
class Neighbour:
    """A neuron that fires on the same tokens as another."""

    model: str
    layer: int
    index: int
    similarity: float
    """cosine of the profiles over tokens, -1 to 1 (see `cratelm.viewer.index`)"""
    explanation: str


@dataclass(frozen=True)
class NeuronView:
    """One neuron with everything that its page shows."""

    run: str
    model: str
    site: str
    layer: int
    index: int
    split: Split
    explainer: str
    """explainer whose explanation simulates the excerpts; empty without a simulation"""
    sentence: str
    """what the neuron responds to, the claim that tables show; empty without an explanation"""
    explanations: tuple[ExplanationView, ...]
    statistics: Mapping[str, float]
    """statistics over the split: firing_rate, mean, variance, skew, kurtosis, maximum, n_tokens"""
    histogram: tuple[int, ...]
    """number of tokens in each of several equal bins of the activation; the outer bins include values beyond them"""
    histogram_low: float
    """lower end of the first bin"""
    histogram_high: float
    """upper end of the last bin"""
    excerpts: tuple[ExcerptView, ...]
    held_back: int
    """number of excerpts that are not shown"""
    tokens: tuple[TokenValue, ...]
    """tokens on which the neuron fires most strongly"""
    promoted: tuple[TokenValue, ...]
    suppressed: tuple[TokenValue, ...]
    nearest: tuple[Neighbour, ...]
    previous: int | None
    """index of the previous neuron of the layer; None for the first"""
    following: int | None
    """index of the next neuron of the layer; None for the last"""
    problems: tuple[str, ...] = ()
    """what cannot be shown, and why"""
    last_token: LastToken | None = None
    """None if it was not measured"""
    name: str = ""
    """how the neuron is written: its index, or `17+` and `17-` for the ends of neuron 17"""

    @property
    def silent(self) -> bool:
        """Return whether the neuron, or this end of it, was never above 0 on the split."""
        return self.statistics.get("maximum", 0.0) <= 0

    @property
    def dead(self) -> bool:
        """Return whether the neuron never fired on the split, with both ends at neither of them."""
        return self.silent and self.statistics.get("opposite_maximum", 0.0) <= 0

    @property
    def other_end(self) -> int | None:
        """Return the index of the other end of the same neuron; None if neurons have one end."""
        return self.index ^ 1 if has_both_ends(self.site) else None


@dataclass(frozen=True)
class MapPoint:
    """A neuron on the map of its layer; x and y range from 0 to 1."""

    index: int
    x: float
    y: float
    score: float | None
    label: str
    """the claim of the explanation; empty if there is none"""
    group: NeuronGroup = NO_GROUP
    name: str = ""
    """how the neuron is written; empty: its index"""


@dataclass(frozen=True)
class SearchHit:
    """A neuron found by a search."""

    model: str
    layer: int
    index: int
    explanation: str
    value: float
    """search by token: mean activation on the token divided by the neuron's maximum; by words: the first score"""
    count: int
    """number of occurrences of the token; 0 for a search by words"""
    firing_rate: float
    """0 to 1, held-out; a neuron that fires on every token is not specific to the token searched for"""


@dataclass(frozen=True)
class SearchResults:
    """Results of a search, best first."""

    hits: tuple[SearchHit, ...]
    note: str
    """which tokens were matched, in words"""


@dataclass(frozen=True)
class IndexState:
    """Progress of the index of a run."""

    ready: bool
    done: int
    """row groups of excerpts that are indexed"""
    total: int
    """row groups of excerpts of the run"""
    problem: str = ""
    """why the index could not be built; empty if there was no problem"""


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
