"""Means of the figures over all held-out tokens, and what explainers gain over a look-up of the last token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cratelm.records import Interval, NeuronKey
from cratelm.score.store import read_token_shares, read_whole_scores
from cratelm.score.whole_records import FIGURES, WholeScore
from cratelm.stats.layers import LayeredMean, layered_mean
from cratelm.stats.score_table import ScoreTable

LOOKUP = "lookup"
"""explainer that knows only the last token"""
ALL_TOKENS = "all_tokens"
"""name, among metrics, of the correlation over all held-out tokens"""


@dataclass(frozen=True)
class WholeMean:
    """The mean of one figure of the scores over all held-out tokens."""

    explainer: str
    control: str
    figure: str
    """one of `FIGURES`"""
    of: LayeredMean


@dataclass(frozen=True)
class Gain:
    """What an explainer's score is above that of the look-up, paired over neurons."""

    explainer: str
    metric: str
    """a metric of `scores.parquet`, or `all_tokens` for the correlation over all held-out tokens"""
    of: LayeredMean


@dataclass(frozen=True)
class WholeSummary:
    """Part `all_tokens` of `summary.json`: figures over all held-out tokens. Means are over layers of neurons."""

    n_tokens: int
    """held-out tokens"""
    token_share: LayeredMean
    """fraction of the variance that the last token alone explains"""
    token_entropy: LayeredMean
    """nats"""
    scores: tuple[WholeMean, ...]
    gains: tuple[Gain, ...]
    token_share_median: LayeredMean | None = None
    """mean over layers of the median over neurons; None in results of earlier versions. A token share has no lower
    bound: a neuron that fires on single tokens of the fit split, and hardly on the held-out one, has a share of
    -100 as easily as of -1, and the mean is then that of a few such neurons"""
    n_misled: int | None = None
    """neurons, or ends, whose token share is below 0: for them the mean over all fit tokens predicts the held-out
    activations better than the means by token; None in results of earlier versions"""

    @property
    def context_share(self) -> LayeredMean:
        """Return 1 - the token share: the fraction that the last token leaves to the context."""
        return _complement(self.token_share)

    def mean(self, explainer: str, figure: str, control: str = "none") -> Interval | None:
        """Return the mean of one of `FIGURES` with its interval; None if there is none."""
        for s in self.scores:
            if (s.explainer, s.figure, s.control) == (explainer, figure, control):
                return s.of.mean
        return None

    def gain(self, explainer: str, metric: str = ALL_TOKENS) -> Interval | None:
        """Return what the explainer's scores are above those of the look-up; None if there is no figure."""
        of = next(
            (g.of for g in self.gains if (g.explainer, g.metric) == (explainer, metric)), None
        )
        return of and of.mean

    def in_words(self) -> dict[str, str]:
        """Return the main figures in words, by what they are."""
        words = {
            "last token alone": f"explains {_shown(self.token_share, 100)}% of the variance,"
            f" context {_shown(self.context_share, 100)}%; token entropy"
            f" {_shown(self.token_entropy, 1)} nats; {self.token_share.undefined} neurons constant"
        }
        if self.n_misled:
            words["last token alone"] += (
                f"; {self.n_misled} of {self.token_share.defined} token shares are below 0 (the fit split misleads):"
                f" median {_shown(self.token_share_median, 100)}%"
            )
        by_name = {(s.explainer, s.control, s.figure): s.of for s in self.scores}
        for explainer in dict.fromkeys(s.explainer for s in self.scores):
            own = by_name[explainer, "none", "correlation"]
            parts = [
                f"correlation {_shown(own, 100)}; shuffled"
                f" {_shown(by_name.get((explainer, 'shuffled', 'correlation')), 100)}",
                f"{own.undefined} undefined",
                f"average precision {_shown(by_name[explainer, 'none', 'precision_top'], 100)}"
                f" (chance {_shown(by_name[explainer, 'none', 'chance_top'], 100, '.2f')})",
                f"AUC {_shown(by_name[explainer, 'none', 'auc'], 100)}, hard negatives"
                f" {_shown(by_name[explainer, 'none', 'auc_hard'], 100)} (chance 50)",
            ]
            words[f"{explainer} all tokens"] = "; ".join(parts)
        for gain in self.gains:
            words[f"gain of {gain.explainer}, {gain.metric}"] = (
                f"{_shown(gain.of, 100, '+.1f')} above {LOOKUP}, paired over {gain.of.defined} neurons"
            )
        return words


