"""Exported folders in the oldest transformers that tools of the field install, in an environment of its own.

SAEDashboard 0.8.0 requires transformers below 4.57 and TransformerLens 2, so that its environment has transformers
4.56.2. `make test-older` makes this environment and runs these tests; elsewhere they are skipped.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import cratelm
from cratelm.interop.model_folder import with_names_of_version_4
from cratelm.models import build
from cratelm.runs import Run
from cratelm.sae.sae import Sae, SaeConfig
from cratelm.tokens.tokenizer import hf_tokenizer, save_hf_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog, a cat", "<|endoftext|>the  mat\n"]
_SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
_HEADS = {**_SMALL, "num_key_value_heads": 1, "head_dim": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "Llama": {**_HEADS, "rope_theta": 500.0},
    "Qwen3": {**_HEADS, "rope_theta": 500.0},
    "GPTNeoX": {**_SMALL, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "Phi": {**_SMALL, "partial_rotary_factor": 0.75, "rope_theta": 500.0},
}
"""families whose rotary embedding is not the default one of transformers 4"""

# Runs in the older environment. Logits of one sequence, and of a padded batch; what generate says with its cache.
READER = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, trust, texts = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "trust", sys.argv[4:]
options = {"trust_remote_code": True} if trust else {}
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
found = {f"ids{i}": torch.tensor(tokenizer(text).input_ids) for i, text in enumerate(texts)}
ids = found["ids0"][None]
with torch.no_grad():
    found["logits"] = model(ids).logits
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found["padded"] = model(ids.repeat(2, 1)[:, :6], attention_mask=mask).logits[:, 2:]
    found["hidden"] = model(ids, output_hidden_states=True).hidden_states[1]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    found["generated"] = model.generate(ids, **options)
    found["uncached"] = model.generate(ids, use_cache=False, **options)
save_file({k: v.contiguous() for k, v in found.items()}, out)
print(transformers.__version__)
"""
LATENTS = """
import os, sys
os.environ["WANDB_MODE"] = "disabled"
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae, x = SAE.load_from_disk(sys.argv[1]), load_file(sys.argv[2])["x"]
with torch.no_grad():
    latents = sae.encode(x)
    save_file({"latents": latents, "y": sae.decode(latents)}, sys.argv[3])
"""


def older() -> str:
    """The interpreter of the older environment; skips the test where there is none."""
    python = os.environ.get("OLDER_PYTHON", "")
    if not python:
        pytest.skip("needs an environment with transformers 4.56: type `make test-older`")
    return str(Path(python).absolute())


def run_there(script, *arguments, home):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment.pop("PYTHONPATH", None)
    command = [older(), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def random_model(name):
    """A model whose logits are far apart, so that what it generates depends on every weight."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if name in OTHERS:
            config = getattr(transformers, f"{name}Config")(**OTHERS[name])
            model = getattr(transformers, f"{name}ForCausalLM")(config)
        else:
            more = {"decoupled_dictionary": True} if "decoupled" in name else {}
            model = build(name.split()[0], vocab_size=300, max_position_embeddings=64, hidden_size=32, seed=3, **more)  # fmt: skip
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and "dictionary" not in key:
                parameter.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return hf_tokenizer(train_tokenizer([TEXTS[0]] * 20 + ["a dog, a cat ran"] * 5, 300))


def exported(name, tokenizer, folder):
    model = random_model(name)
    if name in OTHERS:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")  # transformers' own words, not ours
        cratelm.api.export_model(path=folder / "model", out=folder / "out")
        return model
    with Run(folder / "run").stage("model", "mine").write({}, {}) as draft:
        model.save_pretrained(draft.path)
        save_hf_tokenizer(tokenizer, draft.path)
    cratelm.api.export_model(run=folder / "run", model="mine", out=folder / "out")
    return model


@pytest.mark.parametrize("name", ["crate-2l", "crate-2l decoupled", "gpt2-2l", *OTHERS])
@torch.no_grad()
def test_an_exported_model(name, tokenizer, tmp_path):
    older()
    model = exported(name, tokenizer, tmp_path)
    trust = "trust" if "crate" in name else "no"
    version = run_there(READER, tmp_path / "out", tmp_path / "found", trust, *TEXTS, home=tmp_path)
    assert version.split()[-1].startswith("4.56.")
    found = load_file(tmp_path / "found")
    for number, text in enumerate(TEXTS):
        assert found[f"ids{number}"].tolist() == tokenizer(text).input_ids
    ids = found["ids0"][None]
    assert torch.equal(found["logits"], model(ids).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = model(ids.repeat(2, 1)[:, :6], attention_mask=mask).logits[:, 2:]
    assert torch.allclose(found["padded"], padded, atol=1e-4)
    hidden = model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(found["hidden"], hidden, atol=1e-5)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}  # fmt: skip
    expected = model.generate(ids, **options)
    assert torch.equal(found["generated"], expected)
    assert torch.equal(found["uncached"], expected)


@torch.no_grad()
def test_an_autoencoder(tmp_path):
    """As `cratelm import sae` writes it, in SAELens over TransformerLens 2."""
    older()
    sae = Sae(SaeConfig(d_in=12, d_sae=30, model_name="gpt2-2l", site="mlp", layer=1, hook_name="blocks.1.mlp.hook_post"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    (tmp_path / "sae").mkdir()
    sae.save(tmp_path / "sae")
    x = torch.randn(2, 7, 12, generator=generator)
    save_file({"x": x}, tmp_path / "x")
    run_there(LATENTS, tmp_path / "sae", tmp_path / "x", tmp_path / "found", home=tmp_path)
    found = load_file(tmp_path / "found")
    assert torch.equal(found["latents"], sae.encode(x))
    assert torch.equal(found["y"], sae.decode(sae.encode(x)))


# ---- what the folders say, without the environment ---------------------------------------------------


@pytest.mark.parametrize("name", ["crate-2l", "Llama"])
def test_the_class_of_the_tokenizer_is_one_that_both_versions_have(name, tokenizer, tmp_path):
    exported(name, tokenizer, tmp_path)
    for folder in tmp_path.rglob("tokenizer_config.json"):
        told = json.loads(folder.read_text())["tokenizer_class"]
        assert told == ("TokenizersBackend" if folder.parent.name == "model" and name in OTHERS else "PreTrainedTokenizerFast")  # fmt: skip
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_rotary_embeddings_by_the_names_of_version_4():
    gemma = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    cases = [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 500.0}),
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}, {"rotary_emb_base": 5.0, "rotary_pct": 0.5}),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0}}, {"rope_theta": 5.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ({"rope_parameters": gemma}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ({"hidden_size": 4}, {}),
    ]  # fmt: skip
    for config, added in cases:
        assert with_names_of_version_4(config) == {**config, **added}
        assert with_names_of_version_4({"text_config": config}) == {"text_config": {**config, **added}}  # fmt: skip
