"""Both ends of a neuron: chosen by the model or measured, harvested exactly, and told apart everywhere after."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polarity_runs import DEAD, LAYERS, ONLY_NEGATIVE, OPTIONS, WIDTH, gated_llama, run_of_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import cratelm.api as api
from cratelm.activations import harvest as harvest_room
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.layer_harvest import LayerHarvest, octave_of
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.polarity import activation_function
from cratelm.activations.store import read_records, read_summaries
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.explain.selection import select_neurons
from cratelm.explain.store import read_explanations, read_selected
from cratelm.models import build, capture, site_of
from cratelm.models.partial_forward import PartialForward
from cratelm.models.sites import Ends, both_ends, hooked, without_ends
from cratelm.records import NeuronId, NeuronKey, neuron_name, parse_neuron_ids
from cratelm.results.neuron_table import read_neuron_table
from cratelm.results.run_summary import run_card
from cratelm.results.sparsity import read_sparsity
from cratelm.runs import Run
from cratelm.score.controls import shuffled
from cratelm.score.store import read_scores
from cratelm.stats.ends import clustered, neuron_means
from cratelm.stats.layers import layered_mean
from cratelm.stats.scores import all_statistics, statistics_by_end
from cratelm.steer.edits import Edit
from cratelm.steer.steering import steering
from cratelm.tokens.shards import TokenStore

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
MODEL = "llama"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a gated LLaMA: harvested, explained, scored, replaced, with effects."""
    run, _ = run_of_llama(tmp_path_factory.mktemp("polarity"))
    api.explain(run=run, model=MODEL, neurons=0, quiet=True)
    api.score(run=run, model=MODEL, resamples=100, quiet=True)
    api.effects(run=run, model=MODEL, neurons=0, tokens=512, quiet=True)
    api.replace(run=run, model=MODEL, tokens=1024, neuron_tokens=256, quiet=True)
    return run


@pytest.fixture(scope="module")
def truth(run) -> dict[str, list[np.ndarray]]:
    """By split, the raw activations [n, H] of each layer on all tokens, by a hook of the test's own."""
    model, store = gated_llama(300), TokenStore(run / "tokens")
    found = {}
    for split in ("fit", "held_out"):
        tokens = store.split(split)
        layers: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
        for start in range(0, tokens.n_tokens, 32):
            ids = torch.from_numpy(tokens.read(start, min(start + 32, tokens.n_tokens)))[None]
            for number, block in enumerate(model.model.layers):
                down: Any = block.mlp.down_proj

                def take(_, args, of=layers[number]):
                    of.append(args[0][0].numpy())

                handle = down.register_forward_pre_hook(take)
                with torch.no_grad():
                    model(ids)
                handle.remove()
        found[split] = [np.concatenate(of) for of in layers]
    return found


# ---- names ----------------------------------------------------------------------------------------


def test_an_end_is_written_with_its_sign():
    assert [neuron_name(i, "mlp:both") for i in (34, 35)] == ["17+", "17-"]
    assert neuron_name(17, "mlp") == "17"
    end = NeuronId("m", "mlp:both", 3, 35)
    assert (str(end), end.name, end.number, end.end, end.n_ends) == ("m/mlp:both.3.17-", "17-", 17, 1, 2)  # fmt: skip
    assert end.opposite == NeuronId("m", "mlp:both", 3, 34)
    assert NeuronId("m", "mlp", 3, 35).opposite is None


def test_a_number_alone_names_both_ends():
    both = parse_neuron_ids("--only", ["0:17-", "0:2", "1:3+"], "mlp:both")
    assert both == [NeuronKey(0, 4), NeuronKey(0, 5), NeuronKey(0, 35), NeuronKey(1, 6)]
    assert parse_neuron_ids("--only", ["0:17"], "mlp") == [NeuronKey(0, 17)]
    with pytest.raises(InputError, match=r"--only 0:17\+: the neurons of site mlp have one end here: type 0:17"):  # fmt: skip
        parse_neuron_ids("--only", ["0:17+"], "mlp")
    for wrong in ("0:17*", "0:+17", "0:17+-", "0:17 +", "17+"):
        with pytest.raises(InputError, match="write a neuron as LAYER:INDEX"):
            parse_neuron_ids("--only", [wrong])


# ---- the site -------------------------------------------------------------------------------------


