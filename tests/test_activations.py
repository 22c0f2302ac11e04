"""The harvest against a brute-force reference, its bounds, and the models it runs on."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import cratelm
from cratelm.activations import calibration
from cratelm.activations import topk as cells
from cratelm.activations.batches import SearchPlan, random_positions, sampling_keys
from cratelm.activations.calibration import Calibration, calibrate
from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.activations.fused_harvest import FusedLayerHarvest
from cratelm.activations.layer_harvest import ExcerptSizes, LayerHarvest, bytes_per_neuron
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_records, write_records
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table, tokens_at
from cratelm.activations.windows import BatchWindows
from cratelm.errors import InputError
from cratelm.records import EXCERPT_KINDS, Excerpt
from cratelm.runs import Run
from cratelm.tokens.shards import TokenStore

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


def run_harvest(split, activations, length, sizes, batch_tokens, seed, kind=LayerHarvest):
    """Feeds activations [n_tokens, H] through the harvest of one layer, as a model would."""
    plan = SearchPlan.of(split, "fit", EOT, length, split.n_tokens + length, seed)
    pilot = Calibration.of(activations[split.tokens != EOT][: max(1, split.n_tokens // 3)])
    places = random_positions(plan.text_spans(), 1, activations.shape[1], sizes.random, seed)
    kept = kind(pilot, places, sizes, 1)
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


KINDS = st.sampled_from([LayerHarvest, FusedLayerHarvest])


@given(cases(), st.sampled_from([0, 2, 6]), KINDS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_harvest_equals_brute_force(case, waves, kind):
    """With `waves` 0 every candidate is merged by sorting, with 6 nearly all are inserted one by one."""
    split, activations, length, sizes, batch_tokens, seed = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_WAVES", waves)
        kept, pilot, places = run_harvest(
            split, activations, length, sizes, batch_tokens, seed, kind
        )
    expected = reference(split, activations, length, sizes, pilot, places, seed)
    assert kept_excerpts(kept, split) == expected


@given(cases(), KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_statistics_equal_brute_force(case, kind):
    split, activations, length, sizes, batch_tokens, seed = case
    kept, pilot, _ = run_harvest(split, activations, length, sizes, batch_tokens, seed, kind)
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
        in_bin = [bin_of(value, pilot.openai_edges[h].numpy(), "openai_bin") for value in a]
        assert row["openai_counts"] == np.bincount(in_bin, minlength=5).tolist()
        # float32 against float64 at a bin's edge may move a value to its neighbour
        assert np.abs(np.cumsum(near) - np.cumsum(row["histogram"])).max() <= max(2, 0.02 * len(a))


@pytest.mark.parametrize("style", ["relu", "signed", "ties"])
def test_compiled_loops_equal_those_of_torch(style):
    """Over several tiles, pieces and threads: all but the moments exactly, these to the last digits."""
    split = MemorySplit([70, 300, 1, 0, 129, *[40] * 30])
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(split.n_tokens, 130, generator=generator) - 1
    activations = activations if style == "signed" else activations.relu()
    activations = (activations * 3).round() if style == "ties" else activations
    kinds = {"torch": (LayerHarvest, 1), "fused": (FusedLayerHarvest, 1), "in threads": (FusedLayerHarvest, 3)}  # fmt: skip
    kept = {}
    before = torch.get_num_threads()
    for name, (kind, threads) in kinds.items():
        torch.set_num_threads(threads)
        try:
            kept[name] = run_harvest(split, activations, 64, ExcerptSizes(5, 3, 4, 20, 3), 256, 0, kind)[0]  # fmt: skip
        finally:
            torch.set_num_threads(before)
    reference = kept.pop("torch")
    for harvest in kept.values():
        assert torch.equal(harvest.fired, reference.fired)
        assert torch.equal(harvest.maximum, reference.maximum)
        assert torch.equal(harvest.histogram, reference.histogram)
        assert torch.equal(harvest.reached, reference.reached)
        assert int(harvest.histogram.sum()) == 130 * harvest.n_tokens
        assert kept_excerpts(harvest, split) == kept_excerpts(reference, split)
        torch.testing.assert_close(harvest.powers, reference.powers, rtol=1e-4, atol=1e-2)
    assert torch.equal(kept["fused"].powers, kept["in threads"].powers)


def test_pilot_sets_the_edges():
    """Quantiles of 0..1000 in any order; 12 equal bins up to the maximum; a dead neuron has none."""
    values = torch.randperm(1001).float()
    pilot = Calibration.of(torch.stack([values, torch.zeros(1001), values - 2000], 1))
    assert pilot.openai_edges[0].tolist() == [0, 500, 900, 990, 999, 1000]
    np.testing.assert_allclose(pilot.anthropic_edges[0], np.arange(13) * 1000 / 12, rtol=1e-6)
    assert pilot.anthropic_edges[1:].abs().max() == 0
    assert (pilot.low[0], pilot.high[0]) == (0, 1000)
    assert (pilot.low[2], pilot.high[2]) == (-2000, -1000)
    np.testing.assert_allclose(pilot.openai_reach[0], [1, 501 / 1001, 101 / 1001, 11 / 1001, 2 / 1001], rtol=1e-5)  # fmt: skip
    assert pilot.anthropic_reach[0, 0] == pytest.approx(1000 / 1001)  # 0 itself is not above 0


# ---- memory ---------------------------------------------------------------------------------------


def held_bytes(thing, seen=None):
    """Bytes of all arrays and tensors reachable from an object, each storage once."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if hasattr(thing, "__dict__"):
        return sum(held_bytes(value, seen) for value in vars(thing).values())
    return 0


