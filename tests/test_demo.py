"""The whole line on a very small scale: from text to report, and killed on the way."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import FORKED
from undrawn import leave_out_drawing

from cratelm.cli import main
from cratelm.runs import Run

WORDS = [
    "stone",
    "river",
    "light",
    "import",
    "return",
    "seven",
    "and",
    "or",
    "not",
    "while",
    "for",
    "in",
    "under",
    "over",
    "the",
    "a",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """300 short documents with some structure: every `import` is followed by `river`."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(300):
            words = generator.choice(WORDS, 120).tolist()
            text = " ".join(f"{w} river" if w == "import" else w for w in words)
            file.write(json.dumps({"text": text + ".\n"}) + "\n")
    return path


def command(run: Path, corpus: Path) -> list[str]:
    return [
        sys.executable, "-m", "cratelm", "demo", "--run", str(run), "--corpus", str(corpus),
        "--size", "1l", "--vocab-size", "300", "--steps", "3", "--tokens", "3000", "--neurons", "6",
    ]  # fmt: skip


def attempt(arguments: list[str], output: Path) -> None:
    """The body of a process: a command line, with its output in a pipe.

    It draws no figure and does not measure the machine, which takes a third of what is left, and which `whole` does.
    """
    patch = pytest.MonkeyPatch()
    leave_out_drawing(patch)
    patch.setattr("cratelm.pipelines.demo._measure", lambda name, config: (0.1, 1e-5))
    pipe = os.open(output, os.O_WRONLY)
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    sys.exit(main(arguments))


def run_until(run: Path, corpus: Path, told: str = "", jobs: int = 1) -> tuple[str, int | None]:
    """Runs the demo and kills it as soon as a line holds `told`; returns its output and exit status."""
    output = run.with_suffix(".pipe")
    output.unlink(missing_ok=True)
    os.mkfifo(output)
    words = [*command(run, corpus)[3:], "--jobs", str(jobs)]
    process = FORKED.Process(target=attempt, args=(words, output))
    process.start()
    lines = []
    with output.open() as pipe:
        for line in pipe:
            lines.append(line)
            if told and told in line:
                process.kill()
    process.join()
    return "".join(lines), process.exitcode


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, str]:
    """The run of a demo that nobody killed, and what it said."""
    path = tmp_path_factory.mktemp("demo") / "whole"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(path, corpus), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return path, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_demo_killed_anywhere_ends_as_if_it_had_not_been(whole, corpus, tmp_path):
    whole, out = whole
    assert out.startswith("expected: about")
    assert "top-and-random" in out
    assert str(whole / "report" / "report.html") in out
    assert out.splitlines()[-1].startswith("browse the neurons: ")
    assert out.splitlines()[-1].endswith(f"cratelm view {whole}")

    broken = tmp_path / "broken"
    for told, jobs in (("[2/24]", 1), ("[9/24]", 2), ("[24/24]", 1)):
        assert run_until(broken, corpus, told, jobs)[1] == -signal.SIGKILL, told
    out, status = run_until(broken, corpus)
    assert status == 0, out
    assert "skipped" in out

    first, second = (
        {(c.stage, c.name): c.identity for c in Run(path).completions() if c.stage != "report"}
        for path in (whole, broken)
    )
    assert len(first) == 23
    assert first == second
    tables = [path / "report" / "tables" / "mean_and_variance.csv" for path in (whole, broken)]
    assert tables[0].read_text() == tables[1].read_text()  # the page itself tells paths and times
    assert not [p for p in broken.rglob(".*") if "partial" in p.name]


