"""One rule opens a model: the same options in every verb, code from elsewhere only on request, commits pinned."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cratelm
from cratelm.activations.open_harvest import open_harvested
from cratelm.cli import VERBS, config_class, main
from cratelm.errors import InputError
from cratelm.models.open import find_model, folder_identity
from cratelm.models.sizes import load
from cratelm.runs import Run, options_of
from cratelm.runs.model_options import HarvestedModelOptions, SourceOptions
from cratelm.viewer.config import ViewConfig

SOURCE = Path(cratelm.__file__).parent
OPTIONS = {"device", "dtype", "revision", "trust_remote_code"}
OPENS_NO_MODEL = {
    "demo", "tokenize", "train", "explain", "report", "check", "sae compare", "import authors",
    "import sae", "import sparse-gpt", "import records", "export records", "export neuronpedia",
    "tune", "probe", "study",
}  # fmt: skip
"""verbs that open no model from elsewhere: they read results, or models that they train themselves"""
FEW: dict[str, Any] = {"tokens": 600, "pilot_tokens": 64, "top": 4, "random": 4, "per_bin": 2, "context": 4, "sequence_length": 32}  # fmt: skip
CODE = """
from transformers import GPT2Config, GPT2LMHeadModel


class OddConfig(GPT2Config):
    model_type = "odd"


class OddForCausalLM(GPT2LMHeadModel):
    config_class = OddConfig
"""


@pytest.mark.parametrize("verb", sorted(set(VERBS) - OPENS_NO_MODEL))
def test_every_verb_that_opens_a_model_has_the_same_options(verb):
    config = config_class(verb)
    fields = {field.name for field in dataclasses.fields(config)}
    if verb == "export model":  # a folder, whose weights it copies
        assert {"dtype", "trust_remote_code"} <= fields
        return
    if verb == "merge harvest":  # the precision is that of the parts
        assert fields >= OPTIONS - {"dtype"}
    else:
        assert fields >= OPTIONS
    assert issubclass(config, SourceOptions)
    assert {f.name: f.default for f in dataclasses.fields(config)}["trust_remote_code"] is False


def test_every_call_that_opens_a_model_hands_the_options_on():
    """A call without them would open the newest commit, and refuse code that the user trusts."""
    found = 0
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", "")
            if isinstance(node, ast.Call) and name in (
                "find_model",
                "open_model",
                "open_harvested",
            ):
                found += 1
                assert len(node.args) == 3, f"{path}:{node.lineno}: {ast.unparse(node)}"
    assert found > 12


# ---- code that comes with a model ---------------------------------------------------------------------


def write_odd(folder: Path, code: str = CODE, reference: str = "modeling_odd.OddForCausalLM"):
    """A model that transformers does not have."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=312, n_embd=32, n_layer=2, n_head=2, n_positions=64))  # fmt: skip
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": reference}
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "odd", "auto_map": auto_map}))  # fmt: skip
    (folder / "modeling_odd.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    (folder / "corpus").mkdir()
    for number in range(60):
        text = " ".join(f"word{(number * 7 + i * i) % 23} and" for i in range(40))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    cratelm.api.tokenize(run=folder / "run", corpus=str(folder / "corpus"), vocab_size=312, fit=0.3, held_out=0.3, sequence_length=16, quiet=True)  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def odd(run, tmp_path_factory):
    """The folder of the model, harvested as `odd`, with its tokenizer."""
    folder = write_odd(tmp_path_factory.mktemp("models") / "odd")
    shutil.copy(run / "tokens" / "tokenizer.json", folder)
    cratelm.api.harvest(run=run, model=str(folder), trust_remote_code=True, quiet=True, **FEW)
    cratelm.api.explain(run=run, model="odd", neurons=2, explainers=("lookup",), quiet=True)
    return folder


def test_code_is_refused_in_one_line_that_says_what_would_run(odd, run, capsys):
    ran = odd.parent / "ran"
    (odd / "modeling_odd.py").write_text(CODE + f"open({str(ran)!r}, 'w')\n")
    status = main(["harvest", "--run", str(run), "--model", str(odd), "--name", "other"])
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    for part in ("class OddForCausalLM of modeling_odd.py", "sha256 ", "--trust-remote-code", str(odd)):  # fmt: skip
        assert part in error
    with pytest.raises(InputError, match="add --trust-remote-code"):
        load(odd)
    assert not ran.exists()
    (odd / "modeling_odd.py").write_text(CODE)


def _calls(run, odd):
    """Every verb that opens the model in this run, without the option."""
    of_run = {"run": run, "model": "odd", "quiet": True}
    other = {"run": run, "quiet": True}
    return {
        "harvest": {"run": run, "model": str(odd), "name": "again", "quiet": True, **FEW},
        "evaluate": {**other, "path": str(odd)},
        "predict": {**other, "models": (str(odd),), "text": "word1 and word2"},
        "steer": {
            "run": run,
            "path": str(odd),
            "neurons": ("0:1",),
            "zero": True,
            "text": "word1 and",
            "generate": 1,
        },
        "score": of_run,
        "replace": {
            **of_run,
            "explainers": ("lookup",),
            "fit_tokens": 200,
            "tokens": 100,
            "neuron_tokens": 0,
            "curve_tokens": 0,
        },
        "effects": {**of_run, "only": ("0:1",), "tokens": 64, "positions": 2},
        "analyze": {**of_run, "tokens": 100},
        "export_model": {"path": odd, "out": run.parent / "exported"},
    }


@pytest.mark.parametrize("verb", ["harvest", "evaluate", "predict", "steer", "score", "replace", "effects", "analyze", "export_model"])  # fmt: skip
def test_every_verb_runs_code_only_with_the_option(verb, run, odd, capsys):
    options = _calls(run, odd)[verb]
    with pytest.raises(
        InputError, match=r"OddForCausalLM of modeling_odd.py .*--trust-remote-code"
    ):
        getattr(cratelm.api, verb)(**options)
    getattr(cratelm.api, verb)(**options, trust_remote_code=True)
    assert "runs class OddForCausalLM of modeling_odd.py" in capsys.readouterr().err


def test_the_live_page_runs_code_only_with_the_option(run, odd):
    pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
    from cratelm.viewer.live import Live
    from cratelm.viewer.run_reader import Library

    library = Library([run])
    with pytest.raises(InputError, match="--trust-remote-code"):
        Live(library, ViewConfig(runs=(run,))).opened(run.name, "odd")
    context, _ = Live(library, ViewConfig(runs=(run,), trust_remote_code=True)).opened(run.name, "odd")  # fmt: skip
    assert type(context.subject.model).__name__ == "OddForCausalLM"


def test_changed_code_is_another_model(run, odd, tmp_path):
    """The record names the code by its hash: a harvest is not read with other code."""
    before = folder_identity(odd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path))
        (odd / "modeling_odd.py").write_text(CODE + "\n# changed\n")
        assert folder_identity(odd) != before
        with pytest.raises(InputError, match="no longer has the model that was harvested"):
            open_harvested(Run(run), "odd", HarvestedModelOptions(trust_remote_code=True))
        (odd / "modeling_odd.py").write_text(CODE)
    assert folder_identity(odd) == before


