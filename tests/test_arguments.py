"""Values and types of options and arguments: refused in one line that names them, before anything is written."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

import cratelm
from cratelm import api
from cratelm.cli import VERBS, config_class, function_name, main, parse_options
from cratelm.errors import InputError
from cratelm.runs import Options, Run, check_memory
from cratelm.runs.arguments import (
    LARGEST,
    annotations_of,
    checked_arguments,
    checked_path,
    checked_value,
    option_name,
)
from cratelm.runs.devices import device_of, devices
from cratelm.runs.memory import NEVER_REFUSED, available_memory, size_in_words
from cratelm.runs.names import check_name, problem_of

REQUIRED: dict[str, dict[str, Any]] = {
    "steer": {"neurons": ("0:1",), "zero": True},
    "intervene": {"judge": "hf:x"},
    "study": {"recipes": ("laptop",)},
    "import authors": {"checkpoint": "x.pt", "out": "out"},
    "import sparse-gpt": {"folder": "x", "out": "out"},
    "import sae": {"file": "x.pt", "out": "out"},
    "import records": {"files": ("x",), "model": "m"},
    "export model": {"out": "out", "model": "m"},
    "export records": {"out": "out", "model": "m"},
    "export neuronpedia": {"out": "out", "model": "m"},
}
"""arguments without which a verb is refused"""
WRONG = (None, 3, "text", ["a"], object(), b"bytes", {"a": 1}, 1.5, True, (None,), np.zeros(2))


def config_of(verb: str, **options: Any) -> Any:
    return config_class(verb)(**{**REQUIRED.get(verb, {}), **options})


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, told apart here by hand."""
    if get_origin(hint) is not None and get_origin(hint) not in (tuple, Literal):
        return any(accepts(part, value) for part in get_args(hint) if part is not Ellipsis)
    if hint is type(None):
        return value is None
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        listed = [value] if get_args(hint)[0] is Path and isinstance(value, str | Path) else value
        return isinstance(listed, list | tuple | np.ndarray) and all(accepts(get_args(hint)[0], v) for v in np.array(listed, object).tolist())  # fmt: skip
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, {float: (int, float), Path: (str, Path)}.get(hint, hint))


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_configuration_checks_its_types(verb):
    assert issubclass(config_class(verb), Options)
    config_of(verb)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.fault("a value of a wrong type from Python", "one line names the argument")
def test_a_wrong_type_names_the_argument(verb):
    """In `cratelm.api`, for every argument; never an error from deep inside, and nothing is begun."""
    function, hints = getattr(api, function_name(verb)), annotations_of(config_class(verb))
    tried = 0
    for field, hint in hints.items():
        plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        for value in WRONG:
            if accepts(plain, value):
                continue
            with pytest.raises(InputError) as refused:
                function(**{**REQUIRED.get(verb, {}), field: value})
            message = str(refused.value)
            assert message.startswith(f"{option_name(field, hint)} is ")
            assert "\n" not in message
            assert len(message) < 300
            tried += 1
    assert tried >= 5 * len(hints)


def test_numbers_of_numpy_lists_and_paths_are_what_they_mean():
    config = config_of(
        "harvest", tokens=np.int64(5), run="runs/x", sequence_length=np.uint8(8), quiet=np.True_
    )
    assert [type(v) for v in (config.tokens, config.sequence_length, config.quiet)] == [int, int, bool]  # fmt: skip
    assert config.run == Path("runs/x")
    assert config_of("steer", add=np.float32(0.5), zero=False).add == 0.5
    assert type(config_of("sae train", lr=1).lr) is int  # 1 and 1.0 would be two identities
    assert config_of("export records", layers=np.arange(3)).layers == (0, 1, 2)
    assert config_of("evaluate", models=["a", "b"]).models == ("a", "b")
    assert config_of("view", runs="runs/x").runs == (Path("runs/x"),)


def test_identities_are_those_of_the_values_before():
    from cratelm.runs import hash_json, settings_of

    plain = config_of("harvest", tokens=5, top=3)
    converted = config_of("harvest", tokens=np.int32(5), top=np.int64(3), run="elsewhere")
    assert hash_json(settings_of(plain).values) == hash_json(settings_of(converted).values)


