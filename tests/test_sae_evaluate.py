"""`cratelm sae evaluate`: every figure against a plain computation, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from sae_runs import EOT, LENGTH, small_run
from safetensors.torch import load_file, save_file
from tiny_run import reseal

from cratelm.errors import InputError
from cratelm.models import load
from cratelm.models.autoencoder_files import autoencoder_identity
from cratelm.models.sites import site_of
from cratelm.runs import write_json
from cratelm.sae.evaluate import dead_fraction, sae_evaluate
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.reconstruction import Firing, keep_strongest, spliced
from cratelm.sae.sae import Sae, SaeConfig
from cratelm.sae.train import sae_train
from cratelm.sae.train_config import SaeTrainConfig
from cratelm.tokens.shards import TokenStore

sae_lens = pytest.importorskip("sae_lens", reason="the extra sae is not installed")

SMALL = {"tokens": 64 * 30, "batch_size": 64, "expansion": 2, "lr": 3e-3, "quiet": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with autoencoders crate@topk-2x of both layers."""
    run = small_run(tmp_path_factory.mktemp("sae") / "run")
    sae_train(SaeTrainConfig(run=run.path, model="crate", architecture="topk", k=8, **SMALL))
    return run.path


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def evaluated(run, **options):
    return sae_evaluate(SaeEvaluateConfig(run=run, **{"model": "crate", "quiet": True, **options}))


# ---- a plain computation, a sequence at a time ----------------------------------------------------


def losses_with(model, ids, put):
    """Losses [T - 1] of one sequence, `put` in the place of the codes {layer: [T, H]}."""
    handles = [
        model.model.layers[layer].ista.code.register_forward_hook(lambda m, a, o, v=value: v[None])
        for layer, value in put.items()
    ]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    for handle in handles:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()


def codes_of(model, ids, put=None):
    """Codes [T, H] of each layer, `put` in the place of those of the first."""
    seen = []
    handles = [b.ista.code.register_forward_hook(lambda m, a, o: seen.append(o[0])) for b in model.model.layers]  # fmt: skip
    if put is not None:
        handles.append(model.model.layers[0].ista.code.register_forward_hook(lambda m, a, o: put[None]))  # fmt: skip
    with torch.no_grad():
        model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return seen


def on_text(ids, values, instead):
    """`instead` [T, H] at text, `values` at end marks."""
    return torch.where((ids != EOT)[:, None], instead, values)


def by_hand(run, kind, layers):
    """[C, 2] of the documents that are touched: sum of losses and number of targets."""
    model, split = load(run / "model" / "crate"), TokenStore(run / "tokens").split("held_out")
    saes = [sae_lens.SAE.load_from_disk(run / "sae" / "crate@topk-2x" / f"layer-{i}") for i in (0, 1)]  # fmt: skip
    ids = torch.tensor(split.read(0, split.n_tokens))
    rows = list(ids.split(LENGTH))
    text = torch.cat([row != EOT for row in rows])
    codes = [torch.cat([codes_of(model, row)[layer] for row in rows]) for layer in (0, 1)]
    means = [c[text].mean(0) for c in codes]
    with torch.no_grad():
        kept = [round((sae.encode(c[text]) > 0).sum(1).float().mean().item()) for sae, c in zip(saes, codes, strict=True)]  # fmt: skip

    def changed(layer, x):
        if kind == "reconstruction":
            return saes[layer](x)
        if kind == "own_top":
            return x * (x >= x.topk(kept[layer], dim=1).values[:, -1:])
        return {"zero": x * 0, "mean": means[layer].expand_as(x), "own": x}[kind]

    totals, position = np.zeros((split.n_documents, 2)), 0
    for row in rows:
        put = {}
        with torch.no_grad():
            for layer in layers:
                x = codes_of(model, row, put.get(0))[layer]
                put[layer] = on_text(row, x, changed(layer, x))
        found = losses_with(model, row, put)
        documents = split.documents_at(np.arange(position + 1, position + len(row)))
        for document, loss in zip(documents, found.tolist(), strict=True):
            totals[np.flatnonzero(split.ordinals == document)[0]] += (loss, 1)
        position += len(row)
    return totals[totals[:, 1] > 0]


