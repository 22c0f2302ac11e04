"""Explain neurons with a language model: one conversation per neuron and kind of evidence.

An answer becomes an explanation; a failed call, or an answer without a word, is a failure with a reason
and never an explanation. The wording of the prompts is in `cratelm.llm.prompts.neurons`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cratelm.explain.config import ExplainConfig
from cratelm.explain.selection import contrasting, explained_from
from cratelm.explain.store import ExplanationFailure
from cratelm.llm.client import Client
from cratelm.llm.prompts import openai as openai_prompts
from cratelm.llm.prompts.neurons import VERSION, explain_request
from cratelm.llm.prompts.openai import openai_explain_request
from cratelm.llm.requests import Chat, Failure, FailureKind, Outcome
from cratelm.records import EvidenceKind, Excerpt, Explanation, Metric, NeuronId, NeuronRecord

_METRIC: dict[EvidenceKind, Metric] = {"top": "top_and_random", "anthropic": "anthropic"}
"""a metric by which `explained_from` selects the excerpts: `top` gives the strongest ones, none at random.
The inverse of `records.evidence_for`"""
_OPENING = re.compile(
    r"^(the|this) neuron (reacts|responds|fires|activates|is responding|is reacting) (to|on|for)\s+",
    re.I,
)
LONGEST = 600
"""characters after which an explanation is truncated"""


@dataclass(frozen=True, eq=False)
class ExplanationRequest:
    """A request to explain one neuron from one kind of evidence."""

    neuron: NeuronId
    evidence: EvidenceKind
    documents: tuple[int, ...]
    """ordinals of the documents that the excerpts in the prompt come from"""
    request: Chat


class LLMExplainer:
    """Explains neurons with the language model behind `client`; the explainer's name is `name`."""

    def __init__(
        self, client: Client, name: str, config: ExplainConfig, token_strings: Sequence[str]
    ):
        """`token_strings` [V] is the text of each token id."""
        self._client, self._name = client, name
        self._config, self._strings = config, token_strings

    def explain(
        self, records: Iterable[NeuronRecord]
    ) -> Iterator[Explanation | ExplanationFailure]:
        """Yield an explanation or a failure per neuron and kind of evidence.

        Requests are sent in batches that keep the backend busy; only the records of one batch are in
        memory. Raises `BudgetReached` as `Client.ask` does.
        """
        requests = self.requests(records)
        while batch := list(islice(requests, self._client.backend.window)):
            outcomes = self._client.ask([pending.request for pending in batch])
            for request, outcome in zip(batch, outcomes, strict=True):
                yield self._read(request, outcome)

    def requests(self, records: Iterable[NeuronRecord]) -> Iterator[ExplanationRequest]:
        """Yield one request per neuron and kind of evidence; none for a dead neuron.

        `records` are of the fit split.
        """
        for record in records:
            if record.summary.silent:
                continue
            for evidence in self._config.evidence:
                excerpts = explained_from(record, _METRIC[evidence])
                silent = contrasting(record, _METRIC[evidence], self._config.contrast)
                documents = tuple(sorted({e.document for e in excerpts + silent}))
                request = self._request(excerpts, silent)
                yield ExplanationRequest(record.neuron, evidence, documents, request)

    def _request(self, excerpts: Sequence[Excerpt], silent: Sequence[Excerpt]) -> Chat:
        sampling: dict[str, Any] = {
            "max_tokens": self._config.answer_tokens,
            "temperature": self._config.temperature,
            "seed": self._config.seed,
        }
        if self._config.prompts == "openai":
            return openai_explain_request(excerpts, self._strings, **sampling)
        return explain_request(excerpts, silent, self._strings, **sampling)

    def _read(
        self, request: ExplanationRequest, outcome: Outcome
    ) -> Explanation | ExplanationFailure:
        text = parse_explanation(outcome)
        if isinstance(text, Failure):
            reason = f"{text.kind}: {text.reason}"
            return ExplanationFailure(request.neuron, request.evidence, reason)
        prompts = self._config.prompts
        payload: dict[str, object] = {
            "evidence": request.evidence,
            "prompts": VERSION if prompts == "cratelm" else openai_prompts.VERSION,
        }
        return Explanation(request.neuron, self._name, text, payload, request.documents)


def parse_explanation(outcome: Outcome) -> str | Failure:
    """Return the explanation in an answer: its first line that contains a word, without enclosing quotes.

    A failed outcome, or an answer without a word, is returned as a `Failure`.
    """
    if isinstance(outcome, Failure):
        return outcome
    assert isinstance(outcome.value, str)
    for line in outcome.value.splitlines():
        text = _unquoted(_OPENING.sub("", line.strip(" *")))
        if re.search(r"\w", text):
            return text[:LONGEST]
    return Failure(FailureKind.EMPTY, "the answer contains no word")


def _unquoted(text: str) -> str:
    """Return `text` without quotes that enclose all of it; other quotes are left unchanged."""
    inside = text[1:-1]
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in inside:
        return inside.strip()
    return text
