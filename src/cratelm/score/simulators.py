"""Simulators: from an explanation and tokens alone to predicted activations.

One protocol for all of them, with or without a language model; adding one means a class with two
methods. A simulator is given an explanation and token ids: no activation can reach it. The token ids of
all excerpts of a neuron are passed together.

Shapes: n tokens of an excerpt (or of all excerpts together), O options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.config import Prompts
from cratelm.explain.evidence import contexts_of
from cratelm.explain.trie import ROOT
from cratelm.llm.probe import ProbeResult
from cratelm.llm.prompts.neurons import simulate_fill, simulate_read
from cratelm.llm.prompts.openai import openai_simulate_read
from cratelm.llm.requests import Answer, OptionLogprobs, Request
from cratelm.records import MAX_LEVEL, Explanation

COMPAT = "+paper-compat"
"""variant of `LLMSimulator`, added to the label of its rows"""
COMPAT_SEARCHED = 5
"""most likely tokens in which the paper's code looks for a level"""

Simulated = list[NDArray[np.float64]]
"""one array [n] per excerpt"""


class Simulator(Protocol):
    """Predicts activations, in any unit: scores are correlations."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return what a language model has to be asked; empty for simulators without one."""
        ...

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the activation predicted at each token; `answers` are those to `requests`, in order."""
        ...


class LookupSimulator:
    """Predicts the table's value of each token, in the neuron's own unit."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return nothing: no language model is asked."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the table's value at each token, its default for tokens that it lacks."""
        return self.predict(explanation.payload, token_ids)

    def predict(self, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
        """Return the same from the payload alone."""
        tokens, values = _sorted(payload["tokens"], payload["values"])
        lengths = [len(t) for t in token_ids]
        if not sum(lengths):
            return [np.zeros(0) for _ in lengths]
        flat = _find(np.concatenate(token_ids), tokens, values, float(payload["default"]))  # [n]
        return np.split(flat, np.cumsum(lengths)[:-1])


class TrieSimulator:
    """Predicts the value of the deepest node that matches the tokens up to each token."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return nothing: no language model is asked."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the deepest matching node's value at each token, the default where none matches."""
        return self.predict(explanation.payload, token_ids)

    def predict(self, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
        """Return the same from the payload alone.

        All tokens go down the trie together, one level at a time: contexts whose node has no child for
        the next token drop out, and those that remain overwrite the value of the level above.
        """
        lengths = [len(t) for t in token_ids]
        if not sum(lengths):
            return [np.zeros(0) for _ in lengths]
        parents = np.asarray(payload["parents"], dtype=np.int64)
        tokens = np.asarray(payload["tokens"], dtype=np.int64)
        values = np.asarray(payload["values"], dtype=np.float64)
        depth = _depth(parents)
        contexts = contexts_of(list(token_ids), depth)  # [n, depth]
        simulated = np.full(len(contexts), float(payload["default"]))
        # One number per (parent, token), as when the trie was built, so that one binary search finds the
        # children of all nodes. The highest token id, here or in the trie, bounds the second digit.
        base = max(int(contexts.max(initial=0)), int(tokens.max(initial=0))) + 2
        keys, nodes = _sorted((parents + 1) * base + tokens + 1, np.arange(len(tokens)))
        at, node = np.arange(len(contexts)), np.full(len(contexts), ROOT)
        for level in range(depth):
            node = _find((node + 1) * base + contexts[at, level] + 1, keys, nodes, ROOT)
            at, node = at[node != ROOT], node[node != ROOT]
            simulated[at] = values[node]
        return np.split(simulated, np.cumsum(lengths)[:-1])


class ConstantSimulator:
    """Null control: predicts the explanation's default value at every token."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return nothing: no language model is asked."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the default at every token."""
        payload: Any = explanation.payload
        return [np.full(len(t), float(payload["default"])) for t in token_ids]


@dataclass(frozen=True, eq=False)
class LLMSimulator:
    """A language model that reads the explanation (Bills et al. 2023). Predicts levels, 0..top_level.

    One request per excerpt: the levels of all tokens are read from one pass, each as the expected value
    over the levels. `paper_compat` is the variant of Bai & Ma (2025): levels 0..10, only the first token
    of a level is read (where "10" is two tokens a 10 reads as 1), and only the five most likely tokens of
    all are searched; where no level is among them the value is 0.
    """

    strings: Sequence[str]
    """[V] shows each token"""
    supports_logprobs: bool
    """levels are read from log-probabilities; else they are asked for by JSON"""
    top_level: int
    """levels 0..top_level are asked for"""
    n_options: int
    """levels that are single tokens: 0..n_options - 1 are read"""
    paper_compat: bool = False
    prompts: Prompts = "cratelm"

    @classmethod
    def of(
        cls,
        probe: ProbeResult,
        strings: Sequence[str],
        prompts: Prompts = "cratelm",
        *,
        paper_compat: bool = False,
    ) -> "LLMSimulator":
        """Return the simulator for a model with this probe result.

        Raises `InputError` if the model gives no log-probabilities and these are needed.
        """
        needs = "--paper-compat" if paper_compat else "--prompts openai"
        if not probe.supports_logprobs and (paper_compat or prompts == "openai"):
            raise InputError(
                f"{needs} reads log-probabilities, which this server does not give: leave it out"
            )
        # OpenAI's prompts speak of 0..10 whatever the model's tokens
        to_ten = paper_compat or prompts == "openai"
        return cls(
            strings=strings,
            supports_logprobs=probe.supports_logprobs,
            top_level=MAX_LEVEL if to_ten else probe.top_level,
            n_options=probe.top_level + 1,
            paper_compat=paper_compat,
            prompts=prompts,
        )

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return one request per excerpt, for the levels of its tokens."""
        return [self._request(explanation.text, ids) for ids in token_ids]

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the levels in the answers."""
        return [self._levels(answer) for answer in answers]

    def _request(self, explanation: str, token_ids: NDArray) -> Request:
        if not self.supports_logprobs:
            return simulate_fill(explanation, token_ids, self.strings, self.top_level)
        full = self.paper_compat
        if self.prompts == "openai":
            query = openai_simulate_read(explanation, token_ids, self.strings, full=full)
        else:
            query = simulate_read(explanation, token_ids, self.strings, self.top_level, full=full)
        return replace(query, options=query.options[: self.n_options])

    def _levels(self, answer: Answer) -> NDArray[np.float64]:
        """Return the level of each token, [n]."""
        if isinstance(answer.value, tuple):
            return np.array(answer.value, dtype=np.float64)
        assert isinstance(answer.value, OptionLogprobs)
        shares = np.exp(answer.value.log_probs.astype(np.float64))  # [n, O]
        if self.paper_compat:
            assert answer.value.ranks is not None
            shares = np.where(answer.value.ranks < COMPAT_SEARCHED, shares, 0.0)
            total = shares.sum(axis=1, keepdims=True)
            shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
        return shares @ np.arange(shares.shape[1])


SIMULATORS: dict[str, LookupSimulator | TrieSimulator] = {
    "lookup": LookupSimulator(),
    "trie": TrieSimulator(),
}
"""simulators without a language model, by the explainer whose payload each reads"""


def simulator_of(explainer: str) -> LookupSimulator | TrieSimulator:
    """Return the simulator without a language model for an explainer; `InputError` if it has none."""
    if explainer not in SIMULATORS:
        raise InputError(f"no simulator for {explainer!r}: expected one of {', '.join(SIMULATORS)}")
    return SIMULATORS[explainer]


def simulate(explainer: str, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
    """Return the activations that an explanation predicts without a language model.

    One array per sequence of `token_ids`, in the neuron's own unit. Raises `InputError` if no
    simulator reads the payloads of `explainer`.
    """
    return simulator_of(explainer).predict(payload, token_ids)


def _depth(parents: NDArray[np.int64]) -> int:
    depth = np.ones(len(parents), dtype=np.int64)
    for node in np.flatnonzero(parents != ROOT):  # parents come before their children
        depth[node] = depth[parents[node]] + 1
    return int(depth.max(initial=0))


def _sorted(keys: Any, values: Any) -> tuple[NDArray, NDArray]:
    keys, values = np.asarray(keys), np.asarray(values)
    order = np.argsort(keys)
    return keys[order], values[order]


def _find(wanted: NDArray, keys: NDArray, values: NDArray, default: float) -> NDArray:
    """Return `values` at each of `wanted` in the sorted `keys`, `default` where it is not among them."""
    if not len(keys):
        return np.full(len(wanted), default)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], default)