def test_memory_is_the_formula_whatever_the_tokens():
    sizes, neurons = ExcerptSizes(top=7, random=5, per_bin=3, context=6, short_context=2), 11
    for documents in (20, 200):
        split = MemorySplit([30] * documents)
        activations = torch.randn(split.n_tokens, neurons).relu()
        kept, _, _ = run_harvest(split, activations, 16, sizes, 64, 0)
        assert held_bytes(kept) == neurons * bytes_per_neuron(sizes)


@pytest.mark.slow
def test_process_does_not_grow_with_ten_times_the_tokens(tmp_path):
    """Keeping all activations would take 120 MB more for the longer run."""
    peaks = []
    for tokens in (25_000, 250_000):
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, str(tokens)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 40 * 1024  # KiB


GROWTH = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from test_activations import EOT, MemorySplit
from cratelm.activations.batches import SearchPlan
from cratelm.activations.harvest import harvest_split
from cratelm.activations.layer_harvest import ExcerptSizes
from cratelm.activations.calibration import calibrate
from cratelm.models import build, site_of

torch.set_num_threads(1)
model = build("crate-2l", vocab_size=64, max_position_embeddings=32, hidden_size=16).eval()
split = MemorySplit([249] * (int(sys.argv[1]) // 250))
site = site_of(model)
plan = SearchPlan.of(split, "fit", EOT, 32, split.n_tokens, 0)
pilots = calibrate(model, site, plan, 2048, 4096)
kept = harvest_split(model, site, plan, pilots, ExcerptSizes(), 4096)
assert kept[0].n_tokens == int(sys.argv[1]) // 250 * 249
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
""".replace("{tests!r}", repr(str(Path(__file__).parent)))


@pytest.mark.parametrize("kind", ["relu", "normal", "gelu", "zero"])
def test_the_pilot_is_that_of_torchs_sort(kind):
    """Bit for bit, zeros with a sign included, which a sort of NumPy would exchange."""
    values = torch.randn(999, 7, generator=torch.Generator().manual_seed(0)) * 9
    activations = {
        "relu": values.relu(),
        "normal": values,
        "gelu": torch.nn.functional.gelu(values),
        "zero": torch.where(values < 0, -0.0, 0.0),
    }[kind]
    pilot = Calibration.of(activations)
    ordered = activations.sort(0).values
    quantiles = ordered[[0, 499, 898, 988, 997, 998]].T
    high = ordered[-1].clamp(min=0)[:, None] * torch.arange(13) / 12
    for made, expected in ((pilot.openai_edges, quantiles), (pilot.low, ordered[0].clamp(max=0))):
        assert made.numpy().tobytes() == expected.contiguous().numpy().tobytes()
    torch.testing.assert_close(pilot.anthropic_edges, high)
    for edges, reach in (
        (pilot.openai_edges, pilot.openai_reach),
        (pilot.anthropic_edges, pilot.anthropic_reach),
    ):
        for lower, reached in zip(edges[:, :-1].T, reach.T, strict=True):
            above = activations >= lower if (lower != 0).any() else activations > 0
            assert torch.equal(reached, above.float().mean(0))


def test_tokens_are_read_at_once_or_in_pieces(monkeypatch):
    split = MemorySplit([300, 200])
    positions = np.random.default_rng(0).integers(0, split.n_tokens, 400)
    expected = split.tokens[positions]
    read, real = [], split.read
    monkeypatch.setattr(split, "read", lambda a, b: read.append(b - a) or real(a, b), raising=False)
    assert np.array_equal(tokens_at(split, positions), expected)
    assert len(read) == 1
    monkeypatch.setattr("cratelm.activations.tables._READ", 64)
    assert np.array_equal(tokens_at(split, positions), expected)
    assert len(read) > 7
    assert max(read[1:]) <= 64
    assert tokens_at(split, positions[:0]).shape == (0,)


def test_windows_are_the_same_from_a_copy(monkeypatch):
    """Also at both ends of the batch, and where a document or a sequence ends."""
    split = MemorySplit([20, 5, 40, 3], seed=3)
    plan = SearchPlan.of(split, "fit", EOT, 16, split.n_tokens, 0)
    batch = next(plan.batches(64, torch.device("cpu")))
    n = batch.input_ids.numel()
    flat = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    row, neuron = torch.nonzero(batch.is_text[:, None].expand(n, 3), as_tuple=True)
    rows = torch.arange(n).expand(len(row), n)
    for context in (2, 8):
        direct = BatchWindows(flat, batch, 8)
        monkeypatch.setattr("cratelm.activations.windows._WORTH_COPYING", 0)
        expected = direct.around(row, neuron, context)
        monkeypatch.setattr("cratelm.activations.windows._WORTH_COPYING", 10**6)
        copied = BatchWindows(flat, batch, 8)
        assert torch.equal(copied.around(row, neuron, context), expected)
        assert torch.equal(copied.at(rows, neuron), flat.T[neuron])
        for place, (r, h) in enumerate(zip(row.tolist(), neuron.tolist(), strict=True)):
            low, high = next(s for s in batch.segments if s[0] <= r < s[1])
            low, high = max(low, r - context), min(high, r + context)
            inside = slice(low - r + context, high - r + context)
            assert torch.equal(expected[place, inside], flat[low:high, h])
            if low > 0 and high < n:  # the tables cut off what is beyond the ends of the batch
                assert expected[place].count_nonzero() == high - low


@pytest.mark.parametrize("kind", [LayerHarvest, FusedLayerHarvest])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_told(kind, number):
    split = MemorySplit([20, 20])
    activations = torch.randn(split.n_tokens, 3)
    kept, _, _ = run_harvest(split, activations, 16, ExcerptSizes(), 64, 0, kind)
    plan = SearchPlan.of(split, "fit", EOT, 16, 100, 0)
    batch = next(plan.batches(64, torch.device("cpu")))
    broken = activations[batch.position].view(*batch.input_ids.shape, -1).clone()
    broken[0, 3, 1] = number
    with pytest.raises(InputError, match="layer 1 has activations that are not finite"):
        kept.add(broken, batch)


# ---- the verb, and other people's models ------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with tokens and two small models, one trained for a step and one not at all."""
    folder = tmp_path_factory.mktemp("run")
    texts = folder / "texts.jsonl"
    words = ["stone", "river", "light", "import", "return", "seven", "and", "or"]
    generator = np.random.default_rng(0)
    with texts.open("w") as file:
        for _ in range(150):
            text = " ".join(generator.choice(words, 60)) + "."
            file.write(json.dumps({"text": text}) + "\n")
    path = folder / "run"
    cratelm.api.tokenize(run=path, corpus=str(texts), vocab_size=280, fit=0.3, held_out=0.3, sequence_length=32, quiet=True)  # fmt: skip
    small = ("hidden_size=16", "num_attention_heads=2")
    for model in ("crate-2l", "gpt2-2l"):
        cratelm.api.train(run=path, model=model, steps=0, sequence_length=32, model_overrides=small, name=model, validation_sequences=2, tensorboard=False, quiet=True)  # fmt: skip
    return path


OPTIONS = {"top": 12, "random": 6, "per_bin": 4, "pilot_tokens": 512, "batch_tokens": 256}


def test_harvest_verb_writes_what_the_model_does(run):
    result = cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS)
    assert result.site == "ista"
    assert result.neurons == (64, 64)
    model = cratelm.load(run / "model" / "crate-2l")
    store = TokenStore(run / "tokens")
    for split in ("fit", "held_out"):
        records = list(read_records(result.path, split))
        assert [(r.neuron.layer, r.neuron.index) for r in records] == [
            (layer, index) for layer in (0, 1) for index in range(64)
        ]
        record = next(r for r in records if not r.summary.dead and r.neuron.layer == 1)
        tokens = store.split(split)
        for excerpt in record.excerpts:
            if excerpt.kind == "out_of_context":
                ids, shift = torch.from_numpy(excerpt.token_ids).long()[None], 0
            else:
                first = excerpt.position // 32 * 32
                ids = torch.from_numpy(tokens.read(first, min(first + 32, tokens.n_tokens)))[None]
                shift = excerpt.position - excerpt.peak - first
            truth = cratelm.capture(model, cratelm.site_of(model), ids)[1][
                0, :, record.neuron.index
            ]
            expected = truth[shift : shift + len(excerpt)].numpy()
            np.testing.assert_allclose(excerpt.activations, expected, rtol=1e-4, atol=1e-5)
            ordinal = tokens.documents_at(np.array([excerpt.position]))[0]
            assert ordinal == excerpt.document
        top = record.of_kind("top")
        assert len({e.document for e in top}) == len(top)
        peaks = [e.activations[e.peak] for e in top]
        assert peaks == sorted(peaks, reverse=True)
        alone = record.of_kind("out_of_context")
        assert len(alone) == (10 if split == "held_out" else 0)
        if alone:
            assert [e.position for e in alone] == [e.position for e in top[:10]]
            assert all(1 <= len(e) <= 3 for e in alone)


def test_twins_share_random_positions(run):
    places = []
    for model in ("crate-2l", "gpt2-2l"):
        path = cratelm.api.harvest(run=run, model=model, **OPTIONS).path
        places.append(
            [[e.position for e in r.of_kind("random")] for r in read_records(path, "fit")]
        )
    assert places[0] == places[1]
    assert len({tuple(p) for p in places[0]}) > 100  # but neurons differ from each other


def test_one_neuron_can_be_read_alone(run):
    path = cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS).path
    (alone,) = read_records(path, "fit", layers=[1], indices=[9])
    everything = {r.neuron: r for r in read_records(path, "fit")}
    same = everything[alone.neuron]
    assert len(alone.excerpts) == len(same.excerpts) > 10
    for a, b in zip(alone.excerpts, same.excerpts, strict=True):
        assert (a.kind, a.bin, a.rank, a.position) == (b.kind, b.bin, b.rank, b.position)


