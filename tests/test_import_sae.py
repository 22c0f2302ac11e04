"""`cratelm import sae`: parity with the oracle, the same numbers in SAELens, and files that are refused."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import SHARED, needs_shared

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.models import build, site_of
from cratelm.models.hook_names import hooks_of_families
from cratelm.sae.sae import Sae

ORACLE = SHARED / "oracle"
RELATIVE = 1e-5
"""largest difference from the reference, relative to its largest value"""
SETTINGS = {"model_name": "crate-2l", "site": "post", "layer": 1, "act_name": "blocks.1.mlp.hook_post", "act_size": 12, "dict_size": 40}  # fmt: skip


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def weights(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)}
    made = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return {**made, **changes}


def written(folder, held=None, name="0", **changes):
    """An SAE in the authors' format: NAME.pt and NAME_cfg.json."""
    torch.save(weights() if held is None else held, folder / f"{name}.pt")
    settings = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
    (folder / f"{name}_cfg.json").write_text(json.dumps(settings))
    return folder / f"{name}.pt"


@needs_shared
@torch.no_grad()
def test_imported_folder_equals_the_oracle_here_and_in_saelens(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    done = cratelm.api.import_sae(file=str(ORACLE / "sae-0.pt"), out=tmp_path / "sae")
    assert (done.model_name, done.site, done.layer, done.inputs, done.latents) == ("gpt-2l", "mlp", 0, 256, 512)  # fmt: skip
    expected = load_file(ORACLE / "sae-0-expected.safetensors")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.metadata.hook_name == "blocks.0.mlp.hook_post"
    for sae in (Sae.load(tmp_path / "sae"), theirs):
        latents = sae.encode(expected["x"])
        assert difference(latents, expected["latents"]) <= RELATIVE
        assert difference(sae.decode(latents), expected["reconstruction"]) <= RELATIVE
        assert difference(sae(expected["x"]), expected["reconstruction"]) <= RELATIVE
    assert 0 < (expected["latents"] > 0).float().mean() < 1


@torch.no_grad()
def test_it_computes_the_formula(tmp_path):
    w = weights()
    import_here(written(tmp_path), tmp_path / "out")
    sae, x = Sae.load(tmp_path / "out"), torch.randn(2, 5, 12)
    z = torch.clamp((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    assert difference(sae.encode(x), z) <= RELATIVE
    assert difference(sae(x), z @ w["W_dec"] + w["b_dec"]) <= RELATIVE


def import_here(file, out, **more):
    return cratelm.api.import_sae(file=str(file), out=out, **more)


def test_saved_by_saelens_is_read_here(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    import_here(written(tmp_path), tmp_path / "out")
    sae_lens.SAE.load_from_disk(tmp_path / "out").save_model(tmp_path / "theirs")
    ours, theirs = Sae.load(tmp_path / "out"), Sae.load(tmp_path / "theirs")
    assert theirs.config == ours.config
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in ours.state_dict().items())


def test_half_precision_stays(tmp_path):
    held = {k: v.bfloat16() for k, v in weights().items()}
    import_here(written(tmp_path, held), tmp_path / "out")
    sae = Sae.load(tmp_path / "out")
    assert sae.config.dtype == "bfloat16"
    assert all(torch.equal(sae.state_dict()[k], v) for k, v in held.items())
    assert sae(torch.randn(3, 12)).dtype == torch.bfloat16


@pytest.mark.parametrize("hook", hooks_of_families())
def test_their_places_are_sites_of_our_models(hook, tmp_path):
    assert {"mlp.hook_post", "hook_resid_mid", "hook_mlp_out", "attn.hook_z"} <= {*hooks_of_families()}  # fmt: skip
    for name, family in (("gpt-2l", "gpt2"), ("crate-2l", "crate")):
        act_name = f"blocks.1.{hook}"
        file = written(tmp_path, model_name=name, act_name=act_name, site=None, name=family)
        done = import_here(file, tmp_path / family)
        site = site_of(build(f"{family}-2l", vocab_size=50, hidden_size=32), done.site)
        wide = hook == "mlp.hook_post"
        assert site.n_neurons == ((128, 128) if wide else (32, 32))
        assert (done.layer, Sae.load(tmp_path / family).config.hook_name) == (1, act_name)


def test_card_and_configuration(tmp_path):
    done = import_here(written(tmp_path, lr=1e-4), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "cfg.json", "cratelm.json", "sae_weights.safetensors"]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("library_name: saelens", done.sha256, "| ista |", '"lr": 0.0001', "Licence"):
        assert told in card
    assert str(tmp_path) not in card
    config = Sae.load(tmp_path / "out").config
    assert config.provenance["sha256"] == done.sha256
    assert config.provenance["settings"]["lr"] == 1e-4
    with pytest.raises(InputError, match="add --force"):
        import_here(tmp_path / "0.pt", tmp_path / "out")
    import_here(tmp_path / "0.pt", tmp_path / "out", force=True)


def test_settings_elsewhere_and_another_site(tmp_path):
    file = written(tmp_path, act_name="blocks.1.hook_strange", site=None)
    (tmp_path / "0_cfg.json").rename(tmp_path / "settings.json")
    with pytest.raises(InputError, match=r"no 0_cfg.json in the folder of 0.pt.*--config"):
        import_here(file, tmp_path / "out")
    with pytest.raises(InputError, match=r"blocks.1.hook_strange, whose site is unknown.*--site"):
        import_here(file, tmp_path / "out", config=tmp_path / "settings.json")
    done = import_here(file, tmp_path / "out", config=tmp_path / "settings.json", site="heads")
    assert Sae.load(tmp_path / "out").config.site == done.site == "heads"


# ---- files that are refused -----------------------------------------------------------------------


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({k: v for k, v in weights().items() if k != "b_enc"}, "b_enc is missing"),
        ({k: v for k, v in weights().items() if k != "W_enc"}, "W_enc is missing"),
        (weights(W_dec=torch.zeros(12, 40)), r"W_dec has shape \(12, 40\), but \(40, 12\)"),
        (weights(W_enc=torch.zeros(12)), r"W_enc has shape \(12,\)"),
        (weights(b_dec=torch.full((12,), torch.inf)), "b_dec .* not finite"),
        (weights(b_dec=[0.0]), "b_dec is a list"),
        (weights(b_dec=torch.zeros(12).double()), "weights are torch.float32, torch.float64"),
        (weights(surplus=torch.zeros(1)), "surplus does not belong"),
        ({"model": weights(), "model_args": {}}, "cratelm import authors"),
        ([1, 2], "W_enc is missing"),
    ],
)
def test_weights_that_are_wrong(held, told, tmp_path, capsys):
    refused(written(tmp_path, held), told, "0.pt", capsys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"act_size": 13}, "act_size 13, but W_enc of .*0.pt has 12"),
        ({"dict_size": 41}, "dict_size 41, but W_enc of .*0.pt has 40"),
        ({"layer": 0}, "contradicts itself: layer 0"),
        ({"site": "mlp_out"}, "contradicts itself: site mlp_out"),
        ({"act_name": None}, "no act_name"),
        ({"model_name": None}, "no model_name"),
        ({"act_name": "somewhere"}, "'somewhere': it must have the form blocks.LAYER.HOOK"),
    ],
)
def test_settings_that_are_wrong(changes, told, tmp_path, capsys):
    refused(written(tmp_path, **changes), told, "0_cfg.json", capsys)


