"""`cratelm import authors`: parity with the oracle, biased GPT-2, tokenizers, and files that are refused."""

import hashlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shared import SHARED, needs_shared
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.interop import import_authors
from cratelm.interop.authors_checkpoint import load_authors_checkpoint, read_authors_checkpoint
from cratelm.interop.source_file import locate
from cratelm.models import build, load
from cratelm.models.gpt2 import gpt2_config
from cratelm.tokens.tokenizer import train_tokenizer

ORACLE = SHARED / "oracle"
RELATIVE = 1e-5
"""largest difference from the reference, relative to its largest value"""
ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 301}
CRATE_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.embed_positions.": "transformer.wpe.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    ".norm_mssa.": ".prenorm_1.",
    ".norm_ista.": ".prenorm_2.",
    ".mssa.projection.": ".attn.c_attn.",
    ".mssa.output.": ".attn.c_proj.",
    ".ista.dictionary": ".ista.weight",
}
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def ids(seed=0, vocabulary=301):
    return torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(seed))


def crate_checkpoint():
    """A small CRATE, and its weights in the authors' keys."""
    model = build("crate-2l", vocab_size=301, max_position_embeddings=48, seed=1, hidden_size=32).eval()  # fmt: skip
    weights = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in CRATE_NAMES.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor.clone()
    return model, {"model": weights, "model_args": dict(ARGUMENTS)}


def biased_checkpoint(seed=2):
    """A small GPT-2 with ReLU whose biases are not 0, and its weights in the authors' layout."""
    config = gpt2_config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=301, max_position_embeddings=48, zero_biases=False)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    weights = {
        k: v.t().clone() if k.endswith(TURNED) else v.clone() for k, v in model.state_dict().items()
    }
    return model, {"model": weights, "model_args": {**ARGUMENTS, "bias": True}}


def plain_gpt2(w, tokens):
    """GPT-2 with ReLU written out, from weights [out, in]: token ids [B, T] -> logits [B, T, V]."""
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(2):
        h = f"transformer.h.{layer}."
        part = F.layer_norm(x, (32,), w[h + "ln_1.weight"], w[h + "ln_1.bias"], 1e-5)
        qkv = F.linear(part, w[h + "attn.c_attn.weight"], w[h + "attn.c_attn.bias"])
        q, k, v = (t.view(2, 24, 4, 8).transpose(1, 2) for t in qkv.split(32, -1))
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.triu(torch.ones(24, 24), 1) > 0, float("-inf"))  # fmt: skip
        heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 24, 32)
        x = x + F.linear(heads, w[h + "attn.c_proj.weight"], w[h + "attn.c_proj.bias"])
        part = F.layer_norm(x, (32,), w[h + "ln_2.weight"], w[h + "ln_2.bias"], 1e-5)
        inner = F.relu(F.linear(part, w[h + "mlp.c_fc.weight"], w[h + "mlp.c_fc.bias"]))
        x = x + F.linear(inner, w[h + "mlp.c_proj.weight"], w[h + "mlp.c_proj.bias"])
    x = F.layer_norm(x, (32,), w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], 1e-5)
    return x @ w["transformer.wte.weight"].t()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the cat sat on the mat, the cat sat"] * 9, 300).save(str(path))
    return path


def saved(path, checkpoint):
    torch.save(checkpoint, path)
    return path


# ---- parity ---------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("family", ["crate", "gpt2"])
@torch.no_grad()
def test_imported_folder_equals_the_oracle(family, prefixed, tmp_path):
    file = ORACLE / f"{family}-ckpt.pt"
    held = torch.load(file, weights_only=True)
    assert all(key.startswith("_orig_mod.") for key in held["model"])
    if not prefixed:
        held["model"] = {k.removeprefix("_orig_mod."): v for k, v in held["model"].items()}
        file = saved(tmp_path / "ckpt.pt", held)
    out = tmp_path / "folder"
    done = cratelm.api.import_authors(checkpoint=str(file), out=out, tokenizer=str(SHARED / "tokenizers" / "bpe4k.json"))  # fmt: skip
    expected = load_file(ORACLE / f"{family}-expected.safetensors")
    figures = json.loads((ORACLE / f"{family}-expected.json").read_text())
    folder, file_itself = load(out), load_authors_checkpoint(file)
    assert difference(folder(expected["input_ids"]).logits, expected["logits"]) <= RELATIVE
    assert difference(file_itself(expected["input_ids"]).logits, expected["logits"]) <= RELATIVE
    assert done.parameters == figures["num_params_non_position"]
    assert done.best_validation_loss == pytest.approx(held["best_val_loss"].item())
    given = expected["greedy_32"]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(folder.generate(given[:, :8], **options), given)