def test_records_round_trip(run, tmp_path):
    path = cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS).path
    records = list(read_records(path, "held_out"))
    write_records(tmp_path, "held_out", records)
    for before, after in zip(records, read_records(tmp_path, "held_out"), strict=True):
        assert before.neuron == after.neuron
        assert before.summary.maximum == after.summary.maximum
        for a, b in zip(before.excerpts, after.excerpts, strict=True):
            assert np.array_equal(a.activations, b.activations)
            assert np.array_equal(a.token_ids, b.token_ids)


def fields_of(excerpt) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(excerpt).items()
    }


def test_a_table_is_the_list_of_its_excerpts(run):
    path = cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS).path
    record = list(read_records(path, "held_out"))[3]
    layer, index = record.neuron.key
    rows = pq.read_table(path / "excerpts-held_out.parquet").to_pylist()
    expected = [
        {name: row[name] for name in Excerpt.__dataclass_fields__}
        for row in rows
        if (row["layer"], row["index"]) == (layer, index)
    ]
    table, excerpts = record.excerpts, list(record.excerpts)
    assert isinstance(table, ExcerptTable)
    assert ExcerptTable.of(table) is table
    assert list(map(fields_of, excerpts)) == expected
    assert list(map(fields_of, ExcerptTable.of(excerpts))) == expected
    assert list(map(fields_of, table[5:9])) == expected[5:9]
    assert fields_of(table[-1]) == expected[-1]
    assert len(table) == len(expected) > 20
    assert table.lengths.tolist() == [len(e) for e in excerpts]
    for kind in EXCERPT_KINDS:
        assert table.is_kind(kind).tolist() == [e.kind == kind for e in excerpts]
    assert not len(ExcerptTable.of([]))


