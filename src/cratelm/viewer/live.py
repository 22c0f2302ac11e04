"""The live page: run the model on a typed text, and steer it.

One thread owns the model. At most `_WAITING` requests wait for it, each for at most `_PATIENCE` seconds,
so that the server stays responsive. Memory holds only the model used last, and the activations of the text
used last.

Shape legend: T tokens of a text, H neurons of a layer, V vocabulary.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from cachetools import LRUCache

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.errors import InputError
from cratelm.models.begin import opening
from cratelm.models.open import Encoder, encoder_of
from cratelm.models.sites import capture
from cratelm.records import neuron_name
from cratelm.results.stages import changed_at
from cratelm.runs.model_options import HarvestedModelOptions, SourceOptions
from cratelm.steer.edits import Edit
from cratelm.steer.next_tokens import (
    compare_next_tokens,
    continue_text,
    next_log_probabilities,
    shown_units,
    token_string,
)
from cratelm.steer.steering import steering
from cratelm.text.claim import claim
from cratelm.text.units import Unit
from cratelm.viewer.run_reader import Library

LONGEST_TEXT = 4000
"""characters"""
_WAITING, _PATIENCE = 24, 20.0
_ANSWERS = 64
"""maximum number of cached answers, of at most about 100 kB each"""
_STRONGEST, _TOKENS_SHOWN, _MOST_GENERATED = 20, 10, 64
_T = TypeVar("_T")
_Captured = tuple[tuple[tuple[str, ...], tuple[Unit, ...]], int, list[np.ndarray]]


class Busy(Exception):
    """Raised if too many requests wait for the model, or if the model takes too long."""


@dataclass(frozen=True)
class TextActivations:
    """Activation of one neuron at every token of a text."""

    tokens: tuple[str, ...]
    """[T] display strings, without the start token"""
    units: tuple[Unit, ...]
    """the tokens as they are shown: several that make a character are one unit"""
    cut: int
    """number of tokens at the end of the text that do not fit into the model's context"""
    layer: int
    index: int
    values: tuple[float, ...]
    """[T] raw activations of the neuron"""
    maximum: float
    """the neuron's largest activation on the held-out split"""


@dataclass(frozen=True)
class TopNeuron:
    """A neuron with a high activation at a token."""

    layer: int
    index: int
    value: float
    """raw activation"""
    share: float
    """`value` divided by the neuron's largest activation on the held-out split"""
    explanation: str
    name: str
    """how the neuron is written: its index, or `17+` and `17-` for the ends of neuron 17"""


@dataclass(frozen=True)
class TokenChance:
    """Probability of one next token."""

    token: str
    before: float
    """probability without steering"""
    after: float
    """probability with steering"""


@dataclass(frozen=True)
class SteeringEffect:
    """Effect of an edit on the next token and on the continuation."""

    chances: tuple[TokenChance, ...]
    """the tokens whose probability changes most, and the most likely ones before and after"""
    kl: float
    """KL divergence between the next-token distributions without and with steering, nats"""
    plain: str
    """continuation without steering"""
    steered: str
    """continuation with steering"""


