"""The model itself, for what no file holds: activations of a text that is typed, and steering.

One thread owns the model; requests wait for it in a line of at most `_WAITING`, each for `_PATIENCE`
seconds at most, so that the server stays responsive. One model is held at a time, that which was
asked for last: memory is that model's, and the logits and activations of one text.

Shape legend: T tokens of a text, H neurons of a layer, V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.errors import InputError
from cratelm.models.open import Encoder, encoder_of
from cratelm.models.partial_forward import next_logits
from cratelm.models.sites import capture
from cratelm.results.neuron_table import changed_at
from cratelm.steer.edits import Edit
from cratelm.steer.steer import compare_next_tokens, continue_ids
from cratelm.steer.steering import steering
from cratelm.viewer.run_reader import Library

LONGEST_TEXT = 4000
"""characters"""
_WAITING, _PATIENCE = 24, 20.0
_REMEMBERED = 64
"""answers kept; each at most some 100 kB"""
_STRONGEST, _TOKENS_SHOWN, _MOST_GENERATED = 20, 10, 64
_T = TypeVar("_T")
_Captured = tuple[tuple[str, ...], int, list[np.ndarray]]


class Busy(Exception):
    """Too many wait for the model, or it takes too long."""


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it."""

    tokens: tuple[str, ...]
    """[T] as they are shown, the one that texts begin with left out"""
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
    """A neuron that is strong at a token."""

    layer: int
    index: int
    value: float
    """raw activation"""
    share: float
    """of its largest on the held-out split"""
    explanation: str


@dataclass(frozen=True)
class TokenChance:
    token: str
    before: float
    """probability as the next token, unsteered"""
    after: float


@dataclass(frozen=True)
class SteeringEffect:
    """What an edit does to the next token and to the continuation."""

    chances: tuple[TokenChance, ...]
    """those that change most, and the likeliest of both"""
    kl: float
    """nats"""
    plain: str
    steered: str