def test_rows_in_any_order_are_those_of_their_neuron(run, tmp_path):
    """Files of other tools need not be sorted by neuron: here, rows of two neurons alternate."""
    source = cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS).path
    name = "excerpts-fit.parquet"
    for file in ("summaries-fit.parquet", name):
        shutil.copy(source / file, tmp_path / file)
    table = pq.read_table(source / name)
    keys = table["layer"].to_numpy() * 10_000 + table["index"].to_numpy()
    within = np.concatenate([np.arange(n) for n in np.unique(keys, return_counts=True)[1]])
    pq.write_table(table.take(pa.array(np.argsort(within, kind="stable"))), tmp_path / name)
    for one, other in zip(read_records(source, "fit"), read_records(tmp_path, "fit"), strict=True):
        assert one.neuron == other.neuron
        assert list(map(fields_of, one.excerpts)) == list(map(fields_of, other.excerpts))


def test_finished_is_skipped_changed_is_told_same_command_same_files(run):
    first = Run(run).stage("activations", "crate-2l")
    cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS)
    before = first.require("harvest")
    cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS)
    assert first.require("harvest") == before
    with pytest.raises(InputError, match=r"seed=0, now 3.*--force"):
        cratelm.api.harvest(run=run, model="crate-2l", seed=3, **OPTIONS)
    cratelm.api.harvest(run=run, model="crate-2l", force=True, **OPTIONS)
    assert first.require("harvest").outputs == before.outputs


