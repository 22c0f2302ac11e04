"""The page "your own architecture in one file", followed: its file is a family from outside of the package."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, T, make_run, one_thread  # noqa: F401 (a fixture)

import cratelm
from cratelm.errors import InputError
from cratelm.models import FAMILIES, SIZES, build, capture, families, load, register_family, site_of
from cratelm.train import checkpoints

PAGE = Path(__file__).parents[1] / "docs" / "own-architecture.md"
NAME = "pooling-2l"
SIZE = ("hidden_size=32",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's file, named by the environment as the page says."""
    folder = tmp_path_factory.mktemp("outside")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "pooling.py").write_text(code, encoding="utf-8")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("CRATELM_FAMILIES", "pooling")
    tables: list[dict[str, Any]] = [FAMILIES, SIZES]
    before = [dict(table) for table in tables]
    yield folder
    patch.undo()
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    families._imported.discard("pooling")
    sys.modules.pop("pooling", None)


@pytest.fixture(scope="module")
def run(folder):
    run = make_run(folder)
    fields: dict[str, Any] = {**SMALL, "steps": 20, "model_overrides": SIZE}
    cratelm.api.train(run=run, model=NAME, **fields)
    cratelm.api.harvest(run=run, model=NAME, quiet=True)
    cratelm.api.explain(run=run, model=NAME, quiet=True)
    cratelm.api.score(run=run, model=NAME, quiet=True)
    return run


def test_it_is_built_by_name_and_trained_as_every_family(folder, run):
    model: Any = load(run / "model" / NAME)
    assert type(model).__name__ == "PoolingForCausalLM"
    assert site_of(model).name == "mlp"
    assert site_of(model).n_neurons == (128, 128)
    fresh = build(NAME, vocab_size=300, max_position_embeddings=T, hidden_size=32)
    tokens = torch.randint(300, (2, T))
    assert len(capture(fresh, "mlp", tokens)) == 2
    assert model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False).shape == (2, 8)
    with pytest.raises(InputError, match="did you mean pooling-2l"):
        build("poling-2l")
    with pytest.raises(InputError, match="no field 'experts'"):
        build(NAME, experts=2)


def test_its_neurons_are_explained_scored_edited_and_replaced(folder, run):
    for stage in ("activations", "explanations", "scores"):
        assert (run / stage / NAME).is_dir()
    changed = cratelm.api.steer(
        run=run, model=NAME, neurons=("0:3",), set=5.0, text="red river", generate=4
    )
    assert changed is not None
    effects = cratelm.api.effects(run=run, model=NAME, quiet=True)
    assert effects is not None
    replaced = cratelm.api.replace(run=run, model=NAME, quiet=True, tokens=1000)
    assert replaced is not None


def test_it_resumes_with_the_same_bits_and_freezes_its_parts(folder, run, monkeypatch):
    class Stopped(Exception):
        pass

    fields: dict[str, Any] = {
        **SMALL, "steps": 8, "model_overrides": SIZE, "model": NAME, "freeze": ("mlp",), "l1": 0.01,
    }  # fmt: skip
    whole = cratelm.api.train(run=run, name="whole", **fields)
    save = checkpoints.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise Stopped

    monkeypatch.setattr(checkpoints, "save", save_and_stop)
    with contextlib.suppress(Stopped):
        cratelm.api.train(run=run, name="stopped", **fields)
    monkeypatch.setattr(checkpoints, "save", save)
    resumed = cratelm.api.train(run=run, name="stopped", **fields)
    first, second = (load_file(r.path / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    vocabulary = first["transformer.wte.weight"].shape[0]
    fresh = build(NAME, vocab_size=vocabulary, max_position_embeddings=T, hidden_size=32)
    frozen = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(first[frozen], fresh.state_dict()[frozen])


def test_exported_it_loads_without_cratelm_and_without_its_module(folder, run, tmp_path):
    cratelm.api.export_model(run=run, model=NAME, out=tmp_path / "out")
    text = (tmp_path / "out" / "modeling_pooling.py").read_text(encoding="utf-8")
    assert "register_family" not in text
    model = load(run / "model" / NAME)
    tokens = torch.arange(8)[None]
    torch.save({"ids": tokens, "logits": model(tokens).logits.detach()}, tmp_path / "expected.pt")
    program = """
import sys
sys.modules["cratelm"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True).eval()
expected = torch.load("expected.pt")
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
AutoModel.from_pretrained("out", trust_remote_code=True)
"""
    removed = ("PYTHONPATH", "CRATELM_FAMILIES")
    environment = {k: v for k, v in os.environ.items() if k not in removed}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_module_that_cannot_be_imported_is_named(folder, monkeypatch):
    monkeypatch.setenv("CRATELM_FAMILIES", "absent_module")
    with pytest.raises(InputError, match="CRATELM_FAMILIES names the module 'absent_module'"):
        build("crate-2l")


def test_a_name_is_given_once(folder):
    build(NAME, vocab_size=64)
    family = FAMILIES["pooling"]
    for name in ("pooling", "crate", "", "a b", "a--b"):
        with pytest.raises(InputError, match="cannot be added"):
            register_family(name, family.config_class, type(build(NAME, vocab_size=64)))
