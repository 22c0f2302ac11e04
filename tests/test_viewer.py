"""The neuron browser: what it reads, its pages, its server, the export, and the live model."""

import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from viewer_runs import LAYERS, NEURONS, small_run

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.activations.open_harvest import open_harvested
from cratelm.activations.store import read_records, read_summaries
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.models.open import encoder_of
from cratelm.models.sites import capture
from cratelm.results.neuron_view import NeuronFiles
from cratelm.results.views import ExcerptView, LayerQuery, MapPoint, NotFound, ShadedToken
from cratelm.runs import Run
from cratelm.score.simulators import simulate
from cratelm.score.store import read_scores
from cratelm.steer.config import SteerConfig
from cratelm.steer.edits import Edit
from cratelm.steer.steer import steer
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.viewer import drawings
from cratelm.viewer.cache import Kept
from cratelm.viewer.config import ViewConfig
from cratelm.viewer.index import profile_entries
from cratelm.viewer.latex import figure
from cratelm.viewer.links import Links
from cratelm.viewer.pages import Pages, as_data, excerpts_html
from cratelm.viewer.run_reader import RARELY, Library
from cratelm.viewer.security import Rate, allowed_hosts, is_allowed, is_own
from cratelm.viewer.static_site import export
from cratelm.viewer.view import view

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")

from fastapi.testclient import TestClient

from cratelm.viewer import server
from cratelm.viewer.live import LONGEST_TEXT, Busy, Live
from cratelm.viewer.live_api import router

METRICS = ("top_and_random", "random_only", "anthropic")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def library(run) -> Library:
    """With its index."""
    library = Library([run])
    library.index_of("run").build()
    assert library.index_state("run").ready, library.index_state("run").problem
    return library


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def a_neuron(library, alive=True, explained=True) -> int:
    """Of layer 1 of crate-2l."""
    columns = library.columns("run", "crate-2l")
    here = columns.rows_of(1)
    texts, maximum = columns.text()[here], columns.maximum[here]
    return next(i for i in range(NEURONS) if bool(texts[i]) == explained and (maximum[i] > 0) == alive)  # fmt: skip


# ---- what is read ---------------------------------------------------------------------------------


def test_overview_has_the_figures_of_the_files(run, library):
    card = library.run("run")
    assert [c.name for c in card.models] == ["crate-2l", "gpt2-2l", "crate-2l-init"]
    assert card.problems == ()
    for model in card.models:
        summary = json.loads((run / "scores" / model.name / "summary.json").read_text())
        for shown in model.metrics:
            wanted = {"explainer": "trie", "metric": shown.metric, "policy": "leave_out"}
            told = {s["control"]: s for s in summary["statistics"] if wanted.items() <= s.items()}
            own = told["none"]
            mean = shown.mean and shown.mean.mean
            assert mean == own["mean"]
            assert (shown.defined, shown.undefined, shown.dead) == tuple(own["counts"][k] for k in ("defined", "undefined", "dead"))  # fmt: skip
            assert {n: v.mean for n, v in shown.by_layer.items()} == {la["layer"]: la["mean"] for la in own["layers"] if la["mean"] is not None}  # fmt: skip
        summaries = read_summaries(run / "activations" / model.name, "held_out")
        for layer in range(LAYERS):
            here = [s for s in summaries if s.neuron.layer == layer]
            assert model.neurons[layer] == NEURONS
            assert model.dead[layer] == sum(s.dead for s in here)
            assert model.firing[layer] == pytest.approx(np.mean([s.firing_rate for s in here]))
        assert model.loss == json.loads((run / "model" / model.name / "completed.json").read_text())["results"].get("validation_loss")  # fmt: skip
    assert card.null(card.model("crate-2l")).name == "crate-2l-init"


def test_columns_have_every_explanation_and_score(run, library):
    columns = library.columns("run", "gpt2-2l")
    for e in read_explanations(run / "explanations" / "gpt2-2l"):
        row = columns.row(e.neuron.layer, e.neuron.index)
        assert columns.texts["", e.explainer][row] == e.text
    count = 0
    for s in read_scores(run / "scores" / "gpt2-2l"):
        if s.control == "none":
            column = columns.scores["", s.explainer, s.metric]
            row = columns.row(s.neuron.layer, s.neuron.index)
            assert column.status[row] == s.score.status
            assert column.reasons[row] == s.score.reason
            value = np.nan if s.score.value is None else 100 * s.score.value
            np.testing.assert_equal(column.values[row], value)
            count += 1
    assert sum((c.status != "").sum() for c in columns.scores.values()) == count
    assert columns.row(0, NEURONS) is None
    assert columns.row(5, 0) is None


def brute(run, model="crate-2l", layer=1):
    """Rows of a layer from the readers of records: index, explanation, score, maximum, rate."""
    texts = {(e.neuron.layer, e.neuron.index): e.text for e in read_explanations(run / "explanations" / model) if e.explainer == "trie"}  # fmt: skip
    scores = {(s.neuron.layer, s.neuron.index): s.score.value for s in read_scores(run / "scores" / model) if (s.explainer, s.metric, s.control) == ("trie", "random_only", "none")}  # fmt: skip
    summaries = [s for s in read_summaries(run / "activations" / model, "held_out") if s.neuron.layer == layer]  # fmt: skip
    return [(s.neuron.index, texts.get((layer, s.neuron.index), ""), scores.get((layer, s.neuron.index)), s.maximum, s.firing_rate) for s in summaries]  # fmt: skip