def estimate(x, y):
    """sum(x) / sum(y) and its standard error over documents."""
    value, n = x.sum() / y.sum(), len(x)
    return value, np.sqrt(n / (n - 1) * ((x - value * y) ** 2).sum()) / y.sum()


@pytest.fixture(scope="module")
def measured(finished):
    return evaluated(finished, batch_tokens=70)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("kind", ["reconstruction", "own_top", "mean", "zero"])
def test_losses_equal_a_plain_computation(finished, measured, kind, layers):
    place = next(p for p in measured.replacements if p.layers == layers)
    found = getattr(place, kind)
    clean, spliced_in = by_hand(finished, "own", ()), by_hand(finished, kind, layers)
    zero = by_hand(finished, "zero", layers)[:, 0]
    loss, targets = spliced_in[:, 0], spliced_in[:, 1]
    for shown, (value, error) in (
        (measured.loss, estimate(clean[:, 0], targets)),
        (found.loss, estimate(loss, targets)),
        (found.added, estimate(loss - clean[:, 0], targets)),
        (found.recovered_from_zero, estimate(zero - loss, zero - clean[:, 0])),
    ):
        assert shown.value == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert shown.error == pytest.approx(error, rel=1e-2, abs=1e-5)
    assert measured.documents == len(targets)


def test_rebuilding_equals_a_plain_computation(finished, measured):
    model, split = load(finished / "model" / "crate"), TokenStore(finished / "tokens").split("held_out")  # fmt: skip
    ids = torch.tensor(split.read(0, split.n_tokens))
    text = ids != EOT
    documents = split.documents_at(np.arange(len(ids)))[text.numpy()]
    assert measured.tokens == text.sum()
    for layer in (0, 1):
        x = torch.cat([codes_of(model, row)[layer] for row in ids.split(LENGTH)])[text].double()
        sae = sae_lens.SAE.load_from_disk(finished / "sae" / "crate@topk-2x" / f"layer-{layer}")
        with torch.no_grad():
            z = sae.encode(x.float())
            y = sae.decode(z).double()
        shown = measured.layers[layer]
        one = torch.ones(len(x))

        def over(a, b):
            sums = [np.array([v[torch.tensor(documents == d)].sum().item() for d in np.unique(documents)]) for v in (a, b)]  # fmt: skip
            return estimate(*sums)

        unexplained, error = over((x - y).pow(2).sum(1), (x - x.mean(0)).pow(2).sum(1))
        assert shown.explained_variance.value == pytest.approx(1 - unexplained, rel=1e-4)
        assert shown.explained_variance.error == pytest.approx(error, rel=1e-3)
        for name, (value, error) in {
            "l0": over((z != 0).sum(1).float(), one),
            "own_l0": over((x != 0).sum(1).float(), one),
            "shrinkage": over(y.pow(2).sum(1), (x * y).sum(1)),
            "norm_ratio": over(y.norm(dim=1), x.norm(dim=1)),
        }.items():
            assert getattr(shown, name).value == pytest.approx(value, rel=1e-4), name
            assert getattr(shown, name).error == pytest.approx(error, rel=1e-3, abs=1e-6), name
        fired = np.array([(z[torch.tensor(documents == d)] != 0).any(0).numpy() for d in np.unique(documents)])  # fmt: skip
        assert shown.dead.value == pytest.approx((~fired.any(0)).mean())
        without = np.array([(~np.delete(fired, i, 0).any(0)).mean() for i in range(len(fired))])
        jackknife = np.sqrt((len(fired) - 1) * without.var())
        assert shown.dead.error == pytest.approx(jackknife, rel=1e-6)
        assert shown.dead.value > 0  # or the comparison would say little
        assert shown.dead.error > 0


def test_the_own_code_loses_nothing(measured):
    for place in measured.replacements:
        assert place.own.added.value == 0
        assert place.own.recovered_from_zero.value == 1
        assert place.own_top.added.value > 0
    assert [p.layers for p in measured.replacements] == [(0,), (1,), (0, 1)]
    assert measured.replacements[2].own_kept == (8, 8)