class Live:
    """Runs the models of a library, one at a time."""

    def __init__(
        self,
        library: Library,
        options: SourceOptions = HarvestedModelOptions(),  # noqa: B008 - it is frozen
    ):
        self.library, self.options = library, options
        self._worker = ThreadPoolExecutor(1, "model")
        self._waiting = threading.BoundedSemaphore(_WAITING)
        self._model: tuple[tuple[str, str, str], HarvestContext, Encoder] | None = None
        """run, model and identity of its harvest; the opened model"""
        self._text: tuple[tuple[str, str, str], _Captured] | None = None
        """run, model and text; its activations, because several requests usually use the same text"""
        self.beside: dict[str, Any] = {}
        """what else is made of the model in memory, which is freed with it; for use in the model's thread"""
        self._answers: LRUCache[tuple, Any] = LRUCache(_ANSWERS)
        self._lock = threading.Lock()
        """protects `_answers`"""

    def close(self) -> None:
        """Stop the thread of the model and cancel waiting requests."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    # ---- requests ---------------------------------------------------------------------------------

    def activations(
        self, run: str, model: str, text: str, layer: int, index: int
    ) -> TextActivations:
        """Return one neuron's activation at every token of a text.

        Raises `InputError` if the text is empty or too long or the neuron does not exist, and `Busy` if too many
        requests wait.
        """
        state = self.state(run, model)
        maximum = self._maximum(run, model, layer, index)

        def work() -> TextActivations:
            (tokens, units), cut, activations = self._captured(run, model, text)
            layers = self.opened(run, model)[0].site.layer_numbers
            values = activations[layers.index(layer)][:, index]
            return TextActivations(
                tokens, units, cut, layer, index, tuple(values.tolist()), maximum
            )

        return self.ask(("activations", *state, text, layer, index), work)

    def strongest(self, run: str, model: str, text: str, position: int) -> tuple[TopNeuron, ...]:
        """Return the neurons of all layers with the highest activation at a token, relative to their own maximum.

        Raises `InputError` if the text has no token at `position`, and the same errors as `activations`.
        """
        state = self.state(run, model)
        table = self.library.table(run, model)

        def work() -> tuple[TopNeuron, ...]:
            (tokens, _), _, activations = self._captured(run, model, text)
            if not 0 <= position < len(tokens):
                raise InputError(f"token {position}: the text has tokens 0 to {len(tokens) - 1}")
            layers = self.opened(run, model)[0].site.layer_numbers
            strongest = []
            for layer, of_layer in zip(layers, activations, strict=True):
                here = table.rows_of(layer)
                values = of_layer[position]  # [H]
                largest = np.maximum(table.maximum[here], 1e-9)
                share = np.where(table.maximum[here] > 0, values / largest, 0)
                for i in np.argsort(-share, kind="stable")[:_STRONGEST].tolist():
                    if share[i] > 0:
                        text_of = claim(str(table.explanations[here.start + i]))
                        name = neuron_name(i, table.site)
                        strongest.append(
                            TopNeuron(layer, i, float(values[i]), float(share[i]), text_of, name)
                        )
            return tuple(sorted(strongest, key=lambda s: -s.share)[:_STRONGEST])

        return self.ask(("strongest", *state, text, position), work)

    def steer(self, run: str, model: str, text: str, edit: Edit, count: int) -> SteeringEffect:
        """Return the effect of an edit at every token but a begin token on the next token and on a continuation.

        The continuation has `count` tokens, chosen greedily. Raises `InputError` if `count` is too large, and the
        same errors as `activations`.
        """
        if not 0 <= count <= _MOST_GENERATED:
            raise InputError(
                f"{count} tokens were requested: 0 to {_MOST_GENERATED} can be generated"
            )
        state = self.state(run, model)
        for index in edit.indices:
            self._maximum(run, model, edit.layer, index)

        def work() -> SteeringEffect:
            context, encoder = self.opened(run, model)
            ids, _ = self.ids(context, encoder, text, count)
            steered_at = edit.from_position(context.beginning.extra)
            subject_model = context.subject.model
            before = next_log_probabilities(subject_model, ids)
            plain = continue_text(subject_model, encoder, ids, count)
            with steering(subject_model, steered_at, site=context.site):
                after = next_log_probabilities(subject_model, ids)
                steered = continue_text(subject_model, encoder, ids, count)
            change = compare_next_tokens(before, after, encoder.display, _TOKENS_SHOWN)
            chances = _chances(before, after, change, encoder.display)
            return SteeringEffect(chances, change.kl, plain, steered)

        return self.ask(
            ("steer", *state, text, edit.layer, edit.indices, edit.operation, count), work
        )

    # ---- in the model's thread --------------------------------------------------------------------

    def state(self, run: str, model: str) -> tuple[str, str, str, int]:
        """Return the cache key of an answer: run, model, its harvest and the time of the last change of the run.

        A cached answer is valid only while the harvest and the stages computed from it stay the same. Raises
        `NotFound` if the run or the model does not exist.
        """
        self.library.table(run, model)
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        return run, model, harvest, changed_at(path)

    def ask(self, name: tuple, work: Callable[[], _T]) -> _T:
        """Return the cached answer of this name, or compute it in the model's thread."""
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

    def opened(self, run: str, model: str) -> tuple[HarvestContext, Encoder]:
        """Return the model and its encoder, opening them if another model is in memory."""
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        name = (run, model, harvest)
        if self._model is None or self._model[0] != name:
            self._model = self._text = None  # free the other model before loading this one
            self.beside.clear()
            context = open_harvested(path, model, self.options)
            context.subject.model.eval()
            self._model = (name, context, encoder_of(context.subject, path))
        return self._model[1], self._model[2]

    def ids(
        self, context: HarvestContext, encoder: Encoder, text: str, room: int
    ) -> tuple[torch.Tensor, int]:
        """Return the token ids [1, 1 + T], and the number of tokens cut off.

        They begin with the begin token of the harvest, or without one with the end-of-text token.

        `room` is the number of tokens that will be generated after the text.
        """
        ids = encoder.encode(checked(text)).tolist()
        longest = (context.subject.longest or 1024) - 1 - room
        fitting = [opening(encoder, context.beginning), *ids[:longest]]
        device = context.subject.model.device
        return torch.tensor([fitting], device=device), max(0, len(ids) - longest)

    def _captured(self, run: str, model: str, text: str) -> _Captured:
        """Return display strings [T] and units, the number of tokens cut off, and activations [T, H] of each layer."""
        context, encoder = self.opened(run, model)
        name = (run, model, text)
        if self._text is not None and self._text[0] == name:
            return self._text[1]
        ids, cut = self.ids(context, encoder, text, 0)
        captured = capture(context.subject.model, context.site, ids)
        activations = [a[0, 1:].float().cpu().numpy() for a in captured]
        display = encoder.display
        read = ids[0, 1:].tolist()
        tokens = tuple(token_string(display, i) for i in read)
        self._text = (name, ((tokens, shown_units(display, read)), cut, activations))
        return self._text[1]

    def _maximum(self, run: str, model: str, layer: int, index: int) -> float:
        """Return the neuron's largest activation on the held-out split. Raises `InputError` if it does not exist."""
        table = self.library.table(run, model)
        row = table.row(layer, index)
        if row is None:
            name = neuron_name(index, table.site)
            raise InputError(f"{model} has no neuron {name} in layer {layer}")
        return float(table.maximum[row])


def checked(text: str) -> str:
    """Return the text as valid Unicode. Raises `InputError` if it is empty or too long."""
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"the text has {len(text):,} characters, but at most {LONGEST_TEXT:,} are allowed: type a shorter text"
        )
    if not text:
        raise InputError("the text is empty: type a text")
    # JSON can contain lone surrogates, which are not characters
    return text.encode("utf-8", "replace").decode("utf-8")


def _chances(
    before: torch.Tensor, after: torch.Tensor, change: Any, display: list[str]
) -> tuple[TokenChance, ...]:
    """Return the tokens that gain or lose most and the most likely ones, sorted by the larger probability."""
    changed = {c.id: c for c in (*change.gains, *change.losses)}
    likely = {*before.topk(5).indices.tolist(), *after.topk(5).indices.tolist()}
    tokens = sorted({*changed, *likely}, key=lambda t: -max(float(before[t]), float(after[t])))
    p, q = before.exp(), after.exp()
    return tuple(
        TokenChance(token_string(display, t), float(p[t]), float(q[t]))
        for t in tokens[: 2 * _TOKENS_SHOWN]
    )
