"""What the browser reads of a run, whole or damaged."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import copied, reseal
from viewer_runs import LAYERS, NEURONS, a_neuron, brute

from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.explain.store import read_explanations
from cratelm.results.finding import read_finding
from cratelm.results.neuron_view import NeuronFiles
from cratelm.results.views import LayerQuery, NotFound
from cratelm.runs import Run
from cratelm.score.simulators import simulate
from cratelm.score.store import read_scores, read_token_shares, read_whole_scores
from cratelm.viewer.pages import Pages
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import Rate

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")

from fastapi.testclient import TestClient

from cratelm.viewer import server


@pytest.fixture
def run(viewer_run) -> Path:
    return viewer_run


@pytest.fixture
def copy(viewer_run, tmp_path) -> Path:
    shutil.copytree(viewer_run, tmp_path / "copy")
    return tmp_path / "copy"


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
            mean = shown.mean and shown.mean.value
            assert mean == own["mean"]
            assert (shown.defined, shown.undefined, shown.dead) == tuple(own["counts"][k] for k in ("defined", "undefined", "dead"))  # fmt: skip
            assert {n: v.value for n, v in shown.by_layer.items()} == {la["layer"]: la["mean"] for la in own["layers"] if la["mean"] is not None}  # fmt: skip
        summaries = read_summaries(run / "activations" / model.name, "held_out")
        for layer in range(LAYERS):
            here = [s for s in summaries if s.neuron.layer == layer]
            assert model.neurons[layer] == NEURONS
            assert model.dead[layer] == sum(s.dead for s in here)
            assert model.firing[layer] == pytest.approx(np.mean([s.firing_rate for s in here]))
        assert model.loss == json.loads((run / "model" / model.name / "completed.json").read_text())["results"].get("validation_loss")  # fmt: skip
    assert card.null(card.model("crate-2l")).name == "crate-2l-init"


def test_columns_have_every_explanation_and_score(run, library):
    columns = library.table("run", "gpt2-2l")
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


def test_columns_have_what_the_last_token_explains(run, library):
    columns = library.table("run", "gpt2-2l").last_token
    place = library.table("run", "gpt2-2l").row
    shares = read_token_shares(run / "scores" / "gpt2-2l")
    assert len(shares) == LAYERS * NEURONS
    for s in shares:
        shown = columns.row(place(*s.neuron.key))
        assert (shown.token_share, shown.context_share) == (s.token_share, s.context_share)
        assert shown.token_entropy == s.token_entropy
    found = {(s.neuron.key, s.explainer): s.correlation for s in read_whole_scores(run / "scores" / "gpt2-2l") if s.control == "none"}  # fmt: skip
    gains = 0
    for s in shares:
        shown = columns.row(place(*s.neuron.key))
        own = {e: found.get((s.neuron.key, e)) for e in ("lookup", "trie", "concepts")}
        assert shown.correlations == {e: v if v is None else pytest.approx(100 * v) for e, v in own.items()}  # fmt: skip
        assert shown.gains.keys() == {"trie", "concepts"}
        if None not in own.values():
            assert shown.gains["trie"] == pytest.approx(100 * (own["trie"] - own["lookup"]))
            gains += 1
        else:
            assert shown.gains["trie"] is None
    assert 0 < gains < len(shares)


def test_pages_show_what_the_last_token_explains(library):
    """The neuron's page its figures; the layer's page columns by which it can be sorted; neurons without come last."""
    pages, index = Pages(library), a_neuron(library)
    view = library.neuron("run", "crate-2l", 1, index)
    shown = view.last_token
    page = pages.neuron(view)
    assert f"<dt>token share</dt><dd>{100 * shown.token_share:.1f}%</dd>" in page
    assert f"<dt>context share</dt><dd>{100 * shown.context_share:.1f}%</dd>" in page
    assert f"<dt>token entropy</dt><dd>{shown.token_entropy:.2f} nats</dd>" in page
    assert f"<dt>trie, gain over look-up</dt><dd>{shown.gains['trie']:+.1f}</dd>" in page
    columns = library.table("run", "crate-2l").last_token
    here = library.table("run", "crate-2l").rows_of(1)
    for sort in ("token_share", "context_share", "token_entropy"):
        values = getattr(columns, sort)[here].tolist()
        for descending in (False, True):
            sign = -1 if descending else 1
            query = LayerQuery(sort=sort, descending=descending)
            order = sorted(range(NEURONS), key=lambda i: (np.isnan(values[i]), sign * np.nan_to_num(values[i]), i))  # fmt: skip
            rows = library.layer("run", "crate-2l", 1, query).rows
            assert [r.index for r in rows] == order
    page = pages.layer("run", "crate-2l", 1, LayerQuery(sort="token_share", descending=True))
    assert '<th scope="col" class="r" aria-sort="descending"><a href="/r/run/layer/crate-2l/1?sort=token_share">token, %' in page  # fmt: skip
    assert f'data-value="{shown.token_entropy}">{shown.token_entropy:.2f}<' in page


def test_pages_of_a_run_that_was_scored_before_lack_it(tmp_path):
    library = Library([copied(tmp_path)])
    page = Pages(library).layer("run", "crate-2l", 0, LayerQuery(sort="token_share"))
    assert "fires, %" in page
    assert "context, %" not in page
    view = library.neuron("run", "crate-2l", 0, 0)
    assert view.last_token is None
    assert "share" not in Pages(library).neuron(view).replace("can be shared", "")


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
    with pytest.raises(NotFound, match="crate-2l has no layer 7: its layers are 0, 1"):
        library.layer("run", "crate-2l", 7, LayerQuery())


@pytest.mark.parametrize("split", ["held_out", "fit"])
def test_a_neuron_has_its_excerpts(run, library, split):
    index = a_neuron(library)
    view = library.neuron("run", "crate-2l", 1, index, split, excerpts="all")
    (record,) = read_records(run / "activations" / "crate-2l", split, [1], [index])
    store = library.tokens("run")
    payload = next(e.payload for e in read_explanations(run / "explanations" / "crate-2l") if (e.neuron.layer, e.neuron.index, e.explainer) == (1, index, "trie"))  # fmt: skip
    simulated = simulate("trie", payload, [e.token_ids for e in record.excerpts])
    assert view.problems == ()
    assert len(view.excerpts) == len(record.excerpts) > 20
    assert view.held_back == 0
    for shown, e, other in zip(view.excerpts, record.excerpts, simulated, strict=True):
        assert (shown.kind, shown.bin, shown.rank) == (e.kind, e.bin, e.rank)
        units = store.units(e.token_ids)
        assert units[shown.peak].start <= e.peak < units[shown.peak].stop
        assert [t.text for t in shown.true] == [u.text for u in units]
        assert [t.value for t in shown.true] == [
            e.activations[u.start : u.stop].max() for u in units
        ]
        assert [t.value for t in shown.simulated] == pytest.approx(
            [other[u.start : u.stop].max() for u in units]
        )
        assert [bool(t.parts) for t in shown.true] == [u.n_tokens > 1 for u in units]
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
    whole = NeuronFiles(Run(copy)).documents(range(len(table)))
    assert len(set(whole.values())) > 5
    pq.write_table(table, path, row_group_size=3)
    reseal(path.parent)
    assert NeuronFiles(Run(copy)).documents(range(-1, len(table) + 1)) == whole


def test_neighbours_in_the_layer_and_effects(library):
    first, last = (library.neuron("run", "crate-2l", 0, i) for i in (0, NEURONS - 1))
    assert (first.previous, first.following) == (None, 1)
    assert (last.previous, last.following) == (NEURONS - 2, None)
    views = [library.neuron("run", "crate-2l", 0, i) for i in range(NEURONS)]
    assert any(v.promoted and v.suppressed for v in views)
    assert not any(library.neuron("run", "gpt2-2l", 0, i).promoted for i in range(3))
    left_out = next(v for v in views if not v.promoted)
    pages, command = Pages(library), "cratelm effects --run"
    assert "--neurons 0 --force` to measure them" in pages.neuron(left_out)
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
        (("nope", "crate-2l", 0, 0), "there is no run 'nope': the runs are run"),
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
    with pytest.raises(InputError, match="does not exist: name a run directory"):
        Library([tmp_path / "nothing"])


def test_a_folder_that_is_no_run_is_told_with_a_run_that_it_holds(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no stage of a run: name a run directory"):
        Library([tmp_path / "empty"])
    shutil.copytree(run / "tokens", tmp_path / "runs" / "mine" / "tokens")
    with pytest.raises(InputError, match=r"runs has no stage of a run; .*`cratelm view .*/mine`"):
        Library([tmp_path / "runs"])


@pytest.mark.parametrize(
    "file",
    [
        "activations/crate-2l/excerpts-held_out.parquet",
        "activations/crate-2l/summaries-held_out.parquet",
        "explanations/crate-2l/explanations.parquet",
        "scores/crate-2l/scores.parquet",
        "scores/crate-2l/summary.json",
        "scores/crate-2l/token_shares.parquet",
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
    assert "Missing results" in page
    with pytest.raises(NotFound, match="no finished harvest of gpt2-2l"):
        library.table("copy", "gpt2-2l")
    assert "trie" in Pages(library).layer("copy", "crate-2l", 0, LayerQuery())


def test_a_run_without_models_is_a_page(tmp_path):
    (tmp_path / "new" / "tokens").mkdir(parents=True)
    client = TestClient(server.application(Library([tmp_path / "new"])), "http://127.0.0.1")
    answer = client.get("/")
    assert answer.status_code == 200
    assert "has no finished model: type `cratelm demo --run" in answer.text


def test_results_of_replace_are_the_finding_of_the_overview(copy):
    kept = copy.parent / "kept"
    (copy / "replacement").rename(kept)
    before = Library([copy]).finding("copy")
    assert before is not None
    assert before.scores
    (copy / "replacement").mkdir()
    (kept / "crate-2l").rename(copy / "replacement" / "crate-2l")
    library = Library([copy])
    found = library.finding("copy")
    assert found is not None
    summary = json.loads((copy / "replacement" / "crate-2l" / "summary.json").read_text())
    rows = [r for r in summary["rows"] if (r["layers"], r["control"]) == ("all", "none")]
    best = min(rows, key=lambda r: r["loss_replaced"]["value"])
    assert [(f.model, f.row.explainer, f.row.loss_replaced.value) for f in found.losses] == [
        ("crate-2l", best["explainer"], best["loss_replaced"]["value"])
    ]
    assert found == read_finding(Run(copy))
    page = Pages(library).overview("copy")
    loss = f"{best['loss_replaced']['value']:.2f}"
    assert f"On its explanations CRATE reaches a loss of {loss} (" in page
    path = copy / "replacement" / "crate-2l" / "summary.json"
    path.write_bytes(b"{garbage")
    library = Library([copy])
    assert library.finding("copy") == before
    assert "replacement/crate-2l cannot be read" in Pages(library).overview("copy")
