"""The map of a layer: points, groups and their colours, labels, and the details that a page shows on hover."""

import json
import re

import numpy as np
import pytest
from viewer_runs import NEURONS, Parsed, a_neuron

from cratelm.results.neuron_groups import TOKEN_CLASSES, NeuronGroup, neuron_groups, token_class
from cratelm.results.views import LayerQuery, MapPoint
from cratelm.text.units import TokenStrings
from cratelm.viewer import run_reader
from cratelm.viewer.layer_map import (
    COLOURS,
    HEIGHT,
    WIDTH,
    colours,
    details,
    draw_map,
    place_labels,
)
from cratelm.viewer.pages import Pages
from cratelm.viewer.peaks import BEFORE, Peaks
from cratelm.viewer.run_reader import Library

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")


def points(n: int, group: NeuronGroup | None = None) -> list[MapPoint]:
    return [MapPoint(i, i / n, 0.5, None if i else 73.4, f"text {i}", group or neuron_groups([""], [" self"])[0]) for i in range(n)]  # fmt: skip


def drawn(of: list[MapPoint], address=lambda i: ""):
    return draw_map(of, colours([p.group.family for p in of]), address)


def test_a_point_has_a_colour_a_shade_a_name_and_a_link() -> None:
    found = drawn(points(1024), lambda i: f"/n/{i}?a&b" if i % 2 else "")
    parsed = Parsed(found.svg)
    assert "<title>0 (73): text 0</title>" in found.svg
    assert "<title>1023 (no score): text 1023</title>" in found.svg
    links = [a for tag, a in parsed.tags if tag == "a"]
    assert [a["href"] for a in links] == [f"/n/{i}?a&b" for i in range(1, 1024, 2)]
    neurons = [a for _, a in parsed.tags if (a.get("class") or "").startswith("n ")]
    colour = TOKEN_CLASSES.index("beginnings of words")
    assert neurons[0]["class"] == f"n g{colour} m7"
    assert neurons[1]["class"] == f"n g{colour} m0"
    assert len(neurons) == 1024
    assert {a["tabindex"] for a in neurons} == {"-1"}


def test_a_large_map_carries_no_explanations() -> None:
    found = drawn(points(1025)).svg
    assert "text" not in found.replace("<text", "").replace("</text", "")
    assert "<title>1024 (no score)</title>" in found


def test_explanations_are_escaped() -> None:
    hostile = MapPoint(0, 0.1, 0.2, 50.0, "</title><script>alert(1)</script>\x1b", NeuronGroup("<i>", "<b>"))  # fmt: skip
    found = drawn([hostile] * 3)
    assert "<script" not in found.svg
    assert "<b>" not in found.svg
    assert "\\x1b" in found.svg


def test_classes_of_tokens_have_the_same_colours_on_every_map() -> None:
    assert len(TOKEN_CLASSES) == COLOURS
    some = colours(["numbers", "numbers", "quotes"])
    assert some == colours(["brackets"])
    assert some["numbers"] == TOKEN_CLASSES.index("numbers")


def test_concepts_are_coloured_by_their_number_of_neurons() -> None:
    families = [f"concept {n}" for n in range(12) for _ in range(12 - n)]
    found = colours([*families, ""])
    assert found == {f"concept {n}": n for n in range(COLOURS)}


def test_the_legend_counts_every_neuron() -> None:
    of = [*points(5), *(MapPoint(9, 0, 0, None, "", NeuronGroup("other tokens", "%")),) * 3]
    of += [MapPoint(10, 0, 0, None, "")] * 2
    legend = drawn(of).legend
    assert [(e.name, e.neurons) for e in legend] == [
        ("beginnings of words", 5),
        ("other groups, or none", 5),
    ]
    assert legend[-1].colour == COLOURS
    assert [(e.name, e.neurons) for e in drawn([MapPoint(0, 0, 0, None, "")]).legend] == [("no group", 1)]  # fmt: skip


def at(share: str, *places: tuple[float, float]) -> list[MapPoint]:
    return [MapPoint(i, x, y, None, "", NeuronGroup("f", share)) for i, (x, y) in enumerate(places)]


def test_neighbours_that_share_a_token_have_a_label() -> None:
    near = at("self", (0.5, 0.5), (0.52, 0.5), (0.54, 0.5))
    far = at("self", (0.9, 0.9), (0.92, 0.9))  # two are not enough
    labels = place_labels([*near, *far, *at("lone", (0.1, 0.1))])
    assert [(label.text, label.neurons) for label in labels] == [("self", 3)]
    (label,) = labels
    assert label.x == pytest.approx(24 + 0.52 * (WIDTH - 48))
    assert label.y == pytest.approx(24 + 0.5 * (HEIGHT - 48))
    assert place_labels([]) == []
    scattered = at("self", (0.1, 0.1), (0.5, 0.5), (0.9, 0.9))
    assert place_labels(scattered) == []


def test_a_label_waits_for_the_zoom_at_which_it_overlaps_none() -> None:
    large = at("self", *[(0.5 + 0.01 * i, 0.5) for i in range(6)])
    small = at("cls", *[(0.5 + 0.01 * i, 0.52) for i in range(3)])
    labels = place_labels([*small, *large])
    assert [label.text for label in labels] == ["self", "cls"]
    first, second = labels
    assert first.zoom < second.zoom
    assert (second.y - first.y) * second.zoom >= 19
    same = place_labels([*large, *at("cls", *[(0.5 + 0.01 * i, 0.5) for i in range(6)])])
    assert len(same) == 1  # at no zoom


