"""The browser's index: token to neurons, neurons that fire alike, maps."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from viewer_runs import LAYERS, NEURONS, a_neuron

from cratelm.activations.store import read_records
from cratelm.records import levels
from cratelm.results.views import LayerQuery, NotFound
from cratelm.viewer.index import profile_entries, read_excerpts
from cratelm.viewer.pages import Pages
from cratelm.viewer.peaks import AFTER, BEFORE, favourites
from cratelm.viewer.run_reader import Library

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


@pytest.fixture
def run(viewer_run) -> Path:
    return viewer_run


@pytest.fixture
def copy(viewer_run, tmp_path) -> Path:
    shutil.copytree(viewer_run, tmp_path / "copy")
    return tmp_path / "copy"


def profile(run, model, layer, index):
    """Mean activation and count of each token over the fit excerpts, every position once, by hand."""
    (record,) = read_records(run / "activations" / model, "fit", [layer], [index])
    seen: dict[int, tuple[int, float]] = {}
    for e in record.excerpts:
        if e.kind != "out_of_context":
            for place, (token, value) in enumerate(zip(e.token_ids, e.activations, strict=True)):
                seen[e.position - e.peak + place] = (int(token), float(value))
    by_token: dict[int, list[float]] = {}
    for token, value in seen.values():
        by_token.setdefault(token, []).append(value)
    top = max(v for _, v in seen.values())
    return {t: (np.mean(v) / top, len(v)) for t, v in by_token.items() if len(v) > 1 and np.mean(v) > 0}  # fmt: skip


def test_neurons_that_fire_on_a_token(run, library):
    store = library.tokens("run")
    index = a_neuron(library)
    wanted = profile(run, "crate-2l", 1, index)
    assert len(wanted) > 5
    token, (value, count) = max(wanted.items(), key=lambda item: item[1][0])
    text = store.decode_tokens([token])[0]
    found, note = library.index_of("run").on_token("crate-2l", text)
    assert found[1, index] == (pytest.approx(value, rel=2e-3), count)
    assert "on the token" in note
    page = library.layer("run", "crate-2l", 1, LayerQuery(token=text))
    row = next(r for r in page.rows if r.index == index)
    assert row.on_token == found[1, index][0]
    shares = [r.on_token for r in page.rows]
    assert shares == sorted(shares, reverse=True)
    assert {r.index for r in page.rows} == {i for layer, i in found if layer == 1}
    hits = library.search("run", token=text, limit=10**6).hits
    assert (("crate-2l", 1, index) in {(h.model, h.layer, h.index) for h in hits})  # fmt: skip


def test_a_character_without_a_token_is_searched_by_its_first_bytes(library):
    strings = library.tokens("run").token_strings
    ids, note = library.index_of("run")._ids("中 and more")
    assert {strings.bytes[i].strip() for i in ids} == {"中".encode()[:1]}
    assert "by its first bytes" in note
    assert library.index_of("run")._ids("q$$$")[0] == []


def test_search_leaves_untrained_controls_out_unless_asked(library):
    cards = {m.name: m.null_of for m in library.run("run").models}
    controls = {name for name, of in cards.items() if of}
    assert controls
    for asked in ({"text": "fires"}, {"token": "river"}):
        found = {h.model for h in library.search("run", limit=10**6, **asked).hits}
        assert found
        assert not found & controls
        for model in cards:
            hits = library.search("run", limit=10**6, model=model, **asked).hits
            assert {h.model for h in hits} <= {model}
            assert hits or model not in found
            columns = library.table("run", model)
            for hit in hits[:5]:
                row = columns.row(hit.layer, hit.index)
                assert hit.firing_rate == columns.firing_rate[row]
    control = min(controls)
    assert library.search("run", token="river", model=control).hits
    with pytest.raises(NotFound, match="no harvest of nothing"):
        library.search("run", token="river", model="nothing")


def test_a_token_is_found_without_its_spaces(library):
    found, note = library.index_of("run").on_token("crate-2l", "river")
    assert found
    assert "ignoring spaces" in note or "on the token" in note
    none, note = library.index_of("run").on_token("crate-2l", "no such token at all")
    assert not none
    assert "There is no token" in note


def test_a_token_on_which_no_neuron_has_an_entry_is_found_and_empty(library):
    """`starts` ends at the largest token with an entry; the vocabulary goes on."""
    index = library.index_of("run")
    last = len(index._arrays["starts"]) - 2
    index._ids("river")  # fills the texts of the tokens
    index._texts["\x00beyond"] = [last + 1, last + 7]
    try:
        found, note = index.on_token("crate-2l", "\x00beyond")
    finally:
        del index._texts["\x00beyond"]
    assert found == {}
    assert "on the token" in note


def test_nearest_neurons(run, library):
    index = library.index_of("run")
    vectors = {m: np.asarray(index._vectors(m), np.float32) for m in ("crate-2l", "gpt2-2l")}
    columns = {m: library.table("run", m) for m in vectors}
    me = columns["crate-2l"].row(1, a_neuron(library))
    near = library.nearest("run", "crate-2l", 1, a_neuron(library), n=4)
    for model in vectors:
        cosines = vectors[model] @ vectors["crate-2l"][me]
        if model == "crate-2l":
            assert cosines[me] == pytest.approx(1, abs=1e-2)
            cosines[me] = -1
        best = np.argsort(-cosines, kind="stable")[:4]
        mine = [n for n in near if n.model == model]
        assert [columns[model].row(n.layer, n.index) for n in mine] == best.tolist()
        assert mine[0].similarity == pytest.approx(float(cosines[best[0]]), abs=1e-3)
        assert mine[0].similarity > 0.2


def test_vectors_keep_the_profiles(run, library):
    """The cosine of two neurons' vectors is near that of their whole profiles."""
    index, store = library.index_of("run"), library.tokens("run")
    vectors = np.asarray(index._vectors("crate-2l"), np.float32)
    columns = library.table("run", "crate-2l")
    rows = [columns.row(0, i) for i in range(0, NEURONS, 4)]
    full = np.zeros((len(rows), store.vocab_size))
    for place, i in enumerate(range(0, NEURONS, 4)):
        if columns.maximum[columns.row(0, i)] > 0:
            for token, (value, _) in profile(run, "crate-2l", 0, i).items():
                full[place, token] = value
    lengths = np.linalg.norm(full, axis=1)
    kept = lengths > 0
    unit = full[kept] / lengths[kept, None]
    ours = vectors[np.array(rows)[kept]]
    off = ~np.eye(len(unit), dtype=bool)
    assert np.corrcoef((unit @ unit.T)[off], (ours @ ours.T)[off])[0, 1] > 0.9