def test_the_command_of_a_stage_has_the_option(run, odd):
    assert "--trust-remote-code" in Run(run).stage("activations", "odd").command()
    record = Run(run).stage("activations", "odd").completion()
    assert record is not None
    assert "trust_remote_code" not in record.config


def test_code_beside_a_model_that_transformers_has_is_not_run(tmp_path, capsys):
    """An exported CRATE brings its code, too, for those without cratelm."""
    from cratelm.interop.model_folder import save_model
    from cratelm.models import build

    save_model(build("crate-1l", vocab_size=64, hidden_size=16, num_attention_heads=2), tmp_path)
    assert (tmp_path / "modeling_crate.py").is_file()
    for trusted in (False, True):
        model = load(tmp_path, trust_remote_code=trusted)
        assert type(model).__module__ == "cratelm.models.crate"
    assert "runs class" not in capsys.readouterr().err


def test_a_language_model_with_code_has_no_option(odd):
    from cratelm.llm.backends.transformers import LocalBackend

    with pytest.raises(InputError, match="name it as openai:MODEL") as error:
        LocalBackend(str(odd)).model  # noqa: B018 - loaded on first use
    assert "--trust-remote-code" not in str(error.value)


# ---- revisions ----------------------------------------------------------------------------------------

_OF_THE_HUB = """
import json, sys
import pytest
import cratelm
from cratelm.activations.open_harvest import open_harvested
from cratelm.errors import InputError
from cratelm.models.open import find_model
from cratelm.runs import Run
from cratelm.runs.model_options import HarvestedModelOptions, SourceOptions
run, few = sys.argv[1], json.loads(sys.argv[2])
one, two = "1" * 40, "2" * 40
# the newest is commit 2; a tag names commit 1
cratelm.api.harvest(run=run, model="me/odd", name="hub", revision="v1", trust_remote_code=True, quiet=True, **few)
record = Run(run).stage("activations", "hub").completion()
assert record.inputs["model"] == "hub:me/odd@" + one, record.inputs
opened = open_harvested(Run(run), "hub", HarvestedModelOptions(trust_remote_code=True))
assert opened.subject.revision == one
assert type(opened.subject.model).ORIGIN == "first"
newest = find_model(Run(run), "me/odd", SourceOptions(trust_remote_code=True)).load("cpu")
assert type(newest.model).ORIGIN == "second"
with pytest.raises(InputError, match=f"me/odd at commit {one}"):
    open_harvested(Run(run), "hub", HarvestedModelOptions())
with pytest.raises(InputError, match=f"--revision main is commit {two} of me/odd, but {one} was harvested"):
    open_harvested(Run(run), "hub", HarvestedModelOptions(revision="main", trust_remote_code=True))
both = cratelm.api.evaluate(run=run, models=("me/odd@v1", "me/odd"), trust_remote_code=True, quiet=True)
losses = [m.loss for m in both.measurements]
assert losses[0] != losses[1]
single = cratelm.api.evaluate(run=run, path="me/odd", revision="v1", trust_remote_code=True, quiet=True)
assert single.measurements[0].loss == losses[0]
with pytest.raises(InputError, match="give one revision"):
    find_model(Run(run), "me/odd@v1", SourceOptions(revision="main"))
with pytest.raises(InputError, match="v9"):
    cratelm.api.evaluate(run=run, path="me/odd", revision="v9", trust_remote_code=True, quiet=True)
# code that lies in another repository is pinned, too
other = find_model(Run(run), "me/lent", SourceOptions(trust_remote_code=True)).pinned()
assert other.identity == f"hub:me/lent+me/odd@{two}@" + "3" * 40, other.identity
print("all is well")
"""


