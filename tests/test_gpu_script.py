"""`benchmarks/gpu.sh` runs here on tiny models, without most of cratelm's packages, as it would on a machine with a GPU."""

import ast
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.models import build
from cratelm.tokens.shards import TokenStore
from cratelm.train.losses import NextTokenLoss

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
pytestmark = pytest.mark.timeout(900)  # the one run of the script takes minutes on a busy machine
BLOCKED = [
    "pyarrow",
    "scipy",
    "matplotlib",
    "tyro",
    "zstandard",
    "datasketch",
    "cachetools",
    "pandas",
    "sklearn",
]


@pytest.fixture(scope="module")
def gpu():
    """The modules of the script, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = [p.stem for p in FOLDER.glob("gpu*.py")]
        yield SimpleNamespace(**{n: importlib.import_module(n) for n in names})
        for name in (*names, "common", "plain_crate", "train_step", "harvest"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def token_file(gpu, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    gpu.gpu_tokens.write(tiny_run.copied(folder / "run"), folder / "tokens.safetensors")
    return folder / "tokens.safetensors"


@pytest.fixture(scope="module")
def finished(token_file, tmp_path_factory) -> SimpleNamespace:
    """The script run once, where the blocked packages can be neither imported nor found."""
    folder = tmp_path_factory.mktemp("gpu")
    lines = [f"sys.modules[{name!r}] = None" for name in BLOCKED]
    (folder / "sitecustomize.py").write_text("\n".join(["import sys", *lines]), encoding="utf-8")
    out = folder / "out"
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "PYTHONPATH": str(folder),
        "PYTHON": sys.executable,
        "OUT": str(out),
    }
    words = ["--device", "cpu", "--tiny", "--minutes", "40", "--twins", "1l", "--tokens"]
    command = ["bash", str(FOLDER / "gpu.sh"), *words, str(token_file)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=folder
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return SimpleNamespace(done=done, out=out, results=results, environment=environment)


def test_every_part_finishes(finished):
    assert finished.done.returncode == 0, finished.done
    parts = finished.results["parts"]
    assert {name: p["status"] for name, p in parts.items()} == dict.fromkeys(
        ("machine", "parity", "training", "harvest", "twins"), "finished"
    )
    assert parts["machine"]["figures"]["versions"]["torch"] == torch.__version__
    assert "--device cpu --tiny" in finished.results["command"]
    parity = parts["parity"]["figures"]
    assert len(parity) == 15
    assert all(r["agrees"] for r in parity.values())
    training = parts["training"]["figures"]
    for name in ("crate-1l, eager", "crate-1l, compiled", "gpt2-1l, eager"):
        assert training[name]["tokens_per_s"] > 0
        assert 0 < training[name]["mfu"] < 10
    for how in ("eager", "compiled"):
        assert 0 < parts["harvest"]["figures"][how]["fraction"] < 1


def test_the_results_are_on_one_screen(finished):
    lines = finished.done.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 200
    for text in (
        "all 15 comparisons agree",
        "crate-1l, compiled",
        "(target 0.5: ",
        "crate-2l compiled",
        "(target 0.8: ",
        "carried tokens",
        "gpt2-1l",
        "4 files",
    ):
        assert text in finished.done.stdout
    assert finished.done.stderr == ""


def test_twins_see_the_same_tokens_in_the_same_steps(finished):
    twins = finished.results["parts"]["twins"]["figures"]
    assert twins["tokens"]["kind"] == "carried"
    same = ("steps", "tokens", "batch_size", "sequence_length", "optimizer", "learning_rate")
    assert [twins["crate-1l"][k] for k in same] == [twins["gpt2-1l"][k] for k in same]
    text = (finished.out / "curves.jsonl").read_text(encoding="utf-8")
    curves = [json.loads(line) for line in text.splitlines()]
    points = [
        [(c["step"], c["tokens"], *sorted(c.keys() - {"model"})) for c in curves if c["model"] == m]
        for m in ("crate-1l", "gpt2-1l")
    ]
    assert points[0] == points[1]
    assert [p[0] for p in points[0] if "loss" in p] == [1, 2, 3, 4]
    assert all(np.isfinite(c.get("loss", c.get("validation_loss"))) for c in curves)


@pytest.mark.parametrize("name", ["crate-1l", "gpt2-1l"])
def test_the_weights_are_those_that_were_trained(finished, gpu, token_file, name):
    """The loss of what is unpacked is that of the last validation, which differs from that of the initial weights."""
    model = gpu.gpu_weights.load([finished.out / "weights" / f"{name}.safetensors"])
    split = gpu.gpu_tokens.read(token_file).held_out
    losses = []
    for index in np.linspace(0, split.n_sequences(16) - 1, 4).astype(int):
        row = torch.from_numpy(split.sequence(int(index), 16))
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        losses.append(float(F.cross_entropy(logits, row[1:])))
    record = finished.results["parts"]["twins"]["figures"][name]
    assert np.mean(losses) == pytest.approx(record["validation_loss"], abs=0.02)
    text = (finished.out / "curves.jsonl").read_text(encoding="utf-8")
    first = next(c for c in map(json.loads, text.splitlines()) if c["model"] == name)
    assert abs(first["validation_loss"] - record["validation_loss"]) > 0.1


def test_nothing_else_is_imported(finished):
    """In the environment of the run above the packages really are not there, for any way of asking."""
    code = f"import importlib.util as u; print([n for n in {BLOCKED} if u.find_spec(n)])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=finished.environment,
    )
    assert found.stdout.strip() == "[]"


def imported_at_once(path: Path) -> set[str]:
    """Names that a module imports when it is imported: not in functions, and not for type checkers alone."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef):
            nodes += [
                c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt | ast.excepthandler)
            ]
    return names