@pytest.mark.parametrize("descending", [False, True])
def test_a_layer_is_sorted(run, library, descending):
    rows = brute(run)
    sign = -1 if descending else 1
    for sort, key in (
        ("random_only", lambda r: (r[2] is None, sign * (r[2] or 0), r[0])),
        ("maximum", lambda r: (sign * r[3], r[0])),
        ("firing_rate", lambda r: (sign * r[4], r[0])),
        ("index", lambda r: sign * r[0]),
    ):
        found = library.layer("run", "crate-2l", 1, LayerQuery(sort=sort, descending=descending))
        assert [r.index for r in found.rows] == [r[0] for r in sorted(rows, key=key)]
    best = library.layer("run", "crate-2l", 1, LayerQuery())
    assert (best.query.sort, best.query.descending) == ("top_and_random", True)


def test_a_layer_is_filtered_and_paged(run, library):
    rows = brute(run)

    def found(**query):
        page = library.layer("run", "crate-2l", 1, LayerQuery(sort="index", **query))
        assert page.total >= len(page.rows)
        return [r.index for r in page.rows]

    assert found(only="explained") == [r[0] for r in rows if r[1]]
    assert found(only="dead") == [r[0] for r in rows if r[3] <= 0]
    assert found(only="alive") == [r[0] for r in rows if r[3] > 0]
    word = next(r[1] for r in rows if r[1]).split()[-1]
    wanted = [r[0] for r in rows if word.casefold() in r[1].casefold()]
    assert 0 < len(wanted) == len(found(text=word.upper()))
    assert found(per_page=10, page=3) == [r[0] for r in rows][20:30]
    assert found(text="no explanation says this") == []
    with pytest.raises(NotFound, match="crate-2l has no layer 7: it has 0, 1"):
        library.layer("run", "crate-2l", 7, LayerQuery())


@pytest.mark.parametrize("split", ["held_out", "fit"])
def test_a_neuron_has_its_excerpts(run, library, split):
    index = a_neuron(library)
    view = library.neuron("run", "crate-2l", 1, index, split, shown="all")
    (record,) = read_records(run / "activations" / "crate-2l", split, [1], [index])
    store = library.tokens("run")
    payload = next(e.payload for e in read_explanations(run / "explanations" / "crate-2l") if (e.neuron.layer, e.neuron.index, e.explainer) == (1, index, "trie"))  # fmt: skip
    simulated = simulate("trie", payload, [e.token_ids for e in record.excerpts])
    assert view.problems == ()
    assert len(view.excerpts) == len(record.excerpts) > 20
    assert view.held_back == 0
    for shown, e, other in zip(view.excerpts, record.excerpts, simulated, strict=True):
        assert (shown.kind, shown.bin, shown.rank, shown.peak) == (e.kind, e.bin, e.rank, e.peak)
        assert [t.text for t in shown.true] == store.decode_tokens(e.token_ids)
        assert [t.value for t in shown.true] == e.activations.tolist()
        assert [t.value for t in shown.simulated] == pytest.approx(other.tolist())
    top = max(e.activations.max() for e in record.excerpts)
    levels = {t.level for e in view.excerpts for t in e.true if t.value == top}
    assert levels == {10}
    top = max(s.max() for s in simulated)
    assert {t.level for e in view.excerpts for t in e.simulated if t.value == top} == {10}
    rows = pq.read_table(run / "tokens" / "documents.parquet").to_pylist()
    names = [f"{r['name'] or r['source']}{':' + str(r['line']) if r['line'] else ''}" for r in rows]
    assert [e.document for e in view.excerpts] == [names[e.document] for e in record.excerpts]
    assert len({e.document for e in view.excerpts}) > 5
    assert view.statistics["firing_rate"] == record.summary.firing_rate
    assert sum(view.histogram) == record.summary.histogram.sum()
    assert view.tokens[0].value > 0
    less = library.neuron("run", "crate-2l", 1, index, split)
    assert len(less.excerpts) + less.held_back == len(view.excerpts)
    assert {e.kind for e in less.excerpts} == {e.kind for e in view.excerpts}


def test_documents_are_named_from_any_row_group(copy):
    path = copy / "tokens" / "documents.parquet"
    table = pq.read_table(path)
    whole = NeuronFiles(Run(copy), Kept()).documents(range(len(table)))
    assert len(set(whole.values())) > 5
    pq.write_table(table, path, row_group_size=3)
    assert NeuronFiles(Run(copy), Kept()).documents(range(-1, len(table) + 1)) == whole


def test_tokens_at_zero_share_one_span():
    true = [("a", 0.0, 0), ("b", 0.0, 0), ("c", 1.25, 5), ("d", 2.5, 10), ("e", -0.0, 0), ("א", -0.0, 0), ("f", 0.0, 0), ("g", 0.0, 0)]  # fmt: skip
    view = ExcerptView("top", 0, 0, 7, "name", tuple(ShadedToken(*t) for t in true), ())
    assert (
        '<span title="0">ab</span><span class="l5" title="1.25">c</span>'
        '<span class="l10" title="2.5">d</span><span title="0">e</span><bdi title="0">א</bdi>'
        '<span title="0">f</span><span class="peak" title="0">g</span></div>'
    ) in excerpts_html([view])


def test_neighbours_in_the_layer_and_effects(library):
    first, last = (library.neuron("run", "crate-2l", 0, i) for i in (0, NEURONS - 1))
    assert (first.previous, first.following) == (None, 1)
    assert (last.previous, last.following) == (NEURONS - 2, None)
    views = [library.neuron("run", "crate-2l", 0, i) for i in range(NEURONS)]
    assert any(v.promoted and v.suppressed for v in views)
    assert not any(library.neuron("run", "gpt2-2l", 0, i).promoted for i in range(3))
    left_out = next(v for v in views if not v.promoted)
    pages, command = Pages(library), "cratelm effects --run"
    assert "--neurons 0 --force` measures it" in pages.neuron(left_out)
    assert command not in pages.neuron(next(v for v in views if v.promoted))
    never = pages.neuron(library.neuron("run", "gpt2-2l", 0, 0))
    assert command in never
    assert "--force" not in never


