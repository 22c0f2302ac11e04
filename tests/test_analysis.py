"""White-box reading: each quantity on a case with a known answer, and the verb on small models."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_activations import MemorySplit
from transformers import LlamaConfig, LlamaForCausalLM

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.store import read_summaries
from cratelm.analysis.analyze import analyze
from cratelm.analysis.coding_rate import coding_rate, compression_rate, orthonormal
from cratelm.analysis.config import AnalyzeConfig
from cratelm.analysis.consistency import (
    HeldOutPass,
    NeuronActivations,
    count_passes,
    covered_tokens,
    draw_partners,
    measure_coverage,
    measure_neurons,
)
from cratelm.analysis.dictionary import (
    coherence,
    effective_rank,
    overlap,
    overlaps,
    random_bases,
    spectral_norm,
    stable_rank,
    welch_bound,
)
from cratelm.analysis.groups import NONE, CorrelationSums, group_neurons
from cratelm.analysis.layer_sums import LayerSums, _add_moments, _TextTokens
from cratelm.analysis.sparse_coding import objective, objectives, sparsity
from cratelm.analysis.store import MEASURES, SHARE, SHARES, LayerFigure, MeasureSummary
from cratelm.analysis.summary import show
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.models import capture, load, site_of
from cratelm.models.crate import CrateConfig, Ista
from cratelm.records import Explanation, Interval, NeuronId, Status
from cratelm.score.simulators import simulate
from cratelm.stats.intervals import bootstrap, jackknife
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

# ---- coding rate ----------------------------------------------------------------------------------


def test_coding_rate_of_orthonormal_tokens():
    """N = p orthonormal tokens: Z Z^T / N = I / p, so that R = p/2 ln(1 + 1/eps^2)."""
    p, epsilon = 6, 0.5
    moment = np.eye(p) / p
    assert coding_rate(moment, epsilon) == pytest.approx(p / 2 * np.log(1 + 1 / epsilon**2))
    assert coding_rate(np.zeros((p, p)), epsilon) == 0


def test_coding_rate_is_that_of_the_tokens():
    """Through the second moment as through Z itself, in either order of the product (Sylvester)."""
    z = np.random.default_rng(0).standard_normal((5, 40))
    direct = np.linalg.slogdet(np.eye(40) + 5 / (40 * 0.25) * z.T @ z)[1] / 2
    assert coding_rate(z @ z.T / 40, 0.5) == pytest.approx(direct)


def test_tokens_in_their_subspaces_are_cheap_to_tell():
    """Two orthogonal planes: what lies in the first costs nothing in the second."""
    bases = np.eye(4).reshape(2, 2, 4)
    moment = np.diag([1.0, 1.0, 0.0, 0.0]) / 2
    inside = compression_rate(moment, bases, 1.0)
    assert inside == pytest.approx(coding_rate(np.eye(2) / 2, 1.0))
    spread = compression_rate(np.eye(4) / 4, bases, 1.0)
    assert spread == pytest.approx(2 * coding_rate(np.eye(2) / 4, 1.0))
    assert np.allclose(
        orthonormal(3 * bases) @ orthonormal(3 * bases).transpose(0, 2, 1), np.eye(2)
    )
    assert compression_rate(moment, orthonormal(3 * bases), 1.0) == pytest.approx(inside)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).standard_normal(12)
    found = jackknife(lambda m: float(m[0, 0]), values[:, None, None], np.ones(12))
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(12))
    assert jackknife(lambda m: 1.0, np.ones((2, 1, 1)), np.array([3.0, 0.0])).error is None


def test_one_wide_direction_does_not_drown_the_narrow_ones():
    """Tokens of 1 narrow direction beside one 100,000 times as wide, neither along an axis."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((500, 2)) * (1e3, 1e-2)
    tokens = torch.from_numpy((spread @ np.array([[0.8, 0.6], [-0.6, 0.8]])).astype(np.float32))
    sums, where = LayerSums(), _TextTokens(torch.ones(500, dtype=torch.bool), np.arange(500))
    _add_moments(sums, tokens, tokens, where)
    assert sums.second_moments is not None
    moment = sums.second_moments[:, 0].sum(0).numpy() / 500
    exact = tokens.double().numpy()
    assert coding_rate(moment, 0.01) == pytest.approx(
        coding_rate(exact.T @ exact / 500, 0.01), rel=1e-6
    )


