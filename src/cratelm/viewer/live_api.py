"""What the live page asks, as JSON over HTTP."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cratelm.errors import InputError
from cratelm.results.views import NotFound, plain
from cratelm.steer.edits import Edit
from cratelm.viewer.live import LONGEST_TEXT, Busy, Live
from cratelm.viewer.security import Rate

BURST, PER_SECOND = 30, 8
"""questions to the model by one client"""
Index = Annotated[int, Field(ge=0, le=100_000_000)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
Run = Annotated[str, Path(max_length=200)]


class Asked(BaseModel):
    """Fields of every question."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=200)]
    text: Text


class ActivationsAsked(Asked):
    layer: Index
    neuron: Index


class StrongestAsked(Asked):
    position: Index


class SteerAsked(Asked):
    layer: Index
    neuron: Index
    operation: Literal["set", "add", "scale", "zero"]
    value: Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)] = 0.0
    tokens: Annotated[int, Field(ge=0, le=64)] = 16

    def edit(self) -> Edit:
        value: Any = True if self.operation == "zero" else self.value
        return Edit(self.layer, self.neuron, **{self.operation: value})


def router(live: Live, rate: Rate | None = None) -> APIRouter:
    """The endpoints; each is answered in a worker thread, the event loop stays free. `rate`: questions
    that one client may ask, 30 at once and 8 a second where it is not given."""
    allowed = rate or Rate(burst=BURST, per_second=PER_SECOND)
    made = APIRouter(prefix="/api/r/{run}/live")

    def answer(request: Request, ask: Any) -> Response:
        client = request.client.host if request.client else ""
        if not allowed.take(client):
            return JSONResponse({"error": "too many questions at once: wait a second"}, 429)
        try:
            return JSONResponse(plain(ask()))
        except Busy as error:
            return JSONResponse({"error": str(error)}, 503)
        except NotFound as error:
            return JSONResponse({"error": str(error)}, 404)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)

    @made.post("/activations")
    def activations(run: Run, asked: ActivationsAsked, request: Request) -> Response:
        return answer(
            request,
            lambda: live.activations(run, asked.model, asked.text, asked.layer, asked.neuron),
        )

    @made.post("/strongest")
    def strongest(run: Run, asked: StrongestAsked, request: Request) -> Response:
        return answer(request, lambda: live.strongest(run, asked.model, asked.text, asked.position))

    @made.post("/steer")
    def steer(run: Run, asked: SteerAsked, request: Request) -> Response:
        return answer(
            request, lambda: live.steer(run, asked.model, asked.text, asked.edit(), asked.tokens)
        )

    return made
