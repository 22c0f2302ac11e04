"""Explain one neuron without a language model, by each explainer that is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.errors import InputError
from cratelm.explain.concepts.fit import FitFeatures
from cratelm.explain.concepts.formula import ConceptExplanation, FormulaSearch, concept_means
from cratelm.explain.concepts.library import builtin_library
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.lookup import residual_of, token_table
from cratelm.explain.phrases import Described, Sentence
from cratelm.explain.trie import context_trie
from cratelm.records import Explanation, NeuronRecord
from cratelm.runs import check_memory


class CountingExplainer:
    """Explains without a language model, by counting over the fit excerpts: `config.explainers`."""

    def __init__(self, config: ExplainConfig, features: FitFeatures):
        """`features` are those of the fit split, with the library of concepts."""
        self._config, self._features = config, features

    def explain(self, records: Iterable[NeuronRecord]) -> Iterator[Explanation]:
        """Yield one explanation per neuron and explainer."""
        for record in records:
            yield from explain_neuron(record, self._config, self._features.strings, self._features)


def explain_neuron(
    record: NeuronRecord,
    config: ExplainConfig,
    token_strings: Sequence[str],
    features: FitFeatures | None = None,
) -> list[Explanation]:
    """Return one explanation per explainer in `config.explainers`; none for a dead neuron.

    `record` is of the fit split; `token_strings` [V] is the text of each token id. Concepts are evaluated by `features`;
    without, the built-in ones on the contexts in the record. Raises `InputError` if the record has out-of-context
    excerpts, which exist for scoring only, or no tokens at all.
    """
    if record.summary.silent:
        return []
    table = ExcerptTable.of(record.excerpts)
    if table.is_kind("out_of_context").any() or not len(table.token_ids):
        raise InputError(
            f"{record.neuron} has no excerpts, or has excerpts of the held_out split instead of fit:"
            " type `cratelm harvest --force` for this model"
        )
    check_contexts(record, config)
    # at least 2 tokens of context, whatever --depth: sentences say what comes before a token
    evidence = collect_evidence(record, depth=max(config.depth, 2), weight=WEIGHT)
    features = features or FitFeatures(builtin_library(), token_strings)
    holds = features.of(evidence)
    described = Described(record, evidence, holds, features.library, token_strings)
    documents = tuple(np.unique(table.documents).tolist())
    explanations = []
    for explainer in config.explainers:
        (text, variance), payload = _explained(explainer, described, config)
        explanations.append(
            Explanation(record.neuron, explainer, text, payload, documents, variance)
        )
    return explanations


def _explained(
    explainer: str, described: Described, config: ExplainConfig
) -> tuple[Sentence, dict[str, Any]]:
    """Return the sentence and the payload of an explanation."""
    evidence, mean = described.evidence, described.record.summary.mean
    if explainer == "trie":
        trie = context_trie(evidence, mean, config.max_entries, depth=config.depth)
        return described.trie_sentence(trie), trie.payload()
    if explainer == "concepts":
        concept = best_concept(described, evidence.activations, mean)
        return described.concept_sentence(concept), concept.payload()
    table = token_table(evidence, mean, config.max_entries)
    if explainer == "lookup":
        return described.lookup_sentence(table), table.payload()
    concept = best_concept(described, residual_of(evidence, table), 0.0, either=True)
    payload = {**concept.payload(), **table.payload()}  # the default is the table's
    return described.stacked_sentence(table, concept), payload


def best_concept(
    described: Described, targets: NDArray[np.float64], default: float, *, either: bool = False
) -> ConceptExplanation:
    """Return the best formula for targets [N] on the evidence, with the means of its cells."""
    weights, holds = described.evidence.weights, described.features
    formula = FormulaSearch(holds, weights, targets, either=either).best()
    terms = formula.terms if formula else ()
    names = [described.library.predicates[t].name for t in terms]
    columns = [holds[:, t] > 0 for t in terms]
    return concept_means(formula, names, columns, weights, targets, default)


def check_contexts(record: NeuronRecord, config: ExplainConfig) -> None:
    """Raise `InputError` if the contexts of all tokens of a neuron's excerpts do not fit into memory."""
    tokens = len(ExcerptTable.of(record.excerpts).token_ids)
    check_memory(config, {"depth": 8 * config.depth * tokens}, "the contexts of one neuron")