def test_a_dead_neuron_and_one_without_explanation(library):
    view = library.neuron("run", "crate-2l", 1, a_neuron(library, explained=False))
    assert view.explanations == ()
    assert view.explainer == ""
    assert all(not e.simulated for e in view.excerpts)
    page = Pages(library).neuron(view)
    assert "Not explained" in page


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (("nope", "crate-2l", 0, 0), "there is no run 'nope' here: there are run"),
        (("run", "nope", 0, 0), "run has no harvest of nope: it has crate-2l"),
        (("run", "crate-2l", 0, 64), "no neuron 64 in layer 0: it has 0 to 63"),
        (("run", "crate-2l", 9, 0), "no such layer"),
        (("run", "../crate-2l", 0, 0), "no harvest of ../crate-2l"),
    ],
)
def test_what_is_not_there_is_told(library, place, told):
    with pytest.raises(NotFound, match=re.escape(told)):
        library.neuron(*place)


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    shutil.copytree(run / "tokens", tmp_path / "run" / "tokens")
    library = Library([run, tmp_path / "run"])
    assert library.keys == ("run", "run-2")
    with pytest.raises(InputError, match="is not there: a run directory was expected"):
        Library([tmp_path / "nothing"])


# ---- the index ------------------------------------------------------------------------------------


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
            columns = library.columns("run", model)
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
    assert "but for spaces" in note or "on the token" in note
    none, note = library.index_of("run").on_token("crate-2l", "no such token at all")
    assert not none
    assert "No token is" in note


def test_nearest_neurons(run, library):
    index = library.index_of("run")
    vectors = {m: np.asarray(index._vectors(m), np.float32) for m in ("crate-2l", "gpt2-2l")}
    columns = {m: library.columns("run", m) for m in vectors}
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
    columns = library.columns("run", "crate-2l")
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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": "another"}))
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
    columns = library.columns("run", "crate-2l")
    path = run / "activations" / "crate-2l" / "excerpts-fit.parquet"
    assert pq.ParquetFile(path).num_row_groups == LAYERS * NEURONS / 16
    neurons, tokens, values, counts = profile_entries(pq.ParquetFile(path), 5, columns)
    assert set(neurons.tolist()) <= set(range(80, 96))
    for row in set(neurons.tolist()):
        mine = neurons == row
        wanted = profile(run, "crate-2l", int(columns.layer[row]), int(columns.index[row]))
        assert counts[mine].tolist() == [wanted[t][1] for t in tokens[mine].tolist()]
        assert values[mine].tolist() == pytest.approx([wanted[t][0] for t in tokens[mine].tolist()], rel=2e-3)  # fmt: skip


# ---- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "activations/crate-2l/excerpts-held_out.parquet",
        "activations/crate-2l/summaries-held_out.parquet",
        "explanations/crate-2l/explanations.parquet",
        "scores/crate-2l/scores.parquet",
        "scores/crate-2l/summary.json",
        "tokens/meta.json",
        "tokens/documents.parquet",
        "steer/crate-2l/logit_effects.parquet",
        "model/crate-2l/completed.json",
    ],
)
@pytest.mark.parametrize("how", ["cut", "gone", "garbage"])
def test_a_damaged_run_shows_what_is_there(copy, file, how):
    path = copy / file
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if how == "cut" else b"{garbage" * 30)
    library = Library([copy])
    client = TestClient(server.application(library, rate=Rate(1e9, 1e9)), "http://127.0.0.1", raise_server_exceptions=True)  # fmt: skip
    overview = client.get("/")
    assert overview.status_code == 200
    assert "gpt2-2l" in overview.text
    assert client.get("/r/copy/neuron/gpt2-2l/0/3").status_code == (200)
    for address in ("/r/copy/layer/crate-2l/0", "/r/copy/neuron/crate-2l/0/3"):
        answer = client.get(address)
        assert answer.status_code in (200, 404)
        assert "Traceback" not in answer.text
        if answer.status_code == 404:
            assert "summaries" in file or "completed" in file
            assert "cratelm harvest" in answer.text or "cannot" in answer.text


@pytest.mark.parametrize("how", ["gone", "garbage"])
def test_without_the_names_of_documents_excerpts_are_there(copy, how):
    path = copy / "tokens" / "documents.parquet"
    path.unlink() if how == "gone" else path.write_bytes(b"{garbage" * 30)
    view = Library([copy]).neuron("copy", "crate-2l", 0, 3)
    assert [p for p in view.problems if p.startswith("names of documents cannot be shown")]
    assert len(view.problems) == 1
    assert view.excerpts
    assert all(re.fullmatch(r"document \d+", e.document) for e in view.excerpts)


def test_a_half_finished_run_says_what_is_missing(copy):
    shutil.rmtree(copy / "scores" / "gpt2-2l")
    (copy / "activations" / "gpt2-2l").rename(copy / "activations" / ".gpt2-2l.partial")
    shutil.rmtree(copy / "explanations")
    library = Library([copy])
    card = library.run("copy")
    missing = " ".join(card.model("gpt2-2l").missing)
    for verb in ("harvest", "explain", "score"):
        assert f"cratelm {verb} --run" in missing
    page = Pages(library).overview("copy")
    assert "What is missing" in page
    with pytest.raises(NotFound, match="no finished harvest of gpt2-2l"):
        library.columns("copy", "gpt2-2l")
    assert "trie" in Pages(library).layer("copy", "crate-2l", 0, LayerQuery())


def test_an_empty_run_is_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    client = TestClient(server.application(Library([tmp_path / "empty"])), "http://127.0.0.1")
    answer = client.get("/")
    assert answer.status_code == 200
    assert "holds no finished model: type `cratelm demo --run" in answer.text


