"""Effects on logits and loss: against the naive way, against derivatives, and on a small run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_steer import KINDS, SMALL, ids, model_of, small_run
from torch.nn import functional as F
from tqdm import tqdm

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.models import build, site_of
from cratelm.models.partial_forward import PartialForward
from cratelm.records import NeuronId
from cratelm.report.drawing import Series
from cratelm.report.sections.effects import effects_figure, effects_table
from cratelm.results.side_results import read_effects, read_interventions
from cratelm.runs import Run
from cratelm.runs.ranks import Share
from cratelm.stats.intervals import bootstrap
from cratelm.steer.ablation import HeldOutText, ablate
from cratelm.steer.attribution import VocabularyEffect, attribute, best, firing, rank_correlation
from cratelm.steer.config import EffectsConfig
from cratelm.steer.direct_logit_attribution import direct_logit_attribution
from cratelm.steer.edits import Edit
from cratelm.steer.effects import effects
from cratelm.steer.steering import steering
from cratelm.steer.store import read_logit_effect
from cratelm.tokens.shards import TokenStore

T = 12


class Split:
    """A made-up split: the part of `TokenSplit` that the measurement reads. Documents of 20 tokens."""

    name, n_tokens = "held_out", 200

    def __init__(self):
        self.tokens = np.random.default_rng(0).integers(1, 101, self.n_tokens)

    def n_sequences(self, length):
        return (self.n_tokens - 1) // length

    def sequence(self, index, length):
        return self.tokens[index * length : index * length + length + 1]

    def documents_at(self, positions):
        return positions // 20


def variant(name: str):
    """A CRATE with a switch beyond the paper."""
    torch.manual_seed(0)
    return build("crate-2l", vocab_size=101, max_position_embeddings=48, seed=1, **SMALL, **{name: True}).eval()  # fmt: skip


def naive(model, site, layer, neuron, put):
    """Loss without a neuron less loss with it, and its activations, token by token: [n, T] each."""
    text, split = HeldOutText.of(Split(), T, 96, 0), Split()  # type: ignore[arg-type]
    tokens = torch.from_numpy(np.stack([split.sequence(i, T) for i in text.sequences]))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def losses():
        with torch.no_grad():
            logits = model(inputs).logits
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    plain = losses()
    with steering(model, Edit(layer, neuron, set=put), site=site):
        without = losses()
    positions = text.sequences[:, None] * T + np.arange(1, T + 1)
    own = cratelm.capture(model, site, inputs)[layer][..., neuron]
    return (without - plain).double().numpy(), own.numpy(), positions // 20


CASES = [
    *((kind, None, True) for kind in KINDS),
    ("ista_residual", None, True),
    ("decoupled_dictionary", None, True),
    ("crate", "heads", False),
    ("crate", "mssa", False),
    ("gpt2", "transformer.h.*.mlp.c_fc", False),
]


@pytest.mark.parametrize(("kind", "name", "direct"), CASES, ids=str)
@pytest.mark.parametrize("put", [0.0, 0.3])
def test_ablation_equals_the_naive_way(kind, name, direct, put):
    model = model_of(kind) if kind in KINDS else variant(kind)
    site = site_of(model, name)
    rest = PartialForward(model, site)
    assert [w is not None for w in rest.writes] == [direct] * site.n_layers
    text = HeldOutText.of(Split(), T, 96, 0)  # type: ignore[arg-type]
    chosen = np.array([1, 5, 11])
    means = [torch.full((3,), put)] * 2
    edits = None if put == 0 else lambda tokens, positions: means
    found = ablate(rest, text, [chosen, chosen], edits, 40, tqdm(disable=True))
    for layer in (0, 1):
        for j, neuron in enumerate(chosen):
            change, own, documents = naive(model, site, layer, int(neuron), put)
            ours = found.neurons[layer][j]
            assert ours.change.value == pytest.approx(change.mean(), abs=2e-6)
            assert ours.n_firing == (own > 0).sum()
            assert ours.n_documents == len(np.unique(documents))
            if (own > 0).any():
                assert ours.where_firing is not None
                assert ours.where_firing.value == pytest.approx(change[own > 0].mean(), abs=4e-6)
            else:
                assert ours.where_firing is None
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_shares_of_neurons_are_the_whole(monkeypatch):
    """Bit for bit, with more groups than shares, and a last group that is smaller."""
    monkeypatch.setattr("cratelm.steer.ablation.GROUP", 2)
    rest = PartialForward(model := model_of("crate"), site_of(model))
    text = HeldOutText.of(Split(), T, 96, 0)  # type: ignore[arg-type]
    chosen = [np.arange(7), np.array([3])]
    whole = ablate(rest, text, chosen, None, 40, tqdm(disable=True))
    parts = [
        ablate(rest, text, chosen, None, 40, tqdm(disable=True), Share(i, 3)) for i in range(3)
    ]
    assert [len(part.neurons[0]) for part in parts] == [3, 2, 2]
    first, *others = parts
    for other in others:
        assert not first.neurons[0].keys() & other.neurons[0].keys()
        first.add(other)
    assert first.neurons == whole.neurons
    assert first.base == whole.base


def test_the_error_is_over_documents():
    """Paired: se of sum(x)/sum(n) over documents (Cochran 1977, 6.4)."""
    model = model_of("crate")
    rest = PartialForward(model, site_of(model))
    text = HeldOutText.of(Split(), T, 96, 0)  # type: ignore[arg-type]
    ours = ablate(rest, text, [np.array([5]), np.array([5])], None, 40, tqdm(disable=True))
    change, _, documents = naive(model, rest.site, 0, 5, 0.0)
    ordinals = np.unique(documents)
    x = np.array([change[documents == d].sum() for d in ordinals])
    n = np.array([(documents == d).sum() for d in ordinals])
    c = len(ordinals)
    error = np.sqrt(c / (c - 1) * ((x - x.sum() / n.sum() * n) ** 2).sum()) / n.sum()
    assert ours.neurons[0][0].change.error == pytest.approx(error, rel=1e-3)
    assert error > 0


def test_a_silent_neuron_changes_nothing():
    model = model_of("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 3] = 0  # type: ignore[union-attr]
    rest = PartialForward(model, site_of(model))
    text = HeldOutText.of(Split(), T, 96, 0)  # type: ignore[arg-type]
    found = ablate(rest, text, [np.array([3]), np.array([3])], None, 96, tqdm(disable=True))
    silent = found.neurons[0][0]
    assert (silent.change.value, silent.n_firing, silent.where_firing) == (0.0, 0, None)
    assert found.neurons[1][0].change.value != 0


# ---- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_order_reading_is_the_derivative_at_fixed_scale(kind):
    """Along changes that leave the norm's scale as it is, it is the derivative of the logits."""
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or "ln_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    rest = PartialForward(model, site_of(model))
    trace = rest.trace(ids(1, 1))
    matrix = direct_logit_attribution(rest, trace)
    assert matrix is not None
    hidden = trace.outputs[1][0, 0]
    change = torch.randn(len(hidden), generator=torch.manual_seed(1))
    centre = hidden - hidden.mean() if kind in ("crate", "gpt2", "neox") else hidden
    moved = change - change.mean() if kind in ("crate", "gpt2", "neox") else change
    moved = moved - (moved @ centre) / (centre @ centre) * centre
    step = 1e-2
    rest.writes[1] = moved[None]
    row = torch.zeros(1, dtype=torch.long)
    up, down = (rest.edited(trace, 1, row, row, torch.full((1, 1), s))[0, 0] for s in (step, -step))
    slope = (up - down) / (2 * step)
    torch.testing.assert_close(matrix @ moved, slope, rtol=1e-2, atol=2e-2 * slope.abs().max())
    if kind != "llama":  # a LayerNorm takes the mean away, an RMSNorm does not
        torch.testing.assert_close(matrix @ (moved + 3), matrix @ moved, rtol=1e-3, atol=1e-3)


