"""Explaining neurons with a language model: what is asked, and what its answers become.

For each neuron and kind of evidence one conversation (`cratelm.llm.prompts.neurons`). An answer is
an explanation; a call that failed, or an answer that says nothing, is a failure with its reason and
never an explanation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cratelm.explain.config import Evidence, ExplainConfig
from cratelm.explain.selection import contrasting, explained_from
from cratelm.explain.store import ExplanationFailure
from cratelm.llm.client import Client
from cratelm.llm.prompts.neurons import VERSION, explain_request
from cratelm.llm.prompts.openai import openai_explain_request
from cratelm.llm.requests import Chat, Failure, FailureKind, Outcome
from cratelm.records import Excerpt, Explanation, Metric, NeuronId, NeuronRecord

_METRIC: dict[Evidence, Metric] = {"top": "top_and_random", "anthropic": "anthropic"}
_OPENING = re.compile(
    r"^(the|this) neuron (reacts|responds|fires|activates|is responding|is reacting) (to|on|for)\s+",
    re.I,
)
LONGEST = 600
"""characters of an explanation that are kept"""


@dataclass(frozen=True, eq=False)
class ExplanationRequest:
    """What a language model is asked about one neuron."""

    neuron: NeuronId
    evidence: Evidence
    documents: tuple[int, ...]
    """ordinals of the documents of the excerpts shown"""
    request: Chat


def explanation_requests(
    record: NeuronRecord, config: ExplainConfig, strings: Sequence[str]
) -> Iterator[ExplanationRequest]:
    """One question per kind of evidence; none about a dead neuron. `record` is of the fit split."""
    if record.summary.dead:
        return
    for evidence in config.evidence:
        shown = explained_from(record, _METRIC[evidence])
        silent = contrasting(record, _METRIC[evidence], config.contrast)
        documents = tuple(sorted({e.document for e in shown + silent}))
        yield ExplanationRequest(
            record.neuron, evidence, documents, _request(shown, silent, config, strings)
        )


def _request(
    shown: Sequence[Excerpt],
    silent: Sequence[Excerpt],
    config: ExplainConfig,
    strings: Sequence[str],
) -> Chat:
    if config.prompts == "openai":
        return openai_explain_request(
            shown,
            strings,
            max_tokens=config.answer_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )
    return explain_request(
        shown,
        silent,
        strings,
        max_tokens=config.answer_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )


def ask(
    asked: Sequence[ExplanationRequest], client: Client, name: str, prompts: str
) -> Iterator[Explanation | ExplanationFailure]:
    """An explanation or a failure for each question. Raises `BudgetReached` as `Client.ask`."""
    outcomes = client.ask([q.request for q in asked])
    for question, outcome in zip(asked, outcomes, strict=True):
        text = parse_explanation(outcome)
        if isinstance(text, Failure):
            reason = f"{text.kind}: {text.reason}"
            yield ExplanationFailure(question.neuron, question.evidence, reason)
            continue
        version = VERSION if prompts == "cratelm" else prompts
        payload: dict[str, object] = {"evidence": question.evidence, "prompts": version}
        yield Explanation(question.neuron, name, text, payload, question.documents)


def parse_explanation(outcome: Outcome) -> str | Failure:
    """The explanation in an answer: its first line that says something, without quotes around it."""
    if isinstance(outcome, Failure):
        return outcome
    assert isinstance(outcome.value, str)
    for line in outcome.value.splitlines():
        text = _unquoted(_OPENING.sub("", line.strip(" *")))
        if re.search(r"\w", text):
            return text[:LONGEST]
    return Failure(FailureKind.EMPTY, "the answer has no word in it")


def _unquoted(text: str) -> str:
    """Without the quotes around all of it; quotes around a part of it stay."""
    inside = text[1:-1]
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in inside:
        return inside.strip()
    return text