# ---- hostile text ---------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Elements, references and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def all_pages(library) -> dict[str, str]:
    pages = Pages(library, live=True)
    found = {"overview": pages.overview(), "live": pages.live_page("run")}
    for model in ("crate-2l", "gpt2-2l"):
        found[f"layer {model}"] = pages.layer("run", model, 1, LayerQuery(token="<script>"))
        for index in range(6):
            view = library.neuron("run", model, 1, index, shown="all")
            found[f"{model} {index}"] = pages.neuron(view)
    found["search"] = pages.search("run", "<script>alert(1)</script>", "")
    found["token"] = pages.search("run", "", "\u202e<img src=x>")
    found["compare"] = pages.compare("run", "crate-2l/1/2", '"><script>x</script>/1')
    found["error"] = pages.error(404, "</p><script>alert(1)</script>")
    return found


def test_nothing_in_a_corpus_acts(library):
    seen = ""
    for name, page in all_pages(library).items():
        page.encode("utf-8")
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", page), name  # fmt: skip
        parsed = Parsed(page)
        for tag, attributes in parsed.tags:
            assert tag not in ("iframe", "object", "embed", "img", "base"), (name, tag)
            assert not any(key.startswith("on") or key == "style" for key in attributes), (name, tag)  # fmt: skip
            if tag == "script":
                assert attributes.get("type") == "application/json" or attributes["src"].startswith("/assets/")  # fmt: skip
            for key in ("href", "src", "action"):
                assert not (attributes.get(key) or "").startswith(("javascript", "//", "http"))
        seen += parsed.words
    assert "script" in seen
    assert "\\x1b" in seen
    assert "{{" in seen


def test_data_cannot_end_its_block():
    told = {"a": "</script><script>alert(1)</script><!--", "b": "\ud800\u2028"}
    shown = str(as_data(told))
    assert "<" not in shown
    assert shown.isascii()
    assert json.loads(shown) == told


def test_latex_is_ascii_and_balanced(library):
    for index in range(8):
        told = figure(library.neuron("run", "crate-2l", 1, index))
        assert told.isascii()
        plain = re.sub(r"\\[{}]", "", told)
        assert plain.count("{") == plain.count("}")
        assert r"\begin{figure}" in told
        assert "\x1b" not in told


def test_latex_has_the_strongest_excerpts_alone(library):
    view = library.neuron("run", "crate-2l", 1, a_neuron(library))
    assert len({e.kind for e in view.excerpts}) > 2
    backwards = replace(view, excerpts=view.excerpts[::-1])
    tops = [e for e in view.excerpts if e.kind == "top"]
    assert figure(backwards) == figure(replace(view, excerpts=tuple(tops[::-1])))
    assert figure(view).count("[2pt]") == min(5, len(tops)) > 0


def test_an_open_last_bin_is_told(library):
    view = library.neuron("run", "crate-2l", 1, a_neuron(library))
    high = view.statistics["maximum"]
    assert f">{high:.3g}<" in drawings.histogram(replace(view, histogram_high=high))
    assert f">{high / 2:.3g} or more<" in drawings.histogram(replace(view, histogram_high=high / 2))


def test_a_large_map_carries_no_explanations():
    def points(n):
        return [MapPoint(i, i / n, 0.5, None if i else 73.4, f"text {i}") for i in range(n)]

    drawn = drawings.layer_map(points(1024), lambda i: f"/n/{i}" if i % 2 else "")
    assert "<title>0 (73): text 0</title>" in drawn
    assert "<title>1023 (no score): text 1023</title>" in drawn
    assert drawn.count("<a ") == 512
    assert "text" not in drawings.layer_map(points(1025), lambda i: "")


# ---- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(library):
    live = Live(library)
    yield live
    live.close()


@pytest.fixture(scope="module")
def client(library, live):
    app = server.application(library, live=router(live), rate=Rate(1e9, 1e9))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def test_every_server_counts_requests_of_its_own(library, live):
    first, second = (
        TestClient(server.application(library, live=router(live)), "http://127.0.0.1")
        for _ in range(2)
    )
    found = [first.get("/api/nothing").status_code for _ in range(server.BURST + 200)]
    assert found[0] == 404
    assert 429 in found
    assert second.get("/api/nothing").status_code == 404
    question = {"model": "crate-2l", "text": "stone", "layer": 0, "neuron": 0}
    mine = {"origin": "http://127.0.0.1"}
    strict = [
        TestClient(
            server.application(library, live=router(live, Rate(1, 0)), rate=Rate(1e9, 1e9)),
            "http://127.0.0.1",
        )
        for _ in range(2)
    ]
    for client in strict:
        status = [
            client.post("/api/r/run/live/activations", json=question, headers=mine).status_code
            for _ in range(2)
        ]
        assert status == [200, 429]


def test_every_link_leads_somewhere(client):
    todo, seen = ["/"], set()
    while todo:
        address = todo.pop()
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text[:200])
        if "text/html" not in answer.headers["content-type"]:
            continue
        for _, attributes in Parsed(answer.text).tags:
            link = (attributes.get("href") or attributes.get("src") or "").partition("#")[0]
            kind = re.sub(r"\d+", "9", link)
            if link.startswith("/") and link not in seen and sum(re.sub(r"\d+", "9", s) == kind for s in seen) < 4:  # fmt: skip
                seen.add(link)
                todo.append(link)
    kinds = {s.split("/")[3] for s in seen if s.count("/") > 2 and s.startswith("/r/")}
    assert {"layer", "neuron", "compare", "live"} <= {k.partition("?")[0] for k in kinds}


