"""Probe a language model before the main calls: how it tokenises levels, and whether it answers with them.

A level must be one token, since each slot is read once. Many models split "10" in two (SmolLM2,
LLaMA-2): for these, levels end at 9, so that every level is one token.
"""

from dataclasses import dataclass

import numpy as np

from cratelm.errors import InputError
from cratelm.llm.client import Client
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Answer, OptionLogprobs
from cratelm.records import MAX_LEVEL

LOW_MASS = 0.5
"""if less than this fraction of the probability is on the levels, they say little about the model's answer"""
_PROBES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("names of animals", ("The", " fox", " and", " the", " heron", " left", " at", " dawn", ".")),
    ("numbers", ("On", " page", " 12", ",", " line", " 7", ":", "\\n", "é", " 中", "\\t", '"')),
)


@dataclass(frozen=True)
class ProbeResult:
    """Result of probing a simulator."""

    supports_logprobs: bool
    """levels are read from log-probabilities; otherwise the model is asked for JSON"""
    top_level: int
    """highest level that is asked for: 10, or 9 if "10" is not one token"""
    tokens_of_ten: int | None
    """tokens that "10" takes; None if the server does not report it"""
    mass: float | None
    """mean fraction of all probability that falls on the levels at the slots of two probes; None
    without log-probabilities, or if both probes failed"""
    lowest_mass: float | None
    reason: str = ""
    """why log-probabilities are not used"""
    way: str = ""
    """how the server reports them; empty for a local model, and in files of version 0.1.0"""

    def __str__(self) -> str:
        if not self.supports_logprobs:
            why = f" ({self.reason})" if self.reason else ""
            return (
                f"levels 0..{self.top_level} by JSON: this model reports no log-probabilities{why}"
            )
        split = "one token" if self.tokens_of_ten == 1 else f"{self.tokens_of_ten} tokens"
        text = f"levels 0..{self.top_level} ('10' is {split} of this model)"
        if self.way:
            text += f", read by {self.way}"
        if self.mass is None:
            return f"{text}; both probe calls failed"
        text += (
            f"; {self.mass:.0%} of the probability falls on them (lowest: {self.lowest_mass:.0%})"
        )
        if self.mass < LOW_MASS:
            text += (
                " - WARNING: low; the model would mostly answer with something other than a level"
            )
        return text

    def as_dict(self) -> dict[str, object]:
        """Return the result as the key `preflight` of `summary.json` holds it.

        The key of `supports_logprobs` is `reads` there, as in the files of version 0.1.0.
        """
        values = dict(vars(self))
        return {"reads": values.pop("supports_logprobs"), **values}


def probe_levels(client: Client) -> ProbeResult:
    """Ask for the levels of two made-up excerpts, and return what is found.

    Makes at most two calls, in addition to those that count tokens; their answers are stored in the ledger. If
    such a call fails, `mass` is unknown and nothing is raised.

    Raises `InputError` if the model splits digits, or a server does not say how it tokenises levels.
    """
    backend, ledger = client.backend, client.ledger
    if not backend.supports_logprobs:
        return ProbeResult(False, MAX_LEVEL, None, None, None, backend.reason)
    label = f"levels of {backend.name} {sorted(backend.identity.items())}"
    counts = (ledger.recall(label) or {}).get("counts")
    if counts is None:
        counts = backend.tokens_at_slot([str(n) for n in range(MAX_LEVEL + 1)], " word\t")
        if not counts:
            why = f" ({backend.reason})" if backend.reason else ""
            raise InputError(
                f"{backend.name}: the probe calls for the log-probabilities of levels failed{why}: type the"
                " command again, or request levels as JSON with --method json"
            )
        ledger.remember(label, {"counts": counts})
    top = top_level(counts)
    probes = [
        simulate_read(explanation, np.arange(len(tokens)), tokens, top, full=True)
        for explanation, tokens in _PROBES
    ]
    masses = [
        outcome.value.mass
        for outcome in client.ask(probes, is_probe=True)
        if isinstance(outcome, Answer)
        and isinstance(outcome.value, OptionLogprobs)
        and outcome.value.mass is not None
    ]
    if not masses:
        return ProbeResult(True, top, counts[MAX_LEVEL], None, None, way=backend.way)
    pooled = np.concatenate(masses)
    mean, lowest = float(pooled.mean()), float(pooled.min())
    return ProbeResult(True, top, counts[MAX_LEVEL], mean, lowest, way=backend.way)


def top_level(counts: list[int]) -> int:
    """Return the highest level up to which every level is one token.

    `counts` [11]: tokens of "0" ... "10". Raises `InputError` if not all ten digits are single
    tokens.
    """
    if len(counts) != MAX_LEVEL + 1 or any(n != 1 for n in counts[:MAX_LEVEL]):
        raise InputError(
            f"this model splits the levels 0 ... 10 into {counts} tokens: each of the ten digits must be"
            " one token; choose another model, or a model behind a server with --method json"
        )
    return MAX_LEVEL if counts[MAX_LEVEL] == 1 else MAX_LEVEL - 1