# ---- sparse coding --------------------------------------------------------------------------------


def test_objective_where_the_code_is_exact():
    """x = D a: no residual is left, f = lambda |a|_1; and at 0, f = |x|^2 / 2."""
    atoms = torch.eye(3)
    code = torch.tensor([[2.0, 0.0, 1.0]])
    x = code @ atoms
    assert objective(x, atoms, code, 0.1).item() == pytest.approx(0.3)
    assert objective(x, atoms, 0 * code, 0.1).item() == pytest.approx(2.5)


def test_orthonormal_dictionary_is_solved_in_one_step_of_size_one():
    """D = I, eta = 1: A_1 = ReLU(x - lambda) is the minimum, and stays."""
    x = torch.tensor([[2.0, 0.05, -1.0]])
    found = objectives(x, torch.eye(3), 1.0, 0.1, 3)[:, 0]
    best = 0.5 * (0.1**2 + 0.05**2 + 1.0) + 0.1 * 1.9
    assert found.tolist() == pytest.approx([0.5 * (4 + 0.0025 + 1), best, best, best])


def test_objectives_are_those_of_the_model_s_codes():
    config = CrateConfig(vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    layer = Ista(config)
    torch.nn.init.normal_(layer.dictionary, std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    found = objectives(x, layer.dictionary, 0.1, 0.1, 2)
    assert torch.allclose(found[2], objective(x, layer.dictionary, layer.encode(x), 0.1))


def test_small_steps_never_raise_the_objective_and_large_ones_do():
    atoms = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    bound = spectral_norm(atoms.double().numpy()) ** -2
    small = objectives(x, atoms, bound, 0.1, 8)
    assert (small.diff(dim=0) <= 1e-5).all()
    large = objectives(x, atoms, 8 * bound, 0.1, 8)
    assert (large.diff(dim=0) > 0).any()


def test_sparsity_of_known_vectors():
    found = sparsity(
        torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0], [10.0, -2.0, 0.5, 0]])
    )
    assert found["nonzero"].tolist() == [1, 0.25, 0.75]
    assert found["above_tenth"].tolist() == [1, 0.25, 0.5]
    assert found["hoyer"][:2].tolist() == pytest.approx([0, 1])
    assert torch.isnan(sparsity(torch.zeros(1, 4))["hoyer"]).all()


# ---- dictionary and heads -------------------------------------------------------------------------


def test_coherence_of_known_atoms():
    assert coherence(np.eye(5)).mutual == 0
    atoms = np.eye(4)[[0, 1, 2, 0]] * np.array([[1], [1], [1], [7]])
    found = coherence(atoms)
    assert (found.nearest[0], found.nearest[3], found.mutual) == (3, 0, 1)
    assert found.duplicated.tolist() == [True, False, False, True]
    opposite = coherence(np.array([[1.0, 0], [-2, 0], [0, 1]]))
    assert opposite.mutual == 1
    assert not opposite.duplicated.any()
    half = coherence(np.array([[1.0, 0, 0], [0.5, np.sqrt(0.75), 0], [0, 0, 1]]))
    assert half.mutual == pytest.approx(0.5)


def test_coherence_in_blocks_is_the_same(monkeypatch):
    atoms = np.random.default_rng(0).standard_normal((37, 6))
    whole = coherence(atoms)
    monkeypatch.setattr("cratelm.analysis.dictionary._BLOCK", 5)
    parts = coherence(atoms)
    assert np.array_equal(whole.nearest, parts.nearest)
    assert np.allclose(whole.cosine, parts.cosine)


def test_welch_bound_is_met_by_three_vectors_at_120_degrees():
    angles = np.array([0, 2, 4]) * np.pi / 3
    atoms = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert coherence(atoms).mutual == pytest.approx(welch_bound(3, 2))
    assert welch_bound(4, 4) == 0