def test_a_quiet_demo_says_nothing_and_tells_every_verb_so(tmp_path, monkeypatch, capfd):
    room = importlib.import_module("cratelm.pipelines.demo")
    from cratelm.pipelines.config import DemoConfig

    told = []

    def verb(config):
        told.append(config.quiet)
        return room.ReportResult(tmp_path, tmp_path, tmp_path, (), ())

    for name in (
        "tokenize",
        "train",
        "harvest",
        "explain",
        "score",
        "replace_codes",
        "analyze",
        "effects",
        "report",
    ):
        monkeypatch.setattr(room, name, verb)
    monkeypatch.setattr(room, "comparison_table", lambda _: "")
    config = DemoConfig(run=tmp_path, quiet=True, jobs=1)
    room.demo(config)
    assert capfd.readouterr() == ("", "")
    assert len(told) == 24
    assert all(told)
    assert room._sae_config(config).quiet


def test_families_of_the_demo():
    """One chain of stages for each model and each control; what is compared is made in the same way for all."""
    from cratelm.models import FAMILIES
    from cratelm.pipelines.config import DemoConfig
    from cratelm.pipelines.demo import families_of, model_chains

    every = families_of(DemoConfig(families=()))
    assert set(FAMILIES) - set(every) == {"gpt2-relu"}  # another name of gpt2
    config = DemoConfig(families=("gpt2-solu", "crate"), size="1l")
    chains = [[step.label for step in chain] for chain in model_chains(config)]
    stages = ("model", "activations", "explanations", "scores", "replacement")
    assert chains == [
        [f"{stage} {name}" for stage in stages[: 4 if name.endswith("init") else 5]]
        for name in ("gpt2-solu-1l", "crate-1l", "gpt2-solu-1l-init", "crate-1l-init")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--families", "crate", "gpt2-sol"), "did you mean gpt2-solu?"),
        (("--families", "crate", "crate"), "name each family once"),
        (("--families", "--sae"), "cannot be combined"),
    ],
)
def test_mistakes_in_families_are_one_line(words, message, tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_several_families_end_in_one_table(whole, corpus, tmp_path, capsys):
    """Resumable, on tokens that they share; a run that holds the demo of the twins is refused."""
    words = ["--corpus", str(corpus), "--size", "1l", "--vocab-size", "300", "--steps", "2", "--tokens", "2000",
             "--neurons", "4", "--families", "crate", "gpt2-topk", "crate-mssa", "--jobs", "1", "--quiet"]  # fmt: skip
    assert main(["demo", "--run", str(whole[0]), *words]) == 2
    assert "give it another --run" in capsys.readouterr().err
    run = tmp_path / "families"
    assert main(["demo", "--run", str(run), *words]) == 0
    trained = ["crate-1l", "crate-mssa-1l", "gpt2-topk-1l"]
    assert Run(run).models("replacement") == trained
    tables = json.loads((run / "report" / "tables.json").read_text())
    rows = {row["model"]: row for row in tables["overview"]["rows"]}
    assert sorted(rows) == trained
    for row in rows.values():
        for key in ("loss", "nats_lost", "carried", "token_share", "top_and_random"):
            assert row[key] is not None, key
    assert len(tables["pairs"]["rows"]) == 3
    before = {c.label: c.identity for c in Run(run).completions()}
    assert main(["demo", "--run", str(run), *words]) == 0
    assert "skipped" in capsys.readouterr().out
    assert {c.label: c.identity for c in Run(run).completions()} == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twins_see_the_same_tokens_and_results_can_be_read(whole):
    from cratelm.score.store import read_scores

    path, _ = whole
    models = Run(path).models("scores")
    assert models == ["crate-1l", "crate-1l-init", "gpt2-1l", "gpt2-1l-init"]
    trained = {c.name: c for c in Run(path).completions() if c.stage == "model"}
    assert trained["crate-1l"].results["tokens"] == trained["gpt2-1l"].results["tokens"] == 3 * 16 * 256  # fmt: skip
    assert trained["crate-1l"].inputs == trained["gpt2-1l"].inputs
    for model in models:
        scores = read_scores(path / "scores" / model)
        assert {s.metric for s in scores} == {"top_and_random", "random_only", "anthropic"}
        assert all((s.score.value is None) == (s.score.status != "defined") for s in scores)