def test_revisions_of_the_hub_and_their_code_are_pinned(run, tmp_path):
    hub = tmp_path / "hub"

    def write(name, commit, ref, origin, **options):
        cache = hub / f"models--me--{name}"
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / ref).write_text(commit)
        folder = cache / "snapshots" / commit
        write_odd(folder, CODE + f"    ORIGIN = '{origin}'\n", **options)
        if origin == "second":
            model = GPT2LMHeadModel.from_pretrained(folder)
            model.transformer.wte.weight.data *= 3
            content = (folder / "config.json").read_text()
            model.save_pretrained(folder)
            (folder / "config.json").write_text(content)

    write("odd", "1" * 40, "v1", "first")
    write("odd", "2" * 40, "main", "second")
    write("lent", "3" * 40, "main", "first", reference="me/odd--modeling_odd.OddForCausalLM")
    done = subprocess.run(
        [sys.executable, "-c", _OF_THE_HUB, str(run), json.dumps(FEW)],
        env={
            **os.environ,
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.endswith("all is well\n"), done.stderr[-3000:]


def test_a_revision_of_a_folder_is_refused(run, tmp_path):
    folder = tmp_path / "plain"
    GPT2LMHeadModel(GPT2Config(vocab_size=312, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)  # fmt: skip
    with pytest.raises(
        InputError, match=r"--revision is v1, but .*plain is in .*: omit --revision"
    ):
        find_model(Run(run), str(folder), SourceOptions(revision="v1"))


def test_commands_repeat_what_a_verb_needs_to_open_a_model():
    config = HarvestedModelOptions(revision="abc", trust_remote_code=True)
    assert options_of(config) == ("--revision", "abc", "--trust-remote-code")
    assert options_of(HarvestedModelOptions()) == ()


# ---- precision and device -----------------------------------------------------------------------------


def test_the_precision_is_that_of_the_harvest_unless_it_is_given(run, tmp_path):
    folder = tmp_path / "half"
    GPT2LMHeadModel(GPT2Config(vocab_size=312, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)  # fmt: skip
    cratelm.api.harvest(run=run, model=str(folder), dtype="bfloat16", quiet=True, **FEW)
    opened = open_harvested(Run(run), "half")
    assert opened.subject.model.dtype == torch.bfloat16
    opened = open_harvested(Run(run), "half", HarvestedModelOptions(dtype="float32"))
    assert opened.subject.model.dtype == torch.float32
    with pytest.raises(InputError, match="--device meta:9 cannot be used"):
        open_harvested(Run(run), "half", HarvestedModelOptions(device="meta:9"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autoencoders_take_the_options_of_the_model_too(run, odd, dtype):
    pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    common = {"run": run, "model": str(odd), "dtype": dtype, "quiet": True}
    train = {**common, "name": f"s-{dtype}", "expansion": 1, "tokens": 512, "batch_size": 128, "sequence_length": 32, "layers": (1,)}  # fmt: skip
    evaluate = {**common, "sae": f"s-{dtype}", "tokens": 200, "steered": 1, "steered_tokens": 64, "sequence_length": 32}  # fmt: skip
    for verb, options in (("sae_train", train), ("sae_evaluate", evaluate)):
        with pytest.raises(InputError, match="--trust-remote-code"):
            getattr(cratelm.api, verb)(**options)
        result = getattr(cratelm.api, verb)(**options, trust_remote_code=True)
        assert [layer.layer for layer in result.layers] == [1]
    harvest = {**common, **FEW, "sae": f"s-{dtype}", "trust_remote_code": True}
    assert len(cratelm.api.harvest(**harvest).neurons) == 1
    opened = open_harvested(Run(run), f"odd+s-{dtype}", HarvestedModelOptions(trust_remote_code=True))  # fmt: skip
    assert opened.site.layer_numbers == (1,)
    assert opened.subject.model.dtype == getattr(torch, dtype)
