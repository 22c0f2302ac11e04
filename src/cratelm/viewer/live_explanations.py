"""The model of the live page next to the model run on its explanations, on a typed text.

All codes of the model are replaced by what explanations predict from the text, as in `cratelm replace`, with the
explanations that it stored. The explainer is the stored one that loses the fewest nats on held-out text.

Shape legend: T tokens of a text, H neurons of a layer, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.records import neuron_name
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.predictors import Predictor
from cratelm.replace.simulators import read_simulators
from cratelm.replace.text import BatchText
from cratelm.replace.token_cost import TokenCost, token_cost
from cratelm.results.neuron_table import NeuronTable
from cratelm.results.replacement import read_stored_explainer
from cratelm.steer.next_tokens import shown_units, token_string
from cratelm.text.claim import claim
from cratelm.text.units import Unit
from cratelm.viewer.live import Live

_TOKENS_SHOWN, _NEURONS_SHOWN = 6, 12


@dataclass(frozen=True)
class Prediction:
    """What a model predicts at one token."""

    loss: float | None
    """of the token in the text, nats; None for the token that follows the text"""
    likely: str
    """display string of the most likely token"""
    probability: float
    """of the most likely token"""


@dataclass(frozen=True)
class PredictedToken:
    """One token of the text, and what is predicted there from the tokens before it."""

    token: str
    """display string; empty for the token that follows the text"""
    model: Prediction
    explained: Prediction
    """by the model on its explanations"""
    kl: float
    """KL divergence of the prediction on explanations from that of the model, nats"""


@dataclass(frozen=True)
class ExplainedText:
    """The predictions of every token of a text by a model and by the model on its explanations."""

    explainer: str
    tokens: tuple[PredictedToken, ...]
    """T + 1: those of the text, and the one that follows it"""
    units: tuple[Unit, ...]
    """the tokens of the text as they are shown: several that make a character are one unit"""
    cut: int
    """number of tokens at the end of the text that do not fit into the model's context"""
    loss: float
    """mean over the tokens of the text, nats"""
    loss_explained: float
    """the same on explanations"""


@dataclass(frozen=True)
class NextToken:
    """Probability of one next token."""

    token: str
    model: float
    explained: float
    """by the model on its explanations"""
    is_actual: bool
    """whether it is the token that follows in the text"""


@dataclass(frozen=True)
class NeuronCost:
    """What the explanation of one neuron costs at one token."""

    layer: int
    index: int
    cost: float
    """its share of the difference of the two losses, nats (`cratelm.replace.token_cost`)"""
    position: int
    """token of the text before at which most of this arises; -1 is the start of the text"""
    context: tuple[str, ...]
    """the tokens up to that one that decide what the explanation predicts; of one token if none does"""
    true: float
    """activation at that token"""
    predicted: float
    """what the explanation predicts there"""
    explanation: str
    name: str
    """how the neuron is written: its index, or `17+` and `17-` for the ends of neuron 17"""


@dataclass(frozen=True)
class ExplainedToken:
    """Both predictions of one token, and the neurons whose explanations cost most there."""

    position: int
    target: str
    """the token whose loss is compared: the one in the text; after its end the one that the model finds most likely"""
    tokens: tuple[NextToken, ...]
    """the most likely ones of both, and the target"""
    loss: float
    """of the target, by the model, nats"""
    loss_explained: float
    kl: float
    """KL divergence of the prediction on explanations from that of the model, nats"""
    neurons: tuple[NeuronCost, ...]
    """those that cost most, in order; only costs above 0"""
    others: float
    """sum of the costs of all other neurons, nats"""
    dropped: float
    """nats lost because autoencoders do not reconstruct everything; 0 for neurons"""
    layers: tuple[int, ...]
    """layers whose explanations decide this prediction"""


