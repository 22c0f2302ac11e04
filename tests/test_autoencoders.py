"""Autoencoders of SAELens, sparsify and dictionary_learning: the numbers of their own code, and what is refused."""

import json
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from sae_runs import EOT, LENGTH, small_run
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.open_harvest import open_harvested
from cratelm.errors import InputError
from cratelm.models import capture, load
from cratelm.models import sae_lens as sae_lens_of_ours
from cratelm.models.autoencoder_files import (
    autoencoder_folders,
    autoencoder_identity,
    read_autoencoder,
)
from cratelm.models.latents import find_autoencoders, latents_of
from cratelm.models.sites import hooked
from cratelm.results.side_results import read_sae_evaluation
from cratelm.runs import Run
from cratelm.runs.names import autoencoder_name
from cratelm.sae.evaluate import sae_evaluate
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.reconstruction import text_of
from cratelm.steer.config import SteerConfig
from cratelm.steer.steer import steer
from cratelm.tokens.shards import TokenStore

H, S = 16, 40
IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


X = 2 * draw(3, 5, H) + 0.5


def tensors(**more):
    """Weights of a standard autoencoder, with other ones or without them (None)."""
    made = {"W_enc": draw(H, S), "b_enc": 0.5 * draw(S), "W_dec": draw(S, H, seed=1), "b_dec": draw(H)}  # fmt: skip
    made |= {"threshold": 1 + draw(S, seed=2).abs()} if "threshold" in more else {}
    return {k: v for k, v in {**made, **more}.items() if v is not None}


def sae_lens_folder(folder, weights, settings, **files):
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": H, "d_sae": S, "dtype": "float32", **settings}))  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def same_as(sae, theirs, exact=False):
    """Latents and reconstructions of two autoencoders on X agree; some latents fire and some do not."""
    latents, expected = sae.encode(X), theirs.encode(X)
    y, reconstruction = sae.decode(latents), theirs.decode(expected)
    assert 0 < (expected != 0).float().mean() < 1
    if exact:
        assert torch.equal(latents, expected)
    assert ((latents != 0) == (expected != 0)).all()
    assert torch.allclose(latents, expected, atol=1e-4)
    assert torch.allclose(y, reconstruction, atol=1e-4)


# ---- SAELens ---------------------------------------------------------------------------------------

