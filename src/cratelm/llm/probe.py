"""Before any spending: how does the model tokenise the levels, and does it answer with them at all?

A level must be one token, since a slot is read once. Many models split "10" in two (SmolLM2,
LLaMA-2): there levels run to 9, so that every level is one token.
"""

from dataclasses import dataclass

import numpy as np

from cratelm.errors import InputError
from cratelm.llm.client import Client
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Answer, OptionLogprobs
from cratelm.records import MAX_LEVEL

LOW_MASS = 0.5
"""below this share of all probability on the levels, what is read says little about the model's answer"""
_PROBES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("names of animals", ("The", " fox", " and", " the", " heron", " left", " at", " dawn", ".")),
    ("numbers", ("On", " page", " 12", ",", " line", " 7", ":", "\\n", "é", " 中", "\\t", '"')),
)


@dataclass(frozen=True)
class Preflight:
    """What was found out about a simulator before it was used."""

    reads: bool
    """log-probabilities are read; else the model is asked for JSON"""
    top_level: int
    """highest level that is asked for: 10, or 9 where "10" is not one token"""
    tokens_of_ten: int | None
    """tokens that "10" takes; None where the server does not tell"""
    mass: float | None
    """mean share of all probability that falls on the levels at the slots of two probes; None
    where nothing is read, or both probes failed"""
    lowest_mass: float | None
    reason: str = ""
    """why nothing is read"""

    def __str__(self) -> str:
        if not self.reads:
            why = f" ({self.reason})" if self.reason else ""
            return f"levels 0..{self.top_level} by JSON: this model gives no log-probabilities{why}"
        split = "one token" if self.tokens_of_ten == 1 else f"{self.tokens_of_ten} tokens"
        told = f"levels 0..{self.top_level} ('10' is {split} of this model)"
        if self.mass is None:
            return f"{told}; both trial readings failed"
        told += (
            f"; {self.mass:.0%} of the probability falls on them (least: {self.lowest_mass:.0%})"
        )
        if self.mass < LOW_MASS:
            told += " - WARNING: little; what is read is a small part of what the model would say"
        return told


def preflight(client: Client) -> Preflight:
    """Asks for the levels of two made-up excerpts; two calls at most, kept in the ledger like others.

    A call that fails leaves a figure out and stops nothing.

    Raises `InputError` where the model splits digits.
    """
    backend, ledger = client.backend, client.ledger
    if not backend.reads:
        return Preflight(False, MAX_LEVEL, None, None, None, backend.reason)
    label = f"levels of {backend.name} {sorted(backend.identity.items())}"
    counts = (ledger.recall(label) or {}).get("counts")
    if counts is None:
        counts = backend.tokens_at_slot([str(n) for n in range(MAX_LEVEL + 1)], " word\t")
        if not counts:
            why = f" ({backend.reason})" if backend.reason else ""
            raise InputError(
                f"{backend.name}: a trial call for how it tokenises the levels failed{why}: type the"
                " command again, or ask for levels by JSON with --method json"
            )
        ledger.remember(label, {"counts": counts})
    top = top_level(counts)
    probes = [
        simulate_read(explanation, np.arange(len(tokens)), tokens, top, full=True)
        for explanation, tokens in _PROBES
    ]
    masses = [
        outcome.value.mass
        for outcome in client.ask(probes)
        if isinstance(outcome, Answer)
        and isinstance(outcome.value, OptionLogprobs)
        and outcome.value.mass is not None
    ]
    if not masses:
        return Preflight(True, top, counts[MAX_LEVEL], None, None)
    all_ = np.concatenate(masses)
    return Preflight(True, top, counts[MAX_LEVEL], float(all_.mean()), float(all_.min()))


def top_level(counts: list[int]) -> int:
    """The highest level up to which every level is one token; `counts` [11] tokens of "0" ... "10".

    Raises `InputError` where not even the ten digits are.
    """
    if len(counts) != MAX_LEVEL + 1 or any(n != 1 for n in counts[:MAX_LEVEL]):
        raise InputError(
            f"this model splits the levels 0 ... 10 into {counts} tokens: the ten digits were expected"
            " to be one token each; choose another model, or one behind a server with --method json"
        )
    return MAX_LEVEL if counts[MAX_LEVEL] == 1 else MAX_LEVEL - 1