def test_other_peoples_models(run, tmp_path):
    vocab = 320
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32))  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, max_position_embeddings=32))  # fmt: skip
    for name, model, site, neurons in (
        ("neox", neox, None, (24, 24)),
        ("llama", llama, "model.layers.*.self_attn.o_proj:input", (32,)),  # both ends of 16
    ):
        model.save_pretrained(tmp_path / name)
        result = cratelm.api.harvest(run=run, model=str(tmp_path / name), site=site, **OPTIONS)
        assert result.neurons == neurons
        records = list(read_records(result.path, "held_out", layers=[0], indices=[5]))
        assert records[0].of_kind("random")


def test_the_default_length_is_the_one_rule_for_all_verbs(run, tmp_path):
    long = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=8192))  # fmt: skip
    long.save_pretrained(tmp_path / "long")
    options = {**OPTIONS, "sequence_length": None}
    cratelm.api.harvest(run=run, model=str(tmp_path / "long"), name="long", **options)
    assert (
        Run(run).stage("activations", "long").require("harvest").results["sequence_length"] == 2048
    )
    assert open_harvested(Run(run), "long").sequence_length == 2048
    cratelm.api.harvest(run=run, model="crate-2l", name="short", **options)
    assert open_harvested(Run(run), "short").sequence_length == 32


def test_a_harvest_is_opened_as_it_was_made(run, tmp_path):
    """In its precision, on its device where there is one, and only if the folder is still the same."""
    shutil.copytree(run / "model" / "crate-2l", tmp_path / "mine")
    model = str(tmp_path / "mine")
    cratelm.api.harvest(
        run=run, model=model, name="mine", dtype="bfloat16", device="cpu", **OPTIONS
    )
    held = open_harvested(Run(run), "mine")
    assert held.subject.model.dtype == torch.bfloat16
    assert held.subject.model.device.type == "cpu"
    record = run / "activations" / "mine" / "completed.json"
    told = json.loads(record.read_text())
    assert told["results"]["device"] == "cpu"
    assert "device" not in told["config"]
    told |= {
        "checksum": "",
        "results": {**told["results"], "device": "cuda:99"},
    }  # on another machine
    record.write_text(json.dumps(told))
    assert open_harvested(Run(run), "mine").subject.model.dtype == torch.bfloat16
    saved = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**saved, "bos_token_id": 1}))
    with pytest.raises(InputError, match=r"no longer has the model that was harvested.*--force"):
        open_harvested(Run(run), "mine")


@pytest.mark.parametrize("verb", ["harvest", "evaluate", "predict", "steer", "effects", "analyze"])
def test_a_device_that_is_not_there_is_told(run, verb):
    cratelm.api.harvest(run=run, model="crate-2l", **OPTIONS)
    fields = {
        "harvest": {"model": "crate-2l", "name": "elsewhere"},
        "predict": {"models": ("crate-2l",), "text": "a"},
        "steer": {"model": "crate-2l", "neurons": ("0:0",), "zero": True, "text": "a"},
    }.get(verb, {"model": "crate-2l"})
    with pytest.raises(InputError, match=r"--device cuda:99 cannot be used .*--device auto") as e:
        getattr(cratelm.api, verb)(run=run, device="cuda:99", **fields)
    assert "\n" not in str(e.value)