def test_favourite_tokens_are_those_of_the_profile(run, library):
    index = a_neuron(library)
    wanted = profile(run, "crate-2l", 1, index)
    weights = {token: count * value**2 for token, (value, count) in wanted.items()}
    row = library.table("run", "crate-2l").row(1, index)
    found = library.index_of("run").favourites("crate-2l")[row].tolist()
    best = sorted(weights.values(), reverse=True)[: len(found)]
    assert [weights[token] for token in found] == pytest.approx(best, rel=5e-3)
    dead = library.table("run", "gpt2-2l").maximum <= 0
    if dead.any():
        assert (library.index_of("run").favourites("gpt2-2l")[dead] == -1).all()


def test_a_favourite_token_is_strong_and_frequent():
    """Neither the strongest token, seen twice, nor the most frequent one, which is faint, is the first."""
    neurons, tokens = np.array([1, 1, 1, 1, 0]), np.array([10, 11, 12, 13, 10])
    values, counts = np.array([1.0, 0.8, 0.1, 0.05, 0.5]), np.array([2, 9, 100, 2, 2])
    found = favourites(neurons, tokens, values, counts, n_neurons=3)
    assert found.tolist() == [[10, -1, -1], [11, 10, 12], [-1, -1, -1]]
    empty = np.zeros(0, int)
    assert (favourites(empty, empty, empty, empty, n_neurons=2) == -1).all()


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_the_peak_of_each_neuron_is_its_strongest_excerpt(run, library, model):
    peaks, table = library.index_of("run").peaks(model), library.table("run", model)
    seen = 0
    for record in read_records(run / "activations" / model, "fit", [1], range(0, NEURONS, 7)):
        row = table.row(record.summary.neuron.layer, record.summary.neuron.index)
        excerpts = [e for e in record.excerpts if e.kind != "out_of_context"]
        top = max(float(e.activations.max()) for e in excerpts)
        assert peaks.values[row] == max(top, 0)
        if top <= 0:
            assert (peaks.tokens[row] == -1).all()
            continue
        best = next(e for e in excerpts if float(e.activations.max()) == top)
        at = int(best.activations.argmax())
        low, high = max(0, at - BEFORE), at + AFTER + 1
        inside = peaks.tokens[row] >= 0
        assert peaks.tokens[row][inside].tolist() == best.token_ids[low:high].tolist()
        assert peaks.tokens[row][BEFORE] == best.token_ids[at]
        wanted = levels(best.activations[low:high], top).tolist()
        assert peaks.levels[row][inside].tolist() == wanted
        assert peaks.levels[row].max() == 10
        seen += 1
    assert seen > 3


