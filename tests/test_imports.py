"""What the verbs do not import: libraries that would make each command start later, and that it does not use.

Whether it is quick is measured by `benchmarks/small_harvest.py --start-up`; here it is only fixed what makes it so.
"""

import gc
import importlib
import subprocess
import sys

import pytest
from tiny_run import copied

from cratelm.cli import verb_function

UNUSED = {
    "pandas": "pyarrow.array imports it where it is installed: half a second",
    "matplotlib": "a harvest draws nothing: a second",
    "sklearn": "only the browser's map needs it: a second",
    "datasets": "only corpora of the Hub need it: a second",
    "datasketch": "only `score` looks for duplicates; it imports half of scipy: a second",
    "scipy.stats": "distributions and tests: one to two seconds",
}
MODELS = {
    "torch": "two seconds",
    "transformers": "five seconds",
    "pandas": "half a second",
    "sklearn": "one second",
    "datasketch": "one second, with half of scipy",
    "scipy.stats": "one to two seconds",
}


def imported(code: str, *arguments: str) -> set[str]:
    """Modules of a new interpreter that has run `code`."""
    code += "\nimport sys; print(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_a_harvest_imports_what_it_uses(tmp_path):
    """From the command to the finished stage, not only the imports at the top."""
    code = "import sys; from cratelm.cli import main; assert main(sys.argv[1:]) == 0"
    run = str(copied(tmp_path))
    modules = imported(code, *f"harvest --run {run} --model crate-2l --name h --tokens 500".split())
    assert {"torch", "pyarrow.parquet"} <= modules
    assert not UNUSED.keys() & modules


@pytest.mark.parametrize("verb", ["explain", "report", "view"])
def test_reading_results_imports_no_models(verb):
    modules = imported(f"from cratelm.cli import verb_function; verb_function({verb!r})")
    assert "pyarrow.parquet" in modules
    assert not MODELS.keys() & modules


def test_no_garbage_is_collected_during_imports(monkeypatch):
    states = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: states.append(gc.isenabled()) or real(name))  # fmt: skip
    assert callable(verb_function("check"))
    assert gc.isenabled()
    gc.disable()
    try:
        verb_function("check")
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert states == [False, False]
    monkeypatch.setattr("cratelm.cli.function_name", lambda verb: "absent")
    with pytest.raises(AttributeError):
        verb_function("check")
    assert gc.isenabled()
