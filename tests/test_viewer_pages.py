"""The browser's pages: what they show, and that nothing in a corpus acts on them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from tiny_run import copied
from viewer_runs import Parsed, a_neuron, brute

from cratelm.results.views import ExcerptView, LayerQuery, NeuronView, ShadedToken
from cratelm.viewer import drawings
from cratelm.viewer.exports import latex_figure
from cratelm.viewer.featured import RARELY, ranking, shown_excerpt
from cratelm.viewer.pages import Links, Pages, as_data, excerpts_html
from cratelm.viewer.run_reader import Library

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


SIMULATION_METRICS = ("top_and_random", "random_only", "anthropic")


@pytest.fixture
def run(viewer_run) -> Path:
    return viewer_run


@pytest.fixture
def copy(viewer_run, tmp_path) -> Path:
    shutil.copytree(viewer_run, tmp_path / "copy")
    return tmp_path / "copy"


def test_tokens_at_zero_share_one_span():
    true = [("a", 0.0, 0), ("b", 0.0, 0), ("c", 1.25, 5), ("d", 2.5, 10), ("e", -0.0, 0), ("א", -0.0, 0), ("f", 0.0, 0), ("g", 0.0, 0)]  # fmt: skip
    view = ExcerptView("top", 0, 0, 7, "name", tuple(ShadedToken(*t) for t in true), ())
    assert (
        '<span title="0">ab</span><span class="l5" title="1.25">c</span>'
        '<span class="l10" title="2.5">d</span><span title="0">e</span><bdi dir="rtl"><span title="0">א</span></bdi>'
        '<span title="0">f</span><span class="peak" title="0">g</span></div>'
    ) in excerpts_html([view])


def all_pages(library) -> dict[str, str]:
    pages = Pages(library, live=True)
    found = {"overview": pages.overview(), "live": pages.live_page("run")}
    for model in ("crate-2l", "gpt2-2l"):
        found[f"layer {model}"] = pages.layer("run", model, 1, LayerQuery(token="<script>"))
        for index in range(6):
            view = library.neuron("run", model, 1, index, excerpts="all")
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
        told = latex_figure(library.neuron("run", "crate-2l", 1, index))
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
    assert latex_figure(backwards) == latex_figure(replace(view, excerpts=tuple(tops[::-1])))
    assert latex_figure(view).count("[2pt]") == min(5, len(tops)) > 0


def test_an_open_last_bin_is_told(library):
    view = library.neuron("run", "crate-2l", 1, a_neuron(library))
    high = view.statistics["maximum"]
    assert f">{high:.3g}<" in drawings.histogram(replace(view, histogram_high=high))
    assert f">{high / 2:.3g} or more<" in drawings.histogram(replace(view, histogram_high=high / 2))


def test_overview_colours_are_those_of_the_table(copy):
    shutil.rmtree(copy / "scores" / "crate-2l")
    card = Library([copy]).run("copy")
    assert [c.name for c in card.models if not c.null_of] == ["crate-2l", "gpt2-2l"]
    drawn = drawings.scores_by_layer(card, "top_and_random")
    assert "var(--c1)" in drawn
    assert "var(--c0)" not in drawn


def test_layers_and_neurons_side_by_side(client):
    layers = client.get("/r/run/compare", params={"left": "crate-2l/1"}).text
    assert "crate-2l, layer 1" in layers
    assert "gpt2-2l, layer 1" in layers
    neurons = client.get("/r/run/compare", params={"left": "crate-2l/1/2", "right": "gpt2-2l/0/5"}).text  # fmt: skip
    assert "crate-2l layer 1 neuron 2" in neurons
    assert "gpt2-2l layer 0 neuron 5" in neurons
    assert (
        "type MODEL/LAYER or MODEL/LAYER/NEURON, such as"
        in client.get("/r/run/compare?left=x").text
    )


def test_any_two_models_can_stand_side_by_side(client, library):
    """The name of a model alone stands for its layer of the same number, or for its most similar neuron."""
    layers = client.get("/r/run/compare?left=crate-2l/1&right=crate-2l-init").text
    assert "crate-2l, layer 1" in layers
    assert "crate-2l-init, layer 1" in layers
    index = a_neuron(library)
    near = library.nearest("run", "crate-2l", 1, index, n=1, other="crate-2l-init")
    (best,) = [n for n in near if n.model == "crate-2l-init"]
    shown = client.get(f"/r/run/compare?left=crate-2l/1/{index}&right=crate-2l-init").text
    assert f"crate-2l-init layer {best.layer} neuron {best.index}" in shown
    assert "most similar neuron of crate-2l-init" in shown


def test_pages_offer_a_comparison_with_every_other_model(run, tmp_path):
    """Where a run has more models than twins and their controls."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    pages = Pages(Library([copy]))
    assert pages._others("copy", "crate-2l") == []
    for stage in ("activations", "explanations", "scores", "model"):
        shutil.copytree(copy / stage / "gpt2-2l", copy / stage / "gpt2-solu-2l")
    pages = Pages(Library([copy]))
    others = pages._others("copy", "crate-2l")
    assert {"gpt2-2l", "gpt2-solu-2l"} <= set(others)
    assert "crate-2l" not in others
    page = pages.layer("copy", "crate-2l", 1, LayerQuery())
    assert '<option value="gpt2-solu-2l">' in page
    assert '<input type="hidden" name="left" value="crate-2l/1">' in page


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
    found = next(s for s in library.histograms("run", "crate-2l", 1) if s.metric == "random_only")
    assert found.defined == len(rows)
    assert found.mean.value == pytest.approx(np.mean([100 * v for _, v in rows]))
    bins = np.clip([100 * v for _, v in rows], 0, 100) // 5
    wanted = np.bincount(np.minimum(bins, 19).astype(int), minlength=20) / len(rows)
    assert found.shares == pytest.approx(wanted.tolist())
    told = {m: [s.metric for s in library.histograms("run", m, 0)] for m in ("crate-2l", "gpt2-2l")}
    assert told["crate-2l"] == told["gpt2-2l"] == list(SIMULATION_METRICS)
    shown = client.get("/r/run/compare", params={"left": "crate-2l/1"}).text
    assert shown.count("distribution of") == len(SIMULATION_METRICS)
    assert f"{found.defined} of {found.neurons}" in shown