def test_headers_of_every_answer(client):
    for address in ("/", "/nope", "/api/runs", "/assets/style.css", "/r/run/neuron/crate-2l/0/0"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("host", "listens", "allowed"),
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("localhost:8000", "127.0.0.1", True),
        ("[::1]:8000", "::1", True),
        ("LOCALHOST", "127.0.0.1", True),
        ("evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example:8000", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("192.168.0.4:8000", "127.0.0.1", False),
        ("192.168.0.4:8000", "0.0.0.0", True),
        ("evil.example:8000", "0.0.0.0", False),
        ("lab.example:8000", "lab.example", True),
    ],
)
def test_hosts(host, listens, allowed):
    anywhere = listens in ("0.0.0.0", "::")
    assert is_allowed(host, allowed_hosts(listens), anywhere) is allowed


def test_other_hosts_and_sites_are_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    body = {"model": "crate-2l", "text": "a", "layer": 0, "neuron": 0}
    address = "/api/r/run/live/activations"
    assert client.post(address, json=body).status_code == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:99"):
        assert client.post(address, json=body, headers={"origin": origin}).status_code == 403
    own = {"origin": "http://127.0.0.1"}
    assert client.post(address, json=body, headers=own).status_code == 200
    assert is_own("http://127.0.0.1:80", "127.0.0.1:80")


@pytest.mark.parametrize(
    "address",
    [
        "/r/run/neuron/..%2f..%2ftokens/0/0",
        "/r/..%2f../layer/crate-2l/0",
        "/assets/..%2fserver.py",
        "/assets/%2e%2e/guard.py",
        "/r/run/neuron/crate-2l/0/-1",
        "/r/run/neuron/crate-2l/0/999999999999999999999",
        "/r/run/layer/crate-2l/0?page=0",
        "/r/run/layer/crate-2l/0?only=%3Cscript%3E",
        "/r/run/search?q=" + "x" * 300,
        "/r/run/neuron/crate-2l/0/0?split=train",
        "/?" + "x" * 5000,
    ],
)
def test_bad_addresses_are_told(client, address):
    answer = client.get(address)
    assert answer.status_code in (400, 404, 414)
    assert "<script>" not in answer.text.replace("<script src", "")
    assert "Traceback" not in answer.text
    api = client.get("/api" + address)
    assert api.status_code in (400, 404, 414)
    assert set(api.json()) == {"error"}


