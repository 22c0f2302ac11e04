"""The browser's server: addresses, headers, hosts, rates, JSON."""

import html
import os
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest

from cratelm.runs import Run, atomic_path
from cratelm.viewer.index import Index
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import Rate, allowed_hosts, is_allowed, is_own

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")

from fastapi.testclient import TestClient

from cratelm.viewer import server
from cratelm.viewer.live_endpoints import router


def test_every_link_leads_somewhere(client):
    todo, seen, of_kind = ["/"], set(), Counter()
    while todo:
        address = todo.pop()
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text[:200])
        if "text/html" not in answer.headers["content-type"]:
            continue
        # a parser takes ten times as long as the server; what else looks like a link leads somewhere, too
        for found in re.findall(r'\s(?:href|src)="([^"]+)"', answer.text):
            link = html.unescape(found).partition("#")[0]
            kind = re.sub(r"\d+", "9", link)
            if link.startswith("/") and link not in seen and of_kind[kind] < 4:
                seen.add(link)
                of_kind[kind] += 1
                todo.append(link)
    kinds = {s.split("/")[3] for s in seen if s.count("/") > 2 and s.startswith("/r/")}
    assert {"layer", "neuron", "compare", "live"} <= {k.partition("?")[0] for k in kinds}


def test_every_server_counts_requests_of_its_own(library, live, monkeypatch):
    # time stands still: on a slow machine the bucket refills as fast as it is emptied
    monkeypatch.setattr("cratelm.viewer.security.time", SimpleNamespace(monotonic=lambda: 0.0))
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


def test_leftovers_of_a_killed_index_are_removed(viewer_run, tmp_path):
    """A process that is killed while it writes a map leaves a lock and a temporary file."""
    run = tmp_path / "run"
    shutil.copytree(viewer_run, run)
    shutil.rmtree(run / "viewer", ignore_errors=True)
    Index(Run(run)).build()
    (folder,) = (run / "viewer").glob("index-*")
    before = sorted(p.name for p in folder.iterdir())
    (*_, written) = sorted(folder.glob("map-*-0.npy"))
    if (child := os.fork()) == 0:
        with atomic_path(written) as temporary:
            temporary.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(folder.iterdir())) == len(before) + 2
    Index(Run(run)).build()
    assert sorted(p.name for p in folder.iterdir()) == before