# ---- autoencoders whose figures are known ----------------------------------------------------------


def known(path, layer=1, scale=1.0, **options):
    """An autoencoder that gives back non-negative inputs times `scale`."""
    config = SaeConfig(**{"d_in": 128, "d_sae": 128, "model_name": "crate", "site": "ista", "layer": layer, **options})  # fmt: skip
    eye = torch.eye(config.d_in)
    zero = torch.zeros(config.d_in)
    path.mkdir(parents=True)
    Sae.of(config, {"W_enc": eye, "b_enc": zero, "W_dec": eye * scale, "b_dec": zero}, path).save(path)  # fmt: skip
    return path


def test_a_perfect_one_and_one_that_shrinks(run, tmp_path):
    perfect = evaluated(run, sae=str(known(tmp_path / "perfect")))
    (layer,), (place,) = perfect.layers, perfect.replacements
    assert (layer.layer, place.layers) == (1, (1,))
    assert layer.explained_variance.value == pytest.approx(1)
    assert (layer.shrinkage.value, layer.norm_ratio.value) == pytest.approx((1, 1))
    assert layer.l0 == layer.own_l0
    assert abs(place.reconstruction.added.value) < 1e-6
    assert place.own_kept == (round(layer.l0.value),)
    # of layer 0: behind the last layer stands a layer norm, to which half the code is the same
    half = evaluated(run, sae=str(known(tmp_path / "half", layer=0, scale=0.5)))
    (layer,), (place,) = half.layers, half.replacements
    assert (layer.shrinkage.value, layer.norm_ratio.value) == pytest.approx((0.5, 0.5))
    assert layer.explained_variance.value < 1
    assert place.reconstruction.added.value > 1e-3
    assert not (tmp_path / "half" / "evaluation.json").exists()
    kept = json.loads((run / "sae" / "crate@half.json").read_text())
    assert kept["layers"][0]["shrinkage"]["value"] == layer.shrinkage.value
    assert kept["identity"] == autoencoder_identity(tmp_path / "half")
    assert kept["identity"] != autoencoder_identity(tmp_path / "perfect")


def test_what_has_no_value_is_left_out(run, tmp_path):
    nothing = evaluated(run, sae=str(known(tmp_path / "nothing", scale=0.0)), output=tmp_path / "o")
    assert nothing.layers[0].shrinkage is None
    assert nothing.layers[0].norm_ratio.value == 0
    assert json.loads((tmp_path / "o").read_text())["layers"][0]["shrinkage"] is None
    assert " – " in str(nothing)


def test_it_measures_every_architecture_and_other_sites(run):
    for options in ({"model": "gpt2", "architecture": "batchtopk", "k": 6}, {"architecture": "gated", "site": "model.layers.*", "layers": (1,)}):  # fmt: skip
        done = sae_train(SaeTrainConfig(run=run, **{"model": "crate", **SMALL, **options}))
        model = options.get("model", "crate")
        result = evaluated(run, model=model, sae=done.name.split("@")[1], tokens=200)
        assert result.sae == done.name
        assert 0 < result.layers[0].l0.value < result.layers[0].latents
        assert result.replacements[0].own.added.value == 0


def test_keep_strongest_equals_sorting():
    x = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 9, 12):
        for row, kept in zip(x, keep_strongest(x, k), strict=True):
            order = row.abs().argsort(descending=True)[:k]
            assert kept[order].tolist() == row[order].tolist()
            assert (kept != 0).sum() == min(k, 9)


def test_end_marks_keep_their_activations(finished):
    model = load(finished / "model" / "crate")
    site = site_of(model)
    ids = torch.tensor([[3, EOT, 5, 7]])
    seen = []
    with torch.no_grad(), spliced(model, site, ids != EOT, {1: torch.zeros_like}):
        handle = model.model.layers[1].ista.code.register_forward_hook(lambda m, a, o: seen.append(o[0]))  # fmt: skip
        model(input_ids=ids)
        handle.remove()
    assert seen[0][[0, 2, 3]].abs().max() == 0
    assert seen[0][1].abs().max() > 0


