"""Model folders from elsewhere: damaged, incomplete, contradictory or hostile; one line that names the file."""

import json
import pickle
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cratelm
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.models.autoencoder_files import read_autoencoder
from cratelm.models.open import LoadedModel, encoder_of
from cratelm.models.sizes import config_of
from cratelm.runs import Run
from cratelm.runs.pretrained import fewest_parameters, least_memory, weight_files

SMALL: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 8, "hidden_size": 8, "num_attention_heads": 2}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module", params=["crate-2l", "gpt2-2l"])
def good(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    cratelm.build(request.param, **SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *said: str) -> str:
    """The message with which the folder is refused, quickly: in Python and by a verb alike."""
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        cratelm.load(folder)
    message = str(error.value)
    assert time.monotonic() - start < 10
    assert "\n" not in message
    assert len(message) < 600
    for part in (str(folder), *said):
        assert part in message, message
    assert "weights_only" not in message
    return message


def sharded(folder: Path) -> dict[str, str]:
    """Splits the weights into two files; the index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, members in parts.items():
        save_file({n: weights[n] for n in members}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {name: file for file, members in parts.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_good_folders_load(good, folder):
    whole = cratelm.load(good)
    sharded(folder)
    for name, weight in cratelm.load(folder).state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "zeros", "folder"])
@pytest.mark.fault("a file of a model folder is cut, emptied or garbage", "one line names the file")
def test_damaged_files_are_named(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        damaged = {"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"\xff\xfegarbage" * 50, "zeros": bytes(500)}  # fmt: skip
        path.write_bytes(damaged[damage])
    refused(folder, name)


def test_a_flipped_length_of_the_header_is_refused(folder):
    path = folder / WEIGHTS
    content = path.read_bytes()
    for size in (0, 2**62, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        refused(folder, WEIGHTS)


@pytest.mark.parametrize("content", ["null", "[]", '"x"', "{}", '{"model_type": 3}', '{"model_type": "none such"}', "[" * 100_000])  # fmt: skip
def test_a_configuration_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder)


SIZES = ("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "max_position_embeddings", "n_positions", "num_attention_heads", "n_head", "expansion", "n_inner", "ista_steps")  # fmt: skip


@pytest.mark.parametrize("value", [10**9, 10**30, 0, -1, "12", 1.5, [1], {"a": 1}, True])
@pytest.mark.fault("a configuration with absurd sizes", "refused before anything is built")
def test_absurd_sizes_are_refused_before_anything_is_built(folder, value, monkeypatch):
    """Whatever the field, within a second; of what takes the place of a number at most the shape differs."""
    config = json.loads((folder / "config.json").read_text())
    for field in SIZES:
        if field not in config or (field == "ista_steps" and value == 10**9):
            continue
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        start = time.monotonic()
        refused(folder)
        assert time.monotonic() - start < 3, field
    (folder / "config.json").write_text(json.dumps(config))
    cratelm.load(folder)


@pytest.mark.parametrize("field", ["step_size", "threshold", "dropout", "layer_norm_eps", "resid_pdrop", "activation_function", "dtype", "auto_map", "architectures"])  # fmt: skip
def test_other_values_of_a_wrong_type_are_refused_or_ignored(folder, field):
    config = json.loads((folder / "config.json").read_text())
    for value in ("nonsense", [], {"a": 1}, -7):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        try:
            cratelm.load(folder)
        except InputError as error:
            assert str(folder) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.fault(
    "weights of another shape, or missing ones", "refused instead of filled with random numbers"
)
def test_weights_that_do_not_fit_are_refused(folder):
    """transformers would make up what is missing, and warn."""
    weights = load_file(folder / WEIGHTS)
    largest = max(weights, key=lambda name: weights[name].numel())
    for changed, said in (
        ({n: w for n, w in weights.items() if n != largest}, "is missing"),
        ({**weights, largest: weights[largest][:-1].clone()}, largest),
        ({**weights, largest: weights[largest].T.contiguous()}, largest),
        ({"other": torch.zeros(10_000)}, "is missing"),
    ):
        save_file(changed, folder / WEIGHTS, {"format": "pt"})
        message = refused(folder, said)
        assert "do not fit" in message or "describes" in message, message


def test_one_weight_more_is_said(folder, capfd):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "extra": torch.zeros(3)}, folder / WEIGHTS, {"format": "pt"})
    cratelm.load(folder)
    assert capfd.readouterr().err == f"note: {folder}: weight extra is not used\n"


@pytest.mark.parametrize("name", ["../secret.safetensors", "{outside}/secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors", "C:\\secret.safetensors", "/etc/passwd", "nul\0"])  # fmt: skip
@pytest.mark.fault(
    "an index of weights that names files outside of its folder", "refused; nothing there is read"
)
def test_an_index_does_not_reach_outside_of_its_folder(folder, name):
    index = sharded(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "secret.safetensors")
    name = name.replace("{outside}", str(folder.parent))
    moved = {key: name if file == "a.safetensors" else file for key, file in index.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    refused(folder, INDEX, "outside of its folder")


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}', "{", "\xff"])  # fmt: skip
def test_a_damaged_index_is_named(folder, content):
    sharded(folder)
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    refused(folder, INDEX)


def test_missing_and_damaged_shards_are_named(folder):
    sharded(folder)
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:100])
    refused(folder, "b.safetensors")
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors", "is missing", INDEX)


class Exploit:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("exploited"),))


@pytest.mark.fault("a pickle that could run code", "refused without advice to load it")
def test_a_pickle_that_could_run_code_is_refused_in_our_words(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({**weights, "x": Exploit()}, folder / "pytorch_model.bin")
    message = refused(folder, "pytorch_model.bin", "could run code", "safetensors")
    for advice in ("unsafe", "weights_only", "allowlist", "add_safe_globals", "trust_remote_code"):
        assert advice not in message
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit()))
    refused(folder, "pytorch_model.bin")
    for damaged in (b"", b"garbage", (folder / "pytorch_model.bin").read_bytes()[:20]):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        refused(folder)
    assert not (tmp_path / "exploited").exists()


def test_an_index_of_pickles_does_not_reach_outside_either(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    refused(folder, "outside of its folder")


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "has no weights")
    with pytest.raises(InputError, match="has no weights"):
        weight_files(folder)


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "config.json is missing")


@pytest.mark.parametrize("content", ["", "{", "null", '{"model": {}}', "garbage"])
def test_a_damaged_tokenizer_is_named(folder, content, tmp_path):
    (folder / "tokenizer.json").write_text(content)
    subject = LoadedModel("m", folder, cratelm.load(folder))
    with pytest.raises(InputError, match=r"tokenizer\.json") as error:
        encoder_of(subject, Run(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_verbs_refuse_a_damaged_folder_in_one_line(folder, tmp_path, capsys):
    (folder / WEIGHTS).write_bytes(b"garbage")
    for words in (["evaluate", "--path", str(folder)], ["predict", "--models", str(folder), "--text", "a"], ["export", "model", "--path", str(folder), "--out", str(tmp_path / "out")]):  # fmt: skip
        assert main([*words, "--run", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        if words[0] != "evaluate":  # which opens the tokens of the run first
            assert WEIGHTS in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crate-2l", "gpt2-2l"])
@pytest.mark.parametrize("fields", [{"hidden_size": 10**9}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"max_position_embeddings": 10**12}])  # fmt: skip
def test_a_model_that_cannot_fit_is_not_built(name, fields):
    with pytest.raises(InputError, match=rf"would take at least .*iB of memory.*lower .*{next(iter(fields)) if 'max_position_embeddings' not in fields else ''}"):  # fmt: skip
        cratelm.build(name, **{**fields, "num_attention_heads": 1})


@pytest.mark.parametrize("name", ["crate-2l", "gpt2-2l"])
@pytest.mark.parametrize("value", ["a", None, -1, 0, 1.5, [8], True])
def test_a_field_of_a_wrong_type_is_named(name, value):
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        with pytest.raises(InputError, match=field):
            config_of(name, **{**SMALL, field: value})


@pytest.mark.parametrize("name", ["crate-1l", "gpt2-1l", "crate-2l", "gpt2-2l"])
def test_the_lower_bound_of_parameters_is_close(name):
    model = cratelm.build(name, vocab_size=300)
    exact = sum(p.numel() for p in model.parameters())
    bound = fewest_parameters(model.config)
    assert 0.9 * exact < bound <= exact
    assert least_memory(model.config) >= 4 * bound


# ---- autoencoders --------------------------------------------------------------------------------


@pytest.fixture
def autoencoder(tmp_path) -> Path:
    from cratelm.sae.sae import Sae, SaeConfig

    folder = tmp_path / "sae"
    folder.mkdir()
    Sae(SaeConfig(d_in=4, d_sae=8, model_name="m", site="ista", layer=0)).save(folder)
    return folder


@pytest.mark.fault("a damaged folder of an autoencoder", "one line names the file")
def test_a_folder_of_an_autoencoder_is_checked_before_it_is_loaded(autoencoder):
    read_autoencoder(autoencoder)
    config = json.loads((autoencoder / "cfg.json").read_text())
    for changed in ({"d_sae": 10**9}, {"d_in": 10**30}, {"d_sae": -1}, {"d_in": "4"}, {"d_sae": None}, {"d_sae": 9}):  # fmt: skip
        (autoencoder / "cfg.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(InputError, match=r"cfg\.json"):
            read_autoencoder(autoencoder)
    for damaged in ("", "null", "[]", "{"):
        (autoencoder / "cfg.json").write_text(damaged)
        with pytest.raises(InputError, match=r"cfg\.json"):
            read_autoencoder(autoencoder)
    (autoencoder / "cfg.json").write_text(json.dumps(config))
    weights = autoencoder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"sae_weights\.safetensors cannot be read"):
        read_autoencoder(autoencoder)
    weights.unlink()
    with pytest.raises(InputError, match=r"sae_weights\.safetensors is missing"):
        read_autoencoder(autoencoder)
