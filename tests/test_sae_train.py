"""`cratelm sae train`: what is learnt, what is saved, what a kill costs, and what is refused."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_runs import EOT, LENGTH, small_run
from safetensors.torch import load_file, save_file
from tiny_run import reseal

from cratelm.errors import InputError
from cratelm.models import load, site_of
from cratelm.sae import activations, train
from cratelm.sae.architectures import (
    build_sae,
    keep_rows_at_norm_one,
    project_to_cone,
    resample,
)
from cratelm.sae.train import make_trainer, sae_train
from cratelm.sae.train_config import ARCHITECTURES, SaeTrainConfig
from cratelm.tokens.shards import TokenStore

sae_lens = pytest.importorskip("sae_lens", reason="the extra sae is not installed")

SMALL = {"tokens": 64 * 20, "batch_size": 64, "batch_tokens": 48, "expansion": 2, "lr": 3e-3, "quiet": True}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("sae") / "run")


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return tmp_path / "run"


def trained(run, **options):
    return sae_train(SaeTrainConfig(run=run, **{"model": "crate", "k": None, **SMALL, **options}))


def weights(path, layer):
    return load_file(path / f"layer-{layer}" / "sae_weights.safetensors")


# ---- what is learnt -------------------------------------------------------------------------------


def planted(n, seed=0):
    """Inputs [n, 20] of 30 known directions [30, 20], each on with a chance of 1 in 15."""
    rng = np.random.default_rng(7)
    dictionary = rng.normal(size=(30, 20))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    draw = np.random.default_rng(seed)
    codes = (draw.uniform(size=(n, 30)) < 1 / 15) * draw.uniform(1, 2, size=(n, 30))
    return torch.tensor(codes @ dictionary, dtype=torch.float32), torch.tensor(dictionary).float()


def recovery(sae, dictionary):
    """Mean over the planted directions of the cosine with the row that is nearest."""
    rows = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    return (dictionary @ rows.T).max(1).values.mean().item()


SPARSITY = {"l1": {"l1": 0.03}, "gated": {"l1": 0.03}, "topk": {"k": 2}, "batchtopk": {"k": 2}, "jumprelu": {"l0_coefficient": 0.003}}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planted_directions_are_found(architecture):
    config = SaeTrainConfig(architecture=architecture, d_sae=60, tokens=256 * 400, batch_size=256, lr=5e-3, **SPARSITY[architecture])  # fmt: skip
    sae = build_sae(config, 20, 0, torch.device("cpu"))
    trainer = make_trainer(config, sae)
    dictionary = planted(1)[1]
    before = recovery(sae, dictionary)
    for step in range(config.steps):
        trainer.step(planted(256, step)[0])
    x = planted(2000, 10_000)[0]
    latents = sae.encode(x)
    explained = 1 - (sae.decode(latents) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert recovery(sae, dictionary) > before + 0.2
    assert explained > 0.8
    assert (latents != 0).float().sum(1).mean() < 8


def test_l1_keeps_the_rows_at_norm_one():
    config = SaeTrainConfig(architecture="l1", d_sae=40, tokens=640, batch_size=64, lr=0.05)
    sae = build_sae(config, 20, 0, torch.device("cpu"))
    trainer, x = make_trainer(config, sae), planted(64)[0]
    for _ in range(5):
        before = sae.W_dec.detach().clone()
        trainer.step(x)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(40), atol=1e-6)
    assert (sae.W_dec - before).abs().max() > 1e-3


def test_l1_takes_out_the_gradient_along_a_row():
    config = SaeTrainConfig(architecture="l1", d_sae=40, tokens=640, batch_size=64)
    sae = build_sae(config, 20, 0, torch.device("cpu"))
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.0)
    keep_rows_at_norm_one(sae, optimizer)
    sae(planted(64)[0]).pow(2).sum().backward()
    optimizer.step()
    assert sae.W_dec.grad.abs().max() > 0.1
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("freeze", ["decoder", "soft-decoder", "encoder"])
def test_frozen_matrices_keep_their_start(architecture, freeze):
    config = SaeTrainConfig(architecture=architecture, freeze=freeze, d_sae=40, tokens=64 * 20, batch_size=64, lr=0.05, k=2 if "topk" in architecture else None)  # fmt: skip

    def after_steps(config):
        sae = build_sae(config, 20, 0, torch.device("cpu"))
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        trainer = make_trainer(config, sae)
        for step in range(config.steps):
            trainer.step(planted(64, step)[0])
        rows, start = sae.W_dec.detach().double(), before["W_dec"].double()
        return sae, before, trainer, torch.cosine_similarity(rows, start, dim=1)

    sae, before, trainer, cosines = after_steps(config)
    frozen = {"decoder": "W_dec", "encoder": "W_enc"}.get(freeze)
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, name), before[name]) == (name == frozen), name
    if frozen:
        assert not trainer.optimizer.state[getattr(sae, frozen)]
    else:
        assert cosines.min() >= 0.8 - 1e-6
        assert after_steps(replace(config, freeze=None))[-1].min() < 0.75
    if architecture == "l1":
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(40), atol=1e-5)


def test_the_projection_is_the_nearest_direction_on_the_cone():
    start = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    rows = torch.tensor([[0.0, 2.0], [3.0, 1.0], [-5.0, 0.0], [-2.0, 0.0]])
    project_to_cone(rows, start)
    assert torch.allclose(rows[0], torch.tensor([1.6, 1.2]))
    assert torch.equal(rows[1], torch.tensor([3.0, 1.0]))  # inside
    assert torch.allclose(rows[2], torch.tensor([-3.0, 4.0]))
    assert torch.cosine_similarity(rows[3], start[3], dim=0) >= 0.8  # opposite: any side


def test_a_frozen_decoder_is_saved_as_it_started(run):
    options = {"architecture": "l1", "dead_after": 64, "lr": 0.05, "l1": 0.05, "layers": (0,)}
    result = trained(run, **options, freeze="decoder")
    assert result.name == "crate@l1-2x-frozen-decoder"
    assert (result.revived_by, result.layers[0].resampled) == ("nothing", 0)
    assert result.layers[0].dead > 0  # else there was nothing to resample
    fresh = build_sae(SaeTrainConfig(**{**SMALL, **options}), 128, 0, torch.device("cpu"))
    saved = weights(result.path, 0)["W_dec"]
    cosines = torch.cosine_similarity(saved.double(), fresh.W_dec.double(), dim=1)
    assert cosines.min() > 1 - 1e-7
    usual = trained(run, **options)
    assert usual.layers[0].resampled > 0
    identities = {json.loads((p / "completed.json").read_text())["identity"] for p in (result.path, usual.path)}  # fmt: skip
    assert len(identities) == 2


def test_dead_latents_start_again():
    config = SaeTrainConfig(architecture="l1", d_sae=40, tokens=640, batch_size=64, dead_after=64)
    sae = build_sae(config, 20, 0, torch.device("cpu"))
    trainer, x = make_trainer(config, sae), planted(64)[0]
    with torch.no_grad():
        sae.b_enc[[3, 8]] = -100.0  # these never fire
    for _ in range(3):
        trainer.step(x)
    assert trainer.dead_neurons.nonzero()[:, 0].tolist() == [3, 8]
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    assert resample(trainer, x, torch.Generator().manual_seed(0)) == 2
    others = [i for i in range(40) if i not in (3, 8)]
    assert torch.equal(sae.W_dec[others], before["W_dec"][others])
    assert torch.equal(sae.W_enc[:, others], before["W_enc"][:, others])
    directions = (x - sae.b_dec) / (x - sae.b_dec).norm(dim=1, keepdim=True).clamp_min(1e-8)
    nearest = (sae.W_dec.detach()[[3, 8]] @ directions.T).max(1).values
    assert nearest.tolist() == pytest.approx([1, 1], abs=1e-5)
    norm = 0.2 * before["W_enc"][:, others].norm(dim=0).mean()
    assert sae.W_enc[:, [3, 8]].norm(dim=0).tolist() == pytest.approx([norm.item()] * 2, rel=1e-5)
    assert sae.b_enc[[3, 8]].tolist() == [0, 0]
    state = trainer.optimizer.state
    assert state[sae.W_dec]["exp_avg"][[3, 8]].abs().max() == 0
    assert state[sae.W_enc]["exp_avg_sq"][:, [3, 8]].abs().max() == 0
    assert state[sae.W_dec]["exp_avg"][others].abs().max() > 0
    assert not trainer.dead_neurons.any()
    assert (sae.encode(x)[:, [3, 8]] > 0).any(0).all()  # and they fire now


def test_training_lowers_the_error_on_a_model(run):
    done = trained(run, architecture="topk", k=8, tokens=64 * 150)
    curve = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    for layer in (0, 1):
        points = [p["explained_variance"] for p in curve if p["layer"] == layer]
        assert points[-1] > 0.5
        assert points[-1] > points[0] + 0.3


def test_it_starts_from_the_mean(run):
    done = trained(run, architecture="topk", k=8, lr=1e-9, layers=(0,))
    model, split = load(run / "model" / "crate"), TokenStore(run / "tokens").split("train")
    site, rows = site_of(model), split.n_sequences(LENGTH)
    tokens = torch.tensor(split.read(0, rows * LENGTH)).view(rows, LENGTH)
    with torch.no_grad():
        found = activations.layer_activations(model, site, (0,), tokens)[0][tokens != EOT]
    mean = found.mean(0)
    assert (weights(done.path, 0)["b_dec"] - mean).norm() < 0.05 * mean.norm()


# ---- the stream of activations --------------------------------------------------------------------


def token_stream(finished, monkeypatch, **options):
    """A stream whose activations are [token id, place in the forward pass] of a single layer."""

    def tokens_alone(model, site, layers, tokens):
        places = torch.arange(tokens.numel()).view_as(tokens)
        return [torch.stack([tokens, places], -1).float()]

    monkeypatch.setattr(activations, "layer_activations", tokens_alone)
    model = load(finished.path / "model" / "crate")
    site = site_of(model, "model.layers.*")
    object.__setattr__(site, "n_neurons", (2, 2))
    split = TokenStore(finished.path / "tokens").split("train")
    settings = {"sequence_length": LENGTH, "batch_size": 10, "batch_tokens": 40, "buffer_bytes": 2000, "most_rows": 10_000, "seed": 1}  # fmt: skip
    return split, activations.ActivationBuffer(
        model, site, (0,), split, EOT, **{**settings, **options}
    )


def test_text_tokens_are_served_once_each(finished, monkeypatch):
    split, stream = token_stream(finished, monkeypatch, batch_size=1, buffer_bytes=1000)
    served, expected, passes, buffers = Counter(), Counter(), 0, 0
    for _ in range(3000):
        served[int(stream.batch()[0][0, 0])] += 1
        if stream.position.served == 0:  # batches of one leave nothing of a buffer out
            for number in range(passes, stream.position.first):
                rows = [split.sequence(int(i), LENGTH)[:-1] for i in stream.sampler.indices(number)]
                expected.update(int(t) for row in rows for t in row if t != EOT)
            assert served == expected
            passes, buffers = stream.position.first, buffers + 1
    assert buffers > 10
    assert (
        passes * stream.sampler.batch_size > 2 * stream.sampler.n_sequences
    )  # over several epochs


def test_the_order_is_random(finished, monkeypatch):
    _, stream = token_stream(finished, monkeypatch)
    first = [stream.batch()[0][:, 0].tolist() for _ in range(8)]
    _, other = token_stream(finished, monkeypatch, seed=2)
    assert [other.batch()[0][:, 0].tolist() for _ in range(8)] != first
    places = stream.batch()[0][:, 1].tolist()
    assert places != sorted(places)  # not as they came out of the model


def test_the_buffer_has_a_bound(finished, monkeypatch):
    for size in (1000, 2000, 5000):
        _, stream = token_stream(finished, monkeypatch, buffer_bytes=size)
        stream.batch()
        assert size / 2 < stream.n_bytes <= size + 10 * 2 * 4  # rounded up to a batch
    _, stream = token_stream(finished, monkeypatch, most_rows=20, buffer_bytes=5000)
    assert stream.n_bytes <= (20 + 40) * 2 * 4  # no more than is needed


def test_a_place_is_found_again(finished, monkeypatch):
    _, stream = token_stream(finished, monkeypatch, buffer_bytes=1000)
    places, batches = [], []
    for _ in range(25):
        places.append(stream.position)
        batches.append(stream.batch()[0])
    assert len({p.first for p in places}) > 2
    for place, batch in list(zip(places, batches, strict=True))[::4]:
        _, other = token_stream(finished, monkeypatch, buffer_bytes=1000)
        other.seek(place)
        assert torch.equal(other.batch()[0], batch)


# ---- killed and started again ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "freeze"),
    [("l1", None), ("batchtopk", None), ("jumprelu", None), ("gated", "soft-decoder")],
)  # fmt: skip
def test_interrupted_training_ends_in_the_same_weights(
    run, tmp_path, monkeypatch, architecture, freeze
):
    options = {"architecture": architecture, "dead_after": 64, "buffer_mib": 1, "name": "x", "lr": 0.05, "freeze": freeze}  # fmt: skip
    if architecture == "l1":
        options["l1"] = 0.05  # enough for latents to die
    shutil.copytree(run, tmp_path / "other")
    whole = trained(run, **options)
    assert (min(layer.resampled for layer in whole.layers) > 0) == (architecture == "l1")
    step = train.ActivationBuffer.batch

    def killed_at(number):
        count = 0

        def batch(stream):
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return step(stream)

        return batch

    for number in (4, 9):  # the second attempt starts from step 3 and comes to step 11
        monkeypatch.setattr(train.ActivationBuffer, "batch", killed_at(number))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "other", checkpoint_minutes=0, **options)
        assert not (tmp_path / "other" / "sae" / "crate@x").exists()
    monkeypatch.setattr(train.ActivationBuffer, "batch", step)
    resumed = trained(tmp_path / "other", checkpoint_minutes=0, **options)
    for layer in (0, 1):
        a, b = weights(whole.path, layer), weights(resumed.path, layer)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    names = {p.name for p in resumed.path.iterdir()}
    assert names == {"layer-0", "layer-1", "sae.json", "metrics.jsonl", "timing.jsonl", "completed.json"}  # fmt: skip
    assert (whole.path / "metrics.jsonl").read_text() == (
        resumed.path / "metrics.jsonl"
    ).read_text()
    identities = [json.loads((p / "completed.json").read_text())["identity"] for p in (whole.path, resumed.path)]  # fmt: skip
    assert identities[0] == identities[1]


def test_a_finished_one_is_skipped(run, capsys):
    first = trained(run, architecture="topk", k=4)
    capsys.readouterr()
    assert trained(run, architecture="topk", k=4) == first
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="--force"):
        trained(run, architecture="topk", k=5)


# ---- what is saved --------------------------------------------------------------------------------


def latents_by_hand(x, w, kind, k):
    """Latents of the formulas of each architecture, from saved weights."""
    centred = x - w["b_dec"]
    if kind == "gated":
        gate = centred @ w["W_enc"] + w["b_gate"]
        return (gate > 0) * (centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    pre = centred @ w["W_enc"] + w["b_enc"]
    if kind == "topk":
        least = pre.topk(k, dim=1).values[:, -1:]
        return pre.relu() * (pre >= least)
    return pre.relu() * (pre > w.get("threshold", torch.tensor(0.0)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", [True, False])
def test_saelens_loads_what_was_trained(run, monkeypatch, architecture, normalize):
    kept = []
    finish = train._fold_scales

    def remember(config, trainer):
        kept.append((trainer.activation_scaler.scaling_factor, {k: v.clone() for k, v in trainer.sae.state_dict().items()}))  # fmt: skip
        return finish(config, trainer)

    monkeypatch.setattr(train, "_fold_scales", remember)
    k = 8 if architecture in ("topk", "batchtopk") else None
    done = trained(run, architecture=architecture, k=k, layers=(1,), normalize=normalize)
    assert [p.name for p in done.path.glob("layer-*")] == ["layer-1"]
    sae = sae_lens.SAE.load_from_disk(done.path / "layer-1")
    w = weights(done.path, 1)
    assert torch.allclose(w["W_dec"].norm(dim=1), torch.ones(256), atol=1e-5)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).relu()
    kind = {"batchtopk": "jumprelu"}.get(architecture, architecture)
    latents = sae.encode(x)
    assert torch.allclose(latents, latents_by_hand(x, w, kind, k), atol=1e-5)
    assert torch.allclose(sae.decode(latents), latents @ w["W_dec"] + w["b_dec"], atol=1e-5)
    if architecture == "batchtopk":  # in training it is another function, of a whole batch
        return
    scale, state = kept[0]
    assert (scale is not None) == normalize
    trainable = build_sae(SaeTrainConfig(architecture=architecture, expansion=2, k=k), 128, 1, torch.device("cpu"))  # fmt: skip
    trainable.load_state_dict(state)
    expected = trainable(x * (scale or 1)) / (scale or 1)
    assert torch.allclose(sae(x), expected, atol=1e-5)


def test_what_was_trained_on_is_told(run):
    done = trained(run, architecture="l1", site="model.layers.*", layers=(0,))
    assert done.name == "crate@l1-2x-model-layers"
    sae = sae_lens.SAE.load_from_disk(done.path / "layer-0")
    assert sae.cfg.d_in == 32
    metadata = sae.cfg.metadata
    assert (metadata.site, metadata.layer, metadata.hook_name) == ("model.layers.*", 0, "model.layers.0")  # fmt: skip
    record = json.loads((run / "model" / "crate" / "completed.json").read_text())
    assert metadata.provenance["model_identity"] == record["identity"]
    told = json.loads((done.path / "sae.json").read_text())
    assert told["tokens"] == 1280
    assert told["layers"][0]["latents"] == 64
    assert done.layers[0].explained_variance == told["layers"][0]["explained_variance"]
    assert "layer 0: 32 inputs, 64 latents" in str(done)


def test_it_trains_on_gpt2_and_leaves_no_files(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = trained(run, model="gpt2", architecture="gated", layers=(1,))
    assert done.site == "mlp"
    assert list((tmp_path / "here").iterdir()) == []


# ---- bad input ------------------------------------------------------------------------------------


def test_nan_activations_name_the_layer_and_lose_nothing(run):
    before = trained(run, architecture="topk", k=4)
    path = run / "model" / "crate" / "model.safetensors"
    damaged = load_file(path)
    damaged["model.layers.1.ista.dictionary"][3, 4] = float("nan")
    save_file(damaged, path, {"format": "pt"})
    reseal(path.parent)
    with pytest.raises(InputError, match=r"layer 1 \(site ista\) is nan"):
        trained(run, architecture="topk", k=4, force=True)
    assert weights(before.path, 1)


def test_a_diverging_loss_is_told(run):
    with pytest.raises(InputError, match=r"loss of layer 0 is .* lower --lr"):
        trained(run, architecture="l1", lr=1e25, log_every=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": (2,)}, "has layers 0 to 1"),
        ({"site": "nothing"}, "no site 'nothing'"),
        ({"model": "gpt2", "site": "ista"}, "no site 'ista'"),
        (
            {"architecture": "topk", "k": 300},
            "--k is 300, but the autoencoder has only 256 latents",
        ),
        ({"sequence_length": 17}, "17"),
        ({"model": "other"}, "cratelm train"),
    ],
)
def test_what_does_not_fit_is_refused(run, options, told):
    with pytest.raises(InputError, match=told):
        trained(run, **options)
    assert not (run / "sae").exists() or not list((run / "sae").iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"architecture": "l2"}, "choose from l1, topk"),
        ({"architecture": "topk", "l1": 1e-3}, "--l1 is an option of l1 and gated, .* give --k"),
        ({"k": 3}, "--k is an option of topk and batchtopk, .* give --l1"),
        ({"expansion": 0}, "--expansion must be at least 1, not 0"),
        ({"tokens": 100}, "less than one batch"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"lr_decay": 1.0}, "--lr-decay"),
        ({"l1": -1.0}, "--l1 must be at least 0, not -1"),
        ({"layers": (1, 1)}, "each once"),
        ({"layers": (-1,)}, "from 0"),
        ({"freeze": "bias"}, "choose from decoder, soft-decoder, encoder"),
    ],
)
def test_impossible_settings_are_refused(options, told):
    with pytest.raises(InputError, match=told):
        SaeTrainConfig(**options)


def test_a_missing_package_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(InputError, match=r"\.\[sae\]"):
        trained(run)
