"""Every benchmark runs: what they measure is not checked here, that a change of the library breaks them is."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_run import copied

from cratelm.cli import main

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "analyze": "--layers 3 --width 64 --inner 24 --tokens 300 --length 64 --vocabulary 300 --neurons 2 --turns 1",
    "decoding": "--sizes 2l --positions 12 --vocab-size 300 --turns 1",
    "effects": "--sizes crate-2l --neurons 1 --tokens 64 --length 32 --vocabulary 300 --turns 1",
    "explain_score": f"--neurons 1 --tokens 2000 --turns 1 --against {FOLDER.parent}",
    "harvest": "--sizes crate-2l --tokens 512 --sequence-length 64 --batch-tokens 128 --turns 2",
    "harvest, merge": "--sizes crate-2l --tokens 512 --sequence-length 64 --batch-tokens 128 --merge 2",
    "harvest, sort": "--sort --sort-tokens 3000 --sort-neurons 2 --layer-neurons 8",
    "large_scores": "--layers 1 --neurons 3 --source 2 --tokens 20000",
    "ledger": "--requests 40 --window 16 --turns 1",
    "long_document": "--megabytes 0.5 --kinds words",
    "optimizers": "--corpus CORPUS --models crate-1l --steps 2 --batch 2 --length 32 --validation 2 --vocab-size 300 --fractions 0.5",
    "sae": "--architectures topk --expansion 1 --batch-size 64 --steps 2 --repeats 1 --tokens 20000",
    "seeds": "--sizes crate-2l --tokens 300 --length 64 --vocabulary 300 --neurons 2 --turns 1",
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
    """What a benchmark prints. Its file is run as a module."""
    loaded(name, monkeypatch).main(arguments)
    return capsys.readouterr().out


def loaded(name: str, monkeypatch) -> Any:
    """The module of a benchmark; the folder is where it finds `common`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    name = name.partition(",")[0]
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


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


def test_estimates_against_all_tokens(viewer_run, capsys, monkeypatch):
    printed = run("estimate", ["--run", str(viewer_run), "--per-bin", "5"], capsys, monkeypatch)
    assert printed.count("neurons estimated; mean") == 3


def test_simulating_with_a_local_model(viewer_run, tmp_path, capsys, monkeypatch):
    from test_llm_local import save

    model = save(tmp_path / "tiny-llama")
    arguments = f"--run {viewer_run} --simulator {model} --dtype float32 --neurons 1 --rounds 1"
    printed = run("simulate", arguments.split(), capsys, monkeypatch)
    assert float(printed.split("largest difference")[1].split()[0]) < 1e-3


def test_what_measures_cost(tmp_path, capsys, monkeypatch):
    arguments = f"--run {copied(tmp_path)} --turns 1"
    printed = run("measures", arguments.split(), capsys, monkeypatch)
    assert printed.count(" times (") == len(loaded("measures", monkeypatch).WITH)


def test_running_on_explanations(tmp_path, capsys, monkeypatch):
    arguments = f"--run {copied(tmp_path)} --models crate-2l --fit-tokens 600 --tokens 300"
    printed = run("replace", arguments.split(), capsys, monkeypatch)
    assert printed.count("times the plain passes") == 1


def test_how_tries_grow(tmp_path, capsys, monkeypatch):
    arguments = (
        f"--run {copied(tmp_path)} --models crate-2l --fit-tokens 600 --tokens 300 --entries 3 9"
    )
    printed = run("trie_growth", arguments.split(), capsys, monkeypatch)
    assert printed.count("entries per neuron: squared error ") == 2


def test_a_small_harvest_against_keeping_and_sorting(tmp_path, capsys, monkeypatch):
    """Both sides find the same highest activation of each neuron.

    They run in this process, because two new ones would import for ten seconds.
    """
    path, highest = copied(tmp_path), {}
    benchmark = loaded("small_harvest", monkeypatch)
    assert benchmark.seconds_of([sys.executable, "-c", "sum(range(10**6))"])[1] > 0
    with pytest.raises(SystemExit, match="failed: oh no"):
        benchmark.seconds_of([sys.executable, "-c", "import sys; sys.exit('oh no')"])

    def seconds_of(command):
        if command[1] == "-m":
            assert main(command[3:]) == 0
            file, side = path / "activations" / benchmark.NAME / "excerpts-fit.parquet", "cratelm"
        else:
            loaded("keep_and_sort", monkeypatch).main(command[2:])
            file, side = Path(command[-1]) / "excerpts-fit.parquet", "plain"
        best = highest.setdefault(side, {})
        for row in pq.read_table(file).to_pylist():
            neuron = row["layer"], row["index"]
            best[neuron] = max(best.get(neuron, 0.0), *row["activations"])
        return (6.0, 4.0) if side == "cratelm" else (2.0, 8.0)

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    arguments = f"--run {path} --models crate-2l --tokens 1000 --repeats 1"
    benchmark.main(arguments.split())
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert (result["wall_ratio"], result["cpu_ratio"]) == (3.0, 0.5)
    assert result["ratios"] == [3.0]
    assert highest["cratelm"] == pytest.approx(highest["plain"], rel=1e-5)
    assert len(highest["plain"]) == 64
    assert not (path / "activations" / benchmark.NAME).exists()


def test_all_are_here():
    named = {name.partition(",")[0] for name in TINY} | {
        "large_run",
        "measures",
        "replace",
        "trie_growth",
        "viewer",
        "simulate",
        "estimate",
        "common",
        "small_harvest",
        "keep_and_sort",
        "bench",
        "demo",
        "plain_crate",
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


def test_the_page_is_that_of_the_figures(monkeypatch):
    """Else type `python benchmarks/bench.py --page`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench")
    results = json.loads(bench.FILE.read_text(encoding="utf-8"))
    assert bench.PAGE.read_text(encoding="utf-8") == bench.page(results)


def test_a_row_says_what_was_measured_and_whether_that_is_enough(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench")
    machine = {"cpu": "a processor", "cores": 2, "python": "3.11", "torch": "2.13"}
    command = bench.ROWS["harvest-sort"].command

    def row_of(figures, **more):
        done = {"command": command, "figures": figures, **more}
        page = bench.page({"machine": machine, "commands": {command: done}})
        return next(line for line in page.splitlines() if line.endswith(f"| `{command}` |"))

    assert "| at least 20 | 21.00 | yes |" in row_of([{"ratio": 21.0}])
    assert "| at least 20 | 19.00 | no |" in row_of([{"ratio": 19.0}])
    assert "| not reached | no |" in row_of([{"ratio": None}])
    assert "| not measured (exit status 1) |  |" in row_of([], failed="exit status 1")
    values = bench.Value("V 4,096", [1.5, 1.0, 2.0])
    assert values.shown("") == "V 4,096: 1.50 (1.00 to 2.00)"
    assert not bench.ROWS["decoding"].is_met(values)


def test_a_benchmark_that_fails_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench")
    script = tmp_path / "x.py"
    script.write_text("print('words')\nprint('figures {\"ratio\": 2}')\n")
    assert bench.measured(str(script))["figures"] == [{"ratio": 2}]
    script.write_text("print('figures {\"ratio\": 2}')\nraise SystemExit(3)\n")
    assert bench.measured(str(script))["failed"] == "exit status 3"