SIX = {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.hook_resid_pre"}}
GATED = {"b_enc": None, "b_gate": draw(S, seed=4), "b_mag": draw(S, seed=5), "r_mag": 0.3 * draw(S, seed=6)}  # fmt: skip
ARCHITECTURES = {
    "standard": ({}, {}),
    "topk": ({"k": 6}, {}),
    "topk rescaled": ({"k": 6, "rescale_acts_by_decoder_norm": True}, {}),
    "jumprelu": ({}, {"threshold": 1 + draw(S, seed=2).abs()}),
    "gated": ({}, GATED),
}
OPTIONS = {
    "plain": {},
    "b_dec not subtracted": {"apply_b_dec_to_input": False},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "constant norm": {"normalize_activations": "constant_norm_rescale"},
    "average": {"normalize_activations": "expected_average_only_in"},
    "heads": {
        "reshape_activations": "hook_z",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.attn.hook_z"},
    },
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_parity_with_saelens(name, options, tmp_path):
    lens = pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    settings, weights = ARCHITECTURES[name]
    settings = {**SIX, "architecture": name.split()[0], **settings, **OPTIONS[options]}
    folder = sae_lens_folder(tmp_path / "sae", tensors(**weights), settings)
    theirs = lens.SAE.load_from_disk(folder)
    theirs.turn_off_forward_pass_hook_z_reshaping()
    same_as(read_autoencoder(folder), theirs, exact=True)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescaled", [True, False])
@torch.no_grad()
def test_parity_with_what_saelens_trains(architecture, rescaled, tmp_path):
    """As it is saved in training, with one threshold, and for inference, as JumpReLU."""
    lens = pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    kind = {"batchtopk": "BatchTopK", "matryoshka_batchtopk": "MatryoshkaBatchTopK"}[architecture]
    fields = {"matryoshka_widths": [10, S]} if "Matryoshka" in kind else {}
    config = getattr(lens, f"{kind}TrainingSAEConfig")(
        d_in=H, d_sae=S, k=6, rescale_acts_by_decoder_norm=rescaled, **fields
    )
    theirs = getattr(lens, f"{kind}TrainingSAE")(config)
    theirs.load_state_dict({**tensors(), "topk_threshold": torch.tensor(1.3, dtype=torch.double)})
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    inference = lens.SAE.load_from_disk(tmp_path / "inference")
    same_as(read_autoencoder(tmp_path / "inference"), inference, exact=True)
    ours = read_autoencoder(tmp_path / "training")
    latents, expected = ours.encode(X), inference.encode(X)
    assert ((latents != 0) == (expected != 0)).all()
    assert torch.allclose(ours.decode(latents), inference.decode(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"activation": "relu"}),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}, {"activation": "topk", "k": 5}),
        ({"activation_fn_str": None, "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}, {"activation": "topk", "k": 5}),
        ({"architecture": "jumprelu"}, {"activation": "jumprelu"}),
        ({"apply_b_dec_to_input": False}, {"subtracts_b_dec": False}),
        ({"normalize_activations": "layer_norm"}, {"normalization": "layer_norm"}),
        ({"normalize_activations": False}, {"normalization": "none"}),
        ({"hook_name": None, "hook_point": "blocks.1.hook_mlp_out", "hook_point_layer": 1}, {"hook_name": "blocks.1.hook_mlp_out", "layer": 1}),
        ({"hook_name": None, "hook_point": "blocks.{layer}.hook_mlp_out", "hook_point_layer": 1}, {"hook_name": "blocks.1.hook_mlp_out", "layer": 1}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_settings_of_older_versions(settings, expected, tmp_path):
    """Flat, without `sae_lens_version`, as SAELens 2 to 5 wrote them; SAELens 6 computes the same from them."""
    lens = pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    flat = {
        "architecture": "standard", "hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "hook_head_index": None,
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "normalize_activations": "none", "model_name": "gpt2-small",
        "context_size": 128, "prepend_bos": True, "sae_lens_training_version": "3.2.1", "device": "cpu",
    }  # fmt: skip
    weights = tensors(threshold=True) if settings.get("architecture") == "jumprelu" else tensors()
    if "threshold" in weights:
        weights["threshold"] = 1 + draw(S, seed=2).abs()
    folder = sae_lens_folder(tmp_path / "sae", weights, {**flat, **settings})
    sae = read_autoencoder(folder)
    assert {k: asdict(sae.config)[k] for k in expected} == expected
    assert (sae.config.model_name, sae.config.layer) == ("gpt2-small", 1)
    same_as(sae, lens.SAE.load_from_disk(folder), exact=True)


@torch.no_grad()
def test_scaling_factors(tmp_path, capsys):
    """The factor of the latents (SAELens 5), and that of the activations in a checkpoint (SAELens 6)."""
    factor = 1 + draw(S, seed=7).abs()
    old = {"hook_name": "blocks.0.hook_resid_pre", "architecture": "standard"}
    for name in ("finetuning_scaling_factor", "scaling_factor"):
        folder = sae_lens_folder(tmp_path / name, tensors(**{name: factor}), {**old, "finetuning_scaling_factor": True})  # fmt: skip
        sae, w = read_autoencoder(folder), tensors()
        z = F.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        assert torch.equal(sae.encode(X), z)
        assert torch.allclose(sae.decode(z), (z * factor) @ w["W_dec"] + w["b_dec"], atol=1e-4)
        one = sae_lens_folder(tmp_path / f"one-{name}", tensors(**{name: torch.ones(S)}), old)
        assert torch.allclose(read_autoencoder(one).decode(z), z @ w["W_dec"] + w["b_dec"], atol=1e-4)  # fmt: skip
        silent = sae_lens_folder(tmp_path / f"silent-{name}", tensors(**{name: factor}), old)
        with pytest.raises(InputError, match="finetuning_scaling_factor is not true"):
            read_autoencoder(silent)

    average = {**SIX, "architecture": "standard", "normalize_activations": "expected_average_only_in"}  # fmt: skip
    folder = sae_lens_folder(tmp_path / "scaled", tensors(), average, activation_scaler={"scaling_factor": 2.5})  # fmt: skip
    sae, w = read_autoencoder(folder), tensors()
    z = F.relu((2.5 * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert torch.allclose(sae.encode(X), z, atol=1e-5)
    assert torch.allclose(sae.decode(z), (z @ w["W_dec"] + w["b_dec"]) / 2.5, atol=1e-5)
    capsys.readouterr()
    folded = sae_lens_folder(tmp_path / "folded", tensors(), average)
    assert read_autoencoder(folded).config.scale == 1
    assert "its weights are taken to include the factor" in capsys.readouterr().err
    for wrong in (0, -1, "2", float("inf")):
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": wrong}))
        with pytest.raises(InputError, match=r"activation_scaler\.json has scaling_factor"):
            read_autoencoder(folder)


@torch.no_grad()
def test_thresholds_stay_in_float32(tmp_path):
    """In bfloat16, 1.3 and 1.2969 are one number: which latents fire would depend on the dtype of the file's settings."""
    weights = tensors(threshold=torch.full((S,), 1.2999))
    weights["W_enc"], weights["b_enc"], weights["b_dec"] = torch.zeros(H, S), torch.full((S,), 1.3), torch.zeros(H)  # fmt: skip
    settings = {**SIX, "architecture": "jumprelu", "dtype": "bfloat16"}
    folder = sae_lens_folder(tmp_path / "sae", weights, settings)
    sae = read_autoencoder(folder)
    assert sae.threshold.dtype == torch.float32
    assert (sae.encode(X) > 0).all()
    assert sae.encode(X.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_center_writing_weights_is_a_model_whose_stream_has_mean_0(tmp_path):
    """TransformerLens centres what writes to the stream; the same latents come from the model of transformers."""
    lens = pytest.importorskip("transformer_lens", reason="the extra `tools` is not installed")
    model = tiny()
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.hook_resid_post"}
    metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    centred = sae_lens_folder(tmp_path / "sae", tensors(), {"architecture": "standard", "metadata": metadata})  # fmt: skip
    sae = read_autoencoder(centred)
    from cratelm.interop.transformer_lens import bridge

    bridged = bridge(tiny())
    bridged.enable_compatibility_mode(fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False)  # fmt: skip
    _, cache = bridged.run_with_cache(IDS)
    stream = cache["blocks.1.hook_resid_post"]
    assert stream.mean(-1).abs().max() < 1e-4
    (x,) = capture(model, "blocks.1.hook_resid_post", IDS)
    assert x.mean(-1).abs().max() > 1e-2
    w = tensors()
    expected = F.relu((stream - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    assert torch.allclose(sae.encode(x), expected, atol=1e-3)
    y = expected @ w["W_dec"] + w["b_dec"]
    assert torch.allclose(sae.decode(sae.encode(x)), y + x.mean(-1, keepdim=True), atol=1e-3)
    assert lens is not None


# ---- sparsify ---------------------------------------------------------------------------------------


def sparsify_folder(folder, **settings):
    """As `SparseCoder.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    weights = {"encoder.weight": draw(S, H), "encoder.bias": draw(S), "W_dec": draw(S, H, seed=1), "b_dec": draw(H)}  # fmt: skip
    save_file(weights, folder / "sae.safetensors")
    told = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": S, "k": 6,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": H}  # fmt: skip
    told = {k: v for k, v in {**told, **settings}.items() if v is not None}
    (folder / "cfg.json").write_text(json.dumps(told))
    return folder


class Sparsify:
    """SparseCoder of sparsify, without its fused kernels."""

    def __init__(self, folder):
        self.w = load_file(folder / "sae.safetensors")
        self.k = json.loads((folder / "cfg.json").read_text())["k"]

    def encode(self, x):
        pre = F.relu(
            F.linear(x - self.w["b_dec"], self.w["encoder.weight"], self.w["encoder.bias"])
        )
        values, indices = torch.topk(pre, self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values)

    def decode(self, z):
        return z @ self.w["W_dec"] + self.w["b_dec"]


@pytest.mark.parametrize("settings", [{}, {"num_latents": 0, "expansion_factor": 2.5}, {"multi_topk": True, "activation": None, "transcode": None}])  # fmt: skip
@torch.no_grad()
def test_parity_with_sparsify(settings, tmp_path):
    folder = sparsify_folder(tmp_path / "run" / "layers.1.mlp", **settings)
    if settings.get("num_latents") == 0:
        told = json.loads((folder / "cfg.json").read_text())
        with pytest.raises(InputError, match="d_sae 0"):
            read_autoencoder(folder)
        (folder / "cfg.json").write_text(json.dumps({**told, "num_latents": S}))
    sae = read_autoencoder(folder)
    assert sae.config.hook_name == "layers.1.mlp"
    same_as(sae, Sparsify(folder))


def test_folders_of_sparsify_name_their_module(tmp_path):
    for layer in (0, 1):
        sparsify_folder(tmp_path / "run" / f"h.{layer}.mlp")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "gpt2", "hook_mode": "output"}))  # fmt: skip
    site = latents_of(tiny(), tmp_path / "run")
    assert (site.paths, site.side) == (("transformer.h.0.mlp", "transformer.h.1.mlp"), "output")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"hook_mode": "input"}))
    assert latents_of(tiny(), tmp_path / "run").side == "input"
    (tmp_path / "run" / "config.json").write_text(json.dumps({"hook_mode": "transcode"}))
    with pytest.raises(InputError, match="hook_mode 'transcode'"):
        latents_of(tiny(), tmp_path / "run")
    sparsify_folder(tmp_path / "seeds" / "h.1" / "seed1")
    assert latents_of(tiny(), tmp_path / "seeds" / "h.1" / "seed1").layer_numbers == (1,)
    sparsify_folder(tmp_path / "run" / "h.1")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(InputError, match="several sites, transformer"):
        latents_of(tiny(), tmp_path / "run")


# ---- dictionary_learning ------------------------------------------------------------------------------


def linear(seed=0, enc_bias="encoder.bias", dec_bias="b_dec", **more):
    made = {"encoder.weight": draw(S, H), "decoder.weight": draw(H, S, seed=1)}
    made |= {enc_bias: 0.5 * draw(S)} if enc_bias else {}
    return {**made, dec_bias: draw(H), **more}


def norms(w):
    return w["decoder.weight"].norm(dim=0) if "decoder.weight" in w else w["W_dec"].norm(dim=1)


def of_linear(w, x, b):
    return F.relu(F.linear(x - b, w["encoder.weight"], w["encoder.bias"]))


def gated(w, x):
    pre = F.linear(x - w["decoder_bias"], w["encoder.weight"])
    f_gate = (pre + w["gate_bias"] > 0).float()
    return f_gate * F.relu(w["r_mag"].exp() * pre + w["mag_bias"]) * norms(w)


def top_k(w, x):
    values, indices = of_linear(w, x, w["b_dec"]).topk(int(w["k"]), dim=-1)
    return torch.zeros(*x.shape[:-1], S).scatter(-1, indices, values)


def batch_top_k(w, x):
    post = of_linear(w, x, w["b_dec"])
    return post * (post > w["threshold"])


def matryoshka(w, x):
    post = F.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    return post * (post > w["threshold"])


def jump_relu(w, x):
    pre = x @ w["W_enc"] + w["b_enc"]
    return F.relu(pre * (pre > w["threshold"])) * norms(w)


ONE = torch.tensor(1.3)
DICTIONARIES = {
    "AutoEncoder": (linear(dec_bias="bias"), lambda w, x: of_linear(w, x, w["bias"]), "bias"),
    "AutoEncoderNew": (linear(dec_bias="decoder.bias"), lambda w, x: of_linear(w, x, 0), "decoder.bias"),
    "AutoEncoderTopK": (linear(k=torch.tensor(6, dtype=torch.int), threshold=torch.tensor(-1.0)), top_k, "b_dec"),
    "BatchTopKSAE": (linear(k=torch.tensor(6), threshold=ONE), batch_top_k, "b_dec"),
    "MatryoshkaBatchTopKSAE": (tensors(k=torch.tensor(6), threshold=ONE, group_sizes=torch.tensor([10, 30])), matryoshka, "b_dec"),
    "JumpReluAutoEncoder": (tensors(threshold=0.5 + draw(S, seed=2).abs()), jump_relu, "b_dec"),
    "GatedAutoEncoder": (linear(enc_bias="", dec_bias="decoder_bias", gate_bias=draw(S, seed=4), mag_bias=draw(S, seed=5), r_mag=0.3 * draw(S, seed=6)), gated, "decoder_bias"),
}  # fmt: skip


def dictionary_folder(folder, kind, weights=None, buffer=None, **trainer):
    """As `trainSAE` of dictionary_learning writes it."""
    folder.mkdir(parents=True)
    torch.save(DICTIONARIES[kind][0] if weights is None else weights, folder / "ae.pt")
    told = {"trainer_class": "Trainer", "dict_class": kind, "activation_dim": H, "dict_size": S, "k": 6, "layer": 1,
            "lm_name": "openai-community/gpt2", "submodule_name": "resid_post_layer_1"}  # fmt: skip
    told = {k: v for k, v in {**told, **trainer}.items() if v is not None}
    settings = {"trainer": told, "buffer": {"ctx_len": 128, "io": "out", **(buffer or {})}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


class Dictionary:
    def __init__(self, kind):
        self.w, self.function, self.bias = DICTIONARIES[kind]
        self.divides = kind in ("JumpReluAutoEncoder", "GatedAutoEncoder")

    def encode(self, x):
        return self.function(self.w, x)

    def decode(self, z):
        z = z / norms(self.w) if self.divides else z
        rows = self.w["decoder.weight"].T if "decoder.weight" in self.w else self.w["W_dec"]
        return z @ rows + self.w[self.bias]


@pytest.mark.parametrize("wrapped", ["", "_orig_mod."])
@pytest.mark.parametrize("kind", DICTIONARIES)
@torch.no_grad()
def test_parity_with_dictionary_learning(kind, wrapped, tmp_path):
    weights = {wrapped + k: v for k, v in DICTIONARIES[kind][0].items()}
    sae = read_autoencoder(dictionary_folder(tmp_path / "trainer_0", kind, weights))
    assert (sae.config.hook_name, sae.config.layer) == ("blocks.1.hook_resid_post", 1)
    same_as(sae, Dictionary(kind))


@pytest.mark.parametrize(
    ("folder", "trainer", "io", "path"),
    [
        ("t", {"submodule_name": "resid_post_layer_1"}, "out", "transformer.h.*"),
        ("t", {"submodule_name": "resid_post"}, "out", "transformer.h.*"),
        ("resid_out_layer1/t", {"submodule_name": None}, "out", "transformer.h.*"),
        (
            "attn_out_layer1/t",
            {"submodule_name": None, "layer": None},
            "out",
            "transformer.h.*.attn",
        ),
        ("mlp_out_layer_1", {"submodule_name": ""}, "out", "transformer.h.*.mlp"),
        ("t", {"submodule_name": "transformer.h.1.mlp"}, "in", "transformer.h.*.mlp:input"),
        ("t", {"submodule_name": "h.1.attn"}, "out", "transformer.h.*.attn"),
    ],
)
def test_folders_of_dictionary_learning_name_their_module(folder, trainer, io, path, tmp_path):
    placed = dictionary_folder(tmp_path / folder, "AutoEncoder", buffer={"io": io}, **trainer)
    site = latents_of(tiny(), placed)
    assert site.layer_numbers == (1,)
    expected, _, side = path.partition(":")
    assert (site.paths, site.side) == ((expected.replace("*", "1"),), side or "output")


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path, capsys):
    folder = dictionary_folder(tmp_path / "t", "AutoEncoder")
    (folder / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": Evil()}))
    with pytest.raises(InputError, match="was refused"):
        read_autoencoder(folder)
    torch.save({"encoder.weight": Evil()}, folder / "ae.pt")
    with pytest.raises(InputError, match="was refused"):
        read_autoencoder(folder)
    assert "this ran" not in capsys.readouterr().out


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "architecture": "temporal"}), "architecture 'temporal'.*standard, topk"),
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "architecture": "skip_transcoder"}), "architecture 'skip_transcoder'"),
        (lambda f: sae_lens_folder(f, tensors(), {"activation_fn": "tanh-relu", "hook_name": "a"}), "activation_fn 'tanh-relu'"),
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "normalize_activations": "covariance_whitening"}), "normalize_activations 'covariance_whitening'"),
        (lambda f: sae_lens_folder(f, tensors(), {"hook_name": "blocks.0.attn.hook_q", "hook_head_index": 3}), "hook_head_index 3"),
        (lambda f: sae_lens_folder(f, tensors(), {"hook_point": "blocks.0.attn.hook_z", "hook_point_head_index": 0}), "hook_point_head_index 0"),
        (lambda f: sae_lens_folder(f, tensors(), {"hook_point": "blocks.0.ln2.hook_normalized", "is_transcoder": True}), "is_transcoder True"),
        (lambda f: sae_lens_folder(f, tensors(), {"metadata": {**SIX["metadata"], "hook_name_out": "blocks.0.hook_mlp_out"}}), "hook_name_out"),
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "architecture": "topk"}), "k None"),
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "architecture": "topk", "k": 41}), "k 41, but only 40"),
        (lambda f: sae_lens_folder(f, tensors(), {**SIX, "architecture": "jumprelu"}), "weight threshold is missing"),
        (lambda f: sae_lens_folder(f, tensors(W_skip=draw(H, H)), SIX), "weight W_skip does not belong"),
        (lambda f: sae_lens_folder(f, tensors(b_enc=draw(S + 1)), SIX), r"b_enc has shape \(41,\)"),
        (lambda f: sae_lens_folder(f, tensors(b_enc=torch.full((S,), torch.nan)), SIX), "not finite"),
        (lambda f: sparsify_folder(f, transcode=True), "transcode True"),
        (lambda f: sparsify_folder(f, signed=True), "signed True"),
        (lambda f: sparsify_folder(f, skip_connection=True), "skip_connection True"),
        (lambda f: sparsify_folder(f, activation="groupmax"), "activation 'groupmax'"),
        (lambda f: dictionary_folder(f, "AutoEncoder", dict_class="CrossCoder"), "dict_class 'CrossCoder'.*BatchTopKSAE"),
        (lambda f: dictionary_folder(f, "AutoEncoder", layer=2), "contradicts itself: layer 2, and resid_post_layer_1"),
        (lambda f: dictionary_folder(f, "AutoEncoder", buffer={"io": "in_and_out"}), "io 'in_and_out'"),
        (lambda f: dictionary_folder(f, "AutoEncoder", buffer={"io": "in"}), "contradicts itself: io in, and resid_post_layer_1"),
        (lambda f: dictionary_folder(f, "AutoEncoder", dict_size=41), "41 latents, but weight W_enc has shape"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(make, told, tmp_path):
    folder = make(tmp_path / "h.1")
    with pytest.raises(InputError, match=told) as error:
        read_autoencoder(folder)
    assert "\n" not in str(error.value)


def test_what_a_folder_has_is_said(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"but weights\.bin: an autoencoder is cfg\.json.*ae\.pt"):
        autoencoder_folders(tmp_path)
    with pytest.raises(InputError, match="but no files"):
        autoencoder_folders(tmp_path / "absent")


def test_the_identity_covers_all_files(tmp_path):
    for made in (
        sae_lens_folder(tmp_path / "a", tensors(), SIX, activation_scaler={"scaling_factor": 2.0}),
        sparsify_folder(tmp_path / "h.0"),
        dictionary_folder(tmp_path / "c", "AutoEncoder"),
    ):
        before = {autoencoder_identity(made)}
        for path in made.iterdir():
            content = path.read_bytes()
            path.write_bytes(content + b" ")
            before.add(autoencoder_identity(made))
            path.write_bytes(content)
        assert len(before) == 1 + len(list(made.iterdir()))


# ---- on a model -----------------------------------------------------------------------------------------


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=H, n_layer=2, n_head=2))  # fmt: skip
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.data *= 5
            elif key.endswith("bias"):
                parameter.data = 0.3 * torch.randn(parameter.shape)
    return model.eval()


def hooked_folder(folder, hook, **settings):
    return sae_lens_folder(folder, tensors(), {"architecture": "standard", "metadata": {"hook_name": hook, "sae_lens_version": "6.0.0"}, **settings})  # fmt: skip


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.ln2.hook_normalized", "transformer.h.1.mlp", "hook_embed"])  # fmt: skip
@pytest.mark.parametrize("normalized", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_latents_of_a_hook(hook, normalized, tmp_path):
    """Of the tensor that the file names; an edit keeps what the autoencoder cannot reconstruct."""
    folder = hooked_folder(tmp_path / "any", hook, normalize_activations=normalized)
    model, sae = tiny(), read_autoencoder(folder)
    site = latents_of(model, folder)
    (x,), (latents,) = capture(model, hook, IDS), capture(model, site, IDS)
    assert torch.equal(latents, sae.encode(x))
    plain = model(input_ids=IDS).logits
    with hooked(model, site, lambda place, z: z.clone()):
        assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-4)
    with hooked(model, site, lambda place, z: z + 9 * torch.eye(S)[3]):
        assert (model(input_ids=IDS).logits - plain).abs().max() > 1e-2


def test_the_name_of_a_module_serves_where_that_of_the_hook_is_not_known(tmp_path, monkeypatch):
    """SAELens' registry has both for some releases."""
    metadata = {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "transformer.h.1.output"}
    folder = sae_lens_folder(tmp_path / "any", tensors(), {"architecture": "standard", "metadata": metadata})  # fmt: skip
    assert latents_of(tiny(), folder).paths == ("transformer.h.1",)
    config = GPTBigCodeConfig(vocab_size=101, n_embd=H, n_layer=2, n_head=2, n_positions=16)
    code = GPTBigCodeForCausalLM(config).eval()
    monkeypatch.setattr("cratelm.models.hook_names._FAMILIES", ())
    assert latents_of(code, folder).paths == ("transformer.h.1",)


def test_what_versions_of_transformer_lens_disagree_on_is_said(tmp_path, capsys):
    """Version 2 captures a layer norm's `hook_normalized` after its weight and bias, version 3 before."""
    folder = hooked_folder(tmp_path / "any", "blocks.1.ln2.hook_normalized")
    assert latents_of(tiny(), folder).side == "normalized"
    assert "--site transformer.h.1.ln_2 if it was trained with version 2" in capsys.readouterr().err
    assert latents_of(tiny(), folder, "transformer.h.1.ln_2").side == "output"
    assert not capsys.readouterr().err


def test_a_model_in_16_bits(tmp_path):
    folder = hooked_folder(tmp_path / "any", "blocks.1.hook_resid_mid")
    model = tiny().bfloat16()
    with hooked(model, latents_of(model, folder), lambda place, z: 2 * z), torch.no_grad():
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_the_site_by_hand(tmp_path):
    """`--site` replaces what the file says, or says what it does not; nothing is assumed in its place."""
    silent = sae_lens_folder(tmp_path / "silent", tensors(), {"architecture": "standard"})
    with pytest.raises(InputError, match=r"does not say which tensor.*--site"):
        latents_of(tiny(), silent)
    with pytest.raises(InputError, match=r"does not say of which layer.*--site"):
        latents_of(tiny(), silent, "transformer.h.*.mlp")
    for name in ("transformer.h.1.mlp", "blocks.1.hook_mlp_out"):
        site = latents_of(tiny(), silent, name)
        assert (site.paths, site.layer_numbers) == (("transformer.h.1.mlp",), (1,))
    unknown = hooked_folder(tmp_path / "unknown", "blocks.1.hook_q_input")
    with pytest.raises(InputError, match=r"unknown: 'blocks\.1\.hook_q_input' is no tensor of .*hook_resid_mid.*--site"):  # fmt: skip
        latents_of(tiny(), unknown)
    wide = hooked_folder(tmp_path / "wide", "blocks.1.mlp.hook_pre")
    with pytest.raises(InputError, match=r"reads 16 activations, but site transformer\.h\.\*\.mlp\.c_fc of this model has 64"):  # fmt: skip
        latents_of(tiny(), wide)
    deep = hooked_folder(tmp_path / "deep", "blocks.7.hook_resid_pre")
    with pytest.raises(
        InputError, match=r"is of layer 7, but site .* of this model has layers 0 to 1"
    ):
        latents_of(tiny(), deep)
    other = hooked_folder(tmp_path / "other", "blocks.1.hook_resid_pre", metadata={"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 0})  # fmt: skip
    with pytest.raises(InputError, match=r"contradicts itself: layer 0, and blocks\.1\.hook_resid_pre.*--site"):  # fmt: skip
        latents_of(tiny(), other)
    assert latents_of(tiny(), other, "blocks.1.hook_resid_pre").layer_numbers == (1,)
    for name in ("a", "b"):
        hooked_folder(tmp_path / "twice" / name, "blocks.1.hook_resid_pre")
    with pytest.raises(InputError, match="two autoencoders of layer 1"):
        latents_of(tiny(), tmp_path / "twice")


@torch.no_grad()
def test_decoding_something_else_after_a_normalisation_is_refused(tmp_path):
    folder = hooked_folder(tmp_path / "any", "blocks.1.hook_resid_pre", normalize_activations="layer_norm")  # fmt: skip
    sae = read_autoencoder(folder)
    with pytest.raises(InputError, match="encoded last"):
        sae.decode(draw(3, 5, S))
    sae.encode(X)
    sae.decode(draw(3, 5, S))
    with pytest.raises(InputError, match="encoded last"):
        sae.decode(draw(4, 5, S))


# ---- releases of SAELens' registry --------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """Two made-up releases in SAELens' registry, whose files lie where the Hub's cache would put them.

    The loaders are SAELens' own; only what fetches a file is replaced, and it finds nothing that was not put there.
    """
    pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading import pretrained_saes_directory as directory
    from sae_lens.saes import sae as base

    def lookup(release, repository, conversion, **saes):
        scale = {name: 2.5 for name in saes if name == "scaled"}
        return directory.PretrainedSAELookup(release, repository, "gpt2", conversion, saes, {}, {}, {}, scale, None)  # fmt: skip

    made = {
        "made-up-res": lookup("made-up-res", "owner/made-up", None, plain="blocks.1", scaled="scaled", absent="no"),
        "made-up-dictionary": lookup("made-up-dictionary", "owner/dictionaries", "dictionary_learning_1", **{"resid/trainer_0": "resid/trainer_0"}),
    }  # fmt: skip

    def download(repo_id, filename, subfolder=None, force_download=False, **_):
        path = tmp_path / "cache" / repo_id / (subfolder or "") / filename
        if not (tmp_path / "cache" / repo_id).is_dir():
            raise LocalEntryNotFoundError("the Hub cannot be reached")
        if not path.is_file():
            raise EntryNotFoundError(f"{filename} is not there")
        return str(path)

    for module in (directory, loaders, base):
        monkeypatch.setattr(module, "get_pretrained_saes_directory", lambda: made)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    sae_lens_of_ours.load_release.cache_clear()
    cache = tmp_path / "cache" / "owner"
    settings = {"architecture": "standard", "hook_name": "blocks.1.hook_resid_pre", "model_name": "gpt2-small"}  # fmt: skip
    sae_lens_folder(cache / "made-up" / "blocks.1", tensors(), settings)
    average = {**settings, "normalize_activations": "expected_average_only_in"}
    sae_lens_folder(cache / "made-up" / "scaled", tensors(), average)
    dictionary_folder(cache / "dictionaries" / "resid" / "trainer_0", "BatchTopKSAE")
    yield cache
    sae_lens_of_ours.load_release.cache_clear()


@torch.no_grad()
def test_a_release_is_what_saelens_loads(registry):
    from sae_lens import SAE

    from cratelm.models.sae_lens import load_release

    same_as(load_release("made-up-res/plain"), SAE.from_pretrained("made-up-res", "plain"), exact=True)  # fmt: skip
    scaled = load_release("made-up-res/scaled")  # by the registry's factor
    w = tensors()
    assert torch.allclose(scaled.encode(X), F.relu((2.5 * X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), atol=1e-4)  # fmt: skip
    same_as(load_release("made-up-dictionary/resid/trainer_0"), Dictionary("BatchTopKSAE"))
    same_as(load_release("owner/made-up/blocks.1"), SAE.from_pretrained("made-up-res", "plain"))


def test_a_release_on_a_model(registry, tmp_path):
    run = Run(tmp_path / "run")
    source = find_autoencoders(run, "gpt2", "made-up-res/plain")
    site = latents_of(tiny(), source)
    assert (site.paths, site.side, site.layer_numbers) == (("transformer.h.1",), "input", (1,))
    assert site.autoencoders[0].config.model_name == "gpt2-small"
    before = source.identity
    assert before.startswith("release:made-up-res/plain@")
    changed = load_file(registry / "made-up" / "blocks.1" / "sae_weights.safetensors")
    changed["b_enc"] = changed["b_enc"] + 1
    save_file(changed, registry / "made-up" / "blocks.1" / "sae_weights.safetensors")
    sae_lens_of_ours.load_release.cache_clear()
    assert source.identity != before
    assert autoencoder_name("made-up-res/plain") == "made-up-res-plain"
    assert autoencoder_name(str(registry / "made-up")) == "made-up"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("made-up-res/plane", "has no 'plane'; among its 3 are plain"),
        ("made-up-ress/plain", r"nor RELEASE/ID of SAELens' registry \(is it made-up-res"),
        ("qqqq/plain", "name a folder, autoencoders of the run, or a release"),
        ("made-up-res/absent", r"cannot be loaded by SAELens \(EntryNotFoundError.*--sae FOLDER"),
        ("nobody/nothing/layer", "cannot be loaded by SAELens.*the Hub cannot be reached"),
        ("nothing", "neither a folder nor finished in the run"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_releases_that_are_not_there(name, told, tmp_path):
    with pytest.raises(InputError, match=told) as error:
        latents_of(tiny(), find_autoencoders(Run(tmp_path / "run"), "gpt2", name))
    assert "\n" not in str(error.value)


# ---- the verbs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("saes") / "run").path


def wide(folder, hook, d_in=32, **settings):
    weights = {"W_enc": draw(d_in, S), "b_enc": 0.1 * draw(S), "W_dec": draw(S, d_in, seed=1), "b_dec": 0.1 * draw(d_in)}  # fmt: skip
    told = {"d_in": d_in, "architecture": "standard", "hook_name": hook, **settings}
    return sae_lens_folder(folder, weights, told)


@pytest.mark.parametrize("model", ["crate", "gpt2"])
def test_the_verbs_measure_the_site_that_the_file_names(model, run, tmp_path):
    """Of a folder without `sae_lens_version`: not layer 0 of the MLP, and not another layer."""
    folder = wide(tmp_path / f"mid-{model}", "blocks.1.hook_resid_mid")
    measured = sae_evaluate(SaeEvaluateConfig(run=run, model=model, sae=str(folder), tokens=200, steered=1, steered_tokens=64, quiet=True))  # fmt: skip
    assert (measured.site, [f.layer for f in measured.layers]) == ("blocks.1.hook_resid_mid", [1])
    loaded = load(run / "model" / model)
    split = TokenStore(run / "tokens").split("held_out")
    plan = SearchPlan.of(split, "held_out", EOT, LENGTH, 200, 0)
    on = total = 0
    sae = read_autoencoder(folder)
    for batch in plan.batches(8192, loaded.device):
        (x,) = capture(loaded, "blocks.1.hook_resid_mid", batch.input_ids)
        text = text_of(batch)
        on += int((sae.encode(x)[text] > 0).sum())
        total += int(text.sum())
    assert measured.layers[0].l0.value == pytest.approx(on / total)

    done = harvest(HarvestConfig(run=run, model=model, sae=str(folder), tokens=400, pilot_tokens=64, device="cpu", quiet=True))  # fmt: skip
    assert (done.path.name, done.neurons) == (f"{model}+mid-{model}", (S,))
    context = open_harvested(Run(run), done.path.name)
    assert (context.site.layer_numbers, context.site.side) == ((1,), "residual")
    steered = steer(SteerConfig(run=run, model=model, sae=str(folder), neurons=("1:3",), add=5.0, tokens=8, generate=0, device="cpu"))  # fmt: skip
    assert steered is not None
    with pytest.raises(InputError, match="layer 0"):
        steer(SteerConfig(run=run, model=model, sae=str(folder), neurons=("0:3",), add=5.0, tokens=8, generate=0, device="cpu"))  # fmt: skip


def test_the_option_that_an_error_names_exists(run, tmp_path):
    """`--site` in `sae evaluate`, `harvest` and `steer`, and it decides."""
    folder = wide(tmp_path / "odd", "blocks.1.some.other_tool", d_in=128)
    common: dict[str, Any] = {"run": run, "model": "gpt2", "sae": str(folder)}
    small: dict[str, Any] = {"tokens": 200, "steered": 0, "quiet": True}
    with pytest.raises(InputError, match=r"'blocks\.1\.some\.other_tool' is no tensor of GPT2.*--site"):  # fmt: skip
        sae_evaluate(SaeEvaluateConfig(**common, **small))
    measured = sae_evaluate(SaeEvaluateConfig(**common, **small, site="blocks.1.mlp.hook_pre"))
    assert (measured.site, measured.layers[0].layer) == ("blocks.1.mlp.hook_pre", 1)
    done = harvest(HarvestConfig(**common, site="blocks.1.mlp.hook_post", tokens=400, pilot_tokens=64, device="cpu", quiet=True))  # fmt: skip
    assert open_harvested(Run(run), done.path.name).site.paths == ("transformer.h.1.mlp.c_proj",)
    with pytest.raises(InputError, match="reads 128 activations, but site transformer"):
        sae_evaluate(SaeEvaluateConfig(**common, **small, site="blocks.1.hook_resid_pre"))


def test_a_release_in_the_verbs(run, registry):
    folder = registry / "made-up" / "blocks.1"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    wide(folder, "blocks.1.hook_resid_pre")
    sae_lens_of_ours.load_release.cache_clear()
    common: dict[str, Any] = {"run": run, "model": "gpt2", "sae": "made-up-res/plain"}
    measured = sae_evaluate(SaeEvaluateConfig(**common, tokens=200, steered=0, quiet=True))
    done = harvest(HarvestConfig(**common, tokens=400, pilot_tokens=64, device="cpu", quiet=True))
    assert done.path.name == "gpt2+made-up-res-plain"
    harvested = Run(run).stage("activations", done.path.name).require("harvest")
    stored = read_sae_evaluation(Run(run), harvested)
    assert stored is not None
    assert stored.figures.layers == measured.layers
    assert open_harvested(Run(run), done.path.name).site.layer_numbers == (1,)
    changed = load_file(folder / "sae_weights.safetensors")
    save_file({k: 2 * v for k, v in changed.items()}, folder / "sae_weights.safetensors")
    sae_lens_of_ours.load_release.cache_clear()
    with pytest.raises(InputError, match="no longer has the autoencoders that were harvested"):
        open_harvested(Run(run), done.path.name)