def test_ends_are_the_activation_exactly():
    x = torch.tensor([[1.5, -2.0, 0.0, -0.0, 3e-30, -torch.inf]])
    ends = Ends().encode(x)
    assert ends.tolist() == [[1.5, 0, 0, 2.0, 0, 0, 0, 0, 3.0000000008e-30, 0, 0, torch.inf]] or torch.equal(
        Ends().decode(ends[:, :10]), x[:, :5]
    )  # fmt: skip
    assert not torch.signbit(ends).any()
    assert torch.isnan(Ends().encode(torch.tensor([torch.nan]))).all()
    finite = torch.randn(50, 7)
    assert torch.equal(Ends().decode(Ends().encode(finite)), finite)


def test_the_name_of_a_site_says_that_it_has_both_ends():
    model = gated_llama(300)
    plain, both = site_of(model, "mlp"), site_of(model, "mlp:both")
    assert both == both_ends(plain)
    assert without_ends(both) == plain
    assert (both.n_neurons, both.has_both_ends) == ((2 * WIDTH,) * LAYERS, True)
    path = "model.layers.*.mlp.down_proj:input"
    assert site_of(model, f"{path}:both").name == f"{path}:both"
    for raw, ends in zip(capture(model, plain, IDS), capture(model, "mlp:both", IDS), strict=True):
        assert torch.equal(ends[..., 0::2], raw.clamp(min=0))
        assert torch.equal(ends[..., 1::2], (-raw).clamp(min=0))


@torch.no_grad()
def test_an_edit_of_an_end_is_an_edit_of_the_activation():
    model = gated_llama(300)
    site = site_of(model, "mlp:both")
    raw = capture(model, "mlp", IDS)[1]
    cases = [
        (Edit(1, 2 * 2 + 1, zero=True), raw[..., 2].clamp(min=0)),
        (Edit(1, 2 * 2 + 1, set=5.0), torch.full_like(raw[..., 2], -5.0)),
        (Edit(1, 2 * 2, set=5.0), torch.full_like(raw[..., 2], 5.0)),
        (Edit(1, 2 * 2 + 1, add=1.0), raw[..., 2] - 1),
        (Edit(1, 2 * 2, scale=3.0), raw[..., 2].clamp(min=0) * 3 - (-raw[..., 2]).clamp(min=0)),
    ]
    for edit, expected in cases:
        with steering(model, edit, site=site):
            changed = capture(model, "mlp", IDS)[1]
        torch.testing.assert_close(changed[..., 2], expected, rtol=0, atol=1e-6)
        others = [i for i in range(WIDTH) if i != 2]
        assert torch.equal(changed[..., others], raw[..., others])


@torch.no_grad()
def test_a_rank_one_edit_of_an_end_is_that_of_the_hook():
    model = gated_llama(300)
    partial = PartialForward(model, site_of(model, "mlp:both"))
    assert all(writes is not None and len(writes) == 2 * WIDTH for writes in partial.writes)
    trace = partial.trace(IDS)
    rows, index = torch.tensor([0]), torch.tensor([2 * 5 + 1])
    delta = torch.zeros(1, 12)
    delta[0, -1] = -trace.activations[0][0, -1, 11]
    found = partial.edited(trace, 0, rows, index, delta, 1)

    def without(place, ends):
        if place == 0:
            ends = ends.clone()
            ends[0, -1, 11] = 0
            return ends
        return None

    with hooked(model, partial.site, without):
        expected = model(IDS[:1]).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- the choice -----------------------------------------------------------------------------------


def gpt2(function: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, activation_function=function)
    ).eval()  # fmt: skip


def test_the_function_that_makes_the_activations_is_found():
    assert activation_function(gpt2("gelu_new"), site_of(gpt2("gelu_new"))) == "NewGELUActivation"
    assert activation_function(gpt2("relu"), site_of(gpt2("relu"))) == "ReLU"
    assert activation_function(gpt2("tanh"), site_of(gpt2("tanh"))) == ""
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    crate = build("crate-2l", vocab_size=300, max_position_embeddings=48, seed=0, **small)
    assert activation_function(crate, site_of(crate, "ista")) == "ReLU"
    assert activation_function(crate, site_of(crate, "mssa")) == ""
    llama = gated_llama(300)
    assert activation_function(llama, site_of(llama, "mlp")) == ""
    assert activation_function(llama, site_of(llama, "model.layers.*.mlp.act_fn")) == "SiLU" or (
        activation_function(llama, site_of(llama, "model.layers.*.mlp.act_fn")) == "SiLUActivation"
    )
    assert activation_function(llama, site_of(llama, "model.layers.*")) == ""