def test_a_bug_is_one_sentence(library, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret")

    monkeypatch.setattr(Library, "run", broken)
    client = TestClient(server.application(library, rate=Rate(1e9, 1e9)), "http://127.0.0.1", raise_server_exceptions=False)  # fmt: skip
    answer = client.get("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_a_body_that_is_too_long_is_refused(client):
    answer = client.post("/api/r/run/live/steer", content=b"x" * 70_000, headers={"origin": "http://127.0.0.1"})  # fmt: skip
    assert answer.status_code == 413


def test_a_body_of_unknown_length_is_refused(client):
    answer = client.post("/api/r/run/live/steer", content=iter([b"{}"]), headers={"origin": "http://127.0.0.1"})  # fmt: skip
    assert answer.status_code == 411
    assert "length" in answer.json()["error"]


def test_rates():
    rate = Rate(burst=3, per_second=2)
    assert [rate.take("a", now=0.0) for _ in range(4)] == [True, True, True, False]
    assert rate.take("b", now=0.0)
    assert [rate.take("a", now=0.6) for _ in range(2)] == [True, False]
    assert [rate.take("a", now=60.0) for _ in range(4)] == [True, True, True, False]


def test_assets_are_asked_for_once(client):
    first = client.get("/assets/app.js")
    again = client.get("/assets/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")


def test_json_is_the_same_as_the_page(client, library):
    told = client.get("/api/r/run/neuron/crate-2l/1/3").json()
    view = library.neuron("run", "crate-2l", 1, 3)
    assert told["statistics"] == pytest.approx(dict(view.statistics), nan_ok=True)
    for e, shown in zip(told["excerpts"], view.excerpts, strict=True):
        assert e["tokens"] == [t.text for t in shown.true]
        assert e["activations"] == pytest.approx([t.value for t in shown.true], rel=1e-5)
        assert e["simulated"] == pytest.approx([t.value for t in shown.simulated], rel=1e-5)
        assert (e["kind"], e["bin"], e["peak"]) == (shown.kind, shown.bin, shown.peak)
    assert client.get("/api/r/run/index").json()["ready"] is True
    card = client.get("/api/r/run/neuron/crate-2l/1/3/card.svg")
    assert card.headers["content-type"].startswith("image/svg+xml")
    from xml.etree import ElementTree

    assert ElementTree.fromstring(card.text).tag.endswith("svg")


def test_layers_and_neurons_side_by_side(client):
    layers = client.get("/r/run/compare", params={"left": "crate-2l/1"}).text
    assert "crate-2l, layer 1" in layers
    assert "gpt2-2l, layer 1" in layers
    neurons = client.get("/r/run/compare", params={"left": "crate-2l/1/2", "right": "gpt2-2l/0/5"}).text  # fmt: skip
    assert "crate-2l layer 1 neuron 2" in neurons
    assert "gpt2-2l layer 0 neuron 5" in neurons
    assert "was expected, such as" in client.get("/r/run/compare?left=x").text


def test_beside_a_neuron_stands_the_twins_nearest(client, library):
    index = a_neuron(library)
    near = [n for n in library.nearest("run", "crate-2l", 1, index) if n.model == "gpt2-2l"]
    best = max(near, key=lambda n: n.similarity)
    shown = client.get("/r/run/compare", params={"left": f"crate-2l/1/{index}"}).text
    assert f"gpt2-2l layer {best.layer} neuron {best.index}" in shown
    assert f"cosine {best.similarity:.2f}" in shown
    alone = client.get("/r/run/compare", params={"left": "crate-2l-init/1/2"}).text
    assert "crate-2l-init has no twin in this run" in alone
    assert "crate-2l-init layer 1 neuron 2" in alone


def test_scores_of_layers_beside_each_other(run, library, client):
    rows = [(index, value) for index, _, value, _, _ in brute(run) if value is not None]
    found = next(s for s in library.spreads("run", "crate-2l", 1) if s.metric == "random_only")
    assert found.defined == len(rows)
    assert found.mean.mean == pytest.approx(np.mean([100 * v for _, v in rows]))
    bins = np.clip([100 * v for _, v in rows], 0, 100) // 5
    wanted = np.bincount(np.minimum(bins, 19).astype(int), minlength=20) / len(rows)
    assert found.shares == pytest.approx(wanted.tolist())
    told = {m: [s.metric for s in library.spreads("run", m, 0)] for m in ("crate-2l", "gpt2-2l")}
    assert told["crate-2l"] == told["gpt2-2l"] == list(METRICS)
    shown = client.get("/r/run/compare", params={"left": "crate-2l/1"}).text
    assert shown.count("spread of") == len(METRICS)
    assert f"{found.defined} of {found.neurons}" in shown


def test_overview_begins_with_selective_neurons_that_are_explained_well(library, client):
    for model in ("crate-2l", "gpt2-2l"):
        columns = library.columns("run", model)
        values = columns.score("top_and_random").values
        rare = [(v, r) for r, v in enumerate(values.tolist()) if v > 0 and columns.firing_rate[r] < RARELY]  # fmt: skip
        wanted = [(int(columns.layer[r]), int(columns.index[r])) for v, r in sorted(rare, key=lambda x: -x[0])[:5]]  # fmt: skip
        assert [(h.layer, h.index) for h in library.best("run", model)] == wanted
        page = client.get("/r/run").text
        for layer, index in wanted:
            assert f">{layer}:{index}</a>" in page
    assert any(library.best("run", m) for m in ("crate-2l", "gpt2-2l"))


def test_another_explainer_simulates_when_asked(library, client):
    index = a_neuron(library)
    page = client.get(f"/r/run/neuron/crate-2l/1/{index}").text
    assert "simulated by trie" in page
    link = re.search(r'<a href="([^"]*explainer=lookup)#exc">lookup</a>', page)
    other = client.get(link[1].replace("&amp;", "&")).text
    assert "simulated by lookup" in other
    assert re.search(r'explainer=lookup&amp;all=1|explainer=lookup[^"]*all=1', other)


def test_pages_are_written_into_any_folder_that_is_empty(library, tmp_path, monkeypatch, capfd):
    def written(named: str) -> None:
        result = export(library, Path(named), 1, force=False)
        assert result.path == Path(named) or named.startswith("made")
        assert (result.path / "index.html").is_file()

    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    written(".")
    assert (Path.cwd() / "index.html").is_file()  # the shell's folder is still this one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "empty").mkdir()
    for named in ("link/", "new/", "made/../other", "empty/../empty2/"):
        written(named)
    assert (tmp_path / "link").is_symlink()
    first = (tmp_path / "new" / "index.html").read_bytes()
    (tmp_path / "new" / "stale.html").write_text("of before")
    capfd.readouterr()
    export(library, Path("new"), 1, force=True, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "new" / "index.html").read_bytes() == first
    assert not (tmp_path / "new" / "stale.html").exists()
    assert not list(tmp_path.glob(".*"))


def test_pages_are_written_into_no_other_folder(library, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "below")
    for named, told in (
        ("..", "holds other files"),
        ("/", "holds other files"),
        ("../file", "is a file"),
        ("../file/pages", "is a file, a folder was expected"),
    ):
        with pytest.raises(InputError, match=told) as error:
            export(library, Path(named), 1, force=True)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


# ---- the model ------------------------------------------------------------------------------------

TEXT = "the river <script>alert('corpus')</script> import stone 🙂\n\t  x"


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_activations_are_the_models(run, live, model):
    held = open_harvested(Run(run), model)
    encoder = encoder_of(held.subject, Run(run))
    ids = torch.tensor([[encoder.start, *encoder.encode(TEXT).tolist()]])
    wanted = capture(held.subject.model, held.site, ids)[1][0, 1:, 7]
    found = live.activations("run", model, TEXT, 1, 7)
    assert found.values == pytest.approx(wanted.tolist())
    assert "".join(found.tokens).startswith("the river")
    assert found.cut == 0
    assert found.maximum == next(s.maximum for s in read_summaries(run / "activations" / model, "held_out") if (s.neuron.layer, s.neuron.index) == (1, 7))  # fmt: skip


def test_the_strongest_neurons_at_a_token(run, live):
    maxima = {(s.neuron.layer, s.neuron.index): s.maximum for s in read_summaries(run / "activations" / "crate-2l", "held_out")}  # fmt: skip
    found = live.strongest("run", "crate-2l", TEXT, 2)
    shares = {}
    for (layer, index), maximum in maxima.items():
        if maximum > 0:
            value = live.activations("run", "crate-2l", TEXT, layer, index).values[2]
            shares[layer, index] = value / maximum
    best = sorted(shares.values(), reverse=True)[: len(found)]
    assert [s.share for s in found] == pytest.approx([b for b in best if b > 0], rel=1e-5)
    assert all(shares[s.layer, s.index] == pytest.approx(s.share, rel=1e-5) for s in found)
    with pytest.raises(InputError, match="token 4000: the text has tokens 0 to"):
        live.strongest("run", "crate-2l", TEXT, 4000)


@pytest.mark.parametrize("operation", ["set", "add", "scale", "zero"])
def test_steering_is_that_of_the_verb(run, live, operation):
    value = True if operation == "zero" else 3.0
    edit = Edit(1, 7, **{operation: value})
    found = live.steer("run", "crate-2l", TEXT, edit, 5)
    wanted = steer(SteerConfig(run=run, model="crate-2l", neurons=("1:7",), text=TEXT, generate=5, **{operation: value}))  # fmt: skip
    assert found.kl == pytest.approx(wanted.next_token.kl, abs=1e-6)
    assert (found.plain, found.steered) == (wanted.continuation, wanted.steered_continuation)
    chances = {t.token: (t.before, t.after) for t in found.chances}
    for c in wanted.next_token.gains[:3]:
        assert chances[c.token] == pytest.approx((c.before, c.after), abs=1e-6)
    plain = live.steer("run", "crate-2l", TEXT, Edit(1, 7, add=0.0), 5)
    assert plain.kl == 0
    assert plain.plain == plain.steered == found.plain


def test_answers_are_those_of_the_harvest_and_explanations_of_now(copy):
    live = Live(Library([copy]))
    edit = Edit(1, 7, add=3.0)

    def asked():
        return (
            live.activations("copy", "gpt2-2l", TEXT, 1, 7),
            live.strongest("copy", "gpt2-2l", TEXT, 2),
            live.steer("copy", "gpt2-2l", TEXT, edit, 2),
        )

    before = asked()
    assert all(a is b for a, b in zip(before, asked(), strict=True))  # remembered
    explain(ExplainConfig(run=copy, model="gpt2-2l", neurons=40, quiet=True, explainers=("trie",), max_entries=1, force=True))  # fmt: skip
    texts = live.library.columns("copy", "gpt2-2l").text()
    for s in live.strongest("copy", "gpt2-2l", TEXT, 2):
        assert s.explanation == texts[NEURONS * s.layer + s.index]
    train(TrainConfig(run=copy, model="gpt2-2l", steps=2, seed=1, quiet=True, tensorboard=False, force=True, validate_every=2, model_overrides=("hidden_size=16", "num_attention_heads=2"), sequence_length=64, validation_sequences=8, batch_size=4))  # fmt: skip
    harvest(HarvestConfig(run=copy, model="gpt2-2l", tokens=2500, pilot_tokens=256, device="cpu", force=True))  # fmt: skip
    other = Live(Library([copy]))  # which remembers nothing
    after = asked()
    assert after[0] == other.activations("copy", "gpt2-2l", TEXT, 1, 7)
    assert after[1] == other.strongest("copy", "gpt2-2l", TEXT, 2)
    assert after[2] == other.steer("copy", "gpt2-2l", TEXT, edit, 2)
    assert all(a != b for a, b in zip(before, after, strict=True))
    live.close()
    other.close()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda model: shutil.rmtree(model), "cratelm train"),
        (lambda model: (model / "model.safetensors").unlink(), "no model can be loaded from"),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), "no model can be loaded from"),
        (lambda model: (model / "config.json").write_text("{"), "no model can be loaded from"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_told_at_once(copy, monkeypatch, damage, told):
    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    damage(copy / "model" / "gpt2-2l")
    live = Live(Library([copy]))
    with pytest.raises(InputError, match=told) as error:
        live.activations("copy", "gpt2-2l", "stone", 1, 7)
    assert "\n" not in str(error.value)
    assert live.activations("copy", "crate-2l", "stone", 1, 7).values
    live.close()


def test_a_folder_that_was_harvested_and_is_gone_is_told_at_once(copy, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    done = copy / "activations" / "gpt2-2l" / "completed.json"
    told = json.loads(done.read_text())
    done.write_text(json.dumps(told | {"config": told["config"] | {"model": "models/mine"}}))
    with pytest.raises(InputError, match="models/mine is not there"):
        open_harvested(Run(copy), "gpt2-2l")


def test_overview_colours_are_those_of_the_table(copy):
    shutil.rmtree(copy / "scores" / "crate-2l")
    card = Library([copy]).run("copy")
    assert [c.name for c in card.models if not c.null_of] == ["crate-2l", "gpt2-2l"]
    drawn = drawings.scores_by_layer(card, "top_and_random")
    assert "line c1" in drawn
    assert "c0" not in drawn


def test_texts_that_the_model_is_not_asked_about(live):
    for text, told in (("x" * (LONGEST_TEXT + 1), "4,001 characters, at most 4,000"), ("", "empty")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            live.activations("run", "crate-2l", text, 1, 7)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"text": ""}, "text: "),
        ({"text": "x" * (LONGEST_TEXT + 1)}, "text: "),
        ({"neuron": 64}, "crate-2l has no neuron 64 in layer 1"),
        ({"layer": 3}, "has no neuron 7 in layer 3"),
        ({"model": "../x"}, "no harvest of ../x"),
        ({"value": 1e99}, "value: "),
        ({"operation": "explode"}, "operation: "),
        ({"tokens": 65}, "tokens: "),
        ({"more": 1}, "more: "),
    ],
)
def test_bad_questions_are_told(client, asked, told):
    body = {"model": "crate-2l", "text": TEXT, "layer": 1, "neuron": 7, "operation": "set", "value": 1.0}  # fmt: skip
    answer = client.post("/api/r/run/live/steer", json=body | asked, headers={"origin": "http://127.0.0.1"})  # fmt: skip
    assert answer.status_code in (400, 404)
    assert told in answer.json()["error"]


