"""Random requests to the browser's server: an answer below 500 in time, and a run that stays as it is.

`CRATELM_FUZZ=10000` tries more (tests/fuzz/budget.py).
"""

import json
import resource
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from budget import settings
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import httpx

pytest.importorskip("fastapi", reason="the extra `viewer` is not installed")
pytest.importorskip("sklearn", reason="the extra `viewer` is not installed")

LIMIT = 10.0
MOST_MEMORY = 2**30
PARTS = ["run", "crate-2l", "gpt2-2l", "crate-2l-init", "0", "1", "7", "99999", "-1", "1e9", "9" * 30, "..", ".", "",
         "%2e%2e", "%00", "%ff", "%2F", "a b", "é", "\u202e", "null", "nan", "x" * 300, "<script>", "'\"", ";", "{0}", "~"]  # fmt: skip
TEMPLATES = [
    "/", "/r/{}", "/r/{}/layer/{}/{}", "/r/{}/neuron/{}/{}/{}", "/r/{}/search", "/r/{}/compare", "/r/{}/live",
    "/assets/{}", "/favicon.ico", "/api/runs", "/api/r/{}/layer/{}/{}", "/api/r/{}/search", "/api/r/{}/index",
    "/api/r/{}/neuron/{}/{}/{}", "/api/r/{}/neuron/{}/{}/{}/card.svg", "/api/r/{}/live/{}", "/{}", "/{}/{}", "//{}",
]  # fmt: skip
QUERIES = ["q", "token", "only", "sort", "direction", "page", "model", "left", "right", "split", "explainer", "all", "x"]  # fmt: skip
LIVE = ["activations", "strongest", "steer"]
FIELDS = ["model", "text", "layer", "neuron", "position", "operation", "value", "tokens", "extra"]
HEADERS: dict[str, list[str]] = {
    "origin": ["http://127.0.0.1", "http://evil.example", "null", "", "://"],
    "host": ["127.0.0.1", "localhost:80", "evil.example", "[::1]", "[", "127.0.0.1:x", ""],
    "content-type": [
        "application/json",
        "text/plain",
        "application/json; charset=utf-16",
        "multipart/form-data",
        "x",
    ],
    "content-length": ["0", "-1", "x", "9" * 20, "65537", "3"],
    "transfer-encoding": ["chunked", "x"],
    "if-none-match": ['"x"', "*", ""],
    "range": ["bytes=0-1", "bytes=9-1", "x"],
    "accept-encoding": ["gzip", "x;q=z"],
    "cookie": ["a=b; c", "=" * 100],
}
value = st.one_of(
    st.sampled_from(PARTS),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.none(),
    st.booleans(),
    st.text(max_size=20),
    st.just("x" * 5000),
    st.just([1, [2]]),
    st.just({"a": None}),
)


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    """A request: mostly an address that exists, with parts, queries, headers and a body that may be anything."""
    part = st.one_of(st.sampled_from(PARTS[:8]), st.sampled_from(PARTS), st.text(max_size=10).map(lambda t: quote(t, errors="replace")))  # fmt: skip
    template = draw(st.sampled_from(TEMPLATES))
    address = template.format(*(draw(part) for _ in range(template.count("{}"))))
    if template.endswith("live/{}"):
        address = f"/api/r/run/live/{draw(st.sampled_from(LIVE))}"
    query = {draw(st.sampled_from(QUERIES)): draw(part) for _ in range(draw(st.integers(0, 2)))}
    method = draw(
        st.sampled_from(["GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X"])
    )
    method = "POST" if "/live/" in address else method
    headers = {"origin": "http://127.0.0.1"} if draw(st.integers(0, 4)) else {}
    for name in draw(st.lists(st.sampled_from(list(HEADERS)), max_size=2)):
        headers[name] = draw(st.sampled_from(HEADERS[name]))
    return {"method": method, "url": address, "params": query, "headers": headers, "content": draw(bodies())}  # fmt: skip


@st.composite
def bodies(draw: Any) -> bytes:
    """A body: of the right form with some fields wrong, other JSON, or bytes."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        deep = draw(st.sampled_from([10, 900, 1100, 30_000]))
        return draw(st.sampled_from([b"[" * deep, b"[" * deep + b"]" * deep, b'{"a":' * deep]))
    good = {"model": "crate-2l", "text": "the river", "layer": 1, "neuron": 7}
    changes = {draw(st.sampled_from(FIELDS)): draw(value) for _ in range(draw(st.integers(0, 3)))}
    text = json.dumps({**good, **changes})
    return text.encode("utf-8", "surrogatepass")


def state(run: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file, but of those that a reader may write: the search index, and locks."""
    return {
        str(p.relative_to(run)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in run.rglob("*")
        if p.is_file() and not p.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def bounded():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY


@settings(150)
@given(requests())
@pytest.mark.fault(
    "random requests to the browser's server", "a status below 500 in time; the run stays as it is"
)
def test_requests(client, viewer_run, bounded, sent):
    before = state(viewer_run)
    start = time.process_time()
    try:
        answer = client.request(**sent)
    except (UnicodeError, ValueError, httpx.InvalidURL):
        return  # the client itself refuses to send it
    assert time.process_time() - start < LIMIT
    assert answer.status_code < 500, (sent, answer.text[:300])
    if answer.status_code >= 400 and sent["method"] != "HEAD":
        assert "Traceback" not in answer.text
        if answer.url.path.startswith("/api/"):
            assert set(answer.json()) == {"error"}
            assert "\n" not in answer.json()["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert state(viewer_run) == before
