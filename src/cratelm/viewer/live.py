"""The live page: activations of a typed text, and steering, computed by the model itself; as JSON over HTTP.

One thread owns the model. At most `_WAITING` requests wait for it, each for at most `_PATIENCE` seconds,
so that the server stays responsive. Only the model asked for last is in memory, with the logits and
activations of one text.

Shape legend: T tokens of a text, H neurons of a layer, V vocabulary.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from cachetools import LRUCache
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.errors import InputError
from cratelm.models.open import Encoder, encoder_of
from cratelm.models.sites import capture
from cratelm.results.stages import changed_at
from cratelm.results.views import NotFound, plain
from cratelm.steer.edits import Edit
from cratelm.steer.next_tokens import (
    compare_next_tokens,
    continue_text,
    next_log_probabilities,
    token_string,
)
from cratelm.steer.steering import steering
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import Rate

LONGEST_TEXT = 4000
"""characters"""
_WAITING, _PATIENCE = 24, 20.0
_ANSWERS = 64
"""answers kept; each at most some 100 kB"""
BURST, PER_SECOND = 30, 8
"""requests to the model by one client"""
_STRONGEST, _TOKENS_SHOWN, _MOST_GENERATED = 20, 10, 64
_T = TypeVar("_T")
_Captured = tuple[tuple[str, ...], int, list[np.ndarray]]


class Busy(Exception):
    """Too many requests wait for the model, or it takes too long."""


@dataclass(frozen=True)
class TextActivations:
    """One neuron at every token of a text."""

    tokens: tuple[str, ...]
    """[T] as they are shown, without the one that every text begins with"""
    cut: int
    """tokens left out because the model takes no more"""
    layer: int
    index: int
    values: tuple[float, ...]
    """[T] raw activations of the neuron"""
    maximum: float
    """its largest on the held-out split"""


@dataclass(frozen=True)
class TopNeuron:
    """A neuron with a high activation at a token."""

    layer: int
    index: int
    value: float
    """raw activation"""
    share: float
    """of its largest activation on the held-out split"""
    explanation: str


@dataclass(frozen=True)
class TokenChance:
    """The probability of a next token."""

    token: str
    before: float
    """unsteered"""
    after: float


@dataclass(frozen=True)
class SteeringEffect:
    """Effect of an edit on the next token and on the continuation."""

    chances: tuple[TokenChance, ...]
    """of the tokens that change most, and of the likeliest before and after"""
    kl: float
    """KL divergence of the next token, nats"""
    plain: str
    steered: str


class Live:
    """The models of a library's runs, one at a time."""

    def __init__(self, library: Library):
        self.library = library
        self._worker = ThreadPoolExecutor(1, "model")
        self._waiting = threading.BoundedSemaphore(_WAITING)
        self._model: tuple[tuple[str, str, str], HarvestContext, Encoder] | None = None
        """by run, model and identity of its harvest"""
        self._text: tuple[tuple[str, str, str], _Captured] | None = None
        """activations of the last text, since several requests are about one text"""
        self._answers: LRUCache[tuple, Any] = LRUCache(_ANSWERS)
        self._lock = threading.Lock()
        """of the answers"""

    def close(self) -> None:
        """Stop the thread of the model; waiting requests are cancelled."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    # ---- requests ---------------------------------------------------------------------------------

    def activations(
        self, run: str, model: str, text: str, layer: int, index: int
    ) -> TextActivations:
        """Return one neuron's activation at every token of a text.

        Raises `InputError` for a text or neuron that cannot be read, `Busy` if too many requests wait.
        """
        state = self._state(run, model)
        maximum = self._maximum(run, model, layer, index)

        def work() -> TextActivations:
            tokens, cut, activations = self._captured(run, model, text)
            layers = self._open(run, model)[0].site.layer_numbers
            values = activations[layers.index(layer)][:, index]
            return TextActivations(tokens, cut, layer, index, tuple(values.tolist()), maximum)

        return self._ask(("activations", *state, text, layer, index), work)

    def strongest(self, run: str, model: str, text: str, position: int) -> tuple[TopNeuron, ...]:
        """Return the neurons of all layers that are strongest at a token, relative to their own maximum."""
        state = self._state(run, model)
        table = self.library.table(run, model)

        def work() -> tuple[TopNeuron, ...]:
            tokens, _, activations = self._captured(run, model, text)
            if not 0 <= position < len(tokens):
                raise InputError(f"token {position}: the text has tokens 0 to {len(tokens) - 1}")
            layers = self._open(run, model)[0].site.layer_numbers
            strongest = []
            for layer, of_layer in zip(layers, activations, strict=True):
                here = table.rows_of(layer)
                values = of_layer[position]  # [H]
                largest = np.maximum(table.maximum[here], 1e-9)
                share = np.where(table.maximum[here] > 0, values / largest, 0)
                for i in np.argsort(-share, kind="stable")[:_STRONGEST].tolist():
                    if share[i] > 0:
                        text_of = str(table.explanations[here.start + i])
                        strongest.append(
                            TopNeuron(layer, i, float(values[i]), float(share[i]), text_of)
                        )
            return tuple(sorted(strongest, key=lambda s: -s.share)[:_STRONGEST])

        return self._ask(("strongest", *state, text, position), work)

    def steer(self, run: str, model: str, text: str, edit: Edit, count: int) -> SteeringEffect:
        """Return the effect of an edit at every token on the next token and `count` more, chosen greedily."""
        if not 0 <= count <= _MOST_GENERATED:
            raise InputError(
                f"{count} tokens were requested: 0 to {_MOST_GENERATED} can be generated"
            )
        state = self._state(run, model)
        for index in edit.indices:
            self._maximum(run, model, edit.layer, index)

        def work() -> SteeringEffect:
            context, encoder = self._open(run, model)
            ids, _ = self._ids(context, encoder, text, count)
            subject_model = context.subject.model
            before = next_log_probabilities(subject_model, ids)
            plain = continue_text(subject_model, encoder, ids, count)
            with steering(subject_model, edit, site=context.site):
                after = next_log_probabilities(subject_model, ids)
                steered = continue_text(subject_model, encoder, ids, count)
            change = compare_next_tokens(before, after, encoder.display, _TOKENS_SHOWN)
            chances = _chances(before, after, change, encoder.display)
            return SteeringEffect(chances, change.kl, plain, steered)

        return self._ask(
            ("steer", *state, text, edit.layer, edit.indices, edit.operation, count), work
        )

    # ---- in the model's thread --------------------------------------------------------------------

    def _state(self, run: str, model: str) -> tuple[str, str, str, int]:
        """What an answer is about, read before anything else. Raises `NotFound`.

        An answer that is remembered holds only while the harvest, and what was explained since, is the same.
        """
        self.library.table(run, model)
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        return run, model, harvest, changed_at(path)

    def _ask(self, name: tuple, work: Callable[[], _T]) -> _T:
        """The answer, remembered or from the model's thread."""
        with self._lock:
            if name in self._answers:
                return self._answers[name]
        if not self._waiting.acquire(blocking=False):
            raise Busy("too many requests wait for the model: try again in a moment")
        pending: Future[_T] = self._worker.submit(work)
        pending.add_done_callback(lambda _: self._waiting.release())
        try:
            answer = pending.result(_PATIENCE)
        except Late:
            pending.cancel()
            raise Busy(
                f"the model did not answer within {_PATIENCE:.0f} seconds: try a shorter text"
            ) from None
        with self._lock:
            self._answers[name] = answer
        return answer

    def _open(self, run: str, model: str) -> tuple[HarvestContext, Encoder]:
        """The model, opened if it is not the one in memory."""
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        name = (run, model, harvest)
        if self._model is None or self._model[0] != name:
            self._model = self._text = None  # frees the other before this one is loaded
            context = open_harvested(path, model)
            context.subject.model.eval()
            self._model = (name, context, encoder_of(context.subject, path))
        return self._model[1], self._model[2]

    def _ids(
        self, context: HarvestContext, encoder: Encoder, text: str, room: int
    ) -> tuple[torch.Tensor, int]:
        """Token ids [1, 1 + T] with the one that texts begin with, and how many were cut.

        `room`: tokens that are to be generated after them.
        """
        ids = encoder.encode(checked(text)).tolist()
        longest = (context.subject.longest or 1024) - 1 - room
        fitting = [encoder.start, *ids[:longest]]
        device = context.subject.model.device
        return torch.tensor([fitting], device=device), max(0, len(ids) - longest)

    def _captured(self, run: str, model: str, text: str) -> _Captured:
        """Tokens as shown [T], how many were cut, and activations [T, H] of each layer."""
        context, encoder = self._open(run, model)
        name = (run, model, text)
        if self._text is not None and self._text[0] == name:
            return self._text[1]
        ids, cut = self._ids(context, encoder, text, 0)
        captured = capture(context.subject.model, context.site, ids)
        activations = [a[0, 1:].float().cpu().numpy() for a in captured]
        display = encoder.display
        tokens = tuple(token_string(display, i) for i in ids[0, 1:].tolist())
        self._text = (name, (tokens, cut, activations))
        return tokens, cut, activations

    def _maximum(self, run: str, model: str, layer: int, index: int) -> float:
        """The neuron's largest value on the held-out split. Raises `InputError` if the model lacks it."""
        table = self.library.table(run, model)
        row = table.row(layer, index)
        if row is None:
            raise InputError(f"{model} has no neuron {index} in layer {layer}")
        return float(table.maximum[row])