class Live:
    """The models of a library's runs, one at a time."""

    def __init__(self, library: Library):
        self.library = library
        self._worker = ThreadPoolExecutor(1, "model")
        self._waiting = threading.BoundedSemaphore(_WAITING)
        self._held: tuple[tuple[str, str, str], HarvestContext, Encoder] | None = None
        self._seen: tuple[tuple[str, str, str], _Captured] | None = None
        """the last text, for several questions about it"""
        self._answers: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    # ---- what can be asked ------------------------------------------------------------------------

    def activations(self, run: str, model: str, text: str, layer: int, index: int) -> Reading:
        """One neuron at every token of a text.

        Raises `InputError` for a text or a neuron that cannot be, `Busy` where too many wait.
        """
        state = self._state(run, model)
        maximum = self._maximum(run, model, layer, index)

        def work() -> Reading:
            tokens, cut, found = self._captured(run, model, text)
            values = found[self._place(run, model, layer)][:, index]
            return Reading(tokens, cut, layer, index, tuple(values.tolist()), maximum)

        return self._ask(("activations", *state, text, layer, index), work)

    def strongest(self, run: str, model: str, text: str, position: int) -> tuple[TopNeuron, ...]:
        """The neurons of all layers that are strongest at a token, each against its own largest value."""
        state = self._state(run, model)
        columns = self.library.columns(run, model)

        def work() -> tuple[TopNeuron, ...]:
            tokens, _, found = self._captured(run, model, text)
            if not 0 <= position < len(tokens):
                raise InputError(f"token {position}: the text has tokens 0 to {len(tokens) - 1}")
            held = self._open(run, model)[0]
            texts, strong = columns.text(), []
            for place, layer in enumerate(held.site.layer_numbers):
                here = columns.rows_of(layer)
                values = found[place][position]  # [H]
                largest = np.maximum(columns.maximum[here], 1e-9)
                share = np.where(columns.maximum[here] > 0, values / largest, 0)
                for i in np.argsort(-share, kind="stable")[:_STRONGEST].tolist():
                    if share[i] > 0:
                        told = str(texts[here.start + i])
                        strong.append(TopNeuron(layer, i, float(values[i]), float(share[i]), told))
            return tuple(sorted(strong, key=lambda s: -s.share)[:_STRONGEST])

        return self._ask(("strongest", *state, text, position), work)

    def steer(self, run: str, model: str, text: str, edit: Edit, count: int) -> SteeringEffect:
        """The next token and `count` more with an edit at every token and without; greedy."""
        if not 0 <= count <= _MOST_GENERATED:
            raise InputError(f"{count} tokens: 0 to {_MOST_GENERATED} can be generated")
        state = self._state(run, model)
        for index in edit.indices:
            self._maximum(run, model, edit.layer, index)

        def work() -> SteeringEffect:
            held, encoder = self._open(run, model)
            ids, _ = self._ids(held, encoder, text, count)
            before = _chances(held, ids)
            plain = _continued(held, encoder, ids, count)
            with steering(held.subject.model, edit, site=held.site):
                after = _chances(held, ids)
                steered = _continued(held, encoder, ids, count)
            found = compare_next_tokens(before, after, encoder.display, _TOKENS_SHOWN)
            return SteeringEffect(
                _shown(before, after, found, encoder.display), found.kl, plain, steered
            )

        return self._ask(
            ("steer", *state, text, edit.layer, edit.indices, edit.operation, count), work
        )

    # ---- in the worker ----------------------------------------------------------------------------

    def _state(self, run: str, model: str) -> tuple[str, str, str, int]:
        """What an answer is about, read before anything else: an answer that is remembered holds only
        while the harvest, and what was explained since, is the same. Raises `NotFound`."""
        self.library.columns(run, model)
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        return run, model, harvest, changed_at(path)

    def _ask(self, name: tuple, work: Callable[[], _T]) -> _T:
        """The answer, remembered or from the worker."""
        with self._lock:
            if name in self._answers:
                self._answers.move_to_end(name)
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
            while len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def _open(self, run: str, model: str) -> tuple[HarvestContext, Encoder]:
        """The model, opened where it is not the one that is held."""
        path = self.library.run_of(run)
        harvest = path.stage("activations", model).require("harvest").identity
        name = (run, model, harvest)
        if self._held is None or self._held[0] != name:
            self._held = self._seen = None  # frees the other before this one is read
            held = open_harvested(path, model)
            held.subject.model.eval()
            self._held = (name, held, encoder_of(held.subject, path))
        return self._held[1], self._held[2]

    def _place(self, run: str, model: str, layer: int) -> int:
        held, _ = self._open(run, model)
        return held.site.layer_numbers.index(layer)

    def _ids(
        self, held: HarvestContext, encoder: Encoder, text: str, room: int
    ) -> tuple[torch.Tensor, int]:
        """Token ids [1, 1 + T] with the one that texts begin with, and how many were cut."""
        ids = encoder.encode(checked(text)).tolist()
        longest = (held.subject.longest or 1024) - 1 - room
        kept = [encoder.start, *ids[:longest]]
        return torch.tensor([kept], device=held.subject.model.device), max(0, len(ids) - longest)

    def _captured(self, run: str, model: str, text: str) -> _Captured:
        """Tokens as shown [T], how many were cut, and activations [T, H] of each place."""
        held, encoder = self._open(run, model)
        name = (run, model, text)
        if self._seen is not None and self._seen[0] == name:
            return self._seen[1]
        ids, cut = self._ids(held, encoder, text, 0)
        found = [
            a[0, 1:].float().cpu().numpy() for a in capture(held.subject.model, held.site, ids)
        ]
        display = encoder.display
        tokens = tuple(display[i] if i < len(display) else f"[{i}]" for i in ids[0, 1:].tolist())
        self._seen = (name, (tokens, cut, found))
        return tokens, cut, found

    def _maximum(self, run: str, model: str, layer: int, index: int) -> float:
        """The neuron's largest value on the held-out split. Raises `NotFound` where it is not there."""
        columns = self.library.columns(run, model)
        row = columns.row(layer, index)
        if row is None:
            raise InputError(f"{model} has no neuron {index} in layer {layer}")
        return float(columns.maximum[row])


def checked(text: str) -> str:
    """The text, if it can be read. Raises `InputError` for one that is too long or has no characters."""
    if len(text) > LONGEST_TEXT:
        raise InputError(
            f"the text has {len(text):,} characters, at most {LONGEST_TEXT:,} are read"
        )
    if not text:
        raise InputError("the text is empty: type some")
    # halves of surrogate pairs are no characters; JSON can carry them
    return text.encode("utf-8", "replace").decode("utf-8")


@torch.no_grad()
def _chances(held: HarvestContext, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [V] of the next token, at double precision."""
    logits = next_logits(held.subject.model, ids, 1)[0, 0]
    return logits.double().log_softmax(-1).cpu()


def _continued(held: HarvestContext, encoder: Encoder, ids: torch.Tensor, count: int) -> str:
    if not count:
        return ""
    made = continue_ids(held.subject.model, ids, count, 0.0, 0, encoder.start)
    return encoder.tokenizer.decode(made[0].tolist(), skip_special_tokens=False)


def _shown(
    before: torch.Tensor, after: torch.Tensor, found: Any, display: list[str]
) -> tuple[TokenChance, ...]:
    """Tokens that gain or lose most, by their probability afterwards or before."""
    changed = {c.id: c for c in (*found.gains, *found.losses)}
    likely = {*before.topk(5).indices.tolist(), *after.topk(5).indices.tolist()}
    tokens = sorted({*changed, *likely}, key=lambda t: -max(float(before[t]), float(after[t])))
    p, q = before.exp(), after.exp()
    return tuple(
        TokenChance(display[t] if t < len(display) else f"[{t}]", float(p[t]), float(q[t]))
        for t in tokens[: 2 * _TOKENS_SHOWN]
    )
