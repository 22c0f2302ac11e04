"""Consistency and distinctiveness of a neuron, to which the paper attributes interpretability.

An explanation covers a token if its simulator predicts a high value there:

    covered(t)  <=>  s(t) >= s_0 + x (s_max - s_0)

with s_0 the explanation's default, s_max its largest value, and x a half (other values of x show how much
depends on it). Explanations were made from the fit split, and so was the threshold above which a neuron counts
as firing, a tenth of its largest activation there; everything below is measured on held-out tokens.

    consistency       fraction of the covered tokens at which the neuron fires
    evenness          (sum a)^2 / (n sum a^2) over the n covered tokens: 1 if all activations are equal, 1/n if
                      all but one are 0 (participation ratio; 1 / (1 + squared coefficient of variation))
    distinctiveness   fraction of the other tokens at which it does not fire
    contrast          (m - m') / (m + m') for the mean activations m on covered and m' on other tokens; it needs
                      no threshold: 1 for a neuron that is 0 elsewhere, 0 for one with equal means
    AUROC             probability that a covered token has a higher activation than another token; ties count half

The two concepts are those of Bai & Ma (arXiv 2410.16443, section 5); their numerical definitions are ours.

Memory: activations of as many neurons as fit into a bound, 4 bytes per token and neuron, and which tokens each
explanation covers, one byte per token, neuron and share.

Shape legend: N text tokens, n neurons.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from cratelm.activations.batches import SearchPlan
from cratelm.analysis.store import SHARES, CoverageControl, CoverageMeasures, NeuronCoverage
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.predict import group_values, is_concept_payload
from cratelm.models.sites import Site, hooked
from cratelm.records import Explanation, NeuronKey, Status
from cratelm.runs.ranks import Share
from cratelm.score.simulators import TokenLists, simulate
from cratelm.stats.auc import roc_area_of_ranks

FIRING = 0.1
"""fraction of its largest activation on the fit split above which a neuron fires"""
_ALL = Share()

# ---- one neuron and one explanation ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NeuronActivations:
    """Activations of one neuron on held-out tokens."""

    activations: NDArray[np.float32]
    """[N]"""
    ranks: NDArray[np.float64]
    """[N] ranks of the activations, from 1; ties share their mean rank"""
    firing: float
    """raw activation above which the neuron fires; 0 or less: dead on the fit split"""

    @classmethod
    def of(cls, activations: NDArray[np.float32], fit_maximum: float) -> "NeuronActivations":
        """Return activations [N] with their ranks, computed once for all explanations of the neuron."""
        return cls(activations, rankdata(activations), FIRING * fit_maximum)


def covered_tokens(
    payload: Mapping[str, Any], simulated: NDArray[np.float64], share: float
) -> NDArray[np.bool_]:
    """Return which tokens [N] an explanation covers, from its predictions `simulated` [N].

    An explanation without a value above its default covers no token.
    """
    default = float(payload["default"])
    values = group_values(payload) if is_concept_payload(payload) else payload["values"]
    top = max(values, default=default)
    if top <= default:
        return np.zeros(len(simulated), bool)
    return simulated >= default + share * (top - default)


def measure_coverage(neuron: NeuronActivations, covered: NDArray[np.bool_]) -> CoverageMeasures:
    """Return all measures of a neuron against the covered tokens [N] of one explanation."""
    n, n_elsewhere = int(covered.sum()), int((~covered).sum())
    if neuron.firing <= 0:
        return CoverageMeasures(Status.DEAD, n, n_elsewhere)
    if not n or not n_elsewhere:
        return CoverageMeasures(Status.UNDEFINED, n, n_elsewhere)
    inside, outside = neuron.activations[covered], neuron.activations[~covered]
    energy = float((inside.astype(np.float64) ** 2).sum())
    return CoverageMeasures(
        status=Status.DEFINED,
        n_covered=n,
        n_elsewhere=n_elsewhere,
        consistency=float((inside > neuron.firing).mean()),
        any_consistency=float((inside > 0).mean()),
        evenness=float(inside.sum(dtype=np.float64) ** 2 / (n * energy)) if energy else None,
        distinctiveness=float((outside <= neuron.firing).mean()),
        any_distinctiveness=float((outside <= 0).mean()),
        contrast=contrast(inside, outside),
        auroc=roc_area_of_ranks(neuron.ranks[covered], n_elsewhere),
    )


def contrast(inside: NDArray[np.float32], outside: NDArray[np.float32]) -> float | None:
    """Return the contrast of activations on covered and on other tokens; None if one is negative or all are 0."""
    if min(inside.min(), outside.min()) < 0:
        return None
    m, other = (float(part.mean(dtype=np.float64)) for part in (inside, outside))
    return (m - other) / (m + other) if m + other else None


# ---- all explained neurons ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldOutPass:
    """A model, the site of its neurons, and the held-out tokens that it reads."""

    model: Any
    site: Site
    plan: SearchPlan
    batch_tokens: int
    concepts: ConceptReader | None = None
    """what evaluates formulas of concepts; None if no explanation has one"""


def measure_neurons(
    held_out: HeldOutPass,
    explanations: Sequence[Explanation],
    fit_maximum: Mapping[NeuronKey, float],
    *,
    memory_bytes: int,
    seed: int,
    progress: Callable[[int], Any],
    read: Callable[[int], Any] = lambda _: None,
    work: Share = _ALL,
) -> Iterator[NeuronCoverage]:
    """Yield the measures of every explained neuron, with its own explanation and with another neuron's.

    As many neurons share a pass over the text as fit into `memory_bytes`, of one layer or several: a pass per layer
    would run a deep model as often as it has layers. The other explanation is that of a neuron of the same group
    (`_groups`); a neuron that is alone in its group has none. `fit_maximum` is the largest activation of each neuron on
    the fit split; `progress` is called with the number of neurons measured, `read` with the number of tokens read. `work`: the share of the groups that is
    measured.
    """
    tokens = _segments(held_out)
    n_tokens = sum(map(len, tokens))
    at_once = _at_once(n_tokens, memory_bytes)
    segments = TokenLists(tokens, held_out.concepts)
    for of_pass in _passes(explanations, at_once, work):
        activations = _activations(held_out, of_pass, n_tokens, read)
        for group in of_pass:
            of_group = activations.pop(0)  # [n, N]; freed when the group is done
            yield from _measure_group(group, of_group, segments, fit_maximum, seed)
            progress(len(group))


def count_passes(
    held_out: HeldOutPass,
    explanations: Sequence[Explanation],
    memory_bytes: int,
    work: Share = _ALL,
) -> int:
    """Return how often `measure_neurons` runs the model over the text."""
    at_once = _at_once(sum(map(len, _segments(held_out))), memory_bytes)
    return sum(1 for _ in _passes(explanations, at_once, work))


def _at_once(n_tokens: int, memory_bytes: int) -> int:
    """Return how many neurons fit into memory, with their activations and covered tokens."""
    return max(1, memory_bytes // (n_tokens * (4 + len(SHARES))))


def _measure_group(
    group: Sequence[Explanation],
    activations: NDArray[np.float32],
    segments: TokenLists,
    fit_maximum: Mapping[NeuronKey, float],
    seed: int,
) -> Iterator[NeuronCoverage]:
    """Yield the measures of the neurons of a group, of which `activations` [n, N] are given."""
    covered = [_covered(e, segments) for e in group]
    partner = draw_partners(len(group), seed) if len(group) > 1 else None
    for i, explanation in enumerate(group):
        neuron = NeuronActivations.of(activations[i], fit_maximum[explanation.neuron.key])
        controls: list[tuple[CoverageControl, int]] = [("none", i)]
        if partner is not None:
            controls.append(("shuffled", int(partner[i])))
        for control, explained in controls:
            for share, tokens in zip(SHARES, covered[explained], strict=True):
                measures = measure_coverage(neuron, tokens)
                yield NeuronCoverage(
                    explanation.neuron, explanation.explainer, control, share, measures
                )


def draw_partners(n: int, seed: int) -> NDArray[np.int64]:
    """Return another neuron [n] for each of n >= 2 neurons, each used once: its explanation is the null control.

    The neurons are put into a random ring, in which each gets the previous one.
    """
    order = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def _passes(
    explanations: Sequence[Explanation], at_once: int, work: Share
) -> Iterator[list[list[Explanation]]]:
    """Yield the groups of each pass over the text: at most `at_once` neurons in total, of the share `work`."""
    groups: list[list[Explanation]] = []
    for number, group in enumerate(_groups(explanations, at_once)):
        if not work.takes(number):
            continue
        if groups and sum(map(len, groups)) + len(group) > at_once:
            yield groups
            groups = []
        groups.append(group)
    if groups:
        yield groups


def _groups(explanations: Sequence[Explanation], at_once: int) -> Iterator[list[Explanation]]:
    """Yield explanations of neurons of one layer, at most `at_once` at a time."""
    for layer in sorted({e.neuron.layer for e in explanations}):
        of_layer = [e for e in explanations if e.neuron.layer == layer]
        for low in range(0, len(of_layer), at_once):
            yield of_layer[low : low + at_once]


def _segments(held_out: HeldOutPass) -> list[NDArray[np.int64]]:
    """Return the text tokens of each document in each sequence, in the order of the batches: N tokens in total."""
    segments = []
    for batch in held_out.plan.batches(held_out.batch_tokens, torch.device("cpu")):
        tokens = batch.input_ids.flatten().numpy()
        segments += [tokens[start:stop] for start, stop in batch.segments]
    return segments


def _covered(explanation: Explanation, segments: TokenLists) -> list[NDArray[np.bool_]]:
    """Return which tokens [N] an explanation covers, for each share in `SHARES`."""
    simulated = np.concatenate(simulate(explanation.explainer, explanation.payload, segments))
    return [covered_tokens(explanation.payload, simulated, share) for share in SHARES]


def _activations(
    held_out: HeldOutPass,
    groups: Sequence[Sequence[Explanation]],
    n_tokens: int,
    read: Callable[[int], Any],
) -> list[NDArray[np.float32]]:
    """Return the activations [n, N] of each group, of neurons of one layer, on all text tokens, from one pass."""
    indices = [torch.tensor([e.neuron.index for e in group]) for group in groups]
    of_layer: dict[int, list[int]] = {}  # groups by layer
    for i, group in enumerate(groups):
        of_layer.setdefault(group[0].neuron.layer, []).append(i)
    activations_of = [np.empty((len(group), n_tokens), np.float32) for group in groups]
    start = 0
    for batch in held_out.plan.batches(held_out.batch_tokens, held_out.model.device):
        text = batch.is_text > 0

        def on_activation(
            site_layer: int,
            activations: torch.Tensor,
            text: torch.Tensor = text,
            start: int = start,
        ) -> None:
            layer = held_out.site.layer_numbers[site_layer]
            for i in of_layer.get(layer, ()):
                chosen = activations.flatten(0, 1)[text][:, indices[i].to(text.device)]
                activations_of[i][:, start : start + len(chosen)] = chosen.float().T.cpu().numpy()

        with torch.no_grad(), hooked(held_out.model, held_out.site, on_activation):
            held_out.model.base_model(input_ids=batch.input_ids, use_cache=False)
        start += int(text.sum())
        read(batch.input_ids.numel())
    return activations_of