class LiveExplanations:
    """Runs the models of a live page on their explanations, in the same thread."""

    def __init__(self, live: Live):
        self.live = live

    def read(self, run: str, model: str, text: str) -> ExplainedText:
        """Return how well the model and the model on its explanations predict each token of a text.

        Raises `InputError` if the text is empty or too long, or if there are no stored explanations, and `Busy` if
        too many requests wait.
        """
        state = (*self.live.state(run, model), self._explainer(run, model))

        def work() -> ExplainedText:
            return self._read(run, model, text)

        return self.live.ask(("explained", *state, text), work)

    def predict(self, run: str, model: str, text: str, position: int) -> ExplainedToken:
        """Return both predictions of the token at `position`, and the neurons whose explanations cost most there.

        The position after the last token is that of the token that follows the text. Raises `InputError` if the text
        has no token at `position`, and the same errors as `read`.
        """
        state = (*self.live.state(run, model), self._explainer(run, model))
        table = self.live.library.table(run, model)

        def work() -> ExplainedToken:
            return self._predict(run, model, text, position, table)

        return self.live.ask(("predicted", *state, text, position), work)

    # ---- in the model's thread --------------------------------------------------------------------

    def _read(self, run: str, model: str, text: str) -> ExplainedText:
        context, encoder = self.live.opened(run, model)
        explainer, explained, predictors = self._explained(run, model)
        ids, cut = self.live.ids(context, encoder, text, 0)
        trace, read = explained.trace(ids), _as_read(ids)
        codes = {place: of.predict(read) for place, of in enumerate(predictors)}
        targets: list[int | None] = [*ids[0, 1:].tolist(), None]
        tokens: list[PredictedToken] = []
        by_model = explained.log_probabilities(trace, {})
        on_explanations = explained.log_probabilities(trace, codes)
        for parts in zip(by_model, on_explanations, strict=True):
            p, q = (part.cpu() for part in parts)  # [rows, V]
            following = targets[len(tokens) : len(tokens) + len(p)]
            names = ["" if t is None else token_string(encoder.display, t) for t in following]
            of_both = (_predictions(of, following, encoder.display) for of in (p, q))
            divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()
            tokens += map(PredictedToken, names, *of_both, divergence)
        loss, loss_explained = (
            float(np.mean([of.loss for of in both if of.loss is not None]))
            for both in ([t.model for t in tokens], [t.explained for t in tokens])
        )
        units = shown_units(encoder.display, ids[0, 1:].tolist())
        return ExplainedText(explainer, tuple(tokens), units, cut, loss, loss_explained)

    def _predict(
        self, run: str, model: str, text: str, position: int, table: NeuronTable
    ) -> ExplainedToken:
        context, encoder = self.live.opened(run, model)
        _, explained, predictors = self._explained(run, model)
        ids, _ = self.live.ids(context, encoder, text, 0)
        n_tokens = ids.shape[1] - 1
        if not 0 <= position <= n_tokens:
            raise InputError(
                f"token {position}: the text has tokens 0 to {n_tokens - 1}, and {n_tokens} is the one that follows"
            )
        before = ids[:, : position + 1]
        read = _as_read(before)
        codes = {place: of.predict(read) for place, of in enumerate(predictors)}
        target = int(ids[0, position + 1]) if position < n_tokens else None
        cost = token_cost(explained, before, codes, target)
        display, layers = encoder.display, context.site.layer_numbers
        before_it = ["", *(token_string(display, i) for i in before[0, 1:].tolist())]
        neurons = []
        for place, index, at, nats in _largest(cost.shares):
            length = max(1, predictors[place].context_length(read, at, index))
            true, predicted = (float(of[place][at, index]) for of in (cost.true, codes))
            sentence = claim(str(table.explanations[table.rows_of(layers[place]).start + index]))
            name = neuron_name(index, table.site)
            seen = tuple(before_it[max(0, at + 1 - length) : at + 1])
            neurons.append(
                NeuronCost(
                    layers[place], index, nats, at - 1, seen, true, predicted, sentence, name
                )
            )
        p, q = cost.plain, cost.explained
        all_of_them = sum(float(of.sum(dtype=float)) for of in cost.shares.values())
        return ExplainedToken(
            position=position,
            target=token_string(display, cost.target),
            tokens=_next_tokens(cost, target is not None, display),
            loss=-float(p[cost.target]),
            loss_explained=-float(q[cost.target]),
            kl=float((p.exp() * (p - q)).sum().clamp(min=0)),
            neurons=tuple(neurons),
            others=all_of_them - sum(n.cost for n in neurons),
            dropped=cost.dropped,
            layers=tuple(layers[place] for place in cost.shares),
        )

    def _explainer(self, run: str, model: str) -> tuple[str, str]:
        """Return the explainer whose explanations are used, and the identity of the results that they are from."""
        path = self.live.library.run_of(run)
        explainer = read_stored_explainer(path, model)
        return explainer, path.stage("replacement", model).require().identity

    def _explained(self, run: str, model: str) -> tuple[str, ExplainedModel, list[Predictor]]:
        """Return the explainer, the open model that can run on explanations, and its explanations by place."""
        name = self._explainer(run, model)
        if self.live.beside.get("explained", ("",))[0] != name:
            self.live.beside.pop("explained", None)
            context, _ = self.live.opened(run, model)
            folder = self.live.library.run_of(run).stage("replacement", model).path
            predictors = read_simulators(folder, name[0], context.store.token_strings)
            explained = ExplainedModel(context.subject.model, context.site, context.beginning)
            self.live.beside["explained"] = name, explained, predictors
        _, explained, predictors = self.live.beside["explained"]
        return name[0], explained, predictors