def test_no_reading_where_the_site_is_followed_by_more():
    model = model_of("crate")
    heads = PartialForward(model, site_of(model, "heads"))
    assert direct_logit_attribution(heads, heads.trace(ids(1, 4))) is not None  # of the model's end
    assert heads.writes == [None, None]  # of the neurons there is none


def effect(exact, first=None, named=()):
    neuron = NeuronId("m", "ista", 0, 0)
    first = None if first is None else np.array(first, float)
    return VocabularyEffect(
        neuron, np.array(exact, float), first, 1.0, 4, np.array(named, np.int64)
    )


def test_agreement_overlap_and_place():
    found = effect([3, 1, -1, -3], [30, 2, -2, -9], named=[0])
    assert found.agreement == pytest.approx(1)
    assert found.overlap(2) == 1
    assert found.promotes(found.named) == 1
    assert found.promotes(np.array([3])) == 0
    assert found.promotes(np.array([0, 3])) == 0.5
    assert found.promotes(np.array([], np.int64)) is None
    assert effect([3, 1, -1, -3], [-3, -1, 1, 3]).agreement == pytest.approx(-1)
    assert effect([1, 1, 1, 1], [1, 2, 3, 4]).agreement is None
    assert effect([1, 2]).agreement is None
    assert best(np.array([1.0, 5.0, 3.0]), 2).tolist() == [1, 2]
    from scipy.stats import spearmanr

    a, b = np.random.default_rng(0).integers(0, 9, (2, 50)).astype(float)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_a_mean_and_its_interval():
    assert bootstrap([], 0) is None
    assert bootstrap([2.0], 0).low is None  # type: ignore[union-attr]
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(values.tolist(), 0)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(values.mean())
    width = 2 * 1.96 * values.std() / 20
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    assert found == bootstrap(values.tolist(), 0)