CHOICES = [
    ("relu", None, "positive", True),
    ("gelu_new", None, "positive", False),
    ("tanh", None, "both", False),
    ("gelu_new", "transformer.h.*", "both", False),
    ("gelu_new", "transformer.h.*.attn.c_proj:input", "both", False),
]


@pytest.mark.parametrize(("function", "site", "polarity", "exact"), CHOICES)
def test_the_site_decides(run, tmp_path, function, site, polarity, exact):
    folder = tmp_path / "gpt"
    gpt2(function).save_pretrained(folder)
    name = f"choice-{function}-{len(site or '')}"
    found = harvest(HarvestConfig(run=run, model=str(folder), site=site, name=name, **OPTIONS))
    assert (found.polarity, found.exact_zeros) == (polarity, exact)
    assert found.polarity_reason
    assert found.site.endswith(":both") == (polarity == "both")
    done = Run(run).stage("activations", name).completion()
    assert done is not None
    assert done.results["polarity"] == polarity
    columns = {f.firing_threshold is not None for f in read_summaries(found.path, "fit")}
    assert columns == {not exact}


def test_the_option_decides_before_the_site(run, tmp_path, capsys):
    folder = tmp_path / "gpt"
    gpt2("relu").save_pretrained(folder)
    options = {**OPTIONS, "quiet": False}
    found = harvest(HarvestConfig(run=run, model=str(folder), polarity="both", **options))
    assert (found.polarity, found.neurons) == ("both", (128, 128))
    assert "polarity both (ReLU is never below 0; as asked for)" in capsys.readouterr().out
    for s in read_summaries(found.path, "fit"):
        assert s.silent == (s.neuron.end == 1 or s.dead)  # nothing is below 0
    llama = run.parent / MODEL
    positive = harvest(
        HarvestConfig(run=run, model=str(llama), polarity="positive", name="up", **OPTIONS)
    )
    assert (positive.polarity, positive.site, positive.neurons) == ("positive", "mlp", (6, 6))
    assert positive.dead["fit"] == 2
    assert positive.only_negative["fit"] == 1  # the other one is 0 everywhere


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polarity": "up"}, "polarity"),
        ({"polarity": "both", "sae": "s"}, "--polarity both and --sae cannot be combined"),
        ({"polarity": "positive", "site": "mlp:both"}, "names both ends, and --polarity positive"),
    ],
)
def test_a_polarity_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        HarvestConfig(**options)


# ---- the harvest ----------------------------------------------------------------------------------


