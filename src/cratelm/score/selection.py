"""Choose the held-out excerpts that each metric scores an explanation on.

The ranks are those of the paper (Bai & Ma 2025, section on interpretability, with Bills et al. 2023 and
Bricken et al. 2023). Our excerpts come from the `held_out` split and explanations from `fit`
(`cratelm.explain.selection`), so that the documents are disjoint.

| metric | scored on |
|---|---|
| top_and_random | held-out top ranks 1, 3, 5, 7, 9 and 5 random, 64 tokens |
| random_only | 5 random, 64 tokens |
| detection_hard, fuzzing_hard | held-out top ranks 1, 3, 5, 7, 9 and 3 to 5 hard negatives, 64 tokens |
| anthropic | held-out top ranks 15..24, 2 of each of 12 bins, 5 random, 10 out of context; 8 tokens (3 out of context) |
| all_tokens_estimate | the last token alone of `--per-bin` in each of 5 quantile bins, up to 33 tokens |

If a neuron has fewer excerpts, those that exist are used; the score reports the number of records.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.explain.selection import ANTHROPIC_WINDOW, N_RANDOM, by_rank, first_of_bins
from cratelm.explain.selection import PER_BIN as PER_ANTHROPIC_BIN
from cratelm.records import HARD_METRICS, Excerpt, Metric, NeuronRecord

TOP_RANKS = (1, 3, 5, 7, 9)
ANTHROPIC_TOP_RANKS = tuple(range(15, 25))
N_OUT_OF_CONTEXT = 10
LEAST_HARD = 3
"""hard negatives without which a metric that needs them is undefined"""
SILENT = 0.1
"""fraction of the neuron's maximum below which it is silent"""
HARD_CONTEXT = 16
"""tokens that precede the silent token: without them a reader could not judge its context"""


def scored_on(record: NeuronRecord, metric: Metric) -> tuple[Excerpt, ...]:
    """Return the excerpts of `record` (of the held-out split) that `metric` scores on, in a fixed order."""
    random = by_rank(record, "random", range(N_RANDOM))
    if metric == "random_only":
        return random
    if metric == "top_and_random":
        return by_rank(record, "top", TOP_RANKS) + random
    if metric in HARD_METRICS.values():
        return by_rank(record, "top", TOP_RANKS) + hard_negatives(record)
    top = by_rank(record, "top", ANTHROPIC_TOP_RANKS)
    bins = first_of_bins(record, PER_ANTHROPIC_BIN, without={e.position for e in top})
    in_context = tuple(e.narrowed(*ANTHROPIC_WINDOW) for e in top + bins + random)
    return in_context + by_rank(record, "out_of_context", range(N_OUT_OF_CONTEXT))


def drawn_in_bins(record: NeuronRecord, per_bin: int) -> tuple[Excerpt, ...]:
    """Return `per_bin` excerpts of each quantile bin, or all if there are fewer, cut after the chosen token.

    What follows the chosen token cannot matter to it in a causal model. The harvested excerpts of a bin are uniform draws
    from its tokens, but the lowest ranks are the same tokens for many neurons (`activations.layer_harvest.Binning`).
    So each neuron has its own random order of them: otherwise the neurons' errors would add up in their mean. A smaller
    number is a subset of a larger one.
    """
    table = ExcerptTable.of(record.excerpts)
    rows = np.flatnonzero(table.is_kind("openai_bin"))
    rows = np.random.default_rng([*record.neuron.key]).permutation(rows)
    rows = rows[np.argsort(table.bins[rows], kind="stable")]
    bins = table.bins[rows]
    number = np.arange(len(rows)) - np.searchsorted(bins, bins)  # within its bin
    excerpts = (record.excerpts[row] for row in rows[number < per_bin].tolist())
    return tuple(e.narrowed(e.peak, 1) for e in excerpts)


def inactive_limit(top: Sequence[Excerpt]) -> float:
    """Return what a neuron stays below in inactive texts: half of the peak of the weakest of its top excerpts."""
    return min(float(e.activations.max()) for e in top) / 2


def hard_negatives(record: NeuronRecord) -> tuple[Excerpt, ...]:
    """Return up to 5 inactive excerpts that carry a token on which the neuron peaks, but is silent there.

    The tokens are those at the peaks of the top excerpts scored on. In the excerpts the neuron stays below
    `inactive_limit`, as in random negatives, and at one of these tokens below a tenth of its maximum
    (held-out): its context, not the token, says that the neuron is silent. The excerpts are random ones and
    those of the quantile bins, as long as the top excerpts; each is returned with the silent token as its
    peak, the one closest to the middle. None are returned if there is no top excerpt.
    """
    top = by_rank(record, "top", TOP_RANKS)
    if not top:
        return ()
    limit, silent = inactive_limit(top), SILENT * record.summary.maximum
    strong = [e.token_ids[e.peak] for e in top]
    chosen: dict[int, Excerpt] = {}  # by position: an excerpt may be random and in a bin
    for excerpt in (*record.of_kind("random"), *record.of_kind("openai_bin")):
        is_silent = np.isin(excerpt.token_ids, strong) & (excerpt.activations < silent)
        offsets = np.flatnonzero(is_silent)
        offsets = offsets[offsets >= HARD_CONTEXT]
        if len(offsets) and float(excerpt.activations.max()) < limit:
            peak = int(offsets[np.argmin(np.abs(offsets - len(excerpt) // 2))])
            position = excerpt.position + peak - excerpt.peak
            chosen.setdefault(excerpt.position, replace(excerpt, peak=peak, position=position))
        if len(chosen) == N_RANDOM:
            break
    return tuple(chosen.values())