def test_the_map_has_every_neuron(library):
    points = library.map("run", "crate-2l", 1)
    assert [p.index for p in points] == list(range(NEURONS))
    places = np.array([(p.x, p.y) for p in points])
    assert places.min() == 0
    assert places.max() == 1
    assert len(np.unique(places.round(3), axis=0)) > NEURONS / 2


def test_the_index_is_made_once_and_again_when_the_harvest_changes(copy):
    first = Library([copy])
    first.index_of("copy").build()
    (folder,) = (copy / "viewer").glob("index-*")
    changed = (folder / "meta.json").stat().st_mtime_ns
    again = Library([copy])
    again.index_of("copy").build()
    assert (folder / "meta.json").stat().st_mtime_ns == changed
    path = copy / "activations" / "crate-2l" / "completed.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"identity": "another", "checksum": ""})
    )
    third = Library([copy])
    third.index_of("copy").build()
    (other,) = (copy / "viewer").glob("index-*")
    assert other != folder


def test_a_run_that_changes_while_it_is_served_is_indexed_again(copy):
    library = Library([copy])
    library.index_of("copy").build()
    assert library.nearest("copy", "crate-2l", 1, 0)
    manifest = copy / "manifest.json"

    def touched() -> None:
        os.utime(manifest, ns=(0, manifest.stat().st_mtime_ns + 10**9))

    touched()  # another stage was finished: the index stays
    assert library.index_state("copy").ready
    shutil.rmtree(copy / "activations" / "gpt2-2l")
    touched()
    assert not library.index_state("copy").ready
    deadline = time.monotonic() + 60
    while not library.index_state("copy").ready:
        assert time.monotonic() < deadline, library.index_state("copy").problem
        time.sleep(0.05)
    assert {n.model for n in library.nearest("copy", "crate-2l", 1, 0)} == {"crate-2l"}
    assert len(list((copy / "viewer").glob("index-*"))) == 1


def test_without_an_index_pages_say_so(run):
    library = Library([run])
    assert library.nearest("run", "crate-2l", 0, 0) == ()
    assert library.map("run", "crate-2l", 0) is None
    assert "not ready" in library.layer("run", "crate-2l", 0, LayerQuery(token="x")).note
    assert "when the index is built" in Pages(library).layer("run", "crate-2l", 0, LayerQuery())


def test_entries_of_a_row_group_are_those_of_its_neurons(run, library):
    columns = library.table("run", "crate-2l")
    path = run / "activations" / "crate-2l" / "excerpts-fit.parquet"
    assert pq.ParquetFile(path).num_row_groups == LAYERS * NEURONS / 16
    excerpts = read_excerpts(pq.ParquetFile(path), 5)
    neurons, tokens, values, counts = profile_entries(excerpts, columns)
    assert set(neurons.tolist()) <= set(range(80, 96))
    for row in set(neurons.tolist()):
        mine = neurons == row
        wanted = profile(run, "crate-2l", int(columns.layer[row]), int(columns.index[row]))
        assert counts[mine].tolist() == [wanted[t][1] for t in tokens[mine].tolist()]
        assert values[mine].tolist() == pytest.approx(
            [wanted[t][0] for t in tokens[mine].tolist()], rel=2e-3, abs=6e-8
        )  # fmt: skip  (a step of half precision)
