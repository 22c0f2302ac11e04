"""Latents of sparse autoencoders as a site: seen, edited, harvested and scored like neurons."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models import build, capture, site_of
from cratelm.models.latents import latents_of
from cratelm.models.sites import hooked
from cratelm.report.config import ReportConfig
from cratelm.report.report import report
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

sae_lens = pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")

INPUTS, LATENTS = 64, 24
IDS = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))


def tiny(family="crate"):
    fields = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return build(f"{family}-2l", vocab_size=101, max_position_embeddings=48, seed=1, **fields)


def write_sae(folder, layer, site="ista", hook="", width=INPUTS, kind="JumpReLU"):
    """An autoencoder with random weights, saved by SAELens itself."""
    told: dict[str, Any] = {"hook_name": hook}
    if site:
        told |= {"site": site, "layer": layer}
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=width, d_sae=LATENTS, metadata=sae_lens.saes.sae.SAEMetadata(**told)
    )
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    generator = torch.Generator().manual_seed(layer)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    sae.save_model(folder)
    return sae


@pytest.fixture
def folder(tmp_path):
    for layer in (0, 1):
        write_sae(tmp_path / "saes" / f"layer-{layer}", layer)
    return tmp_path / "saes"


def test_latents_are_the_encoded_activations(folder):
    model = tiny().eval()
    below = capture(model, site_of(model), IDS)
    site = latents_of(model, folder)
    assert (site.n_neurons, site.layer_numbers) == ((LATENTS, LATENTS), (0, 1))
    found = capture(model, site, IDS)
    for layer, (latents, activations) in enumerate(zip(found, below, strict=True)):
        sae = sae_lens.SAE.load_from_disk(folder / f"layer-{layer}")
        assert torch.equal(latents, sae.encode(activations))
        assert (latents > 0).any()


@torch.no_grad()
def test_an_edit_leaves_the_error_of_the_autoencoder(folder):
    """Nothing changes where nothing is edited; an edit writes its decoder row and no more."""
    model = tiny().eval()
    site, plain = latents_of(model, folder), site_of(model)
    clean = model(input_ids=IDS).logits
    with hooked(model, site, lambda layer, z: z.clone()):
        assert torch.allclose(model(input_ids=IDS).logits, clean, atol=1e-5)

    def add(layer, latents):
        return latents + torch.eye(LATENTS)[3] if layer == 0 else None

    seen: list[torch.Tensor] = []
    with hooked(model, plain, lambda layer, a: seen.append(a)), hooked(model, site, add):
        model(input_ids=IDS)
        first = seen[0]
    changed: list[torch.Tensor] = []
    with hooked(model, site, add), hooked(model, plain, lambda layer, a: changed.append(a)):
        model(input_ids=IDS)
    row = sae_lens.SAE.load_from_disk(folder / "layer-0").W_dec[3]
    assert torch.allclose(changed[0] - first, row.expand_as(first), atol=1e-5)


def test_one_layer_keeps_its_number(tmp_path):
    write_sae(tmp_path / "any", 1)
    model = tiny().eval()
    site = latents_of(model, tmp_path / "any")
    assert (site.layer_numbers, site.paths) == ((1,), (site_of(model).paths[1],))


def test_a_folder_that_sae_lens_wrote_alone(tmp_path):
    """Without cratelm's entries, site and layer come from the name of the hook."""
    write_sae(tmp_path / "any", 1, site="", hook="transformer.h.1.mlp.act", kind="Standard")
    model = tiny("gpt2").eval()
    site = latents_of(model, tmp_path / "any")
    assert (site.layer_numbers, site.paths) == ((1,), ("transformer.h.1.mlp.act",))


