"""Write the short phrase of an explanation, for people and for language models.

`score --explanations llm-free` and `intervene` give the phrase to a language model, so a change of its
wording changes scores, and answers in the ledger are asked again.

Tokens are in backticks, white space is visible (␣ space, ⏎ line break, ⇥ tab), and the activating
token of an example is between « and ».
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.explain.evidence import NO_TOKEN, Evidence
from cratelm.explain.lookup import TokenTable
from cratelm.explain.trie import ROOT, Trie
from cratelm.records import Excerpt, NeuronRecord
from cratelm.text.display import visible_folded

N_NAMED = 4
"""tokens or contexts named in a phrase"""
MIN_GAIN = 0.02
"""smallest gain of a named token or context, as a fraction of the gain of the first one named"""
MIN_SEEN = 5
"""tokens of evidence that are needed before a phrase names the token that precedes them"""
BEFORE, AFTER = 6, 4
"""tokens of the example before the activating one, and from it on"""


def lookup_phrase(
    table: TokenTable, evidence: Evidence, record: NeuronRecord, token_strings: Sequence[str]
) -> str:
    """Return text such as: fires on 2.1% of tokens, most on `␣import` and `␣from`, mostly after `⏎`; e.g. ..."""
    gains = np.where(
        table.values > table.default, table.counts * (table.values - table.default) ** 2, 0
    )
    tokens = table.tokens[_ranked(gains)[:N_NAMED]]
    contexts = _listed([_quoted([t], token_strings) for t in tokens])
    after = _mostly_after(evidence, tokens, token_strings)
    return _phrase(record, contexts + after, token_strings)


def trie_phrase(trie: Trie, record: NeuronRecord, token_strings: Sequence[str]) -> str:
    """Return text such as: fires on 2.1% of tokens, most on `import` after `⏎` and on `␣as`; e.g. ..."""
    parent_values = np.where(trie.parents == ROOT, trie.default, trie.values[trie.parents])
    rise = trie.values - parent_values
    gains = np.where(rise > 0, trie.counts * rise**2, 0)
    named: list[list[int]] = []
    for node in _ranked(gains):
        context = trie.context(int(node))
        if not any(_ends_alike(context, other) for other in named):
            named.append(context)
        if len(named) == N_NAMED:
            break
    contexts = _listed([_in_context(c, token_strings) for c in named])
    return _phrase(record, contexts, token_strings)


def _ranked(gains: NDArray) -> NDArray[np.int64]:
    """Return the indices of the gains above `MIN_GAIN` of the largest, in descending order."""
    order = np.argsort(-gains, kind="stable")
    return order[gains[order] > MIN_GAIN * gains.max(initial=0)]


def _phrase(record: NeuronRecord, contexts: str, token_strings: Sequence[str]) -> str:
    percent = 100 * record.summary.firing_rate
    rate = f"fires on {percent:{'.0f' if percent >= 10 else '.2g'}}% of tokens"
    most = f", most on {contexts}" if contexts else ", on none much more than on others"
    return f"{rate}{most}; e.g. {_example(record.excerpts, token_strings)}"


def _example(excerpts: Sequence[Excerpt], token_strings: Sequence[str]) -> str:
    """Return the text around the strongest activation, from a top excerpt if there is one."""
    table = ExcerptTable.of(excerpts)
    rows = np.flatnonzero(table.lengths)
    highest = np.maximum.reduceat(table.activations, table.bounds[rows])
    top = table.is_kind("top")[rows]
    if top.any():
        rows, highest = rows[top], highest[top]
    excerpt = table[int(rows[highest.argmax()])]
    peak = int(excerpt.activations.argmax())

    def text(start: int, stop: int) -> str:
        return visible_folded("".join(token_strings[int(t)] for t in excerpt.token_ids[start:stop]))

    return (
        f"{text(max(0, peak - BEFORE), peak)}«{text(peak, peak + 1)}»{text(peak + 1, peak + AFTER)}"
    )


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
    return "`" + visible_folded("".join(token_strings[t] for t in ids)) + "`"


def _listed(names: list[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def _ends_alike(a: list[int], b: list[int]) -> bool:
    """Return True if one context is a suffix of the other."""
    n = min(len(a), len(b))
    return a[-n:] == b[-n:]