def threshold_of(maximum: float) -> float:
    """The largest power of two that is at most a tenth of the maximum."""
    power = 2.0**30
    while power > maximum / 10:
        power /= 2
    return power


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_both_ends_are_harvested_as_brute_force_has_them(run, truth, monkeypatch, kind):
    if kind == "compiled":
        fused = pytest.importorskip("cratelm.activations.fused_harvest")
        chosen = fused.FusedLayerHarvest
    else:
        chosen = LayerHarvest
    monkeypatch.setattr(harvest_room, "layer_harvest_for", lambda *_: chosen)
    llama = run.parent / MODEL
    found = harvest(HarvestConfig(run=run, model=str(llama), name=f"as-{kind}", **OPTIONS))
    assert (found.site, found.neurons) == ("mlp:both", (2 * WIDTH,) * LAYERS)
    store = TokenStore(run / "tokens")
    for split, layers in truth.items():
        tokens = store.split(split)
        is_text = tokens.read(0, tokens.n_tokens) != store.eot_id
        records = list(read_records(found.path, split))
        assert len(records) == 2 * WIDTH * LAYERS
        for record in records:
            neuron, s = record.neuron, record.summary
            raw = layers[neuron.layer][:, neuron.number]
            end = np.maximum(-raw if neuron.end else raw, 0)
            other = np.maximum(raw if neuron.end else -raw, 0)[is_text]
            text = end[is_text].astype(np.float64)
            assert s.n_tokens == is_text.sum()
            assert s.maximum == pytest.approx(text.max(), rel=1e-4)
            assert s.opposite_maximum == pytest.approx(other.max(), rel=1e-4)
            assert s.mean == pytest.approx(text.mean(), rel=1e-3, abs=1e-6)
            assert s.variance == pytest.approx(text.var(), rel=1e-3, abs=1e-7)
            assert s.silent == (text.max() == 0)
            limit = threshold_of(text.max()) if text.max() > 0 else 0.0
            assert s.firing_threshold == limit
            fires = (text >= limit).sum() if limit else 0
            near = (np.abs(text - limit) < 1e-4 * limit).sum()
            assert abs(s.firing_rate * len(text) - fires) <= near + 1e-6
            for excerpt in record.excerpts:
                if excerpt.kind != "out_of_context":
                    first = excerpt.position - excerpt.peak
                    expected = end[first : first + len(excerpt)]
                    np.testing.assert_allclose(excerpt.activations, expected, rtol=1e-3, atol=1e-5)
            # the strongest token of each document, strongest first
            ordinals = tokens.documents_at(np.arange(tokens.n_tokens))
            best = sorted((end[is_text & (ordinals == d)].max() for d in np.unique(ordinals[is_text])), reverse=True)  # fmt: skip
            peaks = [e.activations[e.peak] for e in record.of_kind("top")]
            np.testing.assert_allclose(peaks, [b for b in best if b > 0][:8], rtol=1e-3, atol=1e-6)


def test_octaves_are_powers_of_two():
    values = torch.tensor([0.0, -3.0, 2.0**-45, 2.0**-40, 0.99, 1.0, 1.99, 2.0, 2.0**30])
    assert octave_of(values).tolist() == [0, 0, 0, 0, 39, 40, 40, 41, 63]


def test_parts_are_the_whole(run):
    llama = run.parent / MODEL
    for name, parts in (("whole", [None]), ("parts", ["1/2", "2/2"])):
        for part in parts:
            harvest(HarvestConfig(run=run, model=str(llama), name=name, part=part, **OPTIONS))
    merged = api.merge_harvest(run=run, model="parts")
    assert (merged.polarity, merged.site) == ("both", "mlp:both")
    assert merged.polarity_reason
    for split in ("fit", "held_out"):
        sides = [read_summaries(run / "activations" / n, split) for n in ("whole", "parts")]
        for a, b in zip(*sides, strict=True):
            plain = [{**vars(s), "neuron": s.neuron.key} for s in (a, b)]
            for key, value in plain[0].items():
                np.testing.assert_equal(plain[1][key], value)


def test_a_neuron_that_only_goes_negative_is_not_dead(run):
    summaries = {(s.neuron.layer, s.neuron.name): s for s in read_summaries(run / "activations" / MODEL, "held_out")}  # fmt: skip
    up, down = summaries[0, f"{ONLY_NEGATIVE}+"], summaries[0, f"{ONLY_NEGATIVE}-"]
    assert (up.silent, up.dead, down.silent, down.dead) == (True, False, False, False)
    assert up.firing_rate == 0
    assert down.firing_rate > 0
    assert all(summaries[0, f"{DEAD}{end}"].dead for end in "+-")
    done = Run(run).stage("activations", MODEL).require("harvest")
    assert done.results["dead"] == {"fit": 1, "held_out": 1}
    sparsity = read_sparsity(run / "activations" / MODEL)[0]
    assert sparsity.dead.tolist() == [i == DEAD for i in range(WIDTH)]
    card = run_card("run", Run(run)).model(MODEL)
    assert (card.neurons[0], card.dead[0], card.dead[1]) == (WIDTH, 1, 0)


def test_sparsity_is_that_of_the_neurons(run, truth):
    """Firing at either end, and the kurtosis of the activation itself."""
    store = TokenStore(run / "tokens")
    tokens = store.split("held_out")
    is_text = tokens.read(0, tokens.n_tokens) != store.eot_id
    rates = {s.neuron: s.firing_rate for s in read_summaries(run / "activations" / MODEL, "held_out")}  # fmt: skip
    for layer, of_layer in read_sparsity(run / "activations" / MODEL).items():
        raw = truth["held_out"][layer][is_text].astype(np.float64)
        expected = ((raw - raw.mean(0)) ** 4).mean(0) / np.maximum(raw.var(0), 1e-30) ** 2
        alive = raw.var(0) > 0
        np.testing.assert_allclose(of_layer.kurtosis[alive], expected[alive], rtol=1e-2)
        assert np.isnan(of_layer.kurtosis[~alive]).all()
        for i, rate in enumerate(of_layer.firing_rate):
            ends = [rates[NeuronId(MODEL, "mlp:both", layer, 2 * i + e)] for e in (0, 1)]
            assert rate == pytest.approx(sum(ends))