def test_ranks():
    assert stable_rank(np.eye(4)) == pytest.approx(4)
    assert effective_rank(np.eye(4)) == pytest.approx(4)
    one = np.outer([1.0, 2], [3.0, 1, 2])
    assert (stable_rank(one), effective_rank(one)) == pytest.approx((1, 1))
    assert spectral_norm(np.diag([3.0, 1])) == pytest.approx(3)


def test_angles_between_coordinate_subspaces():
    plane = np.eye(4)[:2]
    assert overlap(plane, 5 * plane) == pytest.approx((1, 0))
    assert overlap(plane, np.eye(4)[2:]) == pytest.approx((0, 90))
    assert overlap(plane, np.eye(4)[1:3]) == pytest.approx((0.5, 0))
    tilted = np.array([[1.0, 0, 0, 0], [0, np.cos(0.3), np.sin(0.3), 0]])
    assert overlap(plane, tilted)[0] == pytest.approx((1 + np.cos(0.3) ** 2) / 2)


def test_random_subspaces_overlap_by_their_share_of_the_width():
    found = overlaps(random_bases((8, 16, 64), 0))
    assert found.shape == (28, 2)
    assert found[:, 0].mean() == pytest.approx(16 / 64, abs=0.01)


# ---- groups of neurons ----------------------------------------------------------------------------


