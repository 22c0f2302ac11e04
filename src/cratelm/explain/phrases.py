"""Write the sentence of an explanation, for people and for language models: the claim first, then the evidence.

    names of attributes after a dot: `get`, `set` and `write`; 71% of its activation, fires on 2.1% of tokens; e.g. ...

The claim says what the neuron responds to. That is a formula of concepts where one covers its strongest activations and
explains nearly as much as the tokens that could be named, and else these tokens. The evidence says how much of the activation above the neuron's mean falls on what is claimed.

`score --explanations llm-free` and `intervene` give the sentence to a language model, so a change of its wording changes
scores, and answers in the ledger are asked again.

Tokens are in backticks, white space is visible (␣ space, ⏎ line break, ⇥ tab), and the activating token of an example is
between « and ».
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.explain.concepts.formula import ConceptExplanation, Formula, FormulaSearch, holds_in
from cratelm.explain.concepts.library import Library
from cratelm.explain.concepts.sentence import formula_phrase, listed
from cratelm.explain.evidence import NO_TOKEN, Evidence
from cratelm.explain.lookup import TokenTable
from cratelm.explain.trie import ROOT, Trie
from cratelm.records import Excerpt, NeuronRecord
from cratelm.text.claim import claim
from cratelm.text.display import visible, visible_folded
from cratelm.text.units import Unit, is_text, is_whole, text_of, units_in

N_NAMED = 5
"""tokens or contexts named in a claim"""
N_CHARACTERS = 2
"""characters named after a token that is a part of them"""
N_EXAMPLES = 3
"""tokens named as examples of a concept"""
MIN_GAIN = 0.02
"""smallest gain of a named token or context, as a fraction of the gain of the first one named"""
MIN_SEEN = 5
"""tokens of evidence that are needed before a claim names the token that precedes them"""
STRONG = 0.5
"""fraction of the highest activation from which one counts as strong"""
OVERLAP = 0.5
"""share of the strong activations and of the tokens of a concept that must be the same (IoU) for a claim to name it"""
CLAIM_TERMS, CLAIM_BEAM = 2, 4
"""predicates in the claim of a look-up or a trie, and formulas of one that are tried with a second: short, and quick"""
DOMINANT = 0.75
"""share of strong activations on one token from which a claim names the token and not a concept that it is one of"""
ALONE = 0.97
"""share from which the concept is not named at all"""
MOST = 0.5
"""share of the activation below which a claim says that it is not all"""
NEARLY = 0.9
"""fraction of what a claim in tokens explains that one in concepts must, to be preferred: it says what the tokens share"""
BEFORE, AFTER = 6, 4
"""tokens of the example before the activating one, and from it on"""


class Sentence(NamedTuple):
    """A claim about a neuron with its evidence."""

    text: str
    claim_variance: float
    """fraction of the variance over the evidence that is explained by whether a token is one of those claimed, 0..1"""


@dataclass(frozen=True, eq=False)
class Described:
    """A neuron with its evidence, as sentences need it."""

    record: NeuronRecord
    evidence: Evidence
    features: NDArray[np.float32]
    """[N, P] 1 where a predicate holds at a token of evidence"""
    library: Library
    token_strings: Sequence[str]
    """[V] text of each token id"""

    def _token(self, token: int) -> str:
        """Return a token in backticks; of a part of a character also the characters that it is most often part of."""
        quoted = _quoted([token], self.token_strings)
        if is_whole(token, self.token_strings):  # nearly all are: the excerpts need not be read
            return quoted
        return quoted + self._characters.get(token, "")

    @cached_property
    def _characters(self) -> dict[int, str]:
        """Return the characters that tokens are parts of in the excerpts, in words, by token id."""
        counts: dict[int, Counter[str]] = {}
        for excerpt in self.record.excerpts:
            ids = excerpt.token_ids.tolist()
            for unit in units_in(ids, self.token_strings):
                tokens = (
                    ids[unit.start : unit.stop] if is_text(unit, ids, self.token_strings) else []
                )
                for token in tokens:
                    if not is_whole(token, self.token_strings):
                        counts.setdefault(token, Counter())[unit.text.strip()] += 1
        return {
            token: f" (in {listed([f'`{text}`' for text, _ in count.most_common(N_CHARACTERS)])})"
            for token, count in counts.items()
        }

    def lookup_sentence(self, table: TokenTable) -> Sentence:
        """Return the sentence of a look-up table."""
        named = table.tokens[_ranked(_gains(table))[:N_NAMED]]
        tokens = [self._token(t) for t in named.tolist()]
        after = _mostly_after(self.evidence, named, self.token_strings)
        here = np.isin(self.evidence.contexts[:, 0], named)
        return self._better(self._sentence(_tokens(tokens) + after, here))

    def trie_sentence(self, trie: Trie) -> Sentence:
        """Return the sentence of a trie."""
        named: list[list[int]] = []
        for node in _ranked(_rises(trie)):
            context = trie.context(int(node))
            if not any(_ends_alike(context, other) for other in named):
                named.append(context)
            if len(named) == N_NAMED:
                break
        here = np.zeros(len(self.evidence.activations), bool)
        for context in named:
            of = self.evidence.contexts[:, : len(context)]
            here |= (of == context[::-1]).all(1) if of.shape[1] == len(context) else False
        tokens = _tokens(
            [_in_context(c, self.token_strings) if len(c) > 1 else self._token(c[0]) for c in named]
        )
        if all(len(context) == 1 for context in named):
            own = np.array(named, np.int64).ravel()
            tokens += _mostly_after(self.evidence, own, self.token_strings)
        return self._better(self._sentence(tokens, here))

    def concept_sentence(self, explanation: ConceptExplanation) -> Sentence:
        """Return the sentence of a formula; a token that it holds at most of the time is named first."""
        formula = self._formula(explanation)
        holds = self._holds(formula)
        excess = self._excess(holds)
        token = int(excess.argmax()) if len(excess) else 0
        if not formula.terms or not excess.sum() or excess[token] <= DOMINANT * excess.sum():
            return self._about(formula)
        name = f"the token {self._token(token)}"
        if excess[token] > ALONE * excess.sum():
            return self._sentence(name, holds & (self.evidence.contexts[:, 0] == token))
        phrase = formula_phrase(self.library, explanation.names, explanation.operators)
        return self._sentence(f"{name} and other {phrase}", holds)

    def stacked_sentence(self, table: TokenTable, explanation: ConceptExplanation) -> Sentence:
        """Return the sentence of a look-up table with a formula for what it leaves."""
        sentence = self.lookup_sentence(table)
        if not explanation.names:
            return sentence
        holds = holds_in(explanation.payload())
        counts = np.maximum(explanation.counts, 1e-9)
        above, below = (
            float(np.average(explanation.cells[of], weights=counts[of])) for of in (holds, ~holds)
        )
        degree = "more" if above > below else "less"
        phrase = formula_phrase(self.library, explanation.names, explanation.operators)
        first = claim(sentence.text)
        text = f"{first}, {degree} on {phrase}{sentence.text[len(first) :]}"
        return Sentence(text, sentence.claim_variance)

    def _formula(self, explanation: ConceptExplanation) -> Formula:
        terms = tuple(self.library.number[name] for name in explanation.names)
        return Formula(terms, explanation.operators)

    @cached_property
    def _strongest(self) -> Formula | None:
        """Return the formula that covers the strongest activations, on several tokens, and little else; None if none does."""
        activations = self.evidence.activations
        strong = activations >= STRONG * activations.max(initial=0)
        if activations.max(initial=0) <= 0 or strong.sum() < MIN_SEEN:
            return None
        search = FormulaSearch(
            self.features,
            self.evidence.weights,
            strong.astype(float),
            objective="overlap",
            beam=CLAIM_BEAM,
        )
        formula = search.best(CLAIM_TERMS)
        if formula is None:
            return None
        holds, weights = self._holds(formula), self.evidence.weights
        overlap = weights[holds & strong].sum() / weights[holds | strong].sum()
        counts = np.bincount(self.evidence.contexts[holds & strong, 0])
        general = np.count_nonzero(counts) >= N_EXAMPLES and counts.max() <= DOMINANT * counts.sum()
        return formula if general and overlap >= OVERLAP else None

    def _better(self, of_tokens: Sentence) -> Sentence:
        """Return the sentence of the concept that covers the strongest activations if it says as much, else that of tokens."""
        if self._strongest is None:
            return of_tokens
        of_concept = self._about(self._strongest)
        enough = NEARLY * of_tokens.claim_variance
        return of_concept if of_concept.claim_variance >= enough else of_tokens

    def _holds(self, formula: Formula) -> NDArray[np.bool_]:
        if not formula.terms:
            return np.ones(len(self.features), bool)
        return formula.holds([self.features[:, t] > 0 for t in formula.terms])

    def _about(self, formula: Formula) -> Sentence:
        """Return the sentence of a formula, with the tokens that it holds at most strongly."""
        names = [self.library.predicates[t].name for t in formula.terms]
        phrase = formula_phrase(self.library, names, formula.operators)
        here = self._holds(formula)
        return self._sentence(phrase, here, self._examples(here))

    def _examples(self, here: NDArray[np.bool_]) -> list[str]:
        """Return the tokens with the most activation above the mean where `here` [N] holds."""
        total = self._excess(here)
        best = np.argsort(-total, kind="stable")[:N_EXAMPLES]
        return [self._token(t) for t in best.tolist() if total[t] > 0]

    def _excess(self, here: NDArray[np.bool_]) -> NDArray:
        """Return the weighted activation above the mean where `here` [N] holds, by token id."""
        above = np.maximum(self.evidence.activations[here] - self.record.summary.mean, 0)
        return np.bincount(self.evidence.contexts[here, 0], self.evidence.weights[here] * above)

    def _sentence(
        self, claimed: str, here: NDArray[np.bool_], examples: Sequence[str] = ()
    ) -> Sentence:
        """Return a claim with its evidence; `here` [N] is where it says that the neuron fires."""
        summary, evidence = self.record.summary, self.evidence
        excess = evidence.weights * np.maximum(evidence.activations - summary.mean, 0)
        share = float(excess[here].sum() / max(excess.sum(), 1e-12))
        percent = 100 * summary.firing_rate
        rate = f"fires on {percent:{'.0f' if percent >= 10 else '.2g'}}% of tokens"
        example = f"e.g. {_example(self.record.excerpts, self.token_strings)}"
        if not claimed:
            return Sentence(f"no token much more than others; {rate}; {example}", 0.0)
        among = ", among others" if share < MOST else ""
        named = f": {listed(examples)}" if examples else ""
        found = f"{100 * share:.0f}% of its activation, {rate}"
        text = f"{claimed}{among}{named}; {found}; {example}"
        return Sentence(text, _explained(evidence, here))


def _explained(evidence: Evidence, here: NDArray[np.bool_]) -> float:
    """Return the fraction of the variance over the evidence that is explained by `here` [N]; 0 if it holds nowhere."""
    w, y = evidence.weights, evidence.activations
    total, n = w.sum(), w[here].sum()
    mean = (w @ y) / total
    spread = w @ (y - mean) ** 2
    if n <= 0 or n >= total or spread <= 0:
        return 0.0
    excess = (w[here] @ y[here]) - n * mean
    return float(min(1.0, excess**2 * total / (n * (total - n)) / spread))


def _gains(table: TokenTable) -> NDArray:
    rise = np.maximum(table.values - table.default, 0)
    return table.counts * rise**2


def _rises(trie: Trie) -> NDArray:
    """Return the gain of each node that is higher than its parent, 0 for others."""
    above = np.where(trie.parents == ROOT, trie.default, trie.values[trie.parents])
    return trie.counts * np.maximum(trie.values - above, 0) ** 2


def _ranked(gains: NDArray) -> NDArray[np.int64]:
    """Return the indices of the gains above `MIN_GAIN` of the largest, in descending order."""
    order = np.argsort(-gains, kind="stable")
    return order[gains[order] > MIN_GAIN * gains.max(initial=0)]


def _tokens(quoted: list[str]) -> str:
    """Return tokens in words: the token `a`, or the tokens `a` and `b`; empty for none."""
    return f"the token{'s' * (len(quoted) > 1)} {listed(quoted)}" if quoted else ""


def _example(excerpts: Sequence[Excerpt], token_strings: Sequence[str]) -> str:
    """Return the text around the strongest activation, from a top excerpt if there is one."""
    table = ExcerptTable.of(excerpts)
    rows = np.flatnonzero(table.lengths)
    highest = np.maximum.reduceat(table.activations, table.bounds[rows])
    top = table.is_kind("top")[rows]
    if top.any():
        rows, highest = rows[top], highest[top]
    excerpt = table[int(rows[highest.argmax()])]
    at = int(excerpt.activations.argmax())
    units = units_in(excerpt.token_ids.tolist(), token_strings)
    peak = next(number for number, unit in enumerate(units) if at < unit.stop)
    first = next(
        number for number, unit in enumerate(units) if unit.start >= at - BEFORE or number == peak
    )
    after = [unit for unit in units[peak + 1 :] if unit.stop <= at + AFTER]

    def text(of: Sequence[Unit]) -> str:
        return visible_folded("".join(unit.text for unit in of))

    return f"{text(units[first:peak])}«{text(units[peak : peak + 1])}»{text(after)}"


def _mostly_after(evidence: Evidence, tokens: NDArray, token_strings: Sequence[str]) -> str:
    """Return `, mostly after TOKEN` if TOKEN precedes more than half of the activation on `tokens`, else ""."""
    if evidence.contexts.shape[1] < 2:
        return ""
    own = evidence.contexts[:, 0]
    named = np.zeros(own.max(initial=0) + 1, bool)
    named[tokens] = True
    rows = np.flatnonzero(named[own] & (evidence.activations > 0))
    if len(rows) < MIN_SEEN:
        return ""
    before, which = np.unique(evidence.contexts[rows, 1], return_inverse=True)
    share = np.bincount(which, evidence.activations[rows])
    most = int(share.argmax())
    if before[most] == NO_TOKEN or share[most] <= share.sum() / 2:
        return ""
    return f", mostly after {_quoted([int(before[most])], token_strings)}"


def _in_context(context: list[int], token_strings: Sequence[str]) -> str:
    last = _quoted(context[-1:], token_strings)
    return f"{last} after {_quoted(context[:-1], token_strings)}" if len(context) > 1 else last


def _quoted(ids: Sequence[int], token_strings: Sequence[str]) -> str:
    text = visible_folded(text_of(ids, token_strings))
    # a mark that is drawn on the character before it would be drawn on the backtick
    return f"`{'◌' * (text[:1] != visible(text[:1]))}{text}`"


def _ends_alike(a: list[int], b: list[int]) -> bool:
    """Return True if one context is a suffix of the other."""
    n = min(len(a), len(b))
    return a[-n:] == b[-n:]