@torch.no_grad()
def test_biased_gpt2_keeps_its_biases(tmp_path):
    model, checkpoint = biased_checkpoint()
    file = saved(tmp_path / "ckpt.pt", checkpoint)
    cratelm.api.import_authors(checkpoint=str(file), out=tmp_path / "out", tokenizer="none")
    expected = plain_gpt2(checkpoint["model"], ids())
    assert difference(model(ids()).logits, expected) <= RELATIVE  # the reference is GPT-2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(plain) is GPT2LMHeadModel
    for found in (plain, load(tmp_path / "out"), load_authors_checkpoint(file)):
        assert difference(found(ids()).logits, expected) <= RELATIVE
    assert load(tmp_path / "out").transformer.ln_f.bias.requires_grad
    assert "modeling_crate.py" not in os.listdir(tmp_path / "out")


@torch.no_grad()
def test_causal_masks_and_half_precision_are_told(tmp_path):
    model, checkpoint = crate_checkpoint()
    checkpoint["model"] = {k: v.bfloat16() for k, v in checkpoint["model"].items()}
    checkpoint["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    read = read_authors_checkpoint(saved(tmp_path / "ckpt.pt", checkpoint))
    assert difference(read.model(ids()).logits, model.bfloat16().float()(ids()).logits) <= RELATIVE
    told = "; ".join(read.changes)
    assert "causal masks omitted" in told
    assert "torch.bfloat16" in told


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"module.{key}",  # DistributedDataParallel, DataParallel
        lambda key: f"_orig_mod.module.{key}",  # compiled after it was distributed
        lambda key: f"module._orig_mod.{key}",  # compiled before
        lambda key: f"module.module.{key}",
        lambda key: f"_forward_module.{key}",  # Lightning
        lambda key: key.replace("transformer.h.", "_fsdp_wrapped_module.transformer.h."),
        lambda key: re.sub(
            r"(h\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", key
        ),
    ],
)
def test_names_of_wrappers_in_keys(wrapped, tmp_path):
    _, checkpoint = crate_checkpoint()
    plain = load_authors_checkpoint(saved(tmp_path / "plain.pt", checkpoint)).state_dict()
    checkpoint["model"] = {wrapped(k): v for k, v in checkpoint["model"].items()}
    read = read_authors_checkpoint(saved(tmp_path / "wrapped.pt", checkpoint))
    found = read.model.state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[k], v) for k, v in plain.items())
    assert any("removed from the keys" in change for change in read.changes)


# ---- what is in the folder ------------------------------------------------------------------------


def test_card_and_provenance_say_where_it_comes_from(tmp_path, tokenizer_file):
    _, checkpoint = crate_checkpoint()
    checkpoint |= {"iter_num": 4321, "best_val_loss": torch.tensor(2.5), "config": {"lr": 0.5}}
    checkpoint["model"] = {f"_orig_mod.{k}": v for k, v in checkpoint["model"].items()}
    file = saved(tmp_path / "ckpt.pt", checkpoint)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    cratelm.api.import_authors(checkpoint=str(file), out=tmp_path / "out", tokenizer=str(tokenizer_file))  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("library_name: transformers", sha256, "4,321", "2.5000", '"n_embd": 32', "`_orig_mod.` removed", "Licence", "trust_remote_code=True"):  # fmt: skip
        assert told in card
    assert str(tmp_path) not in card
    told = json.loads((tmp_path / "out" / "cratelm.json").read_text())
    assert (told["sha256"], told["iter_num"], told["best_val_loss"]) == (sha256, 4321, 2.5)
    assert told["model_args"] == ARGUMENTS
    assert told["config"] == {"lr": 0.5}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_crate.CrateForCausalLM"
    code = (tmp_path / "out" / "modeling_crate.py").read_text()
    text = Path(cratelm.models.crate.__file__).read_text()
    assert code == text.replace("from cratelm.models.tssa", "from .tssa")
    text = Path(cratelm.models.tssa.__file__).read_text()
    assert (tmp_path / "out" / "tssa.py").read_text() == text