def test_another_explainer_simulates_when_asked(library, client):
    index = a_neuron(library)
    page = client.get(f"/r/run/neuron/crate-2l/1/{index}").text
    assert "simulated by trie" in page
    link = re.search(r'<a href="([^"]*explainer=lookup)#exc">lookup</a>', page)
    other = client.get(link[1].replace("&amp;", "&")).text
    assert "simulated by lookup" in other
    assert re.search(r'explainer=lookup&amp;all=1|explainer=lookup[^"]*all=1', other)


def test_links():
    assert Links().to("r", "a b", "x/y", q="1&2", token="") == "/r/a%20b/x%2Fy?q=1%262"
    inside = Links(("r", "run", "layer", "m", "0"), static=True)
    assert inside.to("r", "run", "neuron", "m+s", 0, 3) == "../../neuron/m%2Bs/0/3.html"
    assert inside.to() == "../../../../index.html"
    assert inside.asset("app.js") == "../../../../assets/app.js"


def featured_by_hand(library, model: str) -> list[tuple[int, int]]:
    """The best neuron of each group by the correlation over all held-out tokens, selective ones first."""
    table, groups = library.table("run", model), library.groups("run", model)
    values = table.last_token.correlations["trie"]
    rows = [r for r in range(len(values)) if values[r] > 0 and table.explanations[r] and table.maximum[r] > 0]  # fmt: skip
    median = np.median(values[rows])
    rows.sort(key=lambda r: (table.firing_rate[r] >= RARELY or values[r] < median, -values[r], r))
    best: dict[str, int] = {}
    for row in rows:
        best.setdefault(groups[row].family, row)
    others = [row for row in rows if row not in best.values()]
    chosen = [*best.values(), *others][:5]
    return [(int(table.layer[r]), int(table.index[r])) for r in chosen]


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_neurons_worth_opening_are_the_best_of_different_groups(library, client, model):
    found = library.featured("run", model)
    assert [(n.layer, n.index) for n in found] == featured_by_hand(library, model)
    assert len(found) == 5
    table = library.table("run", model)
    page = client.get("/r/run").text
    for neuron in found:
        row = table.row(neuron.layer, neuron.index)
        assert neuron.value == table.last_token.correlations["trie"][row]
        assert table.explanations[row].startswith(f"{neuron.explanation};")  # without the evidence
        assert f'neuron {neuron.index}">{neuron.layer}:{neuron.index}</a>' in page
        assert neuron.excerpt is not None
        view = library.neuron("run", model, neuron.layer, neuron.index, explainer="trie", excerpts="top")  # fmt: skip
        shown = [e for e in view.excerpts if neuron.excerpt.true == e.true[max(0, e.peak - 16) : e.peak + 8]]  # fmt: skip
        assert len(shown) >= 1
        assert neuron.excerpt.true[neuron.excerpt.peak] == shown[0].true[shown[0].peak]
        correlations = [np.corrcoef([t.value for t in e.true], [t.value for t in e.simulated])[0, 1] if np.ptp([t.value for t in e.simulated]) and np.ptp([t.value for t in e.true]) else -1 for e in view.excerpts]  # fmt: skip
        best = view.excerpts[int(np.argmax(correlations))]
        assert neuron.excerpt.document == best.document