def test_a_harvest_is_opened_with_its_ends(run):
    opened = open_harvested(Run(run), MODEL)
    assert (opened.site.name, opened.site.n_neurons) == ("mlp:both", (2 * WIDTH,) * LAYERS)
    llama = str(run.parent / MODEL)
    harvest(HarvestConfig(run=run, model=llama, polarity="positive", name="up", **OPTIONS))
    assert open_harvested(Run(run), "up").site.name == "mlp"


# ---- explanations and scores ----------------------------------------------------------------------


def test_neurons_are_drawn_with_both_their_ends(run):
    folder = run / "activations" / MODEL
    drawn = select_neurons(folder, 3, seed=0)
    ends: dict[tuple[int, int], list[str]] = {}
    for s in drawn:
        ends.setdefault((s.neuron.layer, s.neuron.number), []).append(s.neuron.name[-1])
    assert len(ends) == 3 * LAYERS
    assert set(map(tuple, ends.values())) <= {("+", "-"), ("+",), ("-",)}
    everything = {s.neuron.name: s.dead for s in select_neurons(folder, 0, seed=0) if s.neuron.layer == 0}  # fmt: skip
    assert f"{ONLY_NEGATIVE}+" not in everything  # it is silent, and the other end is not
    assert everything[f"{ONLY_NEGATIVE}-"] is False
    assert everything[f"{DEAD}+"] is everything[f"{DEAD}-"] is True
    named = select_neurons(folder, 0, 0, [f"0:{ONLY_NEGATIVE}+", "0:5"])
    assert [(s.neuron.name, s.dead) for s in named] == [(f"{ONLY_NEGATIVE}+", True), ("5+", False), ("5-", False)]  # fmt: skip
    assert [s.neuron.name for s in select_neurons(folder, 0, 0, [f"0:{ONLY_NEGATIVE}"])] == [f"{ONLY_NEGATIVE}-"]  # fmt: skip
    with pytest.raises(InputError, match=r"--only 0:99-: .* of 6 neurons each"):
        select_neurons(folder, 0, 0, ["0:99-"])


def test_both_ends_are_explained_and_scored(run):
    explained = {e.neuron.name for e in read_explanations(run / "explanations" / MODEL) if e.neuron.layer == 0}  # fmt: skip
    assert {"5+", "5-", f"{ONLY_NEGATIVE}-"} <= explained
    assert not {f"{ONLY_NEGATIVE}+", f"{DEAD}+", f"{DEAD}-"} & explained
    selected = {s.neuron for s in read_selected(run / "explanations" / MODEL)}
    scores = list(read_scores(run / "scores" / MODEL))
    assert {s.neuron for s in scores} == selected
    summary = json.loads((run / "scores" / MODEL / "summary.json").read_text())
    assert set(summary["by_end"]) == {"+", "-"}
    for end, statistics in summary["by_end"].items():
        for of in statistics:
            ends = [s for s in scores if (s.explainer, s.metric, s.control) == (of["explainer"], of["metric"], of["control"]) and s.neuron.name.endswith(end)]  # fmt: skip
            assert sum(of["counts"].values()) == len(ends)
    words = Run(run).stage("scores", MODEL).require("score").results["means"]
    assert all("; ends +: " in line and "; ends -: " in line for line in words.values())


