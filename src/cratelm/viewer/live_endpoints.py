"""Endpoints of the live page: JSON over HTTP.

Their bodies are checked here; `cratelm.viewer.live` and `cratelm.viewer.live_explanations` answer.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cratelm.errors import InputError
from cratelm.results.views import NotFound, plain
from cratelm.steer.edits import Edit
from cratelm.viewer.live import LONGEST_TEXT, Busy, Live
from cratelm.viewer.live_explanations import LiveExplanations
from cratelm.viewer.security import Rate

BURST, PER_SECOND = 30, 8
"""rate limit of requests to the model per client: at once, and per second in the long run"""
Index = Annotated[int, Field(ge=0, le=100_000_000)]
Name = Annotated[str, Field(pattern=r"^[0-9]{1,9}[+-]?$")]
"""a neuron as it is written: `17`, or one of its ends, `17+` or `17-`"""
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
RunKey = Annotated[str, Path(max_length=200)]


class LiveRequest(BaseModel):
    """Fields common to all requests."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=200)]
    text: Text


class ActivationsRequest(LiveRequest):
    """Request for the activation of one neuron at every token."""

    layer: Index
    neuron: Index | Name


class PositionRequest(LiveRequest):
    """Request about one token."""

    position: Index


class SteerRequest(LiveRequest):
    """Request to steer one neuron at every token."""

    layer: Index
    neuron: Index | Name
    operation: Literal["set", "add", "scale", "zero"]
    value: Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)] = 0.0
    tokens: Annotated[int, Field(ge=0, le=64)] = 16

    def edit(self, index: int) -> Edit:
        """Return the requested edit of the neuron with this index."""
        value: Any = True if self.operation == "zero" else self.value
        return Edit(self.layer, index, **{self.operation: value})


def _index(live: Live, run: str, body: "ActivationsRequest | SteerRequest") -> int:
    """Return the index of the neuron, or end of one, that a request names."""
    return live.library.index_named(run, body.model, str(body.neuron))


def router(live: Live, rate: Rate | None = None) -> APIRouter:
    """Return the endpoints of the live page. Each runs in a worker thread, so the event loop stays free.

    `rate` limits the requests of each client; by default 30 at once and 8 per second.
    """
    explanations = LiveExplanations(live)
    limit = rate or Rate(burst=BURST, per_second=PER_SECOND)
    endpoints = APIRouter(prefix="/api/r/{run}/live")

    def answer(request: Request, ask: Callable[[], Any]) -> Response:
        client = request.client.host if request.client else ""
        if not limit.take(client):
            return JSONResponse({"error": "too many requests at once: wait a second"}, 429)
        try:
            return JSONResponse(plain(ask()))
        except Busy as error:
            return JSONResponse({"error": str(error)}, 503)
        except NotFound as error:
            return JSONResponse({"error": str(error)}, 404)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)

    @endpoints.post("/activations")
    def activations(run: RunKey, body: ActivationsRequest, request: Request) -> Response:
        return answer(
            request,
            lambda: live.activations(
                run, body.model, body.text, body.layer, _index(live, run, body)
            ),
        )

    @endpoints.post("/strongest")
    def strongest(run: RunKey, body: PositionRequest, request: Request) -> Response:
        return answer(request, lambda: live.strongest(run, body.model, body.text, body.position))

    @endpoints.post("/steer")
    def steer(run: RunKey, body: SteerRequest, request: Request) -> Response:
        return answer(
            request,
            lambda: live.steer(
                run, body.model, body.text, body.edit(_index(live, run, body)), body.tokens
            ),
        )

    @endpoints.post("/explained")
    def explained(run: RunKey, body: LiveRequest, request: Request) -> Response:
        return answer(request, lambda: explanations.read(run, body.model, body.text))

    @endpoints.post("/predicted")
    def predicted(run: RunKey, body: PositionRequest, request: Request) -> Response:
        return answer(
            request, lambda: explanations.predict(run, body.model, body.text, body.position)
        )

    return endpoints