def calls_of_the_package(tmp_path: Path) -> dict[str, Any]:
    """A call of each public function by argument, with everything else as it should be."""
    from cratelm.activations.store import read_records, read_summaries
    from cratelm.explain.store import read_explanations
    from cratelm.score.store import read_scores
    from cratelm.tokens.shards import TokenStore

    model = cratelm.build("crate-1l", vocab_size=300, hidden_size=8, num_attention_heads=2)
    ids = __import__("torch").zeros(1, 2, dtype=__import__("torch").long)
    return {
        "name": lambda v: cratelm.build(v),
        "vocab_size": lambda v: cratelm.build("crate-1l", vocab_size=v),
        "seed": lambda v: cratelm.build(
            "crate-1l", vocab_size=300, hidden_size=8, num_attention_heads=2, seed=v
        ),
        "hidden_size": lambda v: cratelm.build("gpt2-1l", vocab_size=300, hidden_size=v),
        "expansion": lambda v: cratelm.build("crate-1l", vocab_size=300, expansion=v),
        "path": lambda v: cratelm.load(v),
        "model": lambda v: cratelm.site_of(v),
        "site": lambda v: cratelm.capture(model, v, ids),
        "input_ids": lambda v: cratelm.capture(model, "ista", v),
        "edits": lambda v: cratelm.steering(model, v).__enter__(),
        "neurons": lambda v: cratelm.Edit(0, v, zero=True),
        "layer": lambda v: cratelm.Edit(v, 0, zero=True),
        "set": lambda v: cratelm.Edit(0, 0, set=v),
        "positions": lambda v: cratelm.Edit(0, 0, zero=True, positions=v),
        "path of the run": lambda v: Run(v),
        "folder": lambda v: read_explanations(v),
        "folder ": lambda v: read_scores(v),
        "folder  ": lambda v: read_records(v, "fit", [0]),
        "split": lambda v: read_summaries(tmp_path, v),
        "path ": lambda v: TokenStore(v),
        "path  ": lambda v: cratelm.load_authors_checkpoint(v),
    }


@pytest.mark.fault("a value of a wrong type for a public function", "one line names the argument")
def test_public_functions_name_a_wrong_argument(tmp_path):
    for name, call in calls_of_the_package(tmp_path).items():
        for value in (None, 3.5, object(), b"bytes", {"a": 1}):
            if name in ("site", "set") and value in (None, 3.5):
                continue  # a site may be left out of `site_of`, and 3.5 is a number
            with pytest.raises((InputError, TypeError), match=name.strip()):
                call(value)


def test_a_decorated_function_keeps_its_signature():
    import inspect

    @checked_arguments(model=Any)
    def function(model: int, *many: str, other: float = 1.0, **rest: Any) -> tuple:
        """Doc."""
        return model, many, other, rest

    assert function("any", "a", "b", other=np.float64(2), more=3) == ("any", ("a", "b"), 2.0, {"more": 3})  # fmt: skip
    assert str(inspect.signature(function)).startswith("(model: int, *many: str")
    assert function.__doc__ == "Doc."
    with pytest.raises(InputError, match=r"^many is 4 \(int\): it must be a string$"):
        function("any", 4)
    with pytest.raises(TypeError, match="model"):
        function()


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ("x", int, "a is 'x' (str): it must be a whole number"),
        (True, int | None, "a is True (bool): it must be a whole number or None"),
        (1, bool, "a is 1 (int): it must be True or False"),
        (["a", 1], tuple[str, ...], "a is 1 (int): it must be a string"),
        ("ab", tuple[str, ...], "a is 'ab' (str): it must be a list of strings"),
        ("z", Literal["x", "y"], "a is 'z': choose from x, y"),
        (10**400, float, f"a is {'1' + '0' * 58}…: it must be a finite number"),
        (10**16, int, f"a is 10000000000000000: it must be at most {LARGEST:,}"),
        (-(10**16), int | None, f"a is -10000000000000000: it must be at least {-LARGEST:,}"),
        (b"a", str | Path, "a is b'a' (bytes): it must be a string or a path"),
    ],
)  # fmt: skip
def test_messages(value, hint, said):
    with pytest.raises(InputError) as refused:
        checked_value("a", value, hint)
    assert str(refused.value) == said


def test_an_object_that_cannot_be_shown_is_refused():
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(InputError, match="an object of Silent"):
        checked_value("a", Silent(), int)


# ---- values --------------------------------------------------------------------------------------