def _as_read(ids: torch.Tensor) -> BatchText:
    """Return ids [1, T], which begin with a begin token or an end mark, as explanations read them."""
    document = np.zeros(ids.shape, np.int64)
    document[:, 0] = -1
    return BatchText(ids.cpu().numpy(), document)


def _predictions(
    log_probabilities: torch.Tensor, targets: Sequence[int | None], display: list[str]
) -> list[Prediction]:
    """Return a prediction for each row of [rows, V], and the loss of its target."""
    best = log_probabilities.max(-1)
    return [
        Prediction(
            None if target is None else -float(log_probabilities[row, target]),
            token_string(display, likely),
            math.exp(value),
        )
        for row, (target, value, likely) in enumerate(
            zip(targets, best.values.tolist(), best.indices.tolist(), strict=True)
        )
    ]


def _largest(shares: Mapping[int, NDArray[np.float32]]) -> list[tuple[int, int, int, float]]:
    """Return place, index, row of the largest part and total of the neurons that cost most, the first most."""
    largest = []
    for place, of in shares.items():
        total = of.sum(0, dtype=float)  # [H]
        at = np.abs(of).argmax(0)
        for i in np.argsort(-total, kind="stable")[:_NEURONS_SHOWN].tolist():
            if total[i] > 0:
                largest.append((place, i, int(at[i]), float(total[i])))
    return sorted(largest, key=lambda n: -n[3])[:_NEURONS_SHOWN]


def _next_tokens(cost: TokenCost, is_in_text: bool, display: list[str]) -> tuple[NextToken, ...]:
    """Return the most likely tokens of both predictions and the target, sorted by the larger probability."""
    p, q = cost.plain.exp(), cost.explained.exp()
    likely = {*p.topk(_TOKENS_SHOWN).indices.tolist(), *q.topk(_TOKENS_SHOWN).indices.tolist()}
    tokens = sorted({*likely, cost.target}, key=lambda t: -max(float(p[t]), float(q[t])))
    return tuple(
        NextToken(
            token_string(display, t), float(p[t]), float(q[t]), is_in_text and t == cost.target
        )
        for t in tokens
    )