def refused(file, told, named, capsys):
    """One line that names the file, status 2, and nothing left behind."""
    before = sorted(os.listdir(file.parent))
    assert main(["import", "sae", str(file), "--out", str(file.parent / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(file.parent / named) in line
    with pytest.raises(InputError, match=told):
        import_here(file, file.parent / "out")
    assert sorted(os.listdir(file.parent)) == before


def test_damaged_and_hostile_files(tmp_path, capsys):
    marker, file = tmp_path / "was-run", written(tmp_path)
    whole = file.read_bytes()
    torch.save(weights(b_dec=Hostile(marker)), file)
    refused(file, r"was refused.*open", "0.pt", capsys)
    file.write_bytes(pickle.dumps(Hostile(marker)))
    refused(file, "was refused", "0.pt", capsys)
    assert not marker.exists()
    file.write_bytes(whole[:1000])
    refused(file, "truncated", "0.pt", capsys)
    file.write_bytes(whole)
    for content in (b"{", b"[1]", b"\xff\xfe"):
        (tmp_path / "0_cfg.json").write_bytes(content)
        refused(file, "JSON", "0_cfg.json", capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(architecture="topk"), "architecture 'topk', but only 'standard' is"),
        (lambda c: c.update(normalize_activations="layer_norm"), "normalize_activations"),
        (lambda c: c.update(apply_b_dec_to_input=False), "apply_b_dec_to_input"),
        (lambda c: c.update(d_in=11), r"W_enc has shape \(12, 40\), but \(11, 40\)"),
        (lambda c: c.update(d_in="12"), "d_in is '12'"),
        (lambda c: c["metadata"].pop("site"), "no site under metadata"),
        (lambda c: c.update(dtype="int8"), "dtype is 'int8'"),
    ],
)
def test_folders_that_are_wrong(change, told, tmp_path):
    import_here(written(tmp_path), tmp_path / "out")
    path = tmp_path / "out" / "cfg.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=told):
        Sae.load(tmp_path / "out")


def test_a_folder_without_weights_is_told(tmp_path):
    import_here(written(tmp_path), tmp_path / "out")
    weights_path = tmp_path / "out" / "sae_weights.safetensors"
    weights_path.write_bytes(weights_path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        Sae.load(tmp_path / "out")
    weights_path.unlink()
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        Sae.load(tmp_path / "out")
    save_file({"W_enc": torch.zeros(12, 40)}, weights_path)
    with pytest.raises(InputError, match="b_enc is missing"):
        Sae.load(tmp_path / "out")