def test_dead_fraction_of_one_document_has_no_error():
    firing = Firing.of(4)
    firing.add(np.array([True, False, True, False]), 2)
    firing.add(np.array([True, False, False, False]), 2)
    assert firing.documents.tolist() == [1, 0, 1, 0]
    assert dead_fraction(firing, 1).error is None
    assert dead_fraction(firing, 1).value == 0.5


# ---- what is written ------------------------------------------------------------------------------


def test_figures_are_written_and_shown(run, tmp_path):
    result = evaluated(run, output=tmp_path / "out.json", tokens=160)
    written = json.loads((run / "sae" / "crate@topk-2x" / "evaluation.json").read_text())
    assert written == json.loads((tmp_path / "out.json").read_text())
    assert written["places"][2]["own"]["added"]["value"] == 0
    assert written["layers"][0]["l0"]["value"] == 8
    assert written["tokens"] == result.tokens < 160
    assert written["config"]["tokens"] == 160
    trained = json.loads((run / "sae" / "crate@topk-2x" / "completed.json").read_text())
    assert written["identity"] == trained["identity"]
    assert written["model_identity"] == trained["inputs"]["model"]
    shown = str(result)
    assert "crate@topk-2x on ista of crate, held_out" in shown
    assert "all layers: own code, strongest 8, 8" in shown
    assert "100.00% ± 0.00" in shown


def test_the_sample_is_seeded(finished):
    same, other = (evaluated(finished, tokens=160, seed=s).loss for s in (0, 1))
    assert evaluated(finished, tokens=160, batch_tokens=16).loss.value == pytest.approx(same.value)
    assert same != other


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sae": "nothing"}, r"--sae nothing .*\(the run has crate@topk-2x"),
        (
            {"model": "gpt2"},
            r"--sae is not given .*\(the run has none of gpt2.*: .*cratelm sae train",
        ),
        (
            {"sae": "crate@topk-2x", "model": "gpt2"},
            r"cannot be measured on gpt2: .*no site 'ista'",
        ),
        ({"sequence_length": 17}, "17"),
    ],
)
def test_what_is_not_there_is_refused(finished, options, told):
    with pytest.raises(InputError, match=told) as raised:
        evaluated(finished, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"d_in": 64, "d_sae": 64}, r"64 activations, but site ista .* 128"),
        ({"layer": 2}, "layer 2"),
        ({"site": "transformer.h.*"}, "no site"),
        ({"provenance": {"model_identity": "x"}}, "which differs from crate as it is now"),
    ],
)
def test_what_does_not_fit_is_refused(run, tmp_path, options, told):
    path = known(tmp_path / "other", **options)
    with pytest.raises(InputError, match=told):
        evaluated(run, sae=str(path))


def test_a_model_trained_anew_is_told(run, tmp_path):
    """Autoencoders of the run by the chain of its stages, others by what their files say."""
    record = run / "model" / "crate" / "completed.json"
    write_json(record, {**json.loads(record.read_text()), "identity": "another", "checksum": ""})
    with pytest.raises(InputError, match="sae/crate@topk-2x was made from an earlier model/crate"):
        evaluated(run, sae="topk-2x")
    shutil.copytree(run / "sae" / "crate@topk-2x", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="which differs from crate as it is now"):
        evaluated(run, sae=str(tmp_path / "elsewhere"))


def test_damage_is_told(run):
    folder = run / "sae" / "crate@topk-2x" / "layer-1"
    weights = load_file(folder / "sae_weights.safetensors")
    for value, told in ((float("nan"), "W_dec contains numbers that are not finite"), (3e38, "with reconstruction in layers 1 is not a number")):  # fmt: skip
        weights["W_dec"][:] = value
        save_file(weights, folder / "sae_weights.safetensors")
        reseal(folder.parent)
        with pytest.raises(InputError, match=told):
            evaluated(run)
    (folder / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"sae_weights\.safetensors is damaged"):
        evaluated(run)
    path = run / "model" / "crate" / "model.safetensors"
    damaged = load_file(path)
    damaged["model.layers.0.ista.dictionary"][0, 0] = float("nan")
    save_file(damaged, path, {"format": "pt"})
    reseal(path.parent)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"layer 0 \(site ista\) is nan"):
        evaluated(run)