def test_only_neurons_with_a_page_are_featured(library):
    everything = library.featured("run", "crate-2l")
    some = library.featured("run", "crate-2l", lambda layer, index: layer == 1 and index < 30)
    assert {n.layer for n in some} == {1}
    assert max(n.index for n in some) < 30
    assert library.featured("run", "crate-2l") == everything != some


def test_a_map_of_an_export_links_to_the_pages_that_it_has(library):
    query = LayerQuery()
    served = Pages(library).layer("run", "crate-2l", 1, query)
    assert served.count('href="/r/run/neuron/crate-2l/1/') >= 64
    few = Pages(library, static=True, paged=lambda run, model, layer, index: index < 3)
    drawn = few.layer("run", "crate-2l", 1, query).partition('<svg class="map"')[2]
    assert re.findall(r'href="([^"]*)"', drawn) == [f"../../neuron/crate-2l/1/{i}.html" for i in range(3)]  # fmt: skip
    assert Pages(library).layer("run", "crate-2l", 1, query) == served


def test_the_overview_begins_with_the_finding(library, client):
    page = client.get("/r/run").text
    found = library.finding("run")
    assert found is not None
    assert [f.model for f in found.losses] == ["crate-2l", "gpt2-2l"]
    assert found.sentence in Parsed(page).words
    assert page.index('class="lead"') < page.index('class="finding"') < page.index("Neurons worth opening") < page.index("<table>")  # fmt: skip


def test_without_replacement_the_finding_is_about_scores(copy):
    shutil.rmtree(copy / "replacement")
    library = Library([copy])
    page = Pages(library).overview("copy")
    found = library.finding("copy")
    assert found is not None
    assert found.sentence in Parsed(page).words
    assert page.index('class="lead"') < page.index('class="finding"') < page.index("Neurons worth opening") < page.index("<table>")  # fmt: skip
    shown = {s.model: s for s in found.scores}
    card = library.run("copy")
    for name in ("crate-2l", "gpt2-2l"):
        metric = card.model(name).metric("top_and_random")
        assert metric is not None
        assert shown[name].own == metric.mean
        assert shown[name].look_up == metric.look_up != metric.mean
    assert shown["crate-2l"].untrained is not None
    assert shown["gpt2-2l"].untrained is None


def test_a_run_with_one_model_or_without_scores_has_an_overview(copy):
    shutil.rmtree(copy / "activations" / "gpt2-2l")
    for stage in ("model", "scores", "explanations"):
        shutil.rmtree(copy / stage / "gpt2-2l")
    shutil.rmtree(copy / "replacement")
    page = Pages(Library([copy])).overview("copy")
    assert "The neurons of CRATE are explained with a score of" in page
    for name in ("crate-2l", "crate-2l-init"):
        shutil.rmtree(copy / "scores" / name)
    page = Pages(Library([copy])).overview("copy")
    assert 'class="lead"' not in page
    assert "Neurons worth opening" not in page
    assert "crate-2l" in page


def test_without_a_simulation_the_strongest_excerpt_is_shown():
    def excerpt(rank, simulated):
        true = tuple(ShadedToken(f"t{i}", float(i == 20), 10 * (i == 20)) for i in range(40))
        return ExcerptView("top", 0, rank, 20, "name", true, simulated)

    def shown(*excerpts):
        return shown_excerpt(cast(NeuronView, SimpleNamespace(excerpts=excerpts)))

    constant = tuple(ShadedToken("t", 1.0, 10) for _ in range(40))
    strongest = [excerpt(0, ()), excerpt(1, constant)]
    found = shown(*strongest)
    assert found is not None
    assert found.rank == 0
    assert found.true[found.peak].text == "t20"
    assert [t.text for t in found.true] == [f"t{i}" for i in range(4, 28)]
    predicted = shown(*strongest, excerpt(2, strongest[0].true))
    assert predicted is not None
    assert predicted.rank == 2
    assert shown() is None


def test_a_run_of_an_earlier_version_has_an_overview(tmp_path):
    library = Library([copied(tmp_path)])
    assert ranking(library.table("run", "crate-2l"))[1] == "score"
    found = library.featured("run", "crate-2l")
    column = library.table("run", "crate-2l").best_score()
    assert column is not None
    assert {n.value for n in found} <= set(column.values.tolist())
    page = Pages(library).overview("run")
    assert page.count("Neurons worth opening") == bool(found)
