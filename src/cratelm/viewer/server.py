"""Serve the pages with FastAPI; each page is rendered in a worker thread."""

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from cratelm.errors import InputError
from cratelm.results.views import LayerQuery, NeuronView, NotFound, plain
from cratelm.viewer.exports import svg_card
from cratelm.viewer.pages import Pages
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import (
    HEADERS,
    LONGEST_ADDRESS,
    LONGEST_BODY,
    Rate,
    allowed_hosts,
    is_allowed,
    is_own,
)

ASSETS = {
    "style.css": "text/css",
    "app.js": "text/javascript",
    "live.js": "text/javascript",
    "map.js": "text/javascript",
}
Words = Annotated[str, Query(max_length=200)]
TokenText = Annotated[str, Query(max_length=100)]
Layer = Annotated[int, Path(ge=0, le=100_000)]
Neuron = Annotated[str, Path(max_length=20)]


def _query(
    q: Words = "",
    token: TokenText = "",
    only: Literal["all", "explained", "alive", "dead", ""] = "all",
    sort: Annotated[str, Query(max_length=40)] = "",
    direction: Literal["", "ascending", "descending"] = "",
    page: Annotated[int, Query(ge=1, le=10**7)] = 1,
) -> LayerQuery:
    """Return the query of an address. ␣ stands for a space, which forms and addresses strip at the ends."""
    return LayerQuery(sort, direction == "descending", q, _spaced(token), only or "all", page)


def _view(
    request: Request,
    run: str,
    model: str,
    layer: Layer,
    index: Neuron,
    split: Literal["held_out", "fit"] = "held_out",
    explainer: Annotated[str, Query(max_length=100)] = "",
    all: bool = False,
) -> NeuronView:
    library: Library = request.app.state.library
    number = library.index_named(run, model, index)
    return library.neuron(run, model, layer, number, split, explainer, "all" if all else "some")


def _spaced(token: str) -> str:
    return token.replace("␣", " ")


Filters = Annotated[LayerQuery, Depends(_query)]
View = Annotated[NeuronView, Depends(_view)]
BURST, PER_SECOND = 120, 40
"""rate limit of requests per client, at once and per second: enough for a person who holds a key down, but not
for a crawler"""


def application(
    library: Library,
    host: str = "127.0.0.1",
    live: APIRouter | None = None,
    rate: Rate | None = None,
) -> FastAPI:
    """Return the application that serves the runs on the address `host`.

    `live` holds the endpoints that need the model; without it there is no live page. `rate` limits the requests of
    each client; by default 120 at once and 40 per second.
    """
    app = FastAPI(title="cratelm", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.library = library
    pages = Pages(library, live=live is not None)
    app.include_router(_pages(library, pages))
    app.include_router(_api(library), prefix="/api")
    if live is not None:
        app.include_router(live)
    _guard(app, pages, host, rate or Rate(burst=BURST, per_second=PER_SECOND))
    _errors(app, pages)
    return app


def _pages(library: Library, pages: Pages) -> APIRouter:
    """Return the routes of the pages and their assets."""
    router = APIRouter(default_response_class=HTMLResponse)

    @router.get("/")
    def overview() -> Response:
        if len(library.keys) == 1:
            return HTMLResponse(pages.overview(library.keys[0]))
        return HTMLResponse(pages.overview())

    @router.get("/r/{run}")
    def run_overview(run: str) -> Response:
        return HTMLResponse(pages.overview(library.run(run).key))

    @router.get("/r/{run}/layer/{model}/{layer}")
    def layer(run: str, model: str, layer: Layer, query: Filters) -> Response:
        return HTMLResponse(pages.layer(run, model, layer, query))

    @router.get("/r/{run}/neuron/{model}/{layer}/{index}")
    def neuron(view: View) -> Response:
        return HTMLResponse(pages.neuron(view))

    @router.get("/r/{run}/search")
    def search(run: str, q: Words = "", token: TokenText = "", model: Words = "") -> Response:
        return HTMLResponse(pages.search(run, q, _spaced(token), model))

    @router.get("/r/{run}/compare")
    def compare(run: str, left: Words = "", right: Words = "") -> Response:
        return HTMLResponse(pages.compare(run, left, right))

    @router.get("/r/{run}/live")
    def live(run: str) -> Response:
        if not pages.live:
            raise NotFound("the live page is disabled: start `cratelm view` without --no-live")
        return HTMLResponse(pages.live_page(run))

    @router.get("/assets/{name}")
    def asset(name: str, request: Request) -> Response:
        if name not in ASSETS:
            raise NotFound(f"there is no file {name!r}")
        content, tag = _asset(name)
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=ASSETS[name], headers=headers)

    @router.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)  # there is none

    return router


