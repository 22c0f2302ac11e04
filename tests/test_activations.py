"""The harvest against a brute-force reference, its bounds, and the models it runs on."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cratelm.activations.batches import SearchPlan, random_positions, sampling_keys
from cratelm.activations.layer import ExcerptSizes, LayerHarvest
from cratelm.activations.pilot import Pilot
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table, tokens_at

EOT = 0


@dataclass
class MemorySplit:
    """A split of the shards held in memory: documents of random lengths, each ended by EOT."""

    lengths: list[int]
    seed: int = 0
    tokens: np.ndarray = field(init=False)

    def __post_init__(self):
        generator = np.random.default_rng(self.seed)
        parts = [np.append(generator.integers(1, 50, n), EOT) for n in self.lengths]
        self.tokens = np.concatenate(parts)
        self.starts = np.cumsum([0] + [len(p) for p in parts])
        self.ordinals = np.arange(len(parts)) * 3 + 7
        self.n_tokens, self.n_documents = len(self.tokens), len(parts)

    def read(self, start, stop):
        return self.tokens[start:stop]


def run_harvest(split, activations, length, sizes, batch_tokens, seed):
    """Feeds activations [n_tokens, H] through the harvest of one layer, as a model would."""
    plan = SearchPlan.of(split, "fit", EOT, length, split.n_tokens + length, seed)
    pilot = Pilot.of(activations[split.tokens != EOT][: max(1, split.n_tokens // 3)])
    places = random_positions(plan.text_spans(), 1, activations.shape[1], sizes.random, seed)
    kept = LayerHarvest(pilot, places, sizes, 1)
    for batch in plan.batches(batch_tokens, torch.device("cpu")):
        rows = activations[batch.position].view(*batch.input_ids.shape, -1)
        kept.add(rows, batch)
    return kept, pilot, places


def reference(split, activations, length, sizes, pilot, places, seed):
    """What the harvest should keep, by sorting everything: {(neuron, kind, bin): [excerpt, ...]}."""
    document = np.searchsorted(split.starts, np.arange(split.n_tokens), side="right") - 1
    text = np.flatnonzero(split.tokens != EOT)
    keys = sampling_keys(np.arange(split.n_tokens), seed)

    def excerpt(position, neuron, context):
        low = max(position - context, split.starts[document[position]], position // length * length)
        high = min(
            position + context,
            split.starts[document[position] + 1] - 1,
            (position // length + 1) * length,
        )
        return (position, low, high, split.ordinals[document[position]], activations[low:high, neuron].tolist())  # fmt: skip

    found = {}
    for h in range(activations.shape[1]):
        a = activations[:, h].numpy()
        best = {}
        for p in text:
            if a[p] > 0 and (document[p] not in best or a[p] > a[best[document[p]]]):
                best[document[p]] = p
        top = sorted(best.values(), key=lambda p: (-a[p], p))[: sizes.top]
        found[h, "top", -1] = [excerpt(p, h, sizes.context) for p in top]
        found[h, "random", -1] = [excerpt(p, h, sizes.context) for p in places[h] if p >= 0]
        for kind, edges, context in (
            ("openai_bin", pilot.openai_edges[h].numpy(), sizes.context),
            ("anthropic_bin", pilot.anthropic_edges[h].numpy(), sizes.short_context),
        ):
            bins = len(edges) - 1
            for b in range(bins):
                last_is_open = kind == "openai_bin" and b == bins - 1
                members = [p for p in text if bin_of(a[p], edges, kind) == b]
                if edges[b + 1] > edges[b] or last_is_open:
                    chosen = sorted(members, key=lambda p: keys[p])[: sizes.per_bin]
                    found[h, kind, b] = [excerpt(p, h, context) for p in chosen]
    return {place: excerpts for place, excerpts in found.items() if excerpts}


def bin_of(value, edges, kind):
    if kind == "anthropic_bin" and value <= 0:
        return -1
    inner = edges[1:-1]
    return int((value >= inner).sum())


def kept_excerpts(kept, split):
    table = excerpt_table(excerpt_rows(kept, 0, kept.n_neurons), split, "m", "s", 1)
    found = {}
    for row in table.to_pylist():
        assert row["token_ids"] == split.tokens[row["position"] - row["peak"] :][: len(row["token_ids"])].tolist()  # fmt: skip
        excerpts = found.setdefault((row["index"], row["kind"], row["bin"]), [])
        assert row["rank"] == len(excerpts)
        low = row["position"] - row["peak"]
        excerpts.append((row["position"], low, low + len(row["token_ids"]), row["document"], row["activations"]))  # fmt: skip
    return found


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=25))
    lengths.append(draw(st.integers(1, 40)))  # at least one token of text
    neurons = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    split = MemorySplit(lengths, seed)
    activations = torch.randn(split.n_tokens, neurons, generator=generator)
    style = draw(st.sampled_from(["relu", "signed", "ties", "sparse"]))
    if style != "signed":
        activations = activations.relu()
    if style == "ties":
        activations = (activations * 2).round()
    if style == "sparse":
        activations = (activations - 1.2).relu()
    activations[:, 0] *= draw(st.sampled_from([0.0, 1.0]))  # an all-zero neuron
    sizes = ExcerptSizes(
        top=draw(st.integers(1, 6)),
        random=draw(st.integers(1, 6)),
        per_bin=draw(st.integers(1, 5)),
        context=draw(st.integers(2, 12)),
        short_context=draw(st.integers(1, 2)),
    )
    length = draw(st.sampled_from([1, 3, 8, 16, 64]))  # often shorter than the excerpt
    return split, activations, length, sizes, draw(st.sampled_from([8, 64, 1024])), seed


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_harvest_equals_brute_force(case):
    split, activations, length, sizes, batch_tokens, seed = case
    kept, pilot, places = run_harvest(split, activations, length, sizes, batch_tokens, seed)
    expected = reference(split, activations, length, sizes, pilot, places, seed)
    assert kept_excerpts(kept, split) == expected


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_statistics_equal_brute_force(case):
    split, activations, length, sizes, batch_tokens, seed = case
    kept, pilot, _ = run_harvest(split, activations, length, sizes, batch_tokens, seed)
    text = activations[split.tokens != EOT].double().numpy()
    for h, row in enumerate(summary_table(kept, "m", "s", 1).to_pylist()):
        a = text[:, h]
        centred = a - a.mean()
        assert row["n_tokens"] == len(a)
        assert row["maximum"] == a.max()
        assert row["firing_rate"] == pytest.approx((a > 0).mean())
        assert row["mean"] == pytest.approx(a.mean(), abs=1e-5)
        assert row["variance"] == pytest.approx((centred**2).mean(), abs=1e-4)
        if (centred**2).mean() > 1e-3:
            spread = (centred**2).mean() ** 0.5
            assert row["skew"] == pytest.approx((centred**3).mean() / spread**3, rel=1e-3, abs=1e-3)
            assert row["kurtosis"] == pytest.approx((centred**4).mean() / spread**4, rel=1e-3)
        low, high = row["histogram_low"], row["histogram_high"]
        bins = ((a - low) * 64 / (high - low)).astype(int).clip(0, 63)
        near = np.bincount(bins, minlength=64)
        assert sum(row["histogram"]) == len(a)
        # float32 against float64 at a bin's edge may move a value to its neighbour
        assert np.abs(np.cumsum(near) - np.cumsum(row["histogram"])).max() <= max(2, 0.02 * len(a))