def test_neurons_that_fire_alike_are_a_group():
    """Three copies with noise, two others alike, one alone, one that never varies."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 4000, generator=generator)
    noise = 0.2 * torch.randn(5, 4000, generator=generator)
    rows = [a + noise[0], c, 3 * a + noise[1], b + noise[2], a + noise[3], -b, b + noise[4]]
    neurons = torch.stack([*rows, torch.full_like(a, 2.0)], 1)
    moments = CorrelationSums(8)
    for part in neurons.split(700):
        moments.add(part)
    correlation = moments.correlation()
    expected = np.corrcoef(neurons[:, :7].T.numpy())
    assert np.allclose(correlation[:7, :7], expected, atol=1e-4)
    assert not correlation[7, :7].any()
    found = group_neurons(correlation)
    assert found.group.tolist() == [0, NONE, 0, 1, 0, NONE, 1, NONE]
    assert found.nearest[3] == 6
    assert found.correlation[3] == pytest.approx(correlation[3, 6])


# ---- consistency and distinctiveness --------------------------------------------------------------

TOKENS = np.arange(1000) % 10


def test_a_neuron_of_one_token_is_perfect():
    activations = np.where(TOKENS == 3, 5.0, 0).astype(np.float32)
    found = measure_coverage(NeuronActivations.of(activations, 5.0), TOKENS == 3)
    assert found.status is Status.DEFINED
    assert (found.n_covered, found.n_elsewhere) == (100, 900)
    assert [getattr(found, measure) for measure in MEASURES] == pytest.approx([1, 1, 1, 1, 1])


def test_a_neuron_at_random_is_at_chance():
    activations = np.random.default_rng(0).random(20_000).astype(np.float32)
    found = measure_coverage(NeuronActivations.of(activations, 1.0), np.arange(20_000) % 4 == 0)
    assert found.auroc == pytest.approx(0.5, abs=0.02)
    assert found.consistency == pytest.approx(0.9, abs=0.02)
    assert found.distinctiveness == pytest.approx(0.1, abs=0.02)


def test_readings_by_hand():
    """Covered: 4, 0, 2; elsewhere: 1, 0, 0.1; firing above 0.4."""
    activations = np.array([4, 1, 0, 0, 2, 0.1], np.float32)
    mask = np.array([True, False, True, False, True, False])
    found = measure_coverage(NeuronActivations.of(activations, 4.0), mask)
    assert found.consistency == pytest.approx(2 / 3)
    assert found.any_consistency == pytest.approx(2 / 3)
    assert found.evenness == pytest.approx(6**2 / (3 * 20))
    assert found.distinctiveness == pytest.approx(2 / 3)
    assert found.any_distinctiveness == pytest.approx(1 / 3)
    assert found.contrast == pytest.approx((2 - 1.1 / 3) / (2 + 1.1 / 3))
    # pairs won: 4 beats all three, 2 beats all three, 0 ties with one
    assert found.auroc == pytest.approx(6.5 / 9)


def test_what_has_no_value_has_none():
    activations = np.array([1, 0, 0], np.float32)
    none, some = np.zeros(3, bool), np.array([False, True, False])
    assert measure_coverage(NeuronActivations.of(activations, 1.0), none).status is Status.UNDEFINED
    assert measure_coverage(NeuronActivations.of(activations, 1.0), ~none).auroc is None
    assert measure_coverage(NeuronActivations.of(activations, 0.0), some).status is Status.DEAD
    assert measure_coverage(NeuronActivations.of(-activations, 1.0), some).contrast is None
    assert (
        measure_coverage(NeuronActivations.of(np.zeros(3, np.float32), 1.0), some).contrast is None
    )
    silent = measure_coverage(NeuronActivations.of(activations, 1.0), some)
    assert (silent.consistency, silent.evenness) == (0, None)


def test_what_an_explanation_covers():
    payload = {"default": 1.0, "values": [5.0, 2.0, 0.5]}
    simulated = np.array([1.0, 5, 2, 3, 0.5])
    assert covered_tokens(payload, simulated, 0.5).tolist() == [False, True, False, True, False]
    assert covered_tokens(payload, simulated, 0.25).tolist() == [False, True, True, True, False]
    assert not covered_tokens({"default": 1.0, "values": []}, simulated, 0.5).any()
    formula = {"default": 0.0, "terms": ["digits"], "operators": [], "cells": [0.0, max(simulated)]}
    stacked = {
        **formula,
        "default": max(simulated),
        "cells": [0.0, 0.0],
        "tokens": [],
        "values": [],
    }
    assert covered_tokens(formula, simulated, 1.0).sum() == (simulated == max(simulated)).sum()
    assert not covered_tokens(stacked, simulated, 0.5).any()  # nothing above its default
    assert not covered_tokens({"default": 1.0, "values": [0.5]}, simulated, 0.5).any()


def test_everyone_takes_another_one_s_explanation():
    for n in (2, 3, 17):
        partner = draw_partners(n, 4)
        assert sorted(partner) == list(range(n))
        assert (partner != np.arange(n)).all()


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = bootstrap(rng.exponential(1.0, 60), trial, 400)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 0.87 <= hits / 200 <= 0.99
    assert bootstrap([0.3], 0, 100) == Interval(0.3, None, None, 1)


# ---- the verb -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with tiny twins, harvested; CRATE explained."""
    folder = tmp_path_factory.mktemp("analysis")
    draw = random.Random(0)
    words = ["red", "blue", "stone", "river", "the", "over", "def f(x):", "return"]
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(140):
            text = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            file.write(json.dumps({"text": text}) + "\n")
    path = folder / "run"
    corpus = {"corpus": str(folder / "corpus.jsonl"), "vocab_size": 300, "sequence_length": 16}
    tokenize(TokenizeConfig(run=path, fit=0.3, held_out=0.3, quiet=True, **corpus))
    small: dict[str, Any] = {"sequence_length": 32, "validation_sequences": 8, "quiet": True}
    small |= {"model_overrides": ("hidden_size=16", "num_attention_heads=2"), "tensorboard": False}
    for name in ("crate-2l", "gpt2-2l"):
        train(TrainConfig(run=path, model=name, steps=6, batch_size=4, **small))
        harvest(HarvestConfig(run=path, model=name, tokens=2000, pilot_tokens=256, device="cpu"))
    explain(ExplainConfig(run=path, model="crate-2l", neurons=6, quiet=True))
    return path


# a seed whose sample leaves out the last sequence, which is shorter
SMALL: dict[str, Any] = {
    "seed": 1,
    "tokens": 600,
    "resamples": 100,
    "batch_tokens": 64,
    "quiet": True,
}


@pytest.fixture(scope="module")
def analysed(run):
    return analyze(AnalyzeConfig(run=run, model="crate-2l", **SMALL))


def _figures(path: Path) -> dict[tuple[int, str, str], tuple[float, float | None]]:
    rows = pq.read_table(path / "layers.parquet").to_pylist()
    return {(r["layer"], r["quantity"], r["setting"]): (r["value"], r["error"]) for r in rows}


