"""Simulators, which predict activations from an explanation and tokens only.

All of them follow one protocol, with or without a language model; a new one is a class with two methods.
A simulator gets an explanation and token ids, and so has no access to activations. The token ids of all
excerpts of a neuron are passed together.

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
"""number of most likely tokens that the paper's code searches for a level"""

Simulated = list[NDArray[np.float64]]
"""one array [n] per excerpt"""


class Simulator(Protocol):
    """Predicts activations, in any unit, since scores are correlations."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return the requests for a language model; empty for simulators without one."""
        ...

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the predicted activation at each token; `answers` are those to `requests`, in order."""
        ...


class LookupSimulator:
    """Predicts the table's value for each token, in the neuron's unit."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return an empty list, since no language model is used."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the table's value at each token, and its default for tokens not in the table."""
        return self.predict(explanation.payload, token_ids)

    def predict(self, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
        """Return the prediction of `simulate` from the payload of the explanation."""
        tokens, values = _sorted(payload["tokens"], payload["values"])
        lengths = [len(t) for t in token_ids]
        if not sum(lengths):
            return [np.zeros(0) for _ in lengths]
        flat = _find(np.concatenate(token_ids), tokens, values, float(payload["default"]))  # [n]
        return np.split(flat, np.cumsum(lengths)[:-1])


class TrieSimulator:
    """Predicts the value of the deepest node that matches the tokens up to each token, in the neuron's unit."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return an empty list, since no language model is used."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the deepest matching node's value at each token, and the default if none matches."""
        return self.predict(explanation.payload, token_ids)

    def predict(self, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
        """Return the prediction of `simulate` from the payload of the explanation.

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
        # children of all nodes. `base` is above every token id in the contexts and in the trie.
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
        """Return an empty list, since no language model is used."""
        return []

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the default at every token."""
        payload: Any = explanation.payload
        return [np.full(len(t), float(payload["default"])) for t in token_ids]


@dataclass(frozen=True, eq=False)
class LLMSimulator:
    """A language model that reads the explanation (Bills et al. 2023) and predicts levels, 0..top_level.

    There is one request per excerpt: the levels of all tokens are read from one pass, each as the expected
    value over the levels. `paper_compat` is the variant of Bai & Ma (2025): levels are 0..10, only the first
    token of a level is read (if "10" is two tokens, a 10 is read as 1), and only the five most likely tokens
    are searched; if no level is among them, the value is 0.
    """

    strings: Sequence[str]
    """[V] text of each token id"""
    supports_logprobs: bool
    """True: levels are read from log-probabilities; False: they are requested as JSON"""
    top_level: int
    """levels 0..top_level are requested"""
    n_options: int
    """number of levels that are single tokens: 0..n_options - 1 are read"""
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

        `strings` [V] is the text of each token id. Raises `InputError` if log-probabilities are needed and
        the model does not report them.
        """
        needs = "--paper-compat" if paper_compat else "--prompts openai"
        if not probe.supports_logprobs and (paper_compat or prompts == "openai"):
            raise InputError(
                f"{needs} needs log-probabilities, which this server does not report: omit the option"
            )
        # the wording of OpenAI's prompts says 0..10, whatever the model's tokens are
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
"""simulators without a language model, by the explainer whose payloads they read"""


def simulator_of(explainer: str) -> LookupSimulator | TrieSimulator:
    """Return the simulator without a language model for an explainer; raise `InputError` if it has none."""
    if explainer not in SIMULATORS:
        raise InputError(f"no simulator for {explainer!r}: name one of {', '.join(SIMULATORS)}")
    return SIMULATORS[explainer]


def simulate(explainer: str, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
    """Return the activations that an explanation predicts without a language model.

    There is one array per sequence in `token_ids`, in the neuron's unit. Raises `InputError` if no
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


def _find(queries: NDArray, keys: NDArray, values: NDArray, default: float) -> NDArray:
    """Return the value of each of `queries` in the sorted `keys`, `default` for those that are missing."""
    if not len(keys):
        return np.full(len(queries), default)
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], default)
