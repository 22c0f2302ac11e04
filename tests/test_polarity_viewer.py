"""The browser and the report on neurons with two ends: names, both ends on a page, links, live."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from polarity_runs import DEAD, ONLY_NEGATIVE, WIDTH, run_of_llama

import cratelm.api as api
from cratelm.activations.open_harvest import open_harvested
from cratelm.models import capture
from cratelm.models.open import encoder_of
from cratelm.results.views import LayerQuery, NotFound
from cratelm.runs import Run

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")

from fastapi.testclient import TestClient

from cratelm.viewer import server
from cratelm.viewer.index import Index
from cratelm.viewer.live import Live
from cratelm.viewer.live_endpoints import router
from cratelm.viewer.run_reader import Library
from cratelm.viewer.static_site import export

MODEL, TEXT = "llama", "the cat sat on a river"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run, _ = run_of_llama(tmp_path_factory.mktemp("ends"))
    api.explain(run=run, model=MODEL, neurons=0, quiet=True)
    api.score(run=run, model=MODEL, resamples=100, quiet=True)
    Index(Run(run)).build()
    return run


@pytest.fixture(scope="module")
def library(run) -> Library:
    library = Library([run])
    library.index_of("run").build()
    return library


@pytest.fixture(scope="module")
def client(library):
    live = Live(library)
    yield TestClient(server.application(library, live=router(live)), "http://127.0.0.1")
    live.close()


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_the_page_of_an_end_shows_both(client):
    answer = client.get(f"/r/run/neuron/{MODEL}/0/5-")
    assert answer.status_code == 200
    text = text_of(answer.text)
    assert "layer 0 neuron 5-" in text
    assert "This is the end - of the neuron: how far its activation is below 0." in text
    assert "Other end: 5+" in text
    assert f'href="/r/run/neuron/{MODEL}/0/5%2B"' in answer.text
    assert f'rel="prev" href="/r/run/neuron/{MODEL}/0/5%2B"' in answer.text
    other = answer.text.partition('id="other"')[2].partition("</section>")[0]
    assert 'class="excerpt"' in other  # the strongest excerpts of the other end
    assert "top-and-random" in text_of(other)  # its scores
    assert client.get(f"/r/run/neuron/{MODEL}/0/5%2B").text == client.get(f"/r/run/neuron/{MODEL}/0/5").text  # fmt: skip


def test_a_silent_end_is_not_called_dead(client):
    silent = text_of(client.get(f"/r/run/neuron/{MODEL}/0/{ONLY_NEGATIVE}%2B").text)
    assert f"This end is silent: on the held-out tokens searched the neuron only fires at its other end, {ONLY_NEGATIVE}-." in silent  # fmt: skip
    assert "Dead" not in silent
    dead = text_of(client.get(f"/r/run/neuron/{MODEL}/0/{DEAD}-").text)
    assert "Dead: the neuron never fired, at neither end, on the held-out tokens searched." in dead
    alive = text_of(client.get(f"/r/run/neuron/{MODEL}/0/{ONLY_NEGATIVE}-").text)
    assert "Dead" not in alive
    assert f"The other end, {ONLY_NEGATIVE}+ , is silent" in alive


@pytest.mark.parametrize("name", ["5*", "+5", "5-+", "99-", "-1"])
def test_a_name_that_is_none_is_told(client, name):
    answer = client.get(f"/api/r/run/neuron/{MODEL}/0/{name.replace('+', '%2B')}")
    assert answer.status_code == 404
    assert len(answer.json()["error"].splitlines()) == 1


def test_the_layer_lists_ends(client, library):
    text = text_of(client.get(f"/r/run/layer/{MODEL}/0").text)
    assert f"{WIDTH} neurons with two ends each" in text
    assert f"{2 * WIDTH} ends, explained by" in text
    rows = {r.name: r for r in library.layer("run", MODEL, 0, LayerQuery()).rows}
    assert set(rows) == {f"{i}{end}" for i in range(WIDTH) for end in "+-"}
    assert (rows[f"{ONLY_NEGATIVE}+"].dead, rows[f"{ONLY_NEGATIVE}+"].silent) == (False, True)
    dead = library.layer("run", MODEL, 0, LayerQuery(only="dead")).rows
    assert {r.name for r in dead} == {f"{DEAD}+", f"{DEAD}-"}


def test_every_link_leads_somewhere(client):
    todo, seen = ["/"], set()
    while todo:
        address = todo.pop()
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text[:200])
        for found in re.findall(r'\s(?:href|src)="([^"]+)"', answer.text):
            link = html.unescape(found).partition("#")[0]
            if link.startswith("/") and link not in seen and "/layer/" not in link.partition("?")[2]:  # fmt: skip
                seen.add(link)
                if len(seen) < 120:
                    todo.append(link)
    assert any("/neuron/" in link and "%2B" in link for link in seen)
    assert not any(re.search(r"/neuron/llama/\d+/\d+($|\?)", link) for link in seen)


def test_search_compare_and_map_name_ends(client, library):
    hits = text_of(client.get("/r/run/search?q=cat").text)
    assert re.search(r"\b\d[+-]", hits)
    side = text_of(client.get(f"/r/run/compare?left={MODEL}/0/5-&right={MODEL}/0/5%2B").text)
    assert "layer 0 neuron 5-" in side
    assert "layer 0 neuron 5+" in side
    with pytest.raises(NotFound, match=r"17 or one of its ends|write a number"):
        library.index_named("run", MODEL, "5*")
    points = library.map("run", MODEL, 0)
    assert points is not None
    assert [p.name for p in points[:2]] == ["0+", "0-"]


def test_the_live_page_reads_and_steers_an_end(run, client):
    mine = {"origin": "http://127.0.0.1"}
    opened = open_harvested(Run(run), MODEL)
    body = {"model": MODEL, "text": TEXT, "layer": 0}
    found = {
        end: client.post(
            "/api/r/run/live/activations", json=body | {"neuron": f"5{end}"}, headers=mine
        ).json()
        for end in "+-"
    }
    encoder = encoder_of(opened.subject, Run(run))
    ids = torch.tensor([[encoder.start, *encoder.encode(TEXT)]])
    raw = capture(opened.subject.model, "mlp", ids)[0][0, 1:, 5].numpy()
    np.testing.assert_allclose(found["+"]["values"], np.maximum(raw, 0), atol=1e-5)
    np.testing.assert_allclose(found["-"]["values"], np.maximum(-raw, 0), atol=1e-5)
    strongest = client.post("/api/r/run/live/strongest", json={"model": MODEL, "text": TEXT, "position": 2}, headers=mine).json()  # fmt: skip
    assert all(re.fullmatch(r"\d+[+-]", n["name"]) for n in strongest)
    steered = client.post("/api/r/run/live/steer", json=body | {"neuron": "5-", "operation": "set", "value": 9}, headers=mine)  # fmt: skip
    assert steered.json()["kl"] > 0
    wrong = client.post("/api/r/run/live/activations", json=body | {"neuron": "5*"}, headers=mine)
    assert wrong.status_code in (400, 422)


def test_exported_pages_link_both_ends(library, tmp_path):
    export(library, tmp_path / "out", 0, False)
    folder = tmp_path / "out/r/run/neuron/llama/0"
    assert {p.name for p in folder.iterdir()} == {f"{i}{e}.html" for i in range(WIDTH) for e in "+-"}  # fmt: skip
    for page in (tmp_path / "out").rglob("*.html"):
        for link in re.findall(r'href="([^"#:]+)["#]', page.read_text()):
            target = html.unescape(link).replace("%2B", "+")
            assert (page.parent / target).resolve().exists(), (page, link)


@pytest.mark.usefixtures("undrawn")
def test_the_report_tells_the_ends_apart(run):
    api.report(run=run, resamples=100, neurons=3)
    page = (run / "report" / "report.html").read_text()
    text = text_of(page)
    assert "Scores by end" in text
    assert "Neurons of llama fire at two ends, and count once." in text
    assert re.search(r"L0 #\d[+-]", text)
    rows = (run / "report" / "tables" / "by_end.csv").read_text().splitlines()
    assert {line.split(",")[3] for line in rows[1:]} == {"above 0 (+)", "below 0 (-)"}
    sparsity = (run / "report" / "tables" / "sparsity.csv").read_text().splitlines()
    assert sparsity[1].split(",")[1:4] == ["0", str(WIDTH), "1"]