def summarize_whole(folder: Path, scores: ScoreTable, resamples: int, seed: int) -> WholeSummary:
    """Return the means of the figures in `folder`. `scores` are those of its excerpts."""
    shares, whole = read_token_shares(folder), read_whole_scores(folder)
    neurons = [share.neuron.key for share in shares]
    ends = shares[0].neuron.n_ends

    def mean(
        values: Iterable[float | None], of: Sequence[NeuronKey], medians: bool = False
    ) -> LayeredMean:
        numbers = np.array([np.nan if v is None else v for v in values], np.float64)
        layers, indices = np.array(of, np.int64).reshape(-1, 2).T
        in_layer = indices // ends if ends > 1 else None
        return layered_mean(
            numbers,
            layers,
            numbers_in_layer=in_layer,
            medians=medians,
            resamples=resamples,
            seed=seed,
        )

    means, gains = [], []
    groups: dict[tuple[str, str], list[WholeScore]] = {}
    for score in whole:
        groups.setdefault((score.explainer, score.control), []).append(score)
    for (explainer, control), rows in groups.items():
        of = [row.neuron.key for row in rows]
        means += [
            WholeMean(explainer, control, name, mean((getattr(r, name) for r in rows), of))
            for name in FIGURES
        ]
    of_metric = _by_metric(scores, whole)
    for (explainer, metric), values in of_metric.items():
        look_up = of_metric.get((LOOKUP, metric))
        if explainer == LOOKUP or look_up is None:
            continue
        both = sorted(set(values) & set(look_up))
        differences = [values[key] - look_up[key] for key in both]
        gains.append(Gain(explainer, metric, mean(differences, both)))
    of_tokens = [share.token_share for share in shares]
    return WholeSummary(
        shares[0].n_tokens,
        mean(of_tokens, neurons),
        mean((share.token_entropy for share in shares), neurons),
        tuple(means),
        tuple(gains),
        mean(of_tokens, neurons, medians=True),
        sum(share is not None and share < 0 for share in of_tokens),
    )


def _by_metric(
    scores: ScoreTable, whole: Iterable[WholeScore]
) -> dict[tuple[str, str], dict[NeuronKey, float]]:
    """Return the value of each neuron that has one, of its own explanation, by explainer and metric."""
    found: dict[tuple[str, str], dict[NeuronKey, float]] = {}
    for (explainer, metric), group in scores.select(control="none").groups("explainer", "metric").items():  # fmt: skip
        of = group.select(status="defined")
        columns = (of.numbers(name).tolist() for name in ("layer", "index", "value"))
        found[explainer, metric] = {
            NeuronKey(int(layer), int(index)): value for layer, index, value in zip(*columns, strict=True)
        }  # fmt: skip
    for score in whole:
        if score.control == "none" and score.correlation is not None:
            found.setdefault((score.explainer, ALL_TOKENS), {})[score.neuron.key] = (
                score.correlation
            )
    return found


def _complement(share: LayeredMean) -> LayeredMean:
    """Return 1 - a share."""
    mean = share.mean
    if mean is None:
        return share
    low, high = (None if bound is None else 1 - bound for bound in (mean.high, mean.low))
    return LayeredMean(Interval(1 - mean.value, low, high, mean.n), share.defined, share.undefined)


def _shown(of: LayeredMean | None, scale: float, form: str = ".1f") -> str:
    """Return a mean, times `scale`, with its interval; None: there is none, as with one neuron, which has no shuffle."""
    return "none" if of is None or of.mean is None else of.mean.in_words(form, scale)
