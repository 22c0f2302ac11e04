"""Choose the held-out excerpts that each metric scores an explanation on.

The ranks are those of the paper (Bai & Ma 2025, section on interpretability, with Bills et al. 2023 and
Bricken et al. 2023). Our excerpts come from the `held_out` split and explanations from `fit`
(`cratelm.explain.selection`), so that the documents are disjoint.

| metric | scored on |
|---|---|
| top_and_random | held-out top ranks 1, 3, 5, 7, 9 and 5 random, 64 tokens |
| random_only | 5 random, 64 tokens |
| anthropic | held-out top ranks 15..24, 2 of each of 12 bins, 5 random, 10 out of context; 8 tokens (3 out of context) |

If a neuron has fewer excerpts, those that exist are used; the score reports the number of records.
"""

from cratelm.explain.selection import ANTHROPIC_WINDOW, N_RANDOM, PER_BIN, by_rank, first_of_bins
from cratelm.records import Excerpt, Metric, NeuronRecord

TOP_RANKS = (1, 3, 5, 7, 9)
ANTHROPIC_TOP_RANKS = tuple(range(15, 25))
N_OUT_OF_CONTEXT = 10


def scored_on(record: NeuronRecord, metric: Metric) -> tuple[Excerpt, ...]:
    """Return the excerpts of `record` (of the held-out split) that `metric` scores on, in a fixed order."""
    random = by_rank(record, "random", range(N_RANDOM))
    if metric == "random_only":
        return random
    if metric == "top_and_random":
        return by_rank(record, "top", TOP_RANKS) + random
    top = by_rank(record, "top", ANTHROPIC_TOP_RANKS)
    bins = first_of_bins(record, PER_BIN, without={e.position for e in top})
    in_context = tuple(e.narrowed(*ANTHROPIC_WINDOW) for e in top + bins + random)
    return in_context + by_rank(record, "out_of_context", range(N_OUT_OF_CONTEXT))
