"""Random activation records of other tools: imported, or refused in one line with nothing written.

`CRATELM_FUZZ=10000` tries more (tests/fuzz/budget.py).
"""

import json
import shutil
import time

import pytest
from budget import settings
from hypothesis import given
from hypothesis import strategies as st

import cratelm
from cratelm.activations.store import read_records
from cratelm.errors import InputError
from cratelm.runs import Run

LIMIT = 20.0
"""seconds"""
number = (
    st.floats(width=32)
    | st.integers(-(10**40), 10**40)
    | st.sampled_from([0, 1, 0.5, 1e38, 1e39, -0.0])
)
anything = st.none() | st.booleans() | number | st.text(max_size=4) | st.just([]) | st.just({})
tokens = st.lists(
    st.text(max_size=3) | st.sampled_from([" the", "\ud800", "\x00", "x" * 3000]), max_size=5
)


@st.composite
def texts(draw: st.DrawFn) -> dict:
    """An activation record, mostly whole."""
    words = draw(tokens)
    values = draw(st.lists(st.floats(0, 5, width=32), min_size=len(words), max_size=len(words)))
    record: dict = {"tokens": words, "activations": values, "dataclass_name": "ActivationRecord"}
    if draw(st.integers(0, 9)) == 0:
        record[draw(st.sampled_from([*record, "other"]))] = draw(
            anything | st.lists(anything, max_size=3)
        )
    return record


@st.composite
def records(draw: st.DrawFn) -> dict:
    """A neuron record, mostly whole."""
    layer, index = draw(st.integers(0, 1)), draw(st.integers(0, 2))
    record: dict = {
        "neuron_id": {"layer_index": layer, "neuron_index": index, "dataclass_name": "NeuronId"},
        "most_positive_activation_records": draw(st.lists(texts(), max_size=4)),
        "random_sample": draw(st.lists(texts(), max_size=3)),
        "random_sample_by_quantile": draw(
            st.none() | st.lists(st.lists(texts(), max_size=2), max_size=3)
        ),
        "quantile_boundaries": draw(st.none() | st.lists(number | st.none(), max_size=4)),
        **{name: draw(number | st.none()) for name in ("mean", "variance", "skewness", "kurtosis")},
        "dataclass_name": "NeuronRecord",
    }
    if draw(st.integers(0, 5)) == 0:
        record[draw(st.sampled_from([*record, "other"]))] = draw(anything)
    return record


@pytest.mark.fault(
    "activation records of other tools with wrong types, numbers, texts and lengths",
    "imported as they are, or refused in one line with nothing written",
)
@settings(25)
@given(st.lists(records(), min_size=1, max_size=3), st.binary(max_size=20), st.integers(0, 9))
def test_records_of_other_tools(tmp_path_factory, made, noise, kind):
    folder = tmp_path_factory.getbasetemp() / "records"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    for place, record in enumerate(made):
        content = json.dumps(record).encode()
        if kind == 0:
            content = content[: len(content) // 2] + noise
        (folder / "in" / f"{place}.json").write_bytes(content)
    run, start, told = folder / "run", time.monotonic(), ""
    try:
        cratelm.api.import_records(files=(folder / "in",), model="m", run=run, quiet=True)
    except InputError as error:
        told = str(error)
    if told:
        assert "\n" not in told
        assert not Run(run).labels()
    else:
        assert list(read_records(run / "activations" / "m", "held_out"))
        assert Run(run).labelled("activations/m").freshness().state == "fresh"
    assert time.monotonic() - start < LIMIT