def _api(library: Library) -> APIRouter:
    """Return the routes that serve the same data as JSON."""
    router = APIRouter()

    @router.get("/runs")
    def runs() -> Response:
        return JSONResponse([plain(library.run(key)) for key in library.keys])

    @router.get("/r/{run}/layer/{model}/{layer}")
    def layer(run: str, model: str, layer: Layer, query: Filters) -> Response:
        return JSONResponse(plain(library.layer(run, model, layer, query)))

    @router.get("/r/{run}/map/{model}/{layer}")
    def map_details(run: str, model: str, layer: Layer) -> Response:
        return JSONResponse(library.map_details(run, model, layer))

    @router.get("/r/{run}/search")
    def search(run: str, q: Words = "", token: TokenText = "", model: Words = "") -> Response:
        results = library.search(run, text=q, token=_spaced(token), model=model)
        return JSONResponse(plain(results))

    @router.get("/r/{run}/index")
    def index_state(run: str) -> Response:
        return JSONResponse(plain(library.index_state(run)))

    @router.get("/r/{run}/neuron/{model}/{layer}/{index}")
    def neuron(view: View) -> Response:
        return JSONResponse(plain(view))

    @router.get("/r/{run}/neuron/{model}/{layer}/{index}/card.svg")
    def card(view: View) -> Response:
        name = f"neuron-{view.layer}-{view.name}.svg"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(svg_card(view), media_type="image/svg+xml", headers=headers)

    return router


@cache
def _asset(name: str) -> tuple[bytes, str]:
    """Return the content of an asset and its ETag."""
    content = (resources.files("cratelm.viewer") / "assets" / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:20]}"'


def _guard(app: FastAPI, pages: Pages, host: str, rate: Rate) -> None:
    """Add a middleware that rejects requests that `cratelm.viewer.security` does not allow, and sets its headers."""
    names, anywhere = allowed_hosts(host), host in ("0.0.0.0", "::")

    def refused(request: Request) -> tuple[int, str] | None:
        host_header = request.headers.get("host", "")
        origin = request.headers.get("origin")
        client = request.client.host if request.client else ""
        reads = request.method in ("GET", "HEAD")
        length = request.headers.get("content-length", "0" if reads else "")
        if not is_allowed(host_header, names, anywhere):
            return 421, f"this server does not answer to the host {host_header[:80]!r}"
        if not reads and (origin is None or not is_own(origin, host_header)):
            return 403, "requests from other sites are not answered"
        if len(str(request.url)) > LONGEST_ADDRESS:
            return 414, "the address is too long"
        if not length:  # a chunked body may never end
            return 411, "the request must state the length of its body"
        if not length.isdigit() or int(length) > LONGEST_BODY:
            return 413, f"the body of a request can have at most {LONGEST_BODY:,} bytes"
        if not request.url.path.startswith("/assets/") and not rate.take(client):
            return 429, "too many requests at once: wait a second"
        return None

    @app.middleware("http")
    async def guarded(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        problem = refused(request)
        answer = _error(pages, request, *problem) if problem else await call_next(request)
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer


_MESSAGES = {
    400: "the body of the request is not JSON in UTF-8, or is nested too deeply",
    405: "this address does not accept this method",
}
"""what is wrong with a request that FastAPI itself rejects, by its status"""


def _errors(app: FastAPI, pages: Pages) -> None:
    """Add handlers that report errors in one sentence, as a page or as JSON."""

    @app.exception_handler(NotFound)
    def not_found(request: Request, error: Exception) -> Response:
        return _error(pages, request, 404, str(error))

    @app.exception_handler(InputError)
    def bad_input(request: Request, error: Exception) -> Response:
        return _error(pages, request, 400, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"][1:]) or "the request"
        return _error(pages, request, 400, f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = _MESSAGES.get(error.status_code, "there is no such page")
        return _error(pages, request, error.status_code, message)

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> Response:
        kind = type(error).__name__
        return _error(
            pages,
            request,
            500,
            f"the page could not be rendered ({kind}): see the terminal for details",
        )


def _error(pages: Pages, request: Request, status: int, message: str) -> Response:
    """Return an error as a page, or as JSON for the API."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    return HTMLResponse(pages.error(status, message), status)