def fields_of(verb: str, kind: Any) -> list[str]:
    """The fields of this type, None allowed."""
    hints = annotations_of(config_class(verb))
    return [name for name, hint in hints.items() if hint in (kind, kind | None)]


def flag_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


@pytest.mark.fault("NaN or infinity as an option", "one line names the option")
def test_numbers_that_are_not_finite_are_refused():
    tried = 0
    for verb in VERBS:
        for field in fields_of(verb, float):
            for value in ("nan", "inf", "-inf", "1e999"):
                with pytest.raises(InputError, match=rf"{flag_of(field)} is -?(nan|inf): it must be a finite"):  # fmt: skip
                    config_of(verb, **{field: float(value)})
                tried += 1
    assert tried > 100


@pytest.mark.fault(
    "an absurd or negative number as an option", "one line names the option and its limit"
)
def test_absurd_and_negative_numbers_are_refused():
    """Above what any library counts, and below 0; what else is too large depends on the model and the machine."""
    tried = 0
    for verb in VERBS:
        for field in fields_of(verb, int):
            for value in (10**30, -(10**30), -1):
                with pytest.raises(InputError) as refused:
                    config_of(verb, **{field: value})
                assert flag_of(field) in str(refused.value)
                tried += 1
    assert tried > 300


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("tokenize", {"vocab_size": 10**13}),
        ("demo", {"vocab_size": 10**13}),
        ("analyze", {"resamples": 10**13}),
        ("score", {"resamples": 10**13}),
        ("report", {"resamples": 10**13}),
        ("intervene", {"resamples": 10**13}),
        ("intervene", {"texts": 10**13}),
    ],
)
def test_what_options_alone_decide_is_refused_with_its_memory(verb, options):
    ((field, value),) = options.items()
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(InputError, match=rf"{flag} {value}.* would take at least .*iB of memory, but .*iB are available: lower {flag}"):  # fmt: skip
        config_of(verb, **options)


def test_limits_that_are_no_memory():
    for verb, field, value in (
        ("harvest", "batch_tokens", 0),
        ("analyze", "ista_steps", 10**9),
        ("explain", "concurrency", 10**9),
        ("demo", "vocab_size", 5),
    ):
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')} must be at "):
            config_of(verb, **{field: value})


def test_memory_is_compared_with_what_is_available():
    config = SimpleNamespace(top=50, context=10**9, sequence_length=None)
    parts = {("top", "context"): 3 * 2**40, "sequence_length": 2.0**30}
    check_memory(config, parts, "the excerpts", available=2**42)
    check_memory(config, {"top": NEVER_REFUSED - 1}, "little", available=0)
    with pytest.raises(InputError) as refused:
        check_memory(config, parts, "the excerpts", available=2**32)
    assert str(refused.value) == (
        "--top 50 --context 1000000000: the excerpts would take at least 3 TiB of memory, but 4 GiB are"
        " available: lower --top or --context"
    )
    assert [size_in_words(n) for n in (0, 999, 1000, 2**30, 1.5 * 2**41)] == ["0 bytes", "999 bytes", "0.977 KiB", "1 GiB", "3 TiB"]  # fmt: skip
    assert size_in_words(10**40).endswith("EiB")


def test_the_available_memory_is_that_of_this_machine(monkeypatch, tmp_path):
    from cratelm.runs import memory

    free = available_memory()
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, content in {"max": "1000000", "current": "900000", "stat": "inactive_file 300\nactive_file 7"}.items():  # fmt: skip
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_memory() == 100_307
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() != 100_307


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_the_limit_of_the_process_counts(tmp_path):
    import subprocess

    code = "from cratelm.runs.memory import available_memory; print(available_memory())"
    shell = f"ulimit -v 4000000; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4_000_000 * 1024