def test_tokenizer_of_the_folder_is_the_one_given(tmp_path, tokenizer_file):
    file = saved(tmp_path / "ckpt.pt", crate_checkpoint()[1])
    cratelm.api.import_authors(checkpoint=str(file), out=tmp_path / "out", tokenizer=str(tokenizer_file))  # fmt: skip
    text = "the cat sat<|endoftext|>"
    expected = Tokenizer.from_file(str(tokenizer_file)).encode("the cat sat").ids
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found(text)["input_ids"] == [*expected, 0]
    assert (found.eos_token_id, found.model_max_length) == (0, 48)
    assert load(tmp_path / "out").generation_config.eos_token_id == 0
    cratelm.api.import_authors(checkpoint=str(file), out=tmp_path / "none", tokenizer="none")
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "none" / "README.md").read_text()


def test_gpt2s_tokenizer_is_the_default_where_it_fits(tmp_path, tokenizer_file, monkeypatch):
    def fetch():
        return Tokenizer.from_file(str(tokenizer_file))

    small = saved(tmp_path / "small.pt", crate_checkpoint()[1])
    monkeypatch.setattr(import_authors, "fetch_gpt2", fetch)
    with pytest.raises(InputError, match=r"301 tokens, but the tokenizer gpt2 has 50,257.*none"):
        cratelm.api.import_authors(checkpoint=str(small), out=tmp_path / "out")
    _, checkpoint = crate_checkpoint()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        checkpoint["model"][key] = torch.zeros(50304, 32)
    checkpoint["model_args"]["vocab_size"] = 50304
    large = saved(tmp_path / "large.pt", checkpoint)
    done = cratelm.api.import_authors(checkpoint=str(large), out=tmp_path / "out")
    assert done.tokenizer.endswith("50,304 in the model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"]

    def offline():
        raise InputError("no network")

    monkeypatch.setattr(import_authors, "fetch_gpt2", offline)
    with pytest.raises(InputError, match=r"neither through tiktoken nor.*--tokenizer none"):
        cratelm.api.import_authors(checkpoint=str(large), out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_larger_tokenizer_is_refused(tmp_path, tokenizer_file):
    _, checkpoint = crate_checkpoint()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        checkpoint["model"][key] = torch.zeros(200, 32)
    checkpoint["model_args"]["vocab_size"] = 200
    file = saved(tmp_path / "ckpt.pt", checkpoint)
    with pytest.raises(InputError, match="vocabulary of 200 tokens"):
        cratelm.api.import_authors(checkpoint=str(file), out=tmp_path / "out", tokenizer=str(tokenizer_file))  # fmt: skip


def test_nothing_of_others_is_replaced(tmp_path):
    file = saved(tmp_path / "ckpt.pt", crate_checkpoint()[1])
    call = {"checkpoint": str(file), "tokenizer": "none"}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match="not empty and was not written by"):
            cratelm.api.import_authors(out=theirs, force=force, **call)
    with pytest.raises(InputError, match=r"contains the input .*ckpt\.pt"):
        cratelm.api.import_authors(out=tmp_path, force=True, **call)
    with pytest.raises(InputError, match="is a file"):
        cratelm.api.import_authors(out=file, **call)
    cratelm.api.import_authors(out=tmp_path / "out", **call)
    (tmp_path / "out" / "left.txt").write_text("from before")
    with pytest.raises(InputError, match="add --force"):
        cratelm.api.import_authors(out=tmp_path / "out", **call)
    cratelm.api.import_authors(out=tmp_path / "out", force=True, **call)
    assert not (tmp_path / "out" / "left.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "out", "theirs"]


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path, monkeypatch):
    file = saved(tmp_path / "ckpt.pt", crate_checkpoint()[1])
    call = {"checkpoint": str(file), "tokenizer": "none", "out": tmp_path / "out", "force": True}
    cratelm.api.import_authors(**call)
    before = (tmp_path / "out" / "cratelm.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(import_authors, "_write_card", fail)
    with pytest.raises(OSError, match="disk full"):
        cratelm.api.import_authors(**call)
    assert (tmp_path / "out" / "cratelm.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "out"]


# ---- files that are refused -----------------------------------------------------------------------


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


KEY = "transformer.h.1.ista.weight"


def without(key):
    return lambda c: c["model"].pop(key)


def with_weight(key, tensor):
    return lambda c: c["model"].update({key: tensor})


def with_prefix(prefix):
    """As a training script names the model it keeps in another module."""

    def change(checkpoint):
        checkpoint["model"] = {f"{prefix}{k}": v for k, v in checkpoint["model"].items()}

    return change


def with_argument(name, value):
    return lambda c: c["model_args"].update({name: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(KEY), f"weight {KEY} is missing"),
        (without("transformer.wte.weight"), r"transformer\.wte\.weight is missing"),
        (with_weight(KEY, torch.zeros(3, 3)), rf"{KEY} has shape \(3, 3\).*\(128, 32\)"),
        (with_weight("surplus", torch.zeros(1)), "surplus does not belong"),
        (with_weight("model.norm.weight", torch.zeros(32)), r"model\.norm\.weight does not belong"),
        (with_weight(KEY, torch.full((128, 32), torch.nan)), f"{KEY} .* not finite"),
        (with_weight(KEY, torch.zeros(128, 32, dtype=torch.int8)), f"{KEY} has type torch.int8"),
        (with_weight(KEY, [1.0]), f"{KEY} is a list"),
        (with_weight("lm_head.weight", torch.ones(301, 32)), r"lm_head\.weight differs"),
        (with_argument("n_layer", 3), r"n_layer 3.*layers 0, 1"),
        (with_argument("n_layer", 10**9), r"n_layer 1000000000.*layers 0, 1"),
        (with_prefix("student."), r"layers none: keys begin with 'student\.', save the weights"),
        (lambda c: c["model"].update({f"module.{KEY}": c["model"][KEY]}), f"{KEY} twice"),
        (with_argument("n_embd", 48), r"has shape .*model_args require"),
        (with_argument("n_embd", "48"), "n_embd '48'"),
        (with_argument("n_head", 5), "32 is not a multiple"),
        (with_argument("vocab_size", 0), "vocab_size 0"),
        (lambda c: c["model_args"].pop("n_head"), "model_args lacks n_head"),
        (lambda c: c.pop("model_args"), "model_args lacks n_embd, n_layer"),
        (lambda c: c.pop("model"), "no entry 'model'"),
        (lambda c: c.update(model={"a": torch.zeros(1)}), "neither architecture.*keys are a"),
        (lambda c: (c.clear(), c.update(W_enc=torch.zeros(1))), "cratelm import sae"),
    ],
)
def test_checkpoints_that_are_wrong(change, told, tmp_path, capsys):
    _, checkpoint = crate_checkpoint()
    change(checkpoint)
    refused(saved(tmp_path / "ckpt.pt", checkpoint), told, capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("transformer.ln_f.bias"), r"ln_f\.bias is missing \(1 in all\)"),
        (with_argument("bias", False), "bias False, but the weights have some"),
        (with_weight("transformer.h.0.attn.c_attn.weight", torch.zeros(32, 96)), r"c_attn\.weight has shape \(32, 96\).*\(96, 32\)"),
        (with_argument("n_head", 5), "do not describe a valid model"),
    ],
)  # fmt: skip
def test_gpt2_checkpoints_that_are_wrong(change, told, tmp_path, capsys):
    _, checkpoint = biased_checkpoint()
    change(checkpoint)
    refused(saved(tmp_path / "ckpt.pt", checkpoint), told, capsys)