def test_hostile_text_is_read(live):
    for text in ("\x00", "\ud800", "\u202e\x1b[31m", "\n" * 50, "word " * 700):
        found = live.activations("run", "crate-2l", text, 0, 0)
        assert len(found.tokens) == len(found.values) <= 63
    assert found.cut > 0


def test_ten_clients_at_once(run, library):
    live = Live(library)
    problems, done = [], []

    def client(number):
        try:
            for turn in range(4):
                text = f"client {number} river turn {turn}"
                found = live.activations("run", ("crate-2l", "gpt2-2l")[number % 2], text, 1, 3)
                assert "".join(found.tokens) == text
                done.append(found)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.close()
    assert problems == []
    assert len(done) == 40


def test_a_long_line_is_told_instead_of_waited_for(library, monkeypatch):
    monkeypatch.setattr("cratelm.viewer.live._PATIENCE", 0.3)
    live = Live(library)
    gate = threading.Event()
    live._worker.submit(gate.wait)
    with pytest.raises(Busy, match="did not answer within"):
        live.activations("run", "crate-2l", "a", 0, 0)
    held = [live._waiting.acquire(blocking=False) for _ in range(100)]
    with pytest.raises(Busy, match="too many requests"):
        live.activations("run", "crate-2l", "b", 0, 0)
    for _ in range(sum(held)):
        live._waiting.release()
    gate.set()
    assert live.activations("run", "crate-2l", "c", 0, 0).tokens
    live.close()