def test_a_neuron_counts_once_in_means_and_intervals(run):
    scores = list(read_scores(run / "scores" / MODEL))
    found = {
        (s.explainer, s.metric, s.control, s.policy): s
        for s in all_statistics(scores, resamples=50)
    }
    own = [s for s in scores if (s.explainer, s.metric, s.control) == ("trie", "top_and_random", "none")]  # fmt: skip
    by_layer: dict[int, dict[int, list[float]]] = {}
    for s in own:
        if s.score.value is not None:
            by_layer.setdefault(s.neuron.layer, {}).setdefault(s.neuron.number, []).append(100 * s.score.value)  # fmt: skip
    means = [np.mean([np.mean(v) for v in of.values()]) for _, of in sorted(by_layer.items())]
    statistics = found["trie", "top_and_random", "none", "leave_out"]
    assert [layer.mean for layer in statistics.layers] == pytest.approx(means)
    # the same ends twice are no more neurons: as if each neuron had been scored once
    once = [replace(s, neuron=replace(s.neuron, site="mlp", index=s.neuron.number)) for s in own if s.neuron.end == 0]  # fmt: skip
    twice = [replace(s, neuron=replace(s.neuron, site="mlp:both", index=2 * s.neuron.index + e)) for s in once for e in (0, 1)]  # fmt: skip
    single, double = (all_statistics(of, resamples=200)[0] for of in (once, twice))
    assert (double.mean, double.low, double.high) == pytest.approx((single.mean, single.low, single.high))  # fmt: skip
    assert set(statistics_by_end(scores, resamples=10)) == {"+", "-"}
    assert statistics_by_end(once, resamples=10) == {}


def test_values_of_a_neuron_are_averaged():
    ends = [NeuronId("m", "mlp:both", 0, i) for i in (4, 5, 2)]
    assert neuron_means(ends, [1.0, 3.0, None]) == {(0, 2): 2.0}
    plain = [NeuronId("m", "mlp", 0, i) for i in (4, 5)]
    assert neuron_means(plain, [1.0, 3.0]) == {(0, 4): 1.0, (0, 5): 3.0}
    means, first = clustered(np.array([1.0, 5.0, 3.0, 7.0]), np.array([9, 4, 9, 4]))
    assert (means.tolist(), first.tolist()) == ([2.0, 6.0], [0, 1])
    found = layered_mean([1.0, 3.0, np.nan, np.nan, 8.0], [0, 0, 0, 1, 1], numbers_in_layer=[7, 7, 8, 0, 1])  # fmt: skip
    assert found.mean is not None
    assert (found.mean.value, found.defined, found.undefined) == (5.0, 2, 2)


@pytest.mark.parametrize("indices", [range(12), [0, 1, 2, 4, 6], [0, 2, 4, 5], [4, 5, 6, 8], [8, 9, 2, 3]])  # fmt: skip
def test_an_end_is_not_simulated_from_its_other_end(indices):
    neurons = [NeuronId("m", "mlp:both", 0, i) for i in indices]
    for seed in range(20):
        donors = shuffled(neurons, seed)
        assert sorted(donors) == sorted(donors.values()) == sorted(neurons)
        assert all(a.number != b.number for a, b in donors.items())
    plain = [replace(n, site="mlp") for n in neurons]
    order = np.random.default_rng([3, 0]).permutation(len(plain))
    ring = [sorted(plain)[i] for i in order]
    assert shuffled(plain, 3) == dict(zip(ring, ring[1:] + ring[:1], strict=True))


# ---- what follows ---------------------------------------------------------------------------------


def test_a_model_on_the_explanations_of_both_ends(run):
    from cratelm.replace.forward import ExplainedModel
    from cratelm.replace.store import read_replacement_summary

    summary = read_replacement_summary(run / "replacement" / MODEL)
    rows = [r for r in summary.rows if r.layers == "all"]
    assert rows
    assert all(np.isfinite(r.loss_replaced.value) for r in rows)
    assert summary.reconstructed is None  # both ends are the activation: nothing is lost
    model = gated_llama(300)
    explained = ExplainedModel(model, site_of(model, "mlp:both"))
    trace = explained.trace(IDS)
    codes = {p: of.flatten(0, 1).numpy() for p, of in enumerate(trace.activations)}
    torch.testing.assert_close(explained.losses(trace, codes), explained.losses(trace, {}))
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")  # fmt: skip
    torch.testing.assert_close(explained.losses(trace, {}).flatten(), expected)


def test_effects_of_an_end(run):
    from cratelm.steer.store import read_ablations, read_logit_effects

    ablations = {row.neuron.name: row for row in read_ablations(run / "steer" / MODEL) if row.neuron.layer == 0}  # fmt: skip
    assert {"5+", "5-", f"{ONLY_NEGATIVE}-"} <= set(ablations)
    effects = {e.neuron.name: e for e in read_logit_effects(run / "steer" / MODEL) if e.neuron.layer == 0}  # fmt: skip
    assert effects["5-"].activation > 0
    assert effects["5-"].promoted != effects["5+"].promoted