def refused(file, told, capsys):
    """One line that names the file, status 2, and nothing left behind."""
    before = sorted(os.listdir(file.parent))
    command = ["import", "authors", str(file), "--out", str(file.parent / "out"), "--tokenizer", "none"]  # fmt: skip
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(file) in line
    with pytest.raises(InputError, match=told):
        read_authors_checkpoint(file)
    assert sorted(os.listdir(file.parent)) == before


def test_damaged_and_hostile_files(tmp_path, capsys):
    marker, file = tmp_path / "was-run", tmp_path / "ckpt.pt"
    _, checkpoint = crate_checkpoint()
    torch.save({**checkpoint, "config": Hostile(marker)}, file)
    refused(file, r"was refused.*open.*could run code", capsys)
    file.write_bytes(pickle.dumps(Hostile(marker)))
    refused(file, "was refused", capsys)
    assert not marker.exists()
    whole = saved(file, checkpoint).read_bytes()
    for size in (0, 10, 2000, len(whole) - 100):
        file.write_bytes(whole[:size])
        refused(file, "truncated", capsys)
    file.write_text("<html>moved</html>")
    refused(file, "refused|truncated", capsys)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):  # bytes in disorder: read or refused in one line, never anything else
        broken = bytearray(whole)
        for place in torch.randint(0, 3000, (8,), generator=generator).tolist():
            broken[place] ^= 0x55
        file.write_bytes(broken)
        try:
            read_authors_checkpoint(file)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 (most, not all, are refused)
    file.unlink()
    refused(file, "is not a file", capsys)


