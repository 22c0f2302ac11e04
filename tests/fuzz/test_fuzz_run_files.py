"""Random damage to the files of a run: every reader refuses it in one line, or reads what is there.

Half of the damaged files get the hash of their new content, as files of a foreign or later version would have, so that
the readers themselves meet them. `CRATELM_FUZZ=10000` tries more (tests/fuzz/budget.py).
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from budget import settings
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import MODEL, copied, reseal

from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.explain.store import read_explanations, read_selected, read_unexplained
from cratelm.models import load
from cratelm.results.neuron_table import read_neuron_table
from cratelm.results.run_results import read_results
from cratelm.results.scores import read_score_summary
from cratelm.runs import RECORD, Run
from cratelm.runs.check import check
from cratelm.runs.check_config import CheckConfig
from cratelm.score.store import read_scores
from cratelm.steer.store import read_ablations, read_effects_summary, read_logit_effects
from cratelm.tokens.shards import TokenStore
from cratelm.train.log import read_metrics

LIMIT = 20.0
"""seconds"""


def stage(run: Path, name: str) -> Path:
    return run / name / MODEL


READERS: dict[str, Callable[[Path], object]] = {
    "tokens": lambda run: [
        (s := TokenStore(run / "tokens")).decode_tokens(s.split("fit").read(0, 50)),
        s.split("held_out").documents_at(s.split("held_out").starts[:-1]),
    ],
    "model": lambda run: (load(stage(run, "model")), read_metrics(stage(run, "model"))),
    "activations": lambda run: (
        [
            TokenStore(SOUND / "tokens").decode_tokens(excerpt.token_ids)
            for record in read_records(stage(run, "activations"), "fit")
            for excerpt in record.excerpts[:2]
        ]
        + list(read_summaries(stage(run, "activations"), "held_out"))
    ),
    "explanations": lambda run: (
        read_explanations(stage(run, "explanations")),
        read_selected(stage(run, "explanations")),
        read_unexplained(stage(run, "explanations")),
    ),
    "scores": lambda run: (
        read_scores(stage(run, "scores")),
        read_score_summary(stage(run, "scores")),
    ),
    "steer": lambda run: (
        read_effects_summary(stage(run, "steer")),
        read_ablations(stage(run, "steer")),
        read_logit_effects(stage(run, "steer")),
    ),
}
WHOLE: dict[str, Callable[[Path], object]] = {
    "check": lambda run: str(check(CheckConfig(run, quiet=True))),
    "records": lambda run: (Run(run).completions(), Run(run).stale_lines(MODEL)),
    "table": lambda run: read_neuron_table(Run(run), MODEL),
    "results": lambda run: read_results(Run(run)),
}
SOUND = Path(__file__).parents[1] / "run_0_1_0" / "run"
FILES = sorted(
    p.relative_to(SOUND).as_posix()
    for p in SOUND.rglob("*")
    if p.is_file() and f"{MODEL}-init" not in p.parts and p.suffix != ".png"
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """What is done to a file."""
    kind = draw(st.sampled_from(["bits", "cut", "grown", "swapped", "json", "bytes", "gone"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    content = draw(st.binary(max_size=40))
    other = draw(st.sampled_from(FILES))
    value, key = draw(VALUES), draw(st.integers(0, 10**6))
    bits = draw(
        st.lists(
            st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4
        )
    )

    def damage(path: Path) -> None:
        before = bytearray(path.read_bytes())
        if kind == "bits":
            for at, bit in bits:
                if before:
                    before[int(at * len(before))] ^= 1 << bit
        elif kind == "cut":
            del before[int(where * len(before)) :]
        elif kind == "grown":
            before[int(where * len(before)) : int(where * len(before))] = content
        elif kind == "swapped":
            before = bytearray((SOUND / other).read_bytes())
        elif kind == "json":
            before = changed_json(before, value, key)
        elif kind == "bytes":
            before = bytearray(content)
        if kind == "gone":
            path.unlink()
        else:
            path.write_bytes(before)

    return damage


def changed_json(content: bytearray, value: object, key: int) -> bytearray:
    """JSON in which one value, at any depth, is another; for other files only the new value."""
    try:
        whole = json.loads(content.decode())
    except ValueError:
        return bytearray(json.dumps(value).encode())
    places: list[tuple] = []

    def find(node: object) -> None:
        pairs = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for name, inner in list(pairs)[:50]:
            places.append((node, name))
            find(inner)

    find(whole)
    if places:
        node, name = places[key % len(places)]
        node[name] = value
    return bytearray(json.dumps(whole if places else value).encode())


@pytest.mark.fault(
    "bits, bytes, values or whole files of a run are changed at random, with and without a fitting hash",
    "every reader, the tables of the report and `cratelm check` refuse it in one line or read what is there",
)
@settings(60)
@given(st.sampled_from(FILES), damages(), st.booleans(), st.sampled_from(sorted(WHOLE)))
def test_damaged_files_of_a_run(tmp_path_factory, name, damage, is_resealed, whole):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    run = copied(folder)
    damage(run / name)
    owner = run / name.split("/")[0] if name.startswith("tokens/") else (run / name).parent
    can_reseal = (run / name).is_file() and (owner / RECORD).is_file()
    if is_resealed and can_reseal and not name.endswith(RECORD):
        reseal(owner)
    first = name.split("/")[0]
    readers = [WHOLE[whole], *([READERS[first]] if first in READERS else [])]
    for read in readers:
        start, told = time.monotonic(), ""
        try:
            read(run)
        except InputError as error:
            told = str(error)
        assert "\n" not in told
        assert time.monotonic() - start < LIMIT