def test_labels_stay_inside_the_map() -> None:
    left = at("a rather long concept", (0, 0.5), (0.01, 0.5), (0, 0.51))
    (label,) = place_labels(left)
    assert label.x - len(label.text) * 3.6 > 0


def test_details_hold_the_peak_of_each_neuron() -> None:
    peaks = Peaks.empty(3)
    peaks.tokens[0, BEFORE - 1 : BEFORE + 2] = [5, 7, 5]
    peaks.levels[0, BEFORE - 1 : BEFORE + 2] = [0, 10, 3]
    strings = [f"t{i}" for i in range(8)]
    strings[5] = " <x>"
    found = details(points(3), peaks, strings)
    assert found["words"] == ["␣<x>", "t7"]
    assert found["excerpts"] == [[0, 1, 0], [], []]
    assert found["levels"] == ["0a3", "", ""]
    assert found["peak"][0] == 1
    assert found["score"] == [73.4, None, None]
    assert found["text"] == ["text 0", "text 1", "text 2"]
    without = details(points(3), None, [])
    assert without["excerpts"] == []
    assert without["text"] == found["text"]


def test_the_details_of_a_page_are_those_of_its_run(run_details, library) -> None:
    table, store = library.table("run", "crate-2l"), library.tokens("run")
    index = a_neuron(library)
    peaks = library.index_of("run").peaks("crate-2l")
    row = table.row(1, index)
    ids = [t for t in peaks.tokens[row].tolist() if t >= 0]
    words = [run_details["words"][w] for w in run_details["excerpts"][index]]
    assert "".join(words).replace("␣", " ").replace("⏎", "\n").replace("⇥", "\t")[:5] == "".join(store.token_strings[t] for t in ids)[:5]  # fmt: skip
    assert run_details["levels"][index][run_details["peak"][index]] == "a"
    assert len(run_details["text"]) == NEURONS
    assert str(table.explanations[row]).startswith(run_details["text"][index].rstrip("…")[:60])
    groups = library.groups("run", "crate-2l")
    assert run_details["family"][index] == groups[row].family != ""


@pytest.fixture
def run_details(client):
    return client.get("/api/r/run/map/crate-2l/1").json()


def test_the_server_sends_details_apart_and_an_export_carries_them(library, run_details) -> None:
    served = Pages(library).layer("run", "crate-2l", 1, LayerQuery())
    assert 'data-details="/api/r/run/map/crate-2l/1"' in served
    assert "map-data" not in served
    written = Pages(library, static=True).layer("run", "crate-2l", 1, LayerQuery())
    assert "data-details" not in written
    (block,) = re.findall(r'<script type="application/json" id="map-data">(.*?)</script>', written)
    assert json.loads(block) == run_details
    assert "<script src=" in served
    assert "map.js" in served
    for page in (served, written):
        assert "style=" not in page


def test_a_layer_that_does_not_exist_has_no_details(client) -> None:
    assert "its layers are 0, 1" in client.get("/api/r/run/map/crate-2l/9").json()["error"]
    assert client.get("/api/r/run/map/nothing/0").status_code == 404


def test_groups_are_those_of_concepts_where_a_run_has_them(library, monkeypatch) -> None:
    own = Library([library.run_of("run").path])
    own.index_of("run").build()
    table = own.table("run", "crate-2l")
    texts = np.full(len(table.layer), "", object)
    texts[3] = "digits in comments and dots: `1`; fires on 1% of tokens"
    monkeypatch.setitem(table.texts, ("", "concepts"), texts)
    groups = own.groups("run", "crate-2l")
    assert groups[3] == NeuronGroup("digits", "digits in comments")
    assert {g.family for n, g in enumerate(groups) if n != 3} == {""}
    assert any(g.shares for n, g in enumerate(groups) if n != 3)


def test_groups_are_those_of_tokens_where_a_run_has_no_concepts(library, monkeypatch) -> None:
    own = Library([library.run_of("run").path])
    own.index_of("run").build()
    strings = own.tokens("run").token_strings
    monkeypatch.setattr(run_reader, "CONCEPTS", "not there")
    favourites = own.index_of("run").favourites("crate-2l")[:, 0]
    wanted = [token_class(strings[t]) if t >= 0 else "" for t in favourites]
    assert [g.family for g in own.groups("run", "crate-2l")] == wanted


def test_without_an_index_there_are_no_groups_and_pages_are_shown(library, monkeypatch) -> None:
    fresh = Library([library.run_of("run").path])
    monkeypatch.setattr(run_reader, "CONCEPTS", "not there")
    assert {g.family for g in fresh.groups("run", "crate-2l")} == {""}
    assert fresh.map_details("run", "crate-2l", 1) is None
    page = Pages(fresh).overview("run")
    assert page.count('class="featured"') == 2


def test_details_show_characters_that_tokens_share() -> None:
    strings = TokenStrings([b"a", b"\xe4", b"\xb8", b"\xad", b" b"])
    peaks = Peaks.empty(2)
    peaks.tokens[0, BEFORE - 1 : BEFORE + 3] = [0, 1, 2, 3]
    peaks.levels[0, BEFORE - 1 : BEFORE + 3] = [1, 10, 4, 2]
    peaks.tokens[1, BEFORE - 2 : BEFORE + 1] = [4, 0, 4]
    peaks.levels[1, BEFORE - 2 : BEFORE + 1] = [3, 0, 10]
    found = details(points(2), peaks, strings)
    shown = [[found["words"][at] for at in excerpt] for excerpt in found["excerpts"]]
    assert shown == [["a", "中"], ["␣b", "a", "␣b"]]
    assert found["levels"] == ["1a", "30a"]
    assert found["peak"] == [1, 2]