# ---- the verb -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("effects") / "run"
    small_run(path)
    for model in ("crate-2l", "gpt2-2l"):
        cratelm.api.harvest(run=path, model=model, tokens=3000)
    return path


SIZES = {"neurons": 6, "tokens": 600, "positions": 5, "top": 4, "quiet": True}


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_the_verb(run, model):
    result = effects(EffectsConfig(run=run, model=model, **SIZES))
    assert result.path == run / "steer" / model
    assert [(found.layer, found.neurons) for found in result.layers] == [(0, 6), (1, 6)]
    lost = pq.read_table(result.path / "ablation.parquet").to_pylist()
    assert len(lost) == 12
    size = [abs(r["change"]) for r in lost if r["layer"] == 1 and not r["dead"]]
    assert result.layers[1].size.value == pytest.approx(np.mean(size))  # type: ignore[union-attr]
    assert {r["n_tokens"] for r in lost} == {result.n_tokens} == {576}
    rows = pq.read_table(result.path / "logit_effects.parquet").to_pylist()
    for row in rows:
        assert len(row["promoted_ids"]) == len(row["suppressed"]) == 4
        assert row["promoted_values"] == sorted(row["promoted_values"], reverse=True)
        assert row["promoted_values"][0] > 0 > row["suppressed_values"][0]
        assert 1 <= row["n_positions"] <= 5
        assert (row["agreement"] is not None) == (row["kind"] == "exact")
    exact = [row for row in rows if row["kind"] == "exact"]
    assert any(row["named"] != row["named_shuffled"] for row in exact)
    kinds = [row["kind"] for row in rows]
    assert (
        kinds.count("exact")
        == kinds.count("first_order")
        == 12 - sum(found.dead + found.silent for found in result.layers)
    )
    assert json.loads((result.path / "summary.json").read_text())["n_tokens"] == 576
    assert "|change|, nats" in str(result)


def test_an_exact_effect_is_that_of_steering(run, monkeypatch):
    """One neuron of the first layer, by hand: zero at the last token alone."""
    model = cratelm.load(run / "model" / "crate-2l")
    site = site_of(model)
    store = TokenStore(run / "tokens")
    from cratelm.activations.store import read_records

    record = next(r for r in read_records(run / "activations" / "crate-2l", "fit", [0]) if len(firing(r, 3, 0)) == 3)  # fmt: skip
    rest, size = PartialForward(model, site), store.vocab_size
    found = next(attribute(rest, 0, [record], None, vocabulary=size, positions=3, seed=0))
    assert isinstance(found, VocabularyEffect)
    differences = []
    for excerpt in firing(record, 3, 0):
        x = torch.from_numpy(excerpt.token_ids[: excerpt.peak + 1].astype(np.int64))[None]
        with torch.no_grad():
            if cratelm.capture(model, site, x)[0][0, -1, record.neuron.index] == 0:
                continue  # it was above 0 with more text before it
            plain = model(x).logits[0, -1]
            with steering(model, Edit(0, record.neuron.index, zero=True, positions=-1)):
                differences.append((plain - model(x).logits[0, -1])[: store.vocab_size])
    assert found.n_positions == len(differences) > 1
    # shares of the neurons are the whole, each neuron once
    monkeypatch.setattr("cratelm.steer.attribution.NEURONS_A_TIME", 2)
    records = [record] * 5
    options: dict[str, Any] = {"vocabulary": size, "positions": 3, "seed": 0}
    shares = [attribute(rest, 0, records, None, **options, share=Share(i, 2)) for i in range(2)]
    assert [len(list(share)) for share in shares] == [3, 2]
    wanted = torch.stack(differences).double()
    wanted = (wanted - wanted.mean(1, keepdim=True)).mean(0).numpy()
    np.testing.assert_allclose(found.exact, wanted, atol=1e-5)
    assert np.abs(wanted).max() > 1e-3