def test_what_does_not_fit_is_told(tmp_path, folder):
    model = tiny().eval()
    write_sae(tmp_path / "narrow" / "layer-0", 0, width=32)
    write_sae(tmp_path / "deep" / "layer-7", 7)
    write_sae(tmp_path / "mixed" / "layer-0", 0)
    write_sae(tmp_path / "mixed" / "layer-1", 1, site="mssa", width=16)
    write_sae(tmp_path / "cut" / "layer-0", 0)
    config = tmp_path / "cut" / "layer-0" / "cfg.json"
    config.write_text(config.read_text()[:40])
    expected = {
        "": "has no autoencoder",
        "narrow": "reads 32 activations, but site ista of this model has 64",
        "deep": "layers 0 to 1",
        "mixed": "several sites, ista, mssa",
        "cut": "cannot be read as JSON",
    }
    for name, told in expected.items():
        with pytest.raises(InputError, match=told):
            latents_of(model, tmp_path / name)
    with pytest.raises(InputError, match="no site 'ista'"):
        latents_of(tiny("gpt2").eval(), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a tiny CRATE model, and autoencoders of its second layer."""
    folder = tmp_path_factory.mktemp("latents")
    draw = random.Random(0)
    words = ["red", "blue", "stone", "river", "the", "over", "def f(x):", "return"]
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(120):
            text = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            file.write(json.dumps({"text": text}) + "\n")
    path = folder / "run"
    corpus = {"corpus": str(folder / "corpus.jsonl"), "vocab_size": 300, "sequence_length": 16}
    tokenize(TokenizeConfig(run=path, fit=0.3, held_out=0.3, quiet=True, **corpus))
    small: dict[str, Any] = {"sequence_length": 32, "validation_sequences": 8}
    shape = ("hidden_size=16", "num_attention_heads=2")
    small |= {"model_overrides": shape, "tensorboard": False, "quiet": True}
    train(TrainConfig(run=path, model="crate-2l", steps=4, batch_size=4, **small))
    write_sae(folder / "saes" / "layer-1", 1)
    return path


@pytest.mark.usefixtures("undrawn")
def test_latents_go_down_the_whole_line(run):
    """Harvested, explained, scored and reported as a model of their own, beside the neurons."""
    common: dict[str, Any] = {"run": run, "tokens": 1500, "pilot_tokens": 256, "device": "cpu"}
    saes = run.parent / "saes"
    found = harvest(HarvestConfig(**common, model="crate-2l", sae=str(saes)))
    name = "crate-2l+saes"
    assert (found.path.name, found.neurons) == (name, (LATENTS,))
    harvest(HarvestConfig(**common, model="crate-2l"))
    for model in ("crate-2l", name):
        explain(ExplainConfig(run=run, model=model, neurons=8, quiet=True))
        score(ScoreConfig(run=run, model=model, resamples=100, quiet=True))
    summaries = read_summaries(found.path, "held_out")
    assert {(s.neuron.site, s.neuron.layer) for s in summaries} == {("latents", 1)}
    assert [s.neuron.index for s in summaries] == list(range(LATENTS))
    told = json.loads((found.path / "sites.json").read_text())
    assert told["layers"] == [1]
    rows = report(ReportConfig(run=run, resamples=100, neurons=2)).comparison
    assert {row["model"] for row in rows} == {"crate-2l", name}
    _same_tokens_as_the_neurons(run, name)


def _same_tokens_as_the_neurons(run, name):
    """Random excerpts of the same layer and index are of the same tokens: scores can be paired."""
    folders = [run / "activations" / model for model in ("crate-2l", name)]
    neurons, latents = (next(read_records(f, "held_out", [1], [0])) for f in folders)
    positions = [{e.position for e in r.of_kind("random")} for r in (neurons, latents)]
    assert positions[0] == positions[1]
    activations = [np.concatenate([e.activations for e in r.of_kind("random")]) for r in (neurons, latents)]  # fmt: skip
    assert not np.array_equal(*activations)


def test_autoencoders_that_are_not_there(run):
    with pytest.raises(InputError, match=r"neither a folder nor finished in the run.*RELEASE/ID"):
        harvest(HarvestConfig(run=run, model="crate-2l", sae="absent", device="cpu"))


def test_a_site_without_autoencoders_is_as_before():
    site = site_of(tiny().eval())
    assert replace(site, autoencoders=()) == site
    assert site.layer_numbers == (0, 1)