def checked(text: str) -> str:
    """Return the text. Raises `InputError` for one that is too long or empty."""
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"the text has {len(text):,} characters, at most {LONGEST_TEXT:,} are read"
        )
    if not text:
        raise InputError("the text is empty: type some")
    # halves of surrogate pairs are no characters; JSON can carry them
    return text.encode("utf-8", "replace").decode("utf-8")


def _chances(
    before: torch.Tensor, after: torch.Tensor, change: Any, display: list[str]
) -> tuple[TokenChance, ...]:
    """Tokens that gain or lose most, by their probability afterwards or before."""
    changed = {c.id: c for c in (*change.gains, *change.losses)}
    likely = {*before.topk(5).indices.tolist(), *after.topk(5).indices.tolist()}
    tokens = sorted({*changed, *likely}, key=lambda t: -max(float(before[t]), float(after[t])))
    p, q = before.exp(), after.exp()
    return tuple(
        TokenChance(token_string(display, t), float(p[t]), float(q[t]))
        for t in tokens[: 2 * _TOKENS_SHOWN]
    )


# ---- over HTTP ------------------------------------------------------------------------------------

Index = Annotated[int, Field(ge=0, le=100_000_000)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
RunKey = Annotated[str, Path(max_length=200)]


class LiveRequest(BaseModel):
    """Fields of every request."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=200)]
    text: Text


class ActivationsRequest(LiveRequest):
    """One neuron at every token."""

    layer: Index
    neuron: Index


class StrongestRequest(LiveRequest):
    """The strongest neurons at one token."""

    position: Index


class SteerRequest(LiveRequest):
    """One neuron steered at every token."""

    layer: Index
    neuron: Index
    operation: Literal["set", "add", "scale", "zero"]
    value: Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)] = 0.0
    tokens: Annotated[int, Field(ge=0, le=64)] = 16

    def edit(self) -> Edit:
        """Return the edit that is requested."""
        value: Any = True if self.operation == "zero" else self.value
        return Edit(self.layer, self.neuron, **{self.operation: value})


def router(live: Live, rate: Rate | None = None) -> APIRouter:
    """Return the endpoints. Each answers in a worker thread, so the event loop stays free.

    `rate`: requests that one client may make, 30 at once and 8 a second by default.
    """
    allowed = rate or Rate(burst=BURST, per_second=PER_SECOND)
    made = APIRouter(prefix="/api/r/{run}/live")

    def answer(request: Request, ask: Callable[[], Any]) -> Response:
        client = request.client.host if request.client else ""
        if not allowed.take(client):
            return JSONResponse({"error": "too many requests at once: wait a second"}, 429)
        try:
            return JSONResponse(plain(ask()))
        except Busy as error:
            return JSONResponse({"error": str(error)}, 503)
        except NotFound as error:
            return JSONResponse({"error": str(error)}, 404)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)

    @made.post("/activations")
    def activations(run: RunKey, body: ActivationsRequest, request: Request) -> Response:
        return answer(
            request, lambda: live.activations(run, body.model, body.text, body.layer, body.neuron)
        )

    @made.post("/strongest")
    def strongest(run: RunKey, body: StrongestRequest, request: Request) -> Response:
        return answer(request, lambda: live.strongest(run, body.model, body.text, body.position))

    @made.post("/steer")
    def steer(run: RunKey, body: SteerRequest, request: Request) -> Response:
        return answer(
            request, lambda: live.steer(run, body.model, body.text, body.edit(), body.tokens)
        )

    return made
