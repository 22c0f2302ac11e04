"""The command line: help of every verb, errors in one line with a status, Python functions alike."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import cratelm
from cratelm.cli import VERBS, config_class, function_name, main


def call(capsys, *arguments):
    status = main(list(arguments))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for field in fields(config_class(verb)):
        flag = field.name.replace("_", "-")
        positional = flag.upper() if "Positional" in str(field.type) else None
        assert (
            f"--{flag}" in told or f"--no-{flag}" in told or bool(positional and positional in told)
        )
    assert config_class(verb).__doc__.splitlines()[0][:40] in told


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_documented(verb):
    """The docstring under each field is its help; one without would be shown bare."""
    import ast
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(config_class(verb)))).body[0].body
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            after = body[number + 1] if number + 1 < len(body) else None
            assert isinstance(after, ast.Expr), (
                f"{verb}: {ast.unparse(node.target)} has no docstring"
            )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_python_function_of_the_same_arguments(verb):
    function = getattr(cratelm, function_name(verb))
    assert function_name(verb) in dir(cratelm)
    names = list(inspect.signature(function).parameters)
    assert names == [f.name for f in fields(config_class(verb))]
    with pytest.raises(TypeError, match="nonsense"):
        function(nonsense=1)


MODEL_VERBS = (
    "harvest", "evaluate", "predict", "steer", "effects", "intervene", "analyze", "explain", "score",
    "sae train", "sae evaluate", "sae compare",
)  # fmt: skip


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_every_verb_that_runs_a_model_takes_a_device_that_changes_no_identity(verb):
    (device,) = [f for f in fields(config_class(verb)) if f.name == "device"]
    assert device.default == "auto"
    assert device.metadata == {"identity": False}


@pytest.mark.parametrize(
    "verb", [*MODEL_VERBS[:3], "effects", "analyze", "report", "demo", "view", "tokenize", "train"]
)
def test_every_verb_that_takes_long_can_be_quiet(verb):
    (quiet,) = [f for f in fields(config_class(verb)) if f.name == "quiet"]
    assert quiet.default is False
    assert quiet.metadata == {"identity": False}


def test_rooms_that_are_verbs_stay_modules():
    import cratelm.score.metrics

    assert cratelm.score.metrics.correlation_score
    assert callable(cratelm.score)
    assert set(cratelm._VERB_ROOMS) == set(VERBS) & _rooms()


def _rooms():
    from pathlib import Path

    return {p.name for p in Path(cratelm.__file__).parent.iterdir() if p.is_dir()}


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["harvst"], 2, "did you mean harvest"),
        (["import", "recrods"], 2, "did you mean records? Kinds are authors"),
        (["export", "--run", "{tmp}/nothing"], 2, "Kinds are model, records"),
        (["records"], 2, "Verbs are"),
        (["import", "records", "--model", "m"], 2, "--files"),
        (["export", "records", "--model", "m", "--out", "{tmp}/o", "--laiers", "1"], 2, "--layers"),
        (["import", "authors", "{tmp}/absent.pt", "--out", "{tmp}/o"], 2, "absent.pt"),
        (["import", "sae", "{tmp}/absent.pt", "--out", "{tmp}/o"], 2, "absent.pt"),
        (
            ["export", "model", "--run", "{tmp}/nothing", "--model", "m", "--out", "{tmp}/o"],
            2,
            "cratelm train",
        ),
        (["steer", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["effects", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["intervene", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["analyze", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["predict", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["sae", "train", "--run", "{tmp}/nothing"], 2, "cratelm tokenize"),
        (["sae", "evaluate", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["harvest", "--tokenz", "3"], 2, "did you mean --tokens"),
        (["harvest", "--tokens", "three"], 2, "invalid literal"),
        (["harvest", "--tokens", "0"], 2, "--tokens must be at least 1, not 0"),
        (["train", "--run", "{tmp}/nothing"], 2, "cratelm tokenize --run"),
        (["explain", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["score", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["report", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["evaluate", "--run", "{tmp}/nothing"], 2, "cratelm"),
        (["tokenize", "--run", "{tmp}/run", "--corpus", "{tmp}/absent.jsonl"], 2, "absent.jsonl"),
        (["demo", "--steps", "0"], 2, "--steps must be at least 1, not 0"),
    ],
)
def test_failures_are_one_line_and_a_status(arguments, status, told, capsys, tmp_path):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    found, out, error = call(capsys, *arguments)
    assert found == status
    assert told in error
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("cratelm")
    assert "Traceback" not in out + error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_unexpected_errors_are_told_and_can_be_traced(capsys, monkeypatch):
    import cratelm.report.report as module

    def broken(config):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(module, "report", broken)
    status, _, error = call(capsys, "report")
    assert status == 1
    assert "ZeroDivisionError: two lines" in error
    monkeypatch.setenv("CRATELM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["report"])


@pytest.mark.parametrize("word", ["import", "export"])
def test_a_verb_of_kinds_lists_them(word, capsys):
    kinds = [verb for verb in VERBS if verb.startswith(f"{word} ")]
    status, told, _ = call(capsys, word, "--help")
    assert status == 0
    assert kinds
    assert [line.split("  ")[1] for line in told.splitlines() if line[:2] == "  "] == kinds
    assert call(capsys, word)[0] == 2


def test_a_limit_that_was_reached_has_a_status_of_its_own(capsys, monkeypatch):
    import cratelm.report.report as module
    from cratelm.errors import BudgetReached

    def stopped(config):
        raise BudgetReached("100 calls were made")

    monkeypatch.setattr(module, "report", stopped)
    assert call(capsys, "report") == (3, "", "cratelm report: 100 calls were made\n")


def test_overview_and_version(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)
    assert call(capsys)[0] == 2
    assert call(capsys, "--version")[1].strip()


@pytest.mark.parametrize("verb", ["train", "import records", "export neuronpedia"])
def test_help_imports_nothing_heavy(verb):
    """`--help` of a verb answers before torch would have been imported."""
    code = f"import sys; from cratelm.cli import main\ntry: main([*{verb.split()}, '--help'])\nexcept SystemExit: pass\nassert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