def test_finished_is_skipped_and_forced_is_redone_the_same(run, capsys):
    config = EffectsConfig(run=run, model="gpt2-2l", **SIZES)
    first = effects(config)
    capsys.readouterr()
    assert effects(config) == first
    assert "is finished, skipped" in capsys.readouterr().out
    before = json.loads((first.path / "completed.json").read_text())["identity"]
    assert effects(EffectsConfig(run=run, model="gpt2-2l", force=True, **SIZES)) == first
    assert json.loads((first.path / "completed.json").read_text())["identity"] == before
    with pytest.raises(InputError, match=r"--force"):
        effects(EffectsConfig(run=run, model="gpt2-2l", **{**SIZES, "top": 5}))


def test_named_neurons_set_to_their_mean(run):
    fields = {**SIZES, "neurons": 0, "only": ("1:7", "0:3"), "force": True}
    zero = effects(EffectsConfig(run=run, model="gpt2-2l", **fields))
    rows = pq.read_table(zero.path / "ablation.parquet").to_pylist()
    assert [(r["layer"], r["index"]) for r in rows] == [(0, 3), (1, 7)]
    mean = effects(EffectsConfig(run=run, model="gpt2-2l", ablation="mean", **fields))
    assert "set to its mean" in str(mean)
    assert [found.size for found in mean.layers] != [found.size for found in zero.layers]


def test_mistakes(run, tmp_path, capsys):
    for arguments, told in (
        (["--run", str(tmp_path), "--model", "x"], "type `cratelm tokenize"),
        (["--run", str(run), "--model", "nobody"], "type `cratelm harvest"),
        (["--run", str(run), "--model", "crate-2l", "--only", "7:1", "--force"], "7:1"),
        (["--run", str(run), "--model", "crate-2l", "--sequence-length", "99999", "--force"], "lower --sequence-length"),
    ):  # fmt: skip
        assert main(["effects", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not list((run / "steer").glob(".*"))


# ---- the report -----------------------------------------------------------------------------------


def test_what_the_report_reads(run, tmp_path):
    models = ["crate-2l", "gpt2-2l", "nobody"]
    assert read_effects(Run(tmp_path), models) == []
    assert read_interventions(Run(tmp_path), models) == []
    results = [effects(EffectsConfig(run=run, model=m, force=True, **SIZES)) for m in models[:2]]
    read = read_effects(Run(run), models)
    table = effects_table(read)
    assert [(r[0], r[1]) for r in table.rows] == [
        (m, layer) for m in models[:2] for layer in (0, 1)
    ]
    size = results[1].layers[0].size
    cell = table.records()[2]["size"]
    assert size is not None
    assert (cell["value"], cell["low"], cell["high"]) == (size.value, size.low, size.high)
    table.to_latex()
    assert "rank correlation" in table.to_text()
    series = {m: Series(m, place) for place, m in enumerate(models)}
    figure = effects_figure(read, series)
    assert figure is not None
    figure.write(tmp_path)
    assert (tmp_path / "effects.png").stat().st_size > 1000
    assert [s.label for s in figure.series] == models[:2]
    assert effects_figure(read_effects(Run(run), models[2:]), series) is None
    assert len(figure.svgs()) == 3


def test_what_the_gallery_reads(run):
    result = effects(EffectsConfig(run=run, model="gpt2-2l", force=True, **SIZES))
    row = next(
        r
        for r in pq.read_table(result.path / "logit_effects.parquet").to_pylist()
        if r["layer"] == 1 and r["kind"] == "exact"
    )
    neuron = NeuronId("gpt2-2l", "mlp", 1, row["index"])
    found = read_logit_effect(result.path, neuron)
    assert found is not None
    assert list(found.promoted) == row["promoted"]
    assert list(found.suppressed_values) == row["suppressed_values"]
    plain = read_logit_effect(result.path, neuron, "first_order")
    assert plain is not None
    assert plain.promoted_values != found.promoted_values
    assert read_logit_effect(result.path, NeuronId("gpt2-2l", "mlp", 1, 10**6)) is None
    assert read_logit_effect(run / "steer" / "nobody", neuron) is None
