"""The notebook is what its script writes, and every cell of it runs."""

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from cratelm.runs.minis import mini_names

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "steer_a_neuron.ipynb"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that writes the notebook."""
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("write_notebook", ROOT / "scripts" / "write_notebook.py")  # fmt: skip
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_has_ten_cells_of_code_that_the_script_wrote(script):
    written = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    made = script.notebook().cells
    for one, other in zip(written["cells"], made, strict=True):
        source = "".join(one["source"])
        if one["cell_type"] == "code":  # which the formatter breaks into lines
            assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(other["source"]))
        else:
            assert source == other["source"]
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 10
    assert sum(bool(cell["outputs"]) for cell in code) >= 8
    assert not any(o["output_type"] == "error" for cell in code for o in cell["outputs"])


@pytest.mark.skipif("crate-2l" not in mini_names(), reason="no models are built in")
def test_every_cell_of_the_notebook_runs(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    done = script.executed(tmp_path)
    outputs = [cell["outputs"] for cell in done.cells if cell["cell_type"] == "code"]
    shares = json.loads(next(o["text"] for o in outputs[-1] if o["output_type"] == "stream"))
    assert shares[-1] > shares[0]  # the neuron raises what it promotes
    assert any("image/png" in o.get("data", {}) for o in outputs[-1])