# ---- the Hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub's client asks of it: a listing of files, and files of one commit."""

    files: dict[str, bytes]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/repo"):
            if "/tree/" in path:
                told = [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in self.files.items()]  # fmt: skip
            else:
                told = {"id": "owner/repo", "sha": self.commit, "siblings": [{"rfilename": k} for k in self.files]}  # fmt: skip
            content, kind = json.dumps(told).encode(), "application/json"
        else:
            content, kind = self.files.get(path.rpartition("/")[2]), "application/octet-stream"
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body:
            self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


CALLS = """
import json, sys
from cratelm.cli import main
for number, reference in enumerate(sys.argv[1:]):
    status = main(["import", "authors", reference, "--out", f"out-{number}", "--tokenizer", "none"])
    print("status", status, file=sys.stderr)
"""


def test_a_file_of_the_hub(tmp_path):
    """A server on this machine takes the Hub's place."""
    file = saved(tmp_path / "ckpt.pt", crate_checkpoint()[1])
    Hub.files = {"ckpt.pt": file.read_bytes(), "old/ckpt.pt": b"x", "README.md": b"#"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip
    asked = ["owner/repo/ckpt.pt", "hub:owner/repo@main", "owner/repo/absent.pt", "hub:a/b"]
    try:
        command = [sys.executable, "-c", CALLS, *asked]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    first, second, two, third, three, fourth, four = done.stderr.strip().split("\n")
    assert (first, two, three, four) == ("status 0", "status 2", "status 2", "status 2")
    assert "2 .pt files (ckpt.pt, old/ckpt.pt): name a file as hub:owner/repo/FILE" in second
    assert "hub:owner/repo/absent.pt cannot be fetched" in third
    assert "hub:a/b cannot be fetched" in fourth
    assert sorted(p.name for p in tmp_path.glob("out-*")) == ["out-0"]
    told = json.loads((tmp_path / "out-0" / "cratelm.json").read_text())
    assert (told["source"], told["revision"]) == ("hub:owner/repo/ckpt.pt", Hub.commit)


def test_the_one_file_of_a_repository_is_taken(monkeypatch, tmp_path):
    """And what a repository has beside it is found there."""
    files = ["a/0.pt", "a/0_cfg.json", "README.md"]
    told = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: told)
    fetched = "huggingface_hub.hf_hub_download"
    monkeypatch.setattr(fetched, lambda repo, file, revision: f"/x/snapshots/{revision}/{file}")
    found = locate("hub:owner/repo@abc")
    assert (found.name, found.revision) == ("hub:owner/repo/a/0.pt", "abc")
    assert str(found.path) == "/x/snapshots/abc/a/0.pt"
    assert str(found.beside("0_cfg.json")) == "/x/snapshots/abc/a/0_cfg.json"
    assert found.beside("1_cfg.json") is None


@pytest.mark.parametrize("name", ["nowhere/ckpt.pt", "./a/b", "ckpt.pt", "a b/c"])
def test_what_is_no_name_of_the_hub_is_not_asked_there(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    with pytest.raises(InputError, match="is not a file: name a local path, or hub:"):
        cratelm.api.import_authors(checkpoint=name, out="out")