def test_modules_of_the_script_reach_no_other_package():
    """The same by reading the code, which names the module that would import one."""

    def file_of(name: str) -> Path | None:
        for base, parts in ((ROOT / "src", name.split(".")), (FOLDER, name.split("."))):
            for path in (
                base.joinpath(*parts).with_suffix(".py"),
                base.joinpath(*parts, "__init__.py"),
            ):
                if path.is_file():
                    return path
        return None

    waiting, seen, found = {p.stem for p in FOLDER.glob("gpu*.py")}, set(), set()
    while waiting:
        name = waiting.pop()
        path = file_of(name)
        if path is None or name in seen:
            continue
        seen.add(name)
        imported = imported_at_once(path)
        found |= {f"{name} imports {i}" for i in imported if i.split(".")[0] in BLOCKED}
        waiting |= imported | {name.rpartition(".")[0]}
    assert {"cratelm.models.crate", "cratelm.train.losses", "train_step", "harvest"} <= seen
    assert not found


def test_the_loss_without_the_chunked_form(monkeypatch):
    """torch before 2.13 lacks it: the module is read once more, as it would be there."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    monkeypatch.delattr(F, "linear_cross_entropy")
    spec = importlib.util.find_spec("cratelm.train.head_loss")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.LinearCrossEntropyOptions is None
    monkeypatch.setattr("cratelm.train.losses.head_loss", older.head_loss)
    model = build("crate-1l", vocab_size=100, max_position_embeddings=8)
    rows = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = NextTokenLoss(model)
    with torch.no_grad():
        expected = F.cross_entropy(
            model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        each = loss(rows[:, :-1], rows[:, 1:], mean=False)
        mean = loss(rows[:, :-1], rows[:, 1:])
    assert torch.allclose(each, expected.view(2, 8))
    assert torch.allclose(mean, expected.mean())


PARTS = {
    "slow": "import time; figures.record('first', 1); time.sleep(60)",
    "raising": "figures.record('first', 1); raise ValueError('what was wrong')",
    "dying": "import os; figures.record('first', 1); os.kill(os.getpid(), 9)",
    "broken": "figures.record('first', 1)\nimport nowhere_to_be_found",
    "sound": "figures.record('first', 1)",
}
STATUS = {
    "slow": "stopped at its time limit of 2 s",
    "raising": "failed: ValueError: what was wrong",
    "dying": "failed: killed by signal 9",
    "broken": "failed: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "sound": "finished",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_leaves_its_figures_and_a_reason(gpu, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = PARTS[name].replace("\n", "\n    ")
    code = f"def measure(options, figures):\n    {lines}\n"
    (tmp_path / f"gpu_{name}.py").write_text(code, encoding="utf-8")
    start = time.monotonic()
    record = gpu.gpu.run_part(name, None, tmp_path, "fork", 2)
    assert time.monotonic() - start < 20
    assert record["status"] == STATUS[name]
    assert record["figures"] == {"first": 1}
    results = {"seconds": 1.0, "options": {"tiny": "False"}}
    results["parts"] = {"machine": {"status": "finished", "figures": {}}, "training": record}
    assert gpu.gpu_screen.all_is_well(results) == (name == "sound")
    screen = gpu.gpu_screen.screen({**results}, tmp_path)
    assert (f"FAILED: the part training {STATUS[name]}" in screen) == (name != "sound")


def test_an_interrupted_script_leaves_no_part_running(gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "import os, time\ndef measure(o, figures):\n    figures.record('pid', os.getpid())\n    time.sleep(60)"
    (tmp_path / "gpu_waiting.py").write_text(code, encoding="utf-8")

    def interrupt(*_):
        if (tmp_path / "waiting.json").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.gpu.run_part("waiting", None, tmp_path, "fork", 30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pid = json.loads((tmp_path / "waiting.json").read_text(encoding="utf-8"))["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_later_parts_run_after_one_that_failed(gpu, tmp_path, monkeypatch):
    asked = []

    def run_part(name, options, folder, start, seconds):
        asked.append((name, start, round(options.left()), round(seconds)))
        failed = name == "parity" or (name == "machine" and start == "fork")
        return {"status": "failed: it" if failed else "finished", "seconds": 0, "figures": {}}

    monkeypatch.setattr(gpu.gpu, "run_part", run_part)
    monkeypatch.setattr(sys, "platform", "linux")
    words = ["--parts", "twins", "parity", "--minutes", "9"]
    results = gpu.gpu.run_parts(gpu.gpu.options_of(words), tmp_path)
    # the machine is tried again in a process that is not forked; the twins get all time that is left
    assert asked == [
        ("machine", "fork", 27, 30),
        ("machine", "spawn", 27, 30),
        ("parity", "spawn", 77, 80),
        ("twins", "spawn", 527, 530),
    ]
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert sum(gpu.gpu.SECONDS.values()) <= 530


def test_a_gradient_that_differs_is_seen(gpu):
    parity, screen = gpu.gpu_parity, gpu.gpu_screen
    reference = (2.0, {"a": torch.ones(4), "b": torch.ones(4)})
    limits = parity.Limits(1e-3, 1e-2)
    for loss, change, agrees in (
        (2.0, 0.0, True),
        (2.001, 0.005, True),
        (2.01, 0.0, False),
        (2.0, 0.05, False),
        (2.0, float("nan"), False),
        (float("nan"), 0.0, False),
    ):
        found = (loss, {"a": torch.ones(4), "b": torch.ones(4) + change})
        record = parity.compared(found, reference, limits)
        assert record["agrees"] == agrees
        results = {
            "seconds": 1.0,
            "options": {"tiny": "False"},
            "parts": {
                "machine": {"status": "finished", "figures": {}},
                "parity": {
                    "status": "finished",
                    "seconds": 1,
                    "figures": {"this one, fp32": record},
                },
            },
        }
        assert screen.all_is_well(results) == agrees
        printed = screen.screen(results, Path("nowhere"))
        assert ("DISAGREES WITH THE CPU: this one, fp32" in printed) == (not agrees)
    assert parity.compared(found, reference, limits)["worst_weight"] == "a"


def test_the_largest_batch_that_fits_is_measured(gpu, tmp_path, monkeypatch):
    """One variant fits with 8 sequences, one with none, one fails, and the others are measured all the same."""
    training, tried = gpu.gpu_training, []

    def bare_step(name, options, *, plain):
        tried.append((name, options.batch, options.compile, plain))
        if name.startswith("gpt2") and options.compile:
            raise ValueError("no compiler")
        largest = 0 if plain and options.compile else 8
        if options.batch > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda count: count * options.batch * (0.02 if plain else 0.01)

    monkeypatch.setattr(training, "bare_step", bare_step)
    monkeypatch.setattr(training, "useful_flops", lambda *a: 5e9)
    monkeypatch.setattr(training, "matrix_rate", lambda *a: 1e12)
    monkeypatch.setattr(training, "free_memory", lambda device: None)
    options = gpu.gpu_part.PartOptions("cpu", False, tmp_path, time.monotonic() + 60)
    figures = gpu.gpu_part.Figures(tmp_path / "training.json")
    training.measure(options, figures)
    found = json.loads(figures.path.read_text(encoding="utf-8"))
    assert found["crate-12l, eager"]["batch"] == 8
    assert found["crate-12l, eager"]["tokens_per_s"] == pytest.approx(102_400)
    assert found["crate-12l, eager"]["mfu"] == pytest.approx(0.5)
    assert [t[1] for t in tried if t[0] == "crate-12l" and not t[2] and not t[3]] == [32, 16, 8]
    assert [t[1] for t in tried if t[2] and not t[3] and t[0] == "crate-12l"] == [8]
    assert [t[1] for t in tried if t[2] and t[3]] == [8, 4, 2, 1]
    assert found["gpt2-12l, compiled"] == {"error": "ValueError: no compiler"}
    assert "out of memory" in found["crate-12l, five products, compiled"]["error"]
    assert found["four products, eager"]["times_as_fast_as_five"] == pytest.approx(2)
    assert "four products, compiled" not in found


def test_twins_halve_the_micro_batch_that_does_not_fit(gpu):
    calls = []

    class Fake:
        micro, recipe = 32, "recipe"
        accelerator = SimpleNamespace(device=torch.device("cpu"))

        def step(self, number):
            calls.append((number, self.micro))
            if self.micro > 8:
                raise RuntimeError("CUDA out of memory")
            return torch.zeros(()), None, 0.0

        def restart(self, recipe):
            assert recipe == "recipe"

    fake = Fake()
    assert gpu.gpu_twins.Training.seconds_per_step(fake, 2) > 0
    assert calls == [(0, 32), (0, 16), (0, 8), (1, 8), (2, 8)]


def test_the_compiled_harvest_is_that_of_the_eager_one_in_two_graphs(gpu):
    """More graphs would be compiled in the middle of the measurement."""
    harvest, graphs = gpu.gpu_harvest, []
    setting = SimpleNamespace(
        device="cpu", dtype="float32", kind="torch", sequence_length=32, batch_tokens=64, tokens=128
    )

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager = harvest.Setting("crate-2l", setting)
    compiled = harvest.CompiledSetting("crate-2l", setting, backend)
    batches = list(eager.plan.batches(64, eager.device))
    for batch in batches:  # turns, as in the measurement
        eager.harvest([batch])
        compiled.forward([batch])
        compiled.harvest([batch])
    assert len(batches) == 2
    assert len(graphs) == 2
    for mine, theirs in zip(compiled.layers, eager.layers, strict=True):
        assert mine.n_tokens == theirs.n_tokens > 120
        assert torch.equal(mine.maximum, theirs.maximum)
        assert torch.equal(mine.histogram, theirs.histogram)


def test_a_file_of_tokens_has_those_of_the_run(gpu, tmp_path):
    tokens = gpu.gpu_tokens
    run = tiny_run.copied(tmp_path / "run")
    store = TokenStore(run / "tokens")
    train, held_out = store.split("train"), store.split("held_out")
    tokens.main([str(run), str(tmp_path / "all.safetensors")])
    everything = tokens.read(tmp_path / "all.safetensors")
    assert everything.rows == store.padded_vocab_size
    for mine, theirs in ((everything.train, train), (everything.held_out, held_out)):
        last = theirs.n_sequences(16) - 1
        assert mine.n_tokens == theirs.n_tokens
        assert mine.n_sequences(16) == last + 1
        assert np.array_equal(mine.sequence(last, 16), theirs.sequence(last, 16))
    limit = (4096 + train.n_tokens) / 1e6  # room for half of the tokens
    tokens.write(run, tmp_path / "some.safetensors", limit)
    assert (tmp_path / "some.safetensors").stat().st_size <= limit * 1e6
    some = tokens.read(tmp_path / "some.safetensors")
    assert 0 < some.held_out.n_tokens <= train.n_tokens // 2 // 16
    assert 0.3 * train.n_tokens < some.train.n_tokens < 0.5 * train.n_tokens


def test_blocks_are_spread_over_a_split(gpu, monkeypatch):
    monkeypatch.setattr(gpu.gpu_tokens, "BLOCK", 10)
    split = SimpleNamespace(n_tokens=1000, read=lambda a, b: np.arange(a, b))
    taken = gpu.gpu_tokens.evenly(split, 35)
    assert taken.tolist() == [*range(10), *range(495, 505), *range(990, 1000)]


def test_other_files_are_refused_in_one_line(gpu, tmp_path, monkeypatch, capsys):
    tokens = gpu.gpu_tokens
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tokens")
    with pytest.raises(InputError, match=r"is not a file of tokens .* make one with"):
        tokens.read(bad)
    with pytest.raises(InputError, match="is not a file of tokens"):
        tokens.read(tmp_path / "missing")
    arrays = {name: np.array([1, 70], np.uint16) for name in ("train", "held_out")}
    tokens.save_file(arrays, bad, {"rows": "64"})
    with pytest.raises(InputError, match="it has token 70, but a vocabulary of 64"):
        tokens.read(bad)
    monkeypatch.setattr(tokens, "LARGEST_VOCABULARY", 64)
    with pytest.raises(SystemExit) as stopped:
        tokens.main([str(tiny_run.copied(tmp_path / "run")), str(tmp_path / "new.safetensors")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "new.safetensors").exists()
    for words in (["--tokens", str(tmp_path / "missing")], ["--minutes", "0"], ["--parts", "all"]):
        with pytest.raises(SystemExit) as stopped:
            gpu.gpu.options_of(words)
        assert stopped.value.code == 2


def test_generated_tokens_resemble_text(gpu):
    """Few tokens are frequent, and the token before says more than frequency alone."""
    made = gpu.gpu_tokens.generate(200_000, 320)
    assert made.origin["kind"] == "generated"
    assert made.train.n_tokens + made.held_out.n_tokens == 200_000
    tokens = made.train.sequence(0, made.train.n_tokens - 1)
    assert 0 <= tokens.min() <= tokens.max() < 320
    assert 0.0003 < (tokens == 0).mean() < 0.003
    counts = np.bincount(tokens, minlength=320) / len(tokens)
    pairs = np.bincount(tokens[:-1] * 320 + tokens[1:]) / (len(tokens) - 1)
    entropy, joint = (-(p[p > 0] * np.log(p[p > 0])).sum() for p in (counts, pairs))
    assert entropy < 0.9 * np.log(320)
    assert joint - entropy < 0.85 * entropy


@pytest.mark.parametrize("name", ["crate-2l", "gpt2-1l"])
def test_weights_are_split_into_small_files(gpu, tmp_path, monkeypatch, name):
    weights = gpu.gpu_weights
    monkeypatch.setattr(weights, "HEADER_BYTES", 8_000)
    monkeypatch.setattr(weights, "FILE_BYTES", 200_000)
    model = build(name, vocab_size=300, max_position_embeddings=16)
    paths = weights.save(model, tmp_path, name, {})
    assert len(paths) > 1
    assert all(p.stat().st_size < 200_000 for p in paths)
    assert sum(p.stat().st_size for p in paths) <= weights.size_of(model)
    loaded = weights.load(paths)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.bfloat16().float()), key
    with pytest.raises(InputError, match="name all files of the model"):
        weights.load(paths[1:])
    weights.main([*map(str, paths), str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "model.safetensors").is_file()
    monkeypatch.setattr(weights, "FILE_BYTES", 50_000)
    with pytest.raises(ValueError, match="more than one file"):
        weights.save(model, tmp_path, name, {})


def test_weights_that_would_be_too_many_are_not_written(gpu, tmp_path, monkeypatch):
    twins = gpu.gpu_twins
    model = build("crate-1l", vocab_size=300, max_position_embeddings=16)
    training = SimpleNamespace(bare=model, name="crate-1l", recipe=SimpleNamespace(steps=1))
    options = gpu.gpu_part.PartOptions("cpu", False, tmp_path, 0.0)
    figures = SimpleNamespace(values={"tokens": {}})
    size = gpu.gpu_weights.size_of(model)
    monkeypatch.setattr(twins, "WEIGHT_BYTES", 2 * size)
    assert twins.weights(training, options, figures, size + 1) == ([], 0)
    names, n_bytes = twins.weights(training, options, figures, size)
    assert names == ["weights/crate-1l.safetensors"]
    assert n_bytes == (tmp_path / names[0]).stat().st_size
