"""Which fit excerpts each metric shows to an explainer that is a language model.

The paper's ranks (Bai & Ma 2025), on our `fit` split; what is scored on comes from `held_out`
(`cratelm.score.selection`). Explainers that need no language model read every fit excerpt instead.

| metric | explained from |
|---|---|
| top_and_random, random_only | top ranks 0, 2, 4, 6, 8, 64 tokens |
| anthropic | top 15, 2 of each of 12 bins, 5 random, 8 tokens |

Where a neuron has fewer excerpts, what there is is used.
"""

from collections.abc import Collection, Iterable

from cratelm.records import Excerpt, ExcerptKind, Metric, NeuronRecord

TOP_RANKS = (0, 2, 4, 6, 8)
ANTHROPIC_TOP_RANKS = tuple(range(15))
ANTHROPIC_WINDOW = (4, 4)
"""tokens before the peak, tokens from it"""
PER_BIN = 2
N_RANDOM = 5


def explained_from(record: NeuronRecord, metric: Metric) -> tuple[Excerpt, ...]:
    """The excerpts of `record` (of the fit split) that `metric` explains from, in a fixed order."""
    if metric != "anthropic":
        return by_rank(record, "top", TOP_RANKS)
    top = by_rank(record, "top", ANTHROPIC_TOP_RANKS)
    bins = first_of_bins(record, PER_BIN, without={e.position for e in top})
    random = by_rank(record, "random", range(N_RANDOM))
    return tuple(e.narrowed(*ANTHROPIC_WINDOW) for e in top + bins + random)


def contrasting(record: NeuronRecord, metric: Metric, n: int) -> tuple[Excerpt, ...]:
    """The `n` random excerpts of `record` in which the neuron stays lowest, where it stays below half
    of its maximum: what an explainer may be shown that does not activate. Cut as `metric` has it.

    Those that `explained_from` shows already are passed over.
    """
    shown = {e.position for e in explained_from(record, metric)}
    candidates = [
        e.narrowed(*ANTHROPIC_WINDOW) if metric == "anthropic" else e
        for e in record.of_kind("random")
        if e.position not in shown and len(e)
    ]
    silent = [e for e in candidates if float(e.activations.max()) < record.summary.maximum / 2]
    return tuple(sorted(silent, key=lambda e: (float(e.activations.max()), e.rank))[:n])


def by_rank(record: NeuronRecord, kind: ExcerptKind, ranks: Iterable[int]) -> tuple[Excerpt, ...]:
    """The excerpts of a kind with these ranks, in the order of `ranks`; ranks that are not there are left out."""
    found = {e.rank: e for e in record.excerpts if e.kind == kind}
    return tuple(found[rank] for rank in ranks if rank in found)


def first_of_bins(
    record: NeuronRecord, per_bin: int, without: Collection[int] = ()
) -> tuple[Excerpt, ...]:
    """The first `per_bin` excerpts of each Anthropic bin, by bin and rank.

    Those whose chosen token is at a position in `without` are passed over: "further" excerpts, so
    that no token is chosen twice.
    """
    chosen: dict[int, list[Excerpt]] = {}
    for excerpt in sorted(record.of_kind("anthropic_bin"), key=lambda e: (e.bin, e.rank)):
        room = len(chosen.setdefault(excerpt.bin, [])) < per_bin
        if room and excerpt.position not in without:
            chosen[excerpt.bin].append(excerpt)
    return tuple(excerpt for one_bin in chosen.values() for excerpt in one_bin)