def test_steer_takes_an_end(run, capsys):
    from cratelm.steer.config import SteerConfig
    from cratelm.steer.steer import steer

    common: dict[str, Any] = {"run": run, "path": str(run.parent / MODEL), "generate": 0, "text": "the cat sat"}  # fmt: skip
    end = steer(SteerConfig(("0:5-",), set=4.0, **common))
    whole = steer(SteerConfig(("0:5",), set=-4.0, **common))
    assert end.site == "mlp:both"
    assert whole.site == "mlp"
    assert end.next_token.kl == pytest.approx(whole.next_token.kl, rel=1e-4)
    assert end.next_token.kl > 0
    with pytest.raises(InputError, match="name an end of all of them"):
        SteerConfig(("0:5-", "0:4"), set=1.0)
    with pytest.raises(InputError, match=r"neuron 6- of layer 0 does not exist.* neurons 0 to 5"):
        steer(SteerConfig(("0:6-",), set=4.0, **common))
    capsys.readouterr()
    for arguments in (["--neurons", "0:17*", "--set", "1"], ["--neurons", "0:1", "--polarity", "x"]):  # fmt: skip
        assert main(["steer", "--run", str(run), *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["harvest", "--run", str(run), "--model", "x", "--polarity", "sideways"]) == 2
    assert "--polarity" in capsys.readouterr().err
    assert main(["explain", "--run", str(run), "--model", MODEL, "--neurons", "0", "--only", "0:1*"]) == 2  # fmt: skip
    assert "0:1*" in capsys.readouterr().err


def test_analysis_of_both_ends(run):
    api.analyze(run=run, model=MODEL, tokens=512, quiet=True)
    from cratelm.analysis.store import read_neurons

    dead = {n.neuron.name: n.dead for n in read_neurons(run / "analysis" / MODEL) if n.neuron.layer == 0}  # fmt: skip
    assert dead[f"{DEAD}+"] is dead[f"{DEAD}-"] is True
    assert not any(dead[f"{ONLY_NEGATIVE}{end}"] for end in "+-")


def test_the_table_of_neurons(run):
    table = read_neuron_table(Run(run), MODEL)
    assert table.has_ends
    assert table.site == "mlp:both"


def test_exports_tell_the_ends_apart(run, tmp_path):
    api.export_records(run=run, model=MODEL, out=tmp_path / "records", quiet=True)
    for end in ("plus", "minus"):
        names = {p.name for p in (tmp_path / "records" / end / "0").iterdir()}
        assert names == {f"{i}.json" for i in range(WIDTH)}
        record = json.loads((tmp_path / "records" / end / "1" / "5.json").read_text())
        assert record["neuron_id"]["neuron_index"] == 5
    found = api.export_neuronpedia(run=run, model=MODEL, out=tmp_path / "np", quiet=True)
    assert found.sources == ("0-mlp-plus", "0-mlp-minus", "1-mlp-plus", "1-mlp-minus")
    assert found.features == 2 * WIDTH * LAYERS
    one = api.export_records(run=run, model=MODEL, out=tmp_path / "one", only=["0:5-"], quiet=True)
    assert one.neurons == 1
    assert (tmp_path / "one" / "minus" / "0" / "5.json").is_file()


def test_autoencoders_read_activations_and_not_ends():
    from cratelm.sae.train_config import SaeTrainConfig

    with pytest.raises(InputError, match=r"type --site mlp$"):
        SaeTrainConfig(site="mlp:both")
    with pytest.raises(InputError, match="latents of autoencoders have one end"):
        both_ends(replace(site_of(gated_llama(300)), name="latents", autoencoders=(nn.Identity(),) * LAYERS))  # type: ignore[arg-type]  # fmt: skip


def test_seeds_are_compared_by_neurons_with_one_end(run):
    from cratelm.analysis.seeds import _check_sites, _Seed

    with pytest.raises(InputError, match="harvest with --polarity positive, under another --name"):
        _check_sites([_Seed(MODEL, 0, open_harvested(Run(run), MODEL), None)] * 2)