# ---- paths and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.fault("an empty path", "one line names the option")
def test_an_empty_path_is_refused(verb, capsys, tmp_path, monkeypatch):
    """`--run=` is not the working directory, on the command line and in Python."""
    monkeypatch.chdir(tmp_path)
    for field in fields_of(verb, Path):
        flag = flag_of(field)
        words = {"import authors": ["x.pt"], "import sae": ["x.pt"], "import sparse-gpt": ["x"], "study": ["laptop"]}.get(verb, [])  # fmt: skip
        for name, value in REQUIRED.get(verb, {}).items():
            if name not in ("checkpoint", "file", "folder", "recipes", field):
                values = [] if value is True else [value] if isinstance(value, str) else list(value)
                words += [flag_of(name), *values]
        for empty in ([f"{flag}="], [flag, ""], [flag, " "]):
            assert main([*verb.split(), *words, *empty]) == 2
            said = capsys.readouterr().err
            assert f"{flag} is empty" in said, said
            assert said.count("\n") == 1
        with pytest.raises(InputError, match=f"{flag} is empty"):
            config_of(verb, **{field: ""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("-x", "looks like an option: type ./-x"),
        ("a\nb", "control characters"),
        ("a\0b", "control characters"),
        ("a/\x1b[31m", "control characters"),
        ("x" * 256, "a name of 256 bytes"),
        ("é" * 128, "a name of 256 bytes"),
        ("a/" * 3000, "bytes, and at most 255"),
        ("\ud800", "control characters"),
    ],
)
def test_paths_that_no_file_system_has_are_refused(path, problem):
    for run in (lambda: checked_path("--run", path), lambda: config_of("report", run=path)):
        with pytest.raises(InputError, match=problem) as refused:
            run()
        assert "\n" not in str(refused.value)
        assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("path", [".", "..", "./-x", "a b", "é", "/", "x" * 255, "~", "a\udcff"])
def test_paths_that_exist_somewhere_are_accepted(path):
    assert checked_path("--run", path) == Path(path)


NAMES = [
    "",
    " ",
    "a/b",
    "a\\b",
    "..",
    ".x",
    "-x",
    "a\nb",
    "a\x00",
    "\u202ex",
    "x" * 201,
    "é" * 101,
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fault(
    "a name with control characters, slashes or a leading dash, or one that is too long",
    "one line says which names can be used",
)
def test_names_that_cannot_be_used(name, tmp_path):
    assert problem_of(name)
    with pytest.raises(InputError, match="--name is") as refused:
        check_name("--name", name)
    assert str(refused.value).isprintable()
    if name:
        with pytest.raises(InputError, match="the name"):
            Run(tmp_path).stage("model", name)
    for verb in ("train", "harvest", "sae train", "explain", "score", "intervene"):
        if name.strip() and verb != "score":
            with pytest.raises(InputError, match="--name"):
                config_of(verb, name=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["crate-2l", "a b", "é", "x" * 200, "7", "a.b_c", "模型"])
def test_names_that_can_be_used(name, tmp_path):
    check_name("--name", name)
    assert Run(tmp_path).stage("model", name).name == name


def test_separators_are_no_part_of_a_name():
    for verb, name in (
        ("train", "a@b"),
        ("train", "a+b"),
        ("harvest", "a@b"),
        ("sae train", "a@b"),
    ):
        with pytest.raises(InputError, match="separates the parts"):
            config_of(verb, name=name)
    config_of("harvest", name="crate-2l+mine")


def test_a_stage_whose_name_is_no_longer_allowed_is_still_read(tmp_path):
    with Run(tmp_path).stage("model", "x").write({}, {}):
        pass
    (tmp_path / "model" / "x").rename(tmp_path / "model" / "-x")
    assert Run(tmp_path).stage("model", "-x").completion() is not None


@pytest.mark.parametrize(
    ("verb", "field"),
    [("tokenize", "corpus"), ("train", "model"), ("evaluate", "path"), ("harvest", "sae"),
     ("import authors", "checkpoint"), ("evaluate", "device"), ("steer", "path")],
)  # fmt: skip
def test_an_empty_text_is_no_value(verb, field):
    with pytest.raises(InputError, match="is empty"):
        config_of(verb, **{field: ""})
    with pytest.raises(InputError, match="--models is empty"):
        config_of("evaluate", models=("a", ""))
    assert config_of("tokenize", subset_field="").subset_field == ""
    assert config_of("steer", text="").text == ""


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["x", "cuda:99", "meta", "", "cpu:x", "cuda:-1", "mkldnn"])
@pytest.mark.fault("a device that is not there", "one line lists those that are")
def test_a_device_that_this_machine_lacks_names_those_that_it_has(device):
    with pytest.raises(InputError, match="choose from cpu") as refused:
        device_of(device)
    assert f"--device {device}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_devices_can_be_used():
    assert devices()[0] == "cpu"
    for name in ("auto", *devices()):
        device_of(name)


