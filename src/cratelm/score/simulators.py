"""Simulators, which predict activations from an explanation and tokens only.

A simulator gets an explanation and token ids, and so has no access to activations. The token ids of all
excerpts of a neuron are passed together. Without a language model a simulator is a class with one method
(`PayloadSimulator`); with one it has two: its requests, and what it makes of the answers (`Simulator`).

Shapes: n tokens of an excerpt (or of all excerpts together), O options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptFeatures, ConceptReader
from cratelm.explain.concepts.formula import cells_of
from cratelm.explain.concepts.predict import looked_up
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
    """Predicts activations with a language model, in any unit, since scores are correlations."""

    def requests(self, explanation: Explanation, token_ids: Sequence[NDArray]) -> list[Request]:
        """Return the requests for the language model."""
        ...

    def simulate(
        self, explanation: Explanation, token_ids: Sequence[NDArray], answers: Sequence[Answer]
    ) -> Simulated:
        """Return the predicted activation at each token; `answers` are those to `requests`, in order."""
        ...


class TokenLists(Sequence[NDArray]):
    """Token ids of several excerpts, with what several simulations of them share."""

    def __init__(self, token_ids: Sequence[NDArray], concepts: ConceptReader | None = None):
        """`token_ids` has one array per excerpt; `concepts` evaluates the predicates of formulas."""
        self._lists = list(token_ids)
        self._concepts = concepts
        self.flat = np.concatenate([np.zeros(0, np.int64), *self._lists]).astype(np.int64)
        """[n]"""
        self._contexts: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, at: Any) -> Any:
        return self._lists[at]

    def __len__(self) -> int:
        return len(self._lists)

    def contexts(self, depth: int) -> NDArray[np.int64]:
        """Return the contexts of all tokens [n, depth], see `contexts_of`."""
        if depth not in self._contexts:
            self._contexts[depth] = contexts_of(self._lists, depth)
        return self._contexts[depth]

    @cached_property
    def features(self) -> ConceptFeatures:
        """Return where predicates hold at all tokens. Raises `InputError` if no library was given."""
        if self._concepts is None:
            raise InputError("formulas of concepts need the library that they were made with")
        return self._concepts.features(self._lists)

    def split(self, values: NDArray) -> list[NDArray]:
        """Return `values` [n] as one array per excerpt."""
        bounds = [0, *accumulate(map(len, self._lists))]
        return [values[low:high] for low, high in pairwise(bounds)]


class PayloadSimulator(Protocol):
    """A simulator without a language model, which reads only the payload of an explanation."""

    def values(self, payload: Mapping[str, Any], token_ids: TokenLists) -> NDArray[np.float64]:
        """Return the predicted activation at each token of all excerpts, [n]."""
        ...


class LookupSimulator:
    """Predicts the table's value for each token, and its default for tokens not in it, in the neuron's unit."""

    def values(self, payload: Mapping[str, Any], token_ids: TokenLists) -> NDArray[np.float64]:
        """Return the table's value at each token, [n]."""
        tokens, values = _sorted(payload["tokens"], payload["values"])
        return _find(token_ids.flat, tokens, values, float(payload["default"]))


class TrieSimulator:
    """Predicts the value of the deepest node that matches the tokens up to each token, in the neuron's unit."""

    def values(self, payload: Mapping[str, Any], token_ids: TokenLists) -> NDArray[np.float64]:
        """Return the deepest matching node's value at each token [n], and the default if none matches.

        All tokens go down the trie together, one level at a time: contexts whose node has no child for
        the next token drop out, and those that remain overwrite the value of the level above.
        """
        parents = np.asarray(payload["parents"], dtype=np.int64)
        tokens = np.asarray(payload["tokens"], dtype=np.int64)
        values = np.asarray(payload["values"], dtype=np.float64)
        simulated = np.full(len(token_ids.flat), float(payload["default"]))
        depth = _depth(parents)
        contexts = token_ids.contexts(depth)  # [n, depth]
        # One number per (parent, token), as when the trie was built, so that one binary search finds the
        # children of all nodes. `base` is above every token id in the contexts and in the trie.
        base = max(int(token_ids.flat.max(initial=0)), int(tokens.max(initial=0))) + 2
        keys, nodes = _sorted((parents + 1) * base + tokens + 1, np.arange(len(tokens)))
        at, node = np.arange(len(contexts)), np.full(len(contexts), ROOT)
        for level in range(depth):
            node = _find((node + 1) * base + contexts[at, level] + 1, keys, nodes, ROOT)
            inside = node != ROOT
            at, node = at[inside], node[inside]
            simulated[at] = values[node]
        return simulated


class ConceptSimulator:
    """Predicts the mean of the formula's cell that a token is in, added to a look-up if the payload has one.

    In the neuron's unit. Raises `InputError` if the library lacks a predicate of the formula.
    """

    def values(self, payload: Mapping[str, Any], token_ids: TokenLists) -> NDArray[np.float64]:
        """Return the mean of the cell of each token, plus the table's value where there is a table, [n]."""
        means, n = np.asarray(payload["cells"], np.float64), len(token_ids.flat)
        values = means[cells_of([token_ids.features.column(t) for t in payload["terms"]], n)]
        return values + looked_up(payload, token_ids.flat) if "tokens" in payload else values


class ConstantSimulator:
    """Null control: predicts the explanation's default value at every token."""

    def values(self, payload: Mapping[str, Any], token_ids: TokenLists) -> NDArray[np.float64]:
        """Return the default at every token, [n]."""
        return np.full(len(token_ids.flat), float(payload["default"]))


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


SIMULATORS: dict[str, PayloadSimulator] = {
    "lookup": LookupSimulator(),
    "trie": TrieSimulator(),
    "concepts": ConceptSimulator(),
    "lookup+concepts": ConceptSimulator(),
}
"""simulators without a language model, by the explainer whose payloads they read"""
TOKEN_EXPLAINERS = ("lookup", "trie")
"""those whose payloads are tokens with the tokens before them, see `cratelm.score.contexts`"""


def simulator_of(explainer: str) -> PayloadSimulator:
    """Return the simulator without a language model for an explainer; raise `InputError` if it has none."""
    if explainer not in SIMULATORS:
        raise InputError(f"no simulator for {explainer!r}: name one of {', '.join(SIMULATORS)}")
    return SIMULATORS[explainer]


def simulate(
    explainer: str,
    payload: Mapping[str, Any],
    token_ids: Sequence[NDArray],
    concepts: ConceptReader | None = None,
) -> Simulated:
    """Return the activations that an explanation predicts without a language model.

    There is one array per sequence in `token_ids`, in the neuron's unit. `concepts` has the library that
    formulas were made with. Raises `InputError` if no simulator reads the payloads of `explainer`.
    """
    lists = token_ids if isinstance(token_ids, TokenLists) else TokenLists(token_ids, concepts)
    return lists.split(simulator_of(explainer).values(payload, lists))


def _depth(parents: NDArray[np.int64]) -> int:
    """Return the number of levels of a trie; 0 for one without nodes."""
    depth, nodes = 0, np.arange(len(parents))
    while len(nodes) and depth < len(parents):  # as many at most, however damaged the parents are
        nodes = parents[nodes]
        nodes = nodes[nodes != ROOT]
        depth += 1
    return depth


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