def _text(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences read, and which tokens are text."""
    store = TokenStore(run / "tokens")
    split = store.split("held_out")
    found = _sequences(split, store.eot_id)
    ids = torch.from_numpy(np.stack([split.read(i * 32, i * 32 + 32) for i in found]))
    return ids, ids != store.eot_id


def _sequences(split, eot_id):
    from cratelm.activations.batches import SearchPlan

    return SearchPlan.of(split, "held_out", eot_id, 32, SMALL["tokens"], SMALL["seed"]).sequences


@torch.no_grad()
def test_figures_equal_plain_ones(run, analysed):
    """From whole tensors, by the model's own modules."""
    found = _figures(analysed.path)
    model: Any = load(run / "model" / "crate-2l")
    ids, text = _text(run)
    assert analysed.tokens == int(text.sum())
    neurons = capture(model, site_of(model), ids)
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer, block in enumerate(model.model.layers):
        code = neurons[layer][text]
        value, error = found[layer, "nonzero", "after"]
        assert value == pytest.approx((code != 0).float().mean().item(), rel=1e-5)
        assert error is not None
        assert error > 0
        before = block.norm_mssa(hidden[layer])
        mask = torch.full((32, 32), -torch.inf).triu(1)[None, None]
        middle = hidden[layer] + block.mssa(before, attention_mask=mask)[0]
        for name, tokens in (("before", before), ("after", block.norm_mssa(middle))):
            z = tokens[text].double().numpy()
            rate = coding_rate(z.T @ z / len(z), 0.5)
            assert found[layer, f"coding_rate_{name}", "0.5"][0] == pytest.approx(rate, rel=1e-5)
        x = block.norm_ista(middle)[text]
        plain = objective(x, block.ista.dictionary, code, 0.1).mean().item()
        assert found[layer, "lasso", "2"][0] == pytest.approx(plain, rel=1e-4)
        assert found[layer, "dead", ""][0] == pytest.approx(1 - (code > 0).any(0).double().mean().item())  # fmt: skip


@torch.no_grad()
def test_readings_equal_plain_ones(run, analysed):
    rows = pq.read_table(analysed.path / "readings.parquet").to_pylist()
    own = {(r["layer"], r["index"]): r for r in rows if (r["control"], r["share"]) == ("none", 0.5)}
    told = [
        e for e in read_explanations(run / "explanations" / "crate-2l") if e.explainer == "trie"
    ]
    assert set(own) == {(e.neuron.layer, e.neuron.index) for e in told}
    model: Any = load(run / "model" / "crate-2l")
    ids, text = _text(run)
    neurons = capture(model, site_of(model), ids)
    summaries = read_summaries(run / "activations" / "crate-2l", "fit")
    maximum = {(s.neuron.layer, s.neuron.index): s.maximum for s in summaries}
    rows_of_text = [(row, mask) for row, mask in zip(ids.numpy(), text.numpy(), strict=True)]
    for e in told:
        place = (e.neuron.layer, e.neuron.index)
        parts = [part for row, mask in rows_of_text for part in _parts(row, mask)]
        simulated = np.concatenate(simulate("trie", e.payload, parts))
        mask = covered_tokens(e.payload, simulated, 0.5)
        activations = neurons[place[0]][text][:, place[1]].numpy()
        assert own[place]["n_covered"] == mask.sum()
        if mask.any():
            fires = activations > 0.1 * maximum[place]
            assert own[place]["consistency"] == pytest.approx(fires[mask].mean())
            assert own[place]["distinctiveness"] == pytest.approx((~fires[~mask]).mean())


def _parts(row, mask):
    """Stretches of text between end marks."""
    parts = np.split(np.arange(len(row)), np.flatnonzero(~mask))
    kept = [part[mask[part]] for part in parts]
    return [row[part] for part in kept if len(part)]


def test_little_memory_gives_the_same_readings(run, analysed, monkeypatch):
    """In lots of one neuron nothing but the null is lost."""
    monkeypatch.setattr(
        "cratelm.analysis.consistency._groups", lambda e, at_once: [[one] for one in e]
    )
    found = analyze(AnalyzeConfig(run=run, model="crate-2l", force=True, **SMALL))
    rows = pq.read_table(found.path / "readings.parquet").to_pylist()
    assert {r["control"] for r in rows} == {"none"}
    monkeypatch.undo()
    again = analyze(AnalyzeConfig(run=run, model="crate-2l", force=True, **SMALL))
    whole = pq.read_table(again.path / "readings.parquet").to_pylist()
    assert [r for r in whole if r["control"] == "none"] == rows


def test_a_deep_model_reads_the_text_for_all_layers_at_once(tmp_path):
    """A pass for the sums and one for the explanations, and not one for each layer."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=12, num_hidden_layers=6, num_attention_heads=2))  # fmt: skip
    site = site_of(model.eval())
    split = MemorySplit([40, 30, 50])
    plan = SearchPlan.of(split, "held_out", 0, 16, 120, 0)  # type: ignore[arg-type]
    explained = [
        Explanation(NeuronId("m", "mlp", layer, i), "lookup", "", {"default": 0.0, "tokens": [i + 1, 7], "values": [1.0, 2.0]}, ())
        for layer in range(6) for i in range(3)
    ]  # fmt: skip
    maximum = {e.neuron.key: 0.5 for e in explained}
    read: list[int] = []
    model.base_model.register_forward_hook(lambda *_: read.append(1))

    def measured(memory_bytes):
        read.clear()
        held_out, tokens = HeldOutPass(model, site, plan, 1000), []
        found = list(measure_neurons(held_out, explained, maximum, memory_bytes=memory_bytes, seed=3, progress=shown.append, read=tokens.append))  # fmt: skip
        assert sum(tokens) == plan.n_tokens() * count_passes(held_out, explained, memory_bytes)
        return found, len(read)

    shown: list[int] = []
    whole, n_whole = measured(2**20)
    n_batches = sum(1 for _ in plan.batches(1000, torch.device("cpu")))
    assert n_whole == n_batches
    assert shown == [3] * 6  # neurons, after each layer
    # room for the neurons of one layer: a pass each, and the same figures, shuffled explanations included
    of_layers, n_layers = measured(3 * 120 * (4 + len(SHARES)))
    assert n_layers == 6 * n_batches
    assert of_layers == whole
    assert {c.control for c in whole} == {"none", "shuffled"}


def test_what_gpt2_has_not_is_absent(run):
    """Neither a lasso objective nor heads with one subspace, and no zero in their place."""
    found = _figures(analyze(AnalyzeConfig(run=run, model="gpt2-2l", **SMALL)).path)
    quantities = {quantity for _, quantity, _ in found}
    assert {"coding_rate_before", "nonzero", "mutual_coherence", "grouped", "dead"} <= quantities
    absent = ("lasso", "compression_rate_before", "step_size", "head_overlap")
    assert not quantities & set(absent)
    # it has no explanations: nothing is read
    assert not (run / "analysis" / "gpt2-2l" / "readings.parquet").exists()


def test_a_finished_analysis_is_kept(run, capsys):
    config = AnalyzeConfig(run=run, model="crate-2l", **SMALL)
    first, again = analyze(config), analyze(config)
    assert "skipped" in capsys.readouterr().out
    assert str(first) == str(again)
    assert "consistency" in first.table


def test_bad_input_is_told(run, tmp_path):
    with pytest.raises(InputError, match="cratelm harvest"):
        analyze(AnalyzeConfig(run=run, model="absent"))
    with pytest.raises(InputError, match=r"--explainer is 'oracle'.*lookup, trie"):
        analyze(AnalyzeConfig(run=run, model="crate-2l", explainer="oracle", force=True))
    with pytest.raises(InputError, match="--resamples must be at least 100, not 3"):
        AnalyzeConfig(resamples=3)
    assert not list((run / "analysis").glob(".*partial"))


def test_a_layer_without_measured_neurons_has_a_dash_in_the_table():
    figures = [LayerFigure(layer, "dead", "", 0.5) for layer in (0, 1)]
    summary = MeasureSummary(1, "none", SHARE, "consistency", 0.25, None, None, 1, 0, 0)
    lines = show(figures, [summary]).splitlines()
    assert lines[-1].split() == ["consistency", "–", "0.250"]