def test_help_shows_paths_as_before(capsys):
    with pytest.raises(SystemExit):
        parse_options("tokenize", ["--help"])
    assert "--run PATH" in capsys.readouterr().out


# ---- sizes that depend on the model and the text -------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from tiny_run import copied

    return copied(tmp_path_factory.mktemp("tiny") / "run")


ABSURD = 10**12
TOO_LARGE = [
    ("harvest", {"top": ABSURD}, "--top"),
    ("harvest", {"random": ABSURD}, "--random"),
    ("harvest", {"per_bin": ABSURD}, "--per-bin"),
    ("harvest", {"context": ABSURD}, "--context"),
    ("explain", {"depth": ABSURD}, "--depth"),
    ("train", {"batch_size": ABSURD}, "--batch-size"),
    ("train", {"model_overrides": ("hidden_size=1000000000",)}, "hidden_size"),
    ("train", {"model_overrides": ("num_hidden_layers=1000000000",)}, "num_hidden_layers"),
    ("steer", {"generate": ABSURD}, "--generate"),
    ("sae train", {"expansion": ABSURD}, "--expansion"),
    ("sae train", {"d_sae": ABSURD}, "--d-sae"),
    ("sae train", {"batch_tokens": ABSURD}, "--batch-tokens"),
    ("sae train", {"batch_size": ABSURD, "tokens": ABSURD}, "--batch-size"),
]
OF_THE_MODEL = [
    ("harvest", {"sequence_length": ABSURD}),
    ("evaluate", {"sequence_length": ABSURD}),
    ("analyze", {"sequence_length": ABSURD}),
    ("effects", {"sequence_length": ABSURD}),
    ("sae train", {"sequence_length": ABSURD}),
    ("sae evaluate", {"sequence_length": ABSURD}),
]
HARMLESS = [
    ("evaluate", {"batch_size": ABSURD, "max_tokens": ABSURD, "max_documents": ABSURD}),
    ("steer", {"top": ABSURD, "tokens": 4, "generate": 0}),
]


def call(verb: str, run: Path, **options: Any) -> Any:
    fields = {field.name for field in dataclasses.fields(config_class(verb))}
    usual = {"run": run, "force": True, "quiet": True, "device": "cpu"}
    usual = {name: value for name, value in usual.items() if name in fields}
    return getattr(api, function_name(verb))(**{**usual, **REQUIRED.get(verb, {}), **options})


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("verb", "options", "flag"), TOO_LARGE, ids=lambda v: str(v)[:40])
@pytest.mark.fault(
    "a size beyond the memory of the machine",
    "one line with the estimate, what is available and the option to lower",
)
def test_a_size_that_cannot_fit_is_refused_before_it_is_allocated(run, verb, options, flag):
    if verb.startswith("sae"):
        pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    before = files_of(run)
    with pytest.raises(InputError, match=r"would take at least .*iB of memory, but .* are available: lower") as refused:  # fmt: skip
        call(verb, run, **options)
    assert flag in str(refused.value).rpartition("lower")[2]
    assert files_of(run) == before


@pytest.mark.parametrize(("verb", "options"), OF_THE_MODEL, ids=lambda v: str(v)[:40])
def test_a_sequence_is_not_longer_than_the_model_takes(run, verb, options):
    if verb.startswith("sae"):
        pytest.importorskip("sae_lens", reason="the extra `sae` is not installed")
    before = files_of(run)
    with pytest.raises(InputError, match=r"--sequence-length|sae train"):
        call(verb, run, **options)
    assert files_of(run) == before


@pytest.mark.parametrize(("verb", "options"), HARMLESS, ids=lambda v: str(v)[:40])
def test_a_limit_above_all_there_is_takes_no_memory(run, verb, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(verb, run, **options)


def test_messages_are_one_line_whatever_was_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hostile = "a\nb\x1b[31m\u202e"
    for call in (
        lambda: api.demo(corpus=hostile, quiet=True),
        lambda: api.tokenize(corpus=hostile, quiet=True),
        lambda: api.report(run=hostile),
        lambda: api.import_authors(checkpoint=hostile, out="out"),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value).isprintable()
    assert main(["demo", "--corpus", hostile, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert r"corpus a\nb\x1b[31m\u202e does not exist" in said