def test_one_model_is_held_at_a_time(live):
    live.activations("run", "crate-2l", "a stone", 0, 0)
    live.activations("run", "gpt2-2l", "a stone", 0, 0)
    assert live._held[0][1] == "gpt2-2l"
    model = live._held[1].subject.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- the export -----------------------------------------------------------------------------------


def test_every_link_of_an_export_is_a_file(run, tmp_path, capsys):
    assert main(["view", str(run), "--static", str(tmp_path / "out"), "--neurons", "5"]) == 0
    told = capsys.readouterr().out
    assert "open" in told
    assert "30 neurons with a page (354 have none" in told
    files = sorted((tmp_path / "out").rglob("*.html"))
    assert len(files) == 2 + 3 * LAYERS * (1 + 5)
    for file in files:
        parsed = Parsed(file.read_text(encoding="utf-8"))
        for tag, attributes in parsed.tags:
            assert tag != "form" or attributes.get("method") == "dialog"
            link = attributes.get("href") or attributes.get("src")
            if link and not link.startswith(("#", "data:")):
                assert "?" not in link
                target = (file.parent / link.partition("#")[0]).resolve()
                assert target.is_file(), (file, link)
                assert (tmp_path / "out") in target.parents
    data = [
        json.loads(m)
        for m in re.findall(
            r'id="json">(.*?)</script>', next(f for f in files if "neuron" in f.parts).read_text()
        )
    ]
    assert data[0]["excerpts"]


def test_an_export_replaces_only_its_own(run, library, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        export(library, out, 1, True)
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    export(library, out, 1, False)
    with pytest.raises(InputError, match="holds pages already: add --force"):
        export(library, out, 1, False)
    export(library, out, 2, True)
    assert len(list((out / "r/run/neuron/crate-2l/0").iterdir())) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export(library, tmp_path / "file", 1, True)


def test_without_the_extra_it_says_so_and_pages_can_be_written(copy, tmp_path, monkeypatch, capsys):
    shutil.rmtree(copy / "viewer", ignore_errors=True)  # maps that are there need nothing
    for name in ("fastapi", "uvicorn", "sklearn", "sklearn.manifold"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("server", "live_api"):
        monkeypatch.delitem(sys.modules, f"cratelm.viewer.{name}", raising=False)
    assert main(["view", str(copy)]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert "pip install '.[viewer]'" in told
    assert main(["view", str(copy), "--static", str(tmp_path / "out"), "--neurons", "2"]) == 0
    page = (tmp_path / "out/r/copy/layer/crate-2l/0.html").read_text()
    assert (
        "The map cannot be drawn (it needs the package scikit-learn, which is not installed: type `pip install"
        in page
    )
    neuron = next((tmp_path / "out/r/copy/neuron/crate-2l/0").iterdir()).read_text()
    assert "By the tokens they fire on: cosine" in neuron


def test_an_export_that_fails_leaves_nothing(library, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("disk")

    monkeypatch.setattr(Pages, "neuron", broken)
    with pytest.raises(RuntimeError):
        export(library, tmp_path / "out", 1, False)
    assert list(tmp_path.iterdir()) == []


def test_the_best_explained_get_pages(library, tmp_path):
    export(library, tmp_path / "out", 4, False)
    best = library.layer("run", "gpt2-2l", 1, LayerQuery(per_page=4))
    made = {int(p.stem) for p in (tmp_path / "out/r/run/neuron/gpt2-2l/1").iterdir()}
    assert made == {r.index for r in best.rows}


def test_links():
    assert Links().to("r", "a b", "x/y", q="1&2", token="") == "/r/a%20b/x%2Fy?q=1%262"
    inside = Links(("r", "run", "layer", "m", "0"), static=True)
    assert inside.to("r", "run", "neuron", "m+s", 0, 3) == "../../neuron/m%2Bs/0/3.html"
    assert inside.to() == "../../../../index.html"
    assert inside.asset("app.js") == "../../../../assets/app.js"


# ---- the command ----------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(run):
    import signal
    import subprocess
    import sys
    import urllib.request

    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "cratelm", "view", str(run), "--port", "0", "--no-live"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    for _ in range(100):
        try:
            page = urllib.request.urlopen(address, timeout=5).read().decode()
            break
        except OSError:
            time.sleep(0.1)
    assert "crate-2l" in page
    taken = subprocess.run([sys.executable, "-m", "cratelm", "view", str(run), "--port", address.split(":")[-1].strip("/")], capture_output=True, text=True, env=environment)  # fmt: skip
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert taken.returncode == 2
    assert "is taken: type --port" in taken.stderr
    assert taken.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing/here"], "nothing/here is not there: a run directory was expected"),
        (["--port", "99999"], "--port is 99999"),
        (["--neurons", "-1"], "--neurons must be at least 0, not -1"),
    ],
)
def test_bad_commands_are_told(run, words, told, capsys):
    given = words if words[0] == "nothing/here" else [str(run), *words]
    assert main(["view", *given]) == 2
    assert told in capsys.readouterr().err


def test_an_address_that_is_not_of_this_machine(run):
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1:0"):
        view(ViewConfig(runs=(run,), host="203.0.113.1", port=0))