@pytest.mark.parametrize(
    "options",
    [{"split": "test"}, {"tokens": 0}, {"sequence_length": 1}, {"seed": -1}, {"batch_tokens": 0}],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options)).replace("_", "-")):
        SaeEvaluateConfig(**options)


# ---- steering with a reconstruction on the way ----------------------------------------------------


def logits_with(model, ids, layer, change):
    """[T, V] of one sequence, the codes of its text changed."""
    code = model.model.layers[layer].ista.code
    handle = code.register_forward_hook(lambda m, a, o: on_text(ids, o[0], change(o[0]))[None])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    handle.remove()
    return logits[ids != EOT].double()


@pytest.mark.parametrize("layer", [0, 1])
def test_fidelity_of_steering_equals_a_plain_computation(finished, measured, layer):
    found = measured.steering[layer]
    model, split = load(finished / "model" / "crate"), TokenStore(finished / "tokens").split("held_out")  # fmt: skip
    sae = sae_lens.SAE.load_from_disk(finished / "sae" / "crate@topk-2x" / f"layer-{layer}")
    rows = torch.tensor(split.read(0, split.n_tokens)).split(LENGTH)
    with torch.no_grad():
        top = torch.cat([sae.encode(codes_of(model, ids)[layer][ids != EOT]) for ids in rows])
    assert found.layer == layer
    assert found.tokens == len(top)
    assert len(set(found.steered)) == 8
    fidelity, asked, rebuilt = [], [], 0.0
    for latent in found.steered:
        value = top[:, latent].max().item()
        assert value > 0
        sums = torch.zeros(3, dtype=torch.float64)
        kl = 0.0
        for ids in rows:

            def steered(x, latent=latent, value=value):
                z = sae.encode(x)
                z[:, latent] = value
                return sae.decode(z)

            plain = logits_with(model, ids, layer, lambda x: x)
            edit = logits_with(model, ids, layer, lambda x, f=steered: x - sae(x) + f(x))
            done = logits_with(model, ids, layer, steered)
            a, b = (d - plain - (d - plain).mean(1, keepdim=True) for d in (edit, done))
            sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
            p = plain.softmax(1)
            kl += (p * (plain.log_softmax(1) - edit.log_softmax(1))).sum().item()
            if latent == found.steered[0]:
                other = logits_with(model, ids, layer, sae)
                rebuilt += (p * (plain.log_softmax(1) - other.log_softmax(1))).sum().item()
        fidelity.append(sums[0].item() / (sums[1] * sums[2]).sqrt().item())
        asked.append(kl / len(top))
    for shown, values in ((found.fidelity, fidelity), (found.edit, asked)):
        assert shown.value == pytest.approx(np.mean(values), rel=1e-3)
        assert shown.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(8), rel=1e-2)
    assert found.rebuilt == pytest.approx(rebuilt / len(top), rel=1e-3)
    assert 0 < found.fidelity.value < 0.999


def test_steering_a_neuron_of_the_site_needs_no_reconstruction(measured):
    """The same code with nothing rebuilt: the edit alone, at no cost."""
    for found in measured.own_steering:
        assert found.rebuilt == 0
        assert found.fidelity.value == pytest.approx(1, abs=1e-4)
        assert found.edit.value > 0


def test_steering_is_told_and_can_be_left_out(run, measured):
    assert "layer 1: 8 latents" in str(measured)
    few = evaluated(run, steered=2, steered_tokens=LENGTH)
    assert len(few.steering[0].steered) == 2
    assert few.steering[0].tokens < measured.steering[0].tokens
    assert evaluated(run, steered=2, steered_tokens=LENGTH) == few
    without = evaluated(run, steered=0)
    assert without.steering == without.own_steering == ()
    assert "steered" not in str(without)
    told = json.loads((run / "sae" / "crate@topk-2x" / "evaluation.json").read_text())
    assert told["steering"] == []
    with pytest.raises(InputError, match=r"--steered must be at least 0, not -1"):
        SaeEvaluateConfig(steered=-1)
