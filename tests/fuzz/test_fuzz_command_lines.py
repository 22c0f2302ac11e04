"""Random command lines and calls over all verbs: one line or a result, never a traceback, nothing written.

There is no run and no corpus, so that a verb stops where it would begin to work. `CRATELM_FUZZ=10000` tries
more (tests/fuzz/budget.py).
"""

import contextlib
import dataclasses
import io
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget import settings
from hypothesis import given
from hypothesis import strategies as st

from cratelm import api
from cratelm.cli import VERBS, config_class, function_name, main
from cratelm.errors import InputError

LIMIT = 5.0
"""seconds of the processor that a command line may take; most take milliseconds"""
MOST_MEMORY = 2**30
"""bytes by which all command lines together may raise the peak of the process"""
NUMBERS = ["0", "1", "-1", "2", "7", "100", "1e3", "1.5", "-0.0", "nan", "inf", "-inf", "1e999", "1_000", "0x10",
           str(2**31), str(2**63), str(10**12), str(10**15), str(10**30), "9" * 400, "٣", " 1", "1 ", "+5"]  # fmt: skip
TEXTS = ["", " ", "-", "--", "-x", "--run", "x", "a/b", "../x", "/", ".", "..", "a\nb", "\t", "a\x00b", "\x1b[31m",
         "é" * 200, "x" * 5000, "\u202e", "𝒳", "a@b", "a+b", "0:1", "0:x", "-1:2", "a=b", "=", "None", "True", "null",
         "all", "last", "5:", "hf:", "hf:x", "openai:", "openai:x", "none", "auto", "cpu", "cuda", "cuda:9", "meta",
         "crate-2l", "gpt2-1l", "crate-2l@x", "held_out", "train", "builtin", "hub:", "hub:a/b", "zero", "mlp",
         "hidden_size=8", "hidden_size=", "=8", "0/4", "4/0", "x.html", "\udcff", "[", "{}", "%s", "{0}", "$(x)"]  # fmt: skip
OFTEN_NEEDED = {
    "steer": ["--neurons", "0:1", "--zero"],
    "intervene": ["--judge", "hf:x"],
    "import authors": ["absent.pt", "--out", "out"],
    "import sparse-gpt": ["absent", "--out", "out"],
    "import sae": ["absent.pt", "--out", "out"],
    "import records": ["--files", "absent", "--model", "m"],
    "export model": ["--model", "m", "--out", "out"],
    "export records": ["--model", "m", "--out", "out"],
    "export neuronpedia": ["--model", "m", "--out", "out"],
}
NEVER_STARTS = {
    "tokenize": ["--corpus", "absent"],
    "demo": ["--corpus", "absent", "--quiet"],
    "view": ["absent"],
    "predict": ["--models", "m"],
    "study": ["absent.yaml"],
    "probe": ["--models", "absent"],
}
"""last on the line, so that they count: what keeps a verb from beginning to work without a run"""
JUNK: list[Any] = [None, True, False, 0, -1, 1, 10**30, 1.5, float("nan"), float("inf"), "", "x", "a\nb", b"x", [], [1], ["x"],
                   (), ("0:1",), {}, {"a": 1}, set(), object(), object, len, Path("x"), Path(), np.int64(3), np.float32(2), np.nan,
                   np.zeros(3), np.array("x"), 1j, range(3), iter(()), [None], [[1]], "x" * 5000, b"", bytearray(b"x"), ...]  # fmt: skip

word = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.text(max_size=12))


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A verb with some of its options, most of them with a value, some unknown or twice."""
    verb = draw(st.sampled_from(list(VERBS)))
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(config_class(verb))]
    flags = st.sampled_from([*fields, "nonsense"])
    words = list(OFTEN_NEEDED.get(verb, [])) if draw(st.booleans()) else []
    for flag in draw(st.lists(flags, max_size=4)):
        values = draw(st.lists(word, max_size=2))
        if values and draw(st.booleans()):
            words += [f"--{flag}={values[0]}", *values[1:]]
        else:
            words += [f"--{'no-' if draw(st.integers(0, 9)) == 0 else ''}{flag}", *values]
    words = [w for w in words if w not in ("-h", "--help") and not w.startswith("--static")]
    return [*verb.split(), *words, *NEVER_STARTS.get(verb, [])]


@pytest.fixture(scope="module", autouse=True)
def nowhere(tmp_path_factory):
    """An empty working directory, no network, and all verbs imported, so that the time is that of the command."""
    import huggingface_hub.constants

    folder, before = tmp_path_factory.mktemp("nowhere"), Path.cwd()
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.delenv("CRATELM_TRACEBACK", raising=False)
    os.chdir(folder)
    for verb in VERBS:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            main([*verb.split(), *OFTEN_NEEDED.get(verb, []), *NEVER_STARTS.get(verb, [])])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield folder
    os.chdir(before)
    patch.undo()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY


@settings(150)
@given(command_lines())
@pytest.mark.fault(
    "random command lines", "one line and exit status 2, or a result; nothing half-written"
)
def test_command_lines(nowhere, words):
    out, error = io.StringIO(), io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(words)
    assert time.process_time() - start < LIMIT
    said = error.getvalue()
    assert status == 2, (words, status, said)
    assert len(said.splitlines()) == 1, (words, said)
    assert len(said) < 3000
    assert "Traceback" not in said + out.getvalue()
    assert "CRATELM_TRACEBACK" not in said, (words, said)
    assert not list(nowhere.iterdir()), words


@st.composite
def calls(draw: Any) -> tuple[str, dict[str, Any]]:
    """A verb with some of its arguments, mostly of wrong types."""
    verb = draw(st.sampled_from(list(VERBS)))
    names = [field.name for field in dataclasses.fields(config_class(verb))]
    chosen = draw(st.lists(st.sampled_from(names), max_size=4))
    return verb, {name: draw(st.sampled_from(JUNK)) for name in chosen}


REQUIRED: dict[str, dict[str, Any]] = {
    "steer": {"neurons": ("0:1",), "zero": True},
    "intervene": {"judge": "hf:x"},
    "import authors": {"checkpoint": "absent.pt", "out": "out"},
    "import sparse-gpt": {"folder": "absent", "out": "out"},
    "import sae": {"file": "absent.pt", "out": "out"},
    "import records": {"files": ("absent",), "model": "m"},
    "export model": {"out": "out", "model": "m"},
    "export records": {"out": "out", "model": "m"},
    "export neuronpedia": {"out": "out", "model": "m"},
    "tokenize": {"corpus": "absent"},
    "demo": {"corpus": "absent", "quiet": True},
    "view": {"runs": "absent"},
    "study": {"recipes": "absent.yaml"},
    "probe": {"models": ("absent",)},
}


@settings(150)
@given(calls())
@pytest.mark.fault(
    "random arguments of the Python functions",
    "`InputError` or `TypeError` that names the argument",
)
def test_calls(nowhere, call):
    """Refused in one line; the arguments that are given are named if the call is refused for one of them."""
    verb, arguments = call
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        getattr(api, function_name(verb))(**{**REQUIRED.get(verb, {}), **arguments})
    assert time.process_time() - start < LIMIT
    assert "\n" not in str(refused.value)
    assert not list(nowhere.iterdir()), call
