"""Explanations of all neurons of a layer as `cratelm explain` makes them, from excerpts of the fit split."""

from itertools import pairwise

import numpy as np

from cratelm.activations.open_harvest import HarvestContext
from cratelm.activations.store import read_records
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.lookup import token_table
from cratelm.explain.trie import context_trie
from cratelm.replace.config import Kind
from cratelm.replace.contexts import Contexts
from cratelm.replace.predictors import ByContext, Predictor
from cratelm.replace.tables import Tries
from cratelm.score.contexts import Nodes


def explained_by_excerpts(kind: Kind, opened: HarvestContext, place: int, depth: int) -> Predictor:
    """Return the explanations of all neurons at a place of the site, of the size that `cratelm explain` gives them.

    A neuron that never fires on the fit split is predicted to have its mean.
    """
    layer, width = opened.site.layer_numbers[place], opened.site.n_neurons[place]
    most = ExplainConfig().max_entries
    payloads: list[dict[str, object]] = []
    for record in read_records(opened.folder, "fit", [layer]):
        mean = record.summary.mean
        if record.summary.silent:
            payloads.append({"default": mean, "tokens": [], "values": []})
            continue
        evidence = collect_evidence(record, depth=depth if kind == "trie" else 1, weight=WEIGHT)
        if kind == "trie":
            payloads.append(context_trie(evidence, mean, most, depth=depth).payload())
        else:
            payloads.append(token_table(evidence, mean, most).payload())
    assert len(payloads) == width
    return ByContext(tries_of(payloads))


def tries_of(payloads: list[dict[str, object]]) -> Tries:
    """Return look-up tables and tries [H], in their JSON form, as one object that simulates all of them at once."""
    nodes = Nodes.of(payloads)
    contexts, context = Contexts.of_nodes(nodes)
    edges = np.searchsorted(nodes.owner, np.arange(len(payloads) + 1))
    kept, values = [], []
    for low, high in pairwise(edges.tolist()):
        order = np.argsort(context[low:high])
        kept.append(context[low:high][order])
        values.append(nodes.values[low:high][order])
    return Tries.of(contexts, nodes.defaults.astype(np.float32), kept, values)
