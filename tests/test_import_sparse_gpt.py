"""`cratelm import sparse-gpt`: parity with the released format, and folders that are refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import SHARED, needs_shared
from tokenizers import Tokenizer, models

import cratelm
from cratelm.errors import InputError
from cratelm.models import SparseGptForCausalLM, build, capture

ORACLE = SHARED / "oracle"
CONFIG, WEIGHTS = "beeg_config.json", "final_model.pt"


def released(folder: Path) -> Path:
    """A small checkpoint in the released format, of weights drawn here."""
    model = build(
        "sparse-gpt-2l",
        vocab_size=96,
        max_position_embeddings=32,
        hidden_size=32,
        num_attention_heads=4,
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("attn.sink_logit", "attn.attn_imp.sink_logit")
        weights[name.replace("bigram_table.weight", "bigram_table")] = tensor
    content = {
        "block_size": 32, "vocab_size": 96, "n_layer": 2, "n_head": 4, "d_model": 32, "d_head": 8,
        "d_mlp": 128, "rms_norm": True, "afrac": 0.25, "sink": True, "enable_bigram_table": True,
        "afrac_loctypes": "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out",
    }  # fmt: skip
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    torch.save(weights, folder / WEIGHTS)
    return folder


@needs_shared
@torch.no_grad()
def test_the_released_format_gives_the_logits_and_neurons_of_its_authors(tmp_path):
    source = tmp_path / "released"
    source.mkdir()
    shutil.copy(ORACLE / "sparse-gpt-config.json", source / CONFIG)
    shutil.copy(ORACLE / "sparse-gpt.pt", source / WEIGHTS)
    done = cratelm.api.import_sparse_gpt(folder=str(source), out=tmp_path / "out")
    assert (done.parameters, done.nonzero, done.not_read) == (40_680, 13_800, "")
    model = cratelm.load(tmp_path / "out")
    assert isinstance(model, SparseGptForCausalLM)
    assert model.config.weight_fraction == 0.125
    expected = load_file(ORACLE / "sparse-gpt-expected.safetensors")
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits = model(expected["input_ids"]).logits
        assert (logits - expected["logits"]).abs().max() < 1e-5
    neurons = capture(model, "mlp", expected["input_ids"])
    for layer, found in enumerate(neurons):
        assert (found - expected[f"neuron.{layer}"]).abs().max() < 1e-5


def test_the_tokenizer_is_copied_if_there_is_one(tmp_path):
    source = released(tmp_path / "released")
    vocabulary = {f"t{i}": i for i in range(95)} | {"<|endoftext|>": 95}
    Tokenizer(models.WordLevel(vocabulary, "t0")).save(str(source / "tokenizer.json"))
    done = cratelm.api.import_sparse_gpt(folder=str(source), out=tmp_path / "out")
    assert done.tokenizer == "96 tokens, 96 in the model"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    big = vocabulary | {"more": 96}
    Tokenizer(models.WordLevel(big, "t0")).save(str(tmp_path / "big.json"))
    with pytest.raises(InputError, match="97"):
        cratelm.api.import_sparse_gpt(
            folder=str(source), out=tmp_path / "other", tokenizer=str(tmp_path / "big.json")
        )
    assert not (tmp_path / "other").exists()


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), CONFIG),
        (lambda f: (f / CONFIG).write_text("[]", encoding="utf-8"), "list"),
        (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK"), "refused"),
        (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Hostile())), "refused"),
        (lambda f: set_field(f, rms_norm=False), "rms_norm"),
        (lambda f: set_field(f, d_model="wide"), "d_model"),
        (lambda f: set_field(f, n_layer=10**8), "layers"),
        (lambda f: set_field(f, d_mlp=64), "c_fc"),
        (lambda f: set_field(f, afrac_loctypes="resid"), "resid"),
        (lambda f: set_field(f, afrac_loctypes=None), "afrac_loctypes"),
        (lambda f: set_field(f, activation_type="swiglu"), "swiglu"),
        (lambda f: set_field(f, tied_unembed=True), "tied_unembed"),
        (lambda f: set_field(f, sink=False), "sink_logit"),
        (lambda f: drop(f, "lm_head.weight"), "lm_head"),
        (lambda f: drop(f, "transformer.ln_f.weight"), "ln_f"),
    ],
)
def test_other_folders_are_refused_in_one_line(tmp_path, capsys, change, message):
    source = released(tmp_path / "released")
    set_field(source, tied_unembed=False)
    change(source)
    with pytest.raises(InputError, match=message) as caught:
        cratelm.api.import_sparse_gpt(folder=str(source), out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert "ran" not in capsys.readouterr().out


def set_field(folder: Path, **fields) -> None:
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | fields
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")


def drop(folder: Path, name: str) -> None:
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    torch.save({k: v for k, v in weights.items() if k != name}, folder / WEIGHTS)


def test_fields_that_are_not_known_are_named(tmp_path):
    source = released(tmp_path / "released")
    set_field(source, rotary=True)
    done = cratelm.api.import_sparse_gpt(folder=str(source), out=tmp_path / "out")
    assert done.not_read == "rotary"
    with pytest.raises(InputError, match="is not a folder"):
        cratelm.api.import_sparse_gpt(folder=str(tmp_path / "absent"), out=tmp_path / "other")
