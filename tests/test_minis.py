"""Small models that come with cratelm: loaded by name without a network, and checked before they are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import make_run

import cratelm
from cratelm import cli
from cratelm.errors import InputError
from cratelm.interop.config import ExportModelConfig
from cratelm.interop.export_model import export_model
from cratelm.models.open import open_model
from cratelm.results.run_summary import run_card
from cratelm.runs import Run, hash_file, minis

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one small model, as `scripts/make_minis.py` writes it."""
    folder = tmp_path_factory.mktemp("minis")
    model = cratelm.build("crate-1l", vocab_size=300, max_position_embeddings=32)
    source = tmp_path_factory.mktemp("model")
    model.save_pretrained(source)
    export_model(ExportModelConfig(path=source, dtype="bf16", out=folder / "crate-1l"))
    hashes = {p.name: hash_file(p) for p in (folder / "crate-1l").iterdir() if p.is_file()}
    (folder / "hashes.json").write_text(json.dumps({"crate-1l": hashes}), encoding="utf-8")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged, in place of cratelm's own."""
    copy = shutil.copytree(made, tmp_path / "minis")
    monkeypatch.setattr(minis, "FOLDER", copy)
    return copy


def test_a_mini_is_loaded_by_name_and_opened_by_verbs(folder, tmp_path):
    model = cratelm.load("mini:crate-1l")
    ids = torch.arange(8)[None]
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, cratelm.load(folder / "crate-1l")(input_ids=ids).logits)
    assert open_model(Run(tmp_path), "mini:crate-1l").source == folder / "crate-1l"


def test_an_unknown_mini_names_those_that_exist(folder):
    with pytest.raises(InputError, match="no model mini:crate-9l: those of cratelm are mini:crate-1l"):  # fmt: skip
        cratelm.load("mini:crate-9l")


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_damaged_mini_is_refused(damage, folder):
    path = folder / "crate-1l" / "model.safetensors"
    if damage == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing or has changed"):
        cratelm.load("mini:crate-1l")


def test_the_script_refuses_a_run_of_another_corpus(tmp_path):
    run = make_run(tmp_path)
    words = [sys.executable, str(ROOT / "scripts" / "make_minis.py"), str(run), "crate-1l"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode != 0
    assert "name a run of --corpus builtin" in done.stderr


@pytest.mark.parametrize("name", minis.mini_names())
def test_minis_of_this_version(name):
    folder = minis.mini_folder(name)
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 2_000_000
    assert "built-in" in (folder / "README.md").read_text(encoding="utf-8") or "builtin" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    loss = _loss_on_code(f"mini:{name}")
    assert loss < 6  # an untrained model of this vocabulary: 8.3


def _loss_on_code(name: str) -> float:
    from cratelm.models.open import encoder_of

    subject = open_model(Run(Path("absent")), name)
    encoder = encoder_of(subject, Run(Path("absent")))
    text = Path(json.__file__).read_text(encoding="utf-8")
    ids = torch.from_numpy(encoder.encode(text)[:256])[None]
    with torch.no_grad():
        return float(subject.model.float()(input_ids=ids, labels=ids).loss)


@pytest.mark.skipif("crate-2l" not in minis.mini_names(), reason="no models are built in")
def test_the_demo_with_pretrained_models_trains_nothing(tmp_path):
    corpus = Path(json.__file__).parent.parent / "email"
    run = tmp_path / "run"
    status = cli.main(["demo", "--pretrained", "--run", str(run), "--corpus", str(corpus), "--tokens", "3000",
                       "--neurons", "4", "--jobs", "1", "--quiet"])  # fmt: skip
    assert status == 0
    assert Run(run).models("model") == []
    assert Run(run).models("scores") == ["crate-2l", "gpt2-2l"]
    harvested = Run(run).stage("activations", "gpt2-2l").require("harvest")
    assert harvested.config["model"] == "mini:gpt2-2l"
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "CRATE" in page or "crate-2l" in page
    cards = run_card("", Run(run)).models
    assert {card.replaced is not None for card in cards} == {True}
    assert not any(card.missing for card in cards)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "1l"], "no model mini:crate-1l"),
        (["--families", "crate", "gpt2-solu"], "cannot be combined"),
        (["--sae"], "cannot be combined"),
    ],
)
def test_a_demo_with_pretrained_models_refuses_what_they_are_not(words, message, tmp_path, capsys):
    assert cli.main(["demo", "--pretrained", "--run", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