_OF_THE_HUB = """
import sys
from pathlib import Path
import torch
import cratelm
from cratelm.activations.open_harvest import open_harvested
from cratelm.errors import InputError
from cratelm.llm.backends.transformers import LocalBackend
from cratelm.runs import Run

run, cache = Path(sys.argv[1]), Path(sys.argv[2]) / "models--me--tiny"
def harvest(**more):
    cratelm.api.harvest(run=run, model="me/tiny", tokens=500, pilot_tokens=64, quiet=True, **more)
def identity():
    return Run(run).stage("activations", "tiny").require("harvest").inputs["model"]
def first_weight():
    return float(next(open_harvested(Run(run), "tiny").subject.model.parameters()).sum())

harvest()
assert identity() == "hub:me/tiny@" + "1" * 40, identity()
before = first_weight()
harvest()  # finished
(cache / "refs" / "main").write_text("2" * 40)
try:
    harvest()
except InputError as error:
    assert "input model that has changed since" in str(error), error
else:
    raise AssertionError("other weights were taken for the same")
assert first_weight() == before  # of the commit that was harvested
harvest(force=True)
assert identity() == "hub:me/tiny@" + "2" * 40
assert first_weight() != before
backend = LocalBackend("me/tiny", dtype="float32")
assert backend.identity["weights"] == "me/tiny@" + "2" * 40
(cache / "refs" / "main").write_text("1" * 40)
assert float(next(backend.model.parameters()).sum()) == first_weight()
assert LocalBackend("me/tiny").identity["weights"] == "me/tiny@" + "1" * 40
print("all is well")
"""


def test_a_model_of_the_hub_is_identified_by_its_commit(run, tmp_path):
    cache = tmp_path / "hub" / "models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1" * 40)
    for commit in ("1" * 40, "2" * 40):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, max_position_embeddings=32))  # fmt: skip
        model.save_pretrained(cache / "snapshots" / commit)
    done = subprocess.run(
        [sys.executable, "-c", _OF_THE_HUB, str(run), str(tmp_path / "hub")],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.endswith("all is well\n"), done.stderr


def test_a_quiet_harvest_shows_no_bar(run, capsys):
    cratelm.api.harvest(run=run, model="crate-2l", name="quiet", quiet=True, **OPTIONS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("named", [".", "..", "/", "./"])
def test_a_model_without_a_name_takes_no_folder_of_the_run(run, tmp_path, monkeypatch, named):
    """Its results would lie in `activations/` itself, over those of all models."""
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=r"has no name that could name the results: ") as error:
        cratelm.api.harvest(run=run, model=named)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"--sae .* has no name that could name the results"):
        cratelm.api.harvest(run=run, model="crate-2l", sae=named)
    assert sorted(run.rglob("*")) == before


def test_a_folder_of_the_same_name_does_not_hide_the_runs_model(run, tmp_path, monkeypatch):
    (tmp_path / "crate-2l").mkdir()
    monkeypatch.chdir(tmp_path)
    result = cratelm.api.harvest(run=run, model="crate-2l", name="again", **OPTIONS)
    assert result.neurons == (64, 64)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "crate-9l"}, "cratelm train"),
        ({"model": "crate-2l", "site": "nowhere.*.at"}, "no site"),
        ({"model": "crate-2l", "sequence_length": 64}, "longer than the 32 positions"),
        ({"model": "crate-2l", "short_context": 40}, "above --context"),
    ],
)
def test_mistakes_leave_nothing_behind(run, fields, told):
    before = sorted(p for p in run.rglob("*") if p.is_file())
    with pytest.raises(InputError, match=told):
        cratelm.api.harvest(run=run, name="other", **fields)
    assert sorted(p for p in run.rglob("*") if p.is_file()) == before


def test_a_pilot_in_parts_gives_the_same_and_stops_early(monkeypatch):
    """Layers that do not fit together are measured one after another, in passes that end with the last one needed."""
    model = cratelm.build("gpt2-3l", vocab_size=64, max_position_embeddings=32)
    site = cratelm.site_of(model)
    split = MemorySplit([30] * 20)
    plan = SearchPlan.of(split, "fit", EOT, 32, split.n_tokens, 0)  # type: ignore[arg-type]
    ran: list[int] = []
    for number, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    whole = calibrate(model, site, plan, 320, 4096)
    assert ran == [0, 1]  # the last block is left at its MLP
    ran.clear()
    monkeypatch.setattr(calibration, "_PILOT_BYTES", 1)
    parts = calibrate(model, site, plan, 320, 4096)
    assert ran == [0, 0, 1]  # passes that end in blocks 0, 1 and 2
    for one, other in zip(whole, parts, strict=True):
        for name, value in vars(one).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(other, name))), name
