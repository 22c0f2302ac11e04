"""Every benchmark runs: what they measure is not checked here, that a change of the library breaks them is."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "effects": "--sizes crate-2l --neurons 1 --tokens 64 --length 32 --vocabulary 300 --turns 1",
    "explain_score": f"--neurons 1 --tokens 2000 --turns 1 --against {FOLDER.parent}",
    "harvest": "--sizes crate-2l --tokens 512 --sequence-length 64 --batch-tokens 128 --turns 2",
    "harvest, merge": "--sizes crate-2l --tokens 512 --sequence-length 64 --batch-tokens 128 --merge 2",
    "harvest, sort": "--sort --sort-tokens 3000 --sort-neurons 2 --layer-neurons 8",
    "large_scores": "--layers 1 --neurons 3 --source 2 --tokens 20000",
    "ledger": "--requests 40 --window 16 --turns 1",
    "long_document": "--megabytes 0.5 --kinds words",
    "sae": "--architectures topk --expansion 1 --batch-size 64 --steps 2 --repeats 1 --tokens 20000",
    "tokenize_throughput": "--corpus CORPUS --repeats 1",
    "loss": "--vocab-size 300 2000 --width 16 --rows 64 --chunks 8 --repeats 1",
    "tokenize_workers": "--megabytes 1 --files 2 --workers 1 --vocab-size 400",
    "verify": "--sizes crate-2l --neurons 3 --vocab 300 --repeats 1",
    "train_step": "--models crate-2l --vocab-size 300 310 --length 32 --batch 2 --repeats 1 --steps 1",
}

GPU_MODULES = [
    "harvest",
    "machine",
    "parity",
    "part",
    "screen",
    "tokens",
    "training",
    "twins",
    "weights",
]
"""of `gpu.sh`, which tests/test_gpu_script.py runs"""


def run(name: str, arguments: list[str], capsys, monkeypatch) -> str:
    """What a benchmark prints. Its file is run as a module; the folder is where it finds `common`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    name = name.partition(",")[0]
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.main(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_it_runs(name, tmp_path, capsys, monkeypatch):
    if name == "sae":
        pytest.importorskip("sae_lens", reason="the extra sae is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        text = " ".join(f"word{number * k}" for k in range(200))
        (corpus / f"{number}.txt").write_text(text, encoding="utf-8")
    arguments = TINY[name].replace("CORPUS", str(corpus)).split()
    assert any(c.isdigit() for c in run(name, arguments, capsys, monkeypatch))


def test_the_browser_of_a_large_run(viewer_run, tmp_path, capsys, monkeypatch):
    large = tmp_path / "large"
    arguments = [str(viewer_run), str(large), "--layers", "3", "--neurons", "70"]
    run("large_run", arguments, capsys, monkeypatch)
    printed = run("viewer", [str(large), "--turns", "2"], capsys, monkeypatch)
    for line in ("open, to the first overview", "index and maps", "neuron ", "compare neurons"):
        assert line in printed
    printed = run(
        "viewer", [str(viewer_run), "--live", "crate-2l", "--turns", "2"], capsys, monkeypatch
    )
    assert "activations, ten clients" in printed


def test_simulating_with_a_local_model(viewer_run, tmp_path, capsys, monkeypatch):
    from test_llm_local import save

    model = save(tmp_path / "tiny-llama")
    arguments = f"--run {viewer_run} --simulator {model} --dtype float32 --neurons 1 --rounds 1"
    printed = run("simulate", arguments.split(), capsys, monkeypatch)
    assert float(printed.split("largest difference")[1].split()[0]) < 1e-3


def test_all_are_here():
    named = {name.partition(",")[0] for name in TINY} | {
        "large_run",
        "viewer",
        "simulate",
        "common",
        "gpu",
        *(f"gpu_{name}" for name in GPU_MODULES),
    }
    assert named == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_nothing_private_of_the_library_is_used(path):
    """Names with an underscore may change without a word."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cratelm")
        for alias in node.names
    ]
    attributes = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert not [n for n in (*imported, *attributes) if n.startswith("_") and not n.startswith("__")]
