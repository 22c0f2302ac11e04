"""`cratelm export model`: stock transformers loads the folder where cratelm cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_import_authors import crate_checkpoint
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.models import CrateForCausalLM, build, load
from cratelm.runs import Run
from cratelm.tokens.tokenizer import hf_tokenizer, train_tokenizer

TEXT = "the cat sat on the mat"
RESULTS = {"tokens": 98765, "steps": 12, "validation_loss": 3.25, "validation_standard_error": 0.125}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two small models with weights of the size that training gives."""
    path = tmp_path_factory.mktemp("runs") / "mine"
    tokenizer = train_tokenizer([TEXT] * 20 + ["a dog ran"] * 5, 300)
    stages = Run(path)
    corpus = {"corpus": "/home/somebody/texts.jsonl", "tokenizer": "train"}
    with stages.stage("tokens").write(corpus, {"corpus": "c0ffee"}) as draft:
        draft.results = {"tokens": {"train": 4444}}
    inputs = {"tokens": stages.stage("tokens").require("tokenize")}
    for name in ("crate-2l", "gpt2-2l"):
        model = build(name, vocab_size=300, max_position_embeddings=64, hidden_size=32, seed=3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 2 and "dictionary" not in key:
                    parameter.mul_(10)
        with stages.stage("model", name).write({"seed": 3, "steps": 12}, inputs) as draft:
            model.save_pretrained(draft.path)
            hf_tokenizer(tokenizer).save_pretrained(draft.path)
            draft.results = RESULTS
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Exported folders, by model."""
    root = tmp_path_factory.mktemp("exported")
    for name in ("crate-2l", "gpt2-2l"):
        cratelm.api.export_model(run=run, model=name, out=root / name)
    cratelm.api.export_model(path=root / "crate-2l", out=root / "half", dtype="bf16")
    return root


# Runs where `import cratelm` fails; what it computes is compared here with cratelm's own.
STRANGER = """
import json, sys
sys.modules["cratelm"] = None
try:
    import cratelm
except ImportError:
    pass
else:
    raise SystemExit("cratelm can be imported")
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, again, text, trust = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "trust"
options = {"trust_remote_code": True} if trust else {}
model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
base = AutoModel.from_pretrained(folder, **options).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
found = {"ids": ids}
sampling = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
with torch.no_grad():
    found["logits"] = model(ids).logits
    found["hidden"] = base(ids).last_hidden_state
    found["cached"] = model.generate(ids, use_cache=True, **sampling)
    found["uncached"] = model.generate(ids, use_cache=False, **sampling)
    model.save_pretrained(again / "model")
    base.save_pretrained(again / "base")
    tokenizer.save_pretrained(again / "model")
    found["again"] = AutoModelForCausalLM.from_pretrained(again / "model", **options).eval()(ids).logits
    found["base"] = AutoModel.from_pretrained(again / "base", **options).eval()(ids).last_hidden_state
save_file({k: v.contiguous() for k, v in found.items()}, again / "found.safetensors")
told = {"class": type(model).__name__, "module": type(model).__module__}
print(json.dumps(told))
"""


def stranger(folder, tmp_path, trust):
    """Figures of the folder from an interpreter without cratelm, and the class that computed them."""
    again = tmp_path / "again"
    again.mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-c", STRANGER, str(folder), str(again), TEXT, trust]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(again / "found.safetensors"), json.loads(done.stdout.splitlines()[-1]), again


@torch.no_grad()
@pytest.mark.parametrize("name", ["crate-2l", "gpt2-2l"])
def test_stock_transformers_without_cratelm(name, run, exported, tmp_path):
    is_crate = name == "crate-2l"
    found, told, again = stranger(exported / name, tmp_path, "trust" if is_crate else "no")
    model = load(run / "model" / name)
    ids = found["ids"]
    assert torch.equal(found["logits"], model(ids).logits)
    assert torch.equal(found["hidden"], model.base_model(ids).last_hidden_state)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert len(expected[0].unique()) > 3  # no model that says one thing
    assert torch.equal(found["cached"], expected)
    assert torch.equal(found["uncached"], expected)
    assert torch.equal(found["again"], found["logits"])
    assert torch.equal(found["base"], found["hidden"])
    saved_again = {p.name for p in (again / "model").iterdir()}
    if not is_crate:
        assert told == {"class": "GPT2LMHeadModel", "module": GPT2LMHeadModel.__module__}
        assert "modeling_crate.py" not in saved_again | set(os.listdir(exported / name))
        return
    assert told["class"] == "CrateForCausalLM"
    assert told["module"].startswith("transformers_modules.")
    assert {"modeling_crate.py", "model.safetensors", "tokenizer.json"} <= saved_again
    config = json.loads((again / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_crate.CrateForCausalLM"
    assert isinstance(load(again / "model"), CrateForCausalLM)  # and here it is ours


@torch.no_grad()
def test_what_was_imported_is_loaded_likewise(exported, tmp_path):
    model, checkpoint = crate_checkpoint()
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    tokenizer = str(exported / "crate-2l" / "tokenizer.json")
    call = {"checkpoint": str(tmp_path / "ckpt.pt"), "tokenizer": tokenizer}
    cratelm.api.import_authors(out=tmp_path / "imported", **call)
    found, told, _ = stranger(tmp_path / "imported", tmp_path, "trust")
    assert torch.equal(found["logits"], model(found["ids"]).logits)
    assert told["module"].startswith("transformers_modules.")


@torch.no_grad()
def test_cratelm_and_transformers_load_the_folder_here(run, exported):
    ids = torch.arange(20)[None]
    for name in ("crate-2l", "gpt2-2l"):
        ours, expected = load(exported / name), load(run / "model" / name)
        assert type(ours) is type(expected)
        assert torch.equal(ours(ids).logits, expected(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(exported / "gpt2-2l")
    assert all(p.abs().max() == 0 for n, p in plain.named_parameters() if n.endswith(".bias"))


@torch.no_grad()
def test_bf16_halves_the_file_and_keeps_the_numbers(exported):
    whole, half = (load(exported / name) for name in ("crate-2l", "half"))
    assert half.dtype == torch.bfloat16
    sizes = [(exported / n / "model.safetensors").stat().st_size for n in ("crate-2l", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    for key, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[key], tensor.bfloat16()), key


def test_card_says_what_the_run_records(exported, run):
    card = (exported / "crate-2l" / "README.md").read_text()
    for told in ("98,765", "3.2500 ± 0.1250 (standard error)", "texts.jsonl", "4,444", '"seed": 3', "trust_remote_code=True", "transformers 5.", "choose"):  # fmt: skip
        assert told in card
    assert "somebody" not in card
    assert "somebody" not in (exported / "crate-2l" / "cratelm.json").read_text()
    assert "trust_remote_code" not in (exported / "gpt2-2l" / "README.md").read_text()
    told = json.loads((exported / "crate-2l" / "cratelm.json").read_text())
    assert told["training"]["identity"] == Run(run).stage("model", "crate-2l").require("").identity
    # exported once more, the folder still says where it came from
    half = json.loads((exported / "half" / "cratelm.json").read_text())
    assert half["before"]["training"]["results"] == RESULTS
    assert "3.25" in (exported / "half" / "README.md").read_text()


def test_any_model_folder(tmp_path):
    config = LlamaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    done = cratelm.api.export_model(path=tmp_path / "llama", out=tmp_path / "out")
    assert done.architecture == "llama"
    assert set(done.files) >= {"config.json", "model.safetensors", "README.md"}
    assert "modeling_crate.py" not in done.files
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(tmp_path / "llama")(ids).logits)


def test_mistakes_are_told_in_one_line(run, tmp_path, capsys):
    inside, model = run / "exports" / "x", run / "model" / "crate-2l"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("a")
    there = ["--run", str(run), "--model", "crate-2l"]
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([*there, "--out", str(inside)], "is inside the input"),
        ([*there, "--out", str(run.parent)], "contains the input"),
        (["--path", str(model), "--out", str(model / "x")], "is inside the input"),
        ([*there, "--out", str(tmp_path / "theirs"), "--force"], "not empty"),
        (["--run", str(run), "--model", "crate-9l", *out], "cratelm train"),
        (["--path", str(tmp_path / "nowhere"), *out], "has no config.json"),
        (out, "one of --model"),
        ([*there, "--path", str(model), *out], "one of --model"),
        ([*there, *out, "--push", "somewhere"], "must have the form OWNER/REPO"),
    ]
    for arguments, told in cases:
        assert main(["export", "model", *arguments]) == 2, arguments
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert told in line
    assert os.listdir(tmp_path) == ["theirs"]
    assert not (run / "exports").exists()


class FakeHub:
    """Takes the place of `huggingface_hub.HfApi`."""

    calls: list
    fails = False

    def create_repo(self, repository, *, private, exist_ok):
        if self.fails:
            raise ConnectionError("no\nroute")
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))


def test_push_sends_the_folder_and_needs_a_token(run, tmp_path, monkeypatch):
    call = {"run": run, "model": "crate-2l", "out": tmp_path / "out", "push": "me/crate"}
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    FakeHub.calls = []
    with pytest.raises(InputError, match="needs a Hub token"):
        cratelm.api.export_model(**call)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    done = cratelm.api.export_model(**call)
    assert done.pushed == "https://hub/me/crate"
    assert FakeHub.calls == [("create", "me/crate", True, True), ("upload", "me/crate", sorted(done.files))]  # fmt: skip
    monkeypatch.setattr(FakeHub, "fails", True)
    with pytest.raises(InputError, match=r"was written.*ConnectionError: no route.*hf upload") as caught:  # fmt: skip
        cratelm.api.export_model(**call, force=True)
    assert "\n" not in str(caught.value)
    assert (Path(call["out"]) / "config.json").is_file()
