"""Models that run on explanations: against planted models, brute force, and what must not leak."""

import json
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_activations import EOT, MemorySplit
from test_steer import KINDS, SMALL, model_of, small_run
from torch import nn
from torch.nn import functional as F

import cratelm
from cratelm.activations.batches import SearchPlan
from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.fit import FitFeatures
from cratelm.explain.concepts.formula import STRENGTH
from cratelm.explain.concepts.library import builtin_library
from cratelm.explain.evidence import collect_evidence
from cratelm.explain.lookup import token_table
from cratelm.explain.trie import context_trie
from cratelm.models import build, site_of
from cratelm.models.sites import Site, hooked
from cratelm.replace.concepts import N_CELLS, CellSums, cells_of, share_features
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.contexts import NO_TOKEN, ROOT, START, Contexts
from cratelm.replace.exact import quantum_of, rounded
from cratelm.replace.excerpts import tries_of
from cratelm.replace.fit import Fit, FitText
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.layers import layer_sets
from cratelm.replace.measure import HeldOut, Variant, measure
from cratelm.replace.neurons import _within, best_explained, ranking, replaced_alone
from cratelm.replace.ngram import NGrams
from cratelm.replace.predictors import ByContext, Constant, Stacked
from cratelm.replace.replace import replace
from cratelm.replace.simulators import read_simulators
from cratelm.replace.store import (
    read_curve,
    read_documents,
    read_neurons,
    read_replacement_summary,
)
from cratelm.replace.summary import Figures
from cratelm.replace.tables import ContextSums, _highest_by_family, _sums_by_family
from cratelm.replace.text import BatchText, predicted, successors
from cratelm.replace.token_cost import token_cost
from cratelm.report.sections import replacement as section
from cratelm.results.replacement import read_replacement, read_replacement_curve
from cratelm.runs import RECORD, Run
from cratelm.runs.ranks import Ranks
from cratelm.score.simulators import simulate
from cratelm.score.token_share import TokenMeans
from cratelm.stats.documents import DocumentResamples
from cratelm.tokens.beginning import PLAIN
from cratelm.tokens.shards import TokenStore

CPU = torch.device("cpu")


def documents(n: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Documents of random tokens from 1 on, in which some bigrams are frequent."""
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(5, 40, n):
        tokens = rng.integers(1, vocabulary, length)
        tokens[1::3] = tokens[0:-1:3][: len(tokens[1::3])] % (vocabulary - 1) + 1
        found.append(tokens)
    return found


def split_of(parts: list[np.ndarray]) -> Any:
    """A split of the shards with these documents, each ended by EOT."""
    split = MemorySplit([len(p) for p in parts])
    split.tokens = np.concatenate([np.append(p, EOT) for p in parts])
    return split


def plan_of(split: Any, name: str = "fit", length: int = 16) -> SearchPlan:
    return SearchPlan.of(split, name, EOT, length, split.n_tokens + length, 0)  # type: ignore[arg-type]


def text_of(split: Any) -> BatchText:
    """The text of a whole split, in one batch of sequences of 16 tokens."""
    plan = plan_of(split)
    whole = [s for s in plan.sequences if plan.bounds(s)[1] - plan.bounds(s)[0] == 16]
    return BatchText.of(plan.batch(whole, CPU))


# ---- contexts -------------------------------------------------------------------------------------


def naive_context(text: BatchText, at: int, depth: int) -> tuple[int, ...]:
    """The last tokens at a token, walked back one by one."""
    found = [int(text.ids[at])]
    column = at % text.shape[1]
    while len(found) < depth:
        previous = at - len(found)
        if column - len(found) < 0 or text.document[previous] < 0:
            found.append(START)
            break
        found.append(int(text.ids[previous]))
    return tuple(found + [NO_TOKEN] * (depth - len(found)))


def test_contexts_stay_inside_documents_and_sequences():
    text = text_of(split_of(documents(30, 5)))
    contexts = text.contexts(4)
    assert [tuple(c) for c in contexts.tolist()] == [
        naive_context(text, at, 4) for at in range(text.n_tokens)
    ]
    assert (contexts == START).any()
    for low, high in text.segments():
        assert len(set(text.document[low:high])) == 1
        assert low % 16 == 0 or text.document[low - 1] != text.document[low]
        assert high % 16 == 0 or text.document[high] != text.document[high - 1]
    covered = sum(high - low for low, high in text.segments())
    assert covered == (text.document >= 0).sum()


def test_contexts_are_counted_and_found():
    fit, other = (text_of(split_of(documents(40, 6, seed))) for seed in (0, 1))
    tree = Contexts.of(fit.contexts(3))
    counts: dict[tuple, int] = {}
    for context in fit.contexts(3).tolist():
        for k in (1, 2, 3):
            if NO_TOKEN not in context[:k]:
                counts[tuple(context[:k])] = counts.get(tuple(context[:k]), 0) + 1

    def spelled(node: int) -> tuple[int, ...]:
        above = tree.parents[node]
        return (*(spelled(above) if above != ROOT else ()), int(tree.tokens[node]))

    names = [spelled(node) for node in range(len(tree))]
    wanted = {c for c, n in counts.items() if len(c) == 1 or n >= 2}
    assert set(names) == wanted
    assert len(names) == len(wanted)
    assert tree.counts.tolist() == [counts[name] for name in names]
    matched = tree.match(other.contexts(5))  # longer contexts than the tree's
    assert matched.shape == (3, other.n_tokens)
    for at, context in enumerate(other.contexts(5).tolist()):
        for level in range(3):
            name = tuple(context[: level + 1])
            expected = names.index(name) if name in wanted else ROOT
            assert matched[level, at] == expected
    shallow = tree.shallow(2)
    assert (shallow.match(other.contexts(3)) == matched[:2]).all()


# ---- tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    text = text_of(split_of(documents(200, 6)))
    tree = Contexts.of(text.contexts(3))
    rng = np.random.default_rng(1)
    own = rng.random((6, 4))[np.minimum(text.ids, 5)]
    pair = rng.random((40, 40, 4))[text.contexts(2)[:, 1], text.ids]
    activations = (own + pair + 0.5 * rng.random(own.shape)).astype(np.float32)
    activations[:, 3] = rng.random(len(activations))  # tokens make no difference
    sums = ContextSums(tree, 4, quantum_of(len(activations), 16.0))
    half = len(activations) // 2
    matched = tree.match(text.contexts(3))
    sums.add(activations[:half], matched[:, :half])
    sums.add(activations[half:], matched[:, half:])
    return text, tree, matched, activations, sums.tables()


def test_values_are_shrunk_means(fitted):
    text, tree, matched, activations, made = fitted
    values = made.tables.values
    assert values[-1] == pytest.approx(activations.mean(0), rel=1e-5)
    means = TokenMeans(40, 4)
    means.add(activations, text.ids)
    k = means._strength(
        activations.mean(0, dtype=float),
        sum(
            activations[text.ids == t].sum(0, dtype=float) ** 2 / (text.ids == t).sum()
            for t in set(text.ids.tolist())
        ),
    )
    for node in range(len(tree)):
        inside = (matched == node).any(0)
        total, n = activations[inside].sum(0, dtype=float), inside.sum()
        assert made.totals[node] == pytest.approx(total, rel=1e-5)
        if tree.parents[node] == ROOT:  # the strength of single tokens is that of `token_share`
            finite = np.where(np.isinf(k), 1e30, k)
            expected = (total + finite * values[-1]) / (n + finite)
        else:  # the number of tokens that the parent counts as is the same for all contexts of a level
            above = values[tree.parents[node]]
            expected = np.clip(values[node], *np.sort([total / n, above], axis=0))
        assert values[node] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.isinf(k[3]) or k[3] > 100


def test_a_level_that_says_nothing_predicts_what_its_parents_do(fitted):
    _, tree, _, _, made = fitted
    values = made.tables.values
    deep = tree.level(2)
    from_pairs = np.abs(values[deep] - values[tree.parents[deep]]).mean(0)
    from_tokens = np.abs(values[tree.level(1)] - values[tree.parents[tree.level(1)]]).mean(0)
    assert (from_pairs[:3] < 0.1 * from_tokens[:3]).all()  # pairs matter, the third token does not


@pytest.mark.parametrize("most", [1, 5, 40, 10_000])
def test_tries_of_limited_size(fitted, most):
    _, tree, matched, activations, made = fitted
    tries = made.pruned(most)
    assert tries.entries <= most
    predicted = tries.predict(matched)
    for h in range(4):
        kept = set(tries.rise.tocsc()[:, [h]].nonzero()[0].tolist()) | set(made_kept(made, h, most))
        assert len(kept) <= most
        assert all(tree.parents[node] in kept | {ROOT} for node in kept)
        deepest = [
            next((int(m) for m in matched[::-1, at] if m in kept), ROOT)
            for at in range(matched.shape[1])
        ]
        deepest = np.array(deepest)
        inner = {int(tree.parents[node]) for node in kept}
        for node in {*kept, ROOT}:
            at = deepest == node
            if not at.any():
                continue
            value = made.tables.values[node][h]  # `ROOT` is the last row
            if node in inner:
                value = (activations[at, h].sum() + value) / (at.sum() + 1)
            assert predicted[at, h] == pytest.approx(value, rel=1e-4)


def made_kept(made, h: int, most: int) -> list[int]:
    """The contexts with the best gains in their subtree, sought one by one."""
    tree, values = made.tables.contexts, made.tables.values[:, h]
    gains = tree.counts * (values[:-1] - values[tree.parents]) ** 2
    best = gains.copy()
    for node in range(len(tree) - 1, -1, -1):
        if tree.parents[node] != ROOT:
            best[tree.parents[node]] = max(best[tree.parents[node]], best[node])
    order = sorted(range(len(tree)), key=lambda n: (-best[n], n))[:most]
    return [n for n in order if best[n] > 0]


def test_length_of_the_context_that_decides_a_prediction(fitted):
    text, _, matched, _, made = fitted
    whole, pruned = ByContext(made.tables), ByContext(made.pruned(10))
    stacked = Stacked([ByContext(made.pruned(1)), whole])
    values = made.tables.values
    for token in range(0, text.n_tokens, 97):
        deepest = int((matched[:, token] != ROOT).sum())
        assert whole.context_length(text, token, 0) == deepest
        assert stacked.context_length(text, token, 0) == deepest
        assert whole.predict(text)[token, 0] == values[matched[deepest - 1, token]][0]
        for h in range(4):
            kept = set(made_kept(made, h, 10))
            expected = max((k for k in range(1, 4) if matched[k - 1, token] in kept), default=0)
            assert pruned.context_length(text, token, h) == expected
    assert Constant(np.ones(4, np.float32)).context_length(text, 0, 0) == 0


def test_larger_tries_predict_better(fitted):
    _, _, matched, activations, made = fitted
    errors = [
        ((made.pruned(most).predict(matched)[:, 0] - activations[:, 0]) ** 2).mean()
        for most in (1, 10, 40)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_weights_decide_what_is_kept(fitted):
    _, tree, _, _, made = fitted
    weights = np.zeros((len(tree), 4), np.float32)
    weights[3] = 1
    tries = made.pruned(2, weights)
    assert set(tries.rise.nonzero()[0].tolist()) == {3}


def test_a_shared_limit_goes_to_the_neurons_that_vary(fitted):
    _, _, matched, activations, made = fitted
    own, shared = made.pruned(10), made.pruned(10, shared=True)
    assert shared.n_values == own.n_values == 40
    gains = [sorted(of, reverse=True) for of in made._best_gains(None).T.tolist()]
    everything = sorted((g for of in gains for g in of), reverse=True)
    for h in range(4):
        wanted = sum(g >= everything[39] for g in gains[h])
        assert len(shared.rise.tocsc()[:, [h]].data) == wanted
    errors = [((t.predict(matched) - activations) ** 2).sum() for t in (own, shared)]
    assert errors[1] < errors[0]


def test_families_are_added_and_compared_as_by_reduceat():
    rng = np.random.default_rng(0)
    for first in ([0], [0, 1, 2], [0, 5, 6, 30]):
        values = rounded(rng.normal(size=(40, 3)), 2.0**-20)
        sums = _sums_by_family(values, np.array(first))
        assert (sums == np.add.reduceat(values, first, axis=0)).all()
        values = np.sort(values, axis=0)[:, [0, 1, 2, 2]].astype(np.float32)
        values[:, 3] *= -1  # the highest is the last of a family, or the first
        highest = _highest_by_family(values, np.array(first))
        assert (highest == np.maximum.reduceat(values, first, axis=0)).all()


def test_sums_do_not_depend_on_the_order(fitted):
    _, tree, matched, activations, _ = fitted
    activations = activations * 10.0 ** np.random.default_rng(0).uniform(-6, 3, activations.shape)
    activations = activations.astype(np.float32)
    edges = np.linspace(0, len(activations), 8).astype(int)

    def total(order, quantum):
        sums = ContextSums(tree, 4, quantum)
        for low, high in order:
            part = ContextSums(tree, 4, quantum)
            part.add(activations[low:high], matched[:, low:high])
            sums.merge(part)
        return sums.deepest

    parts = list(pairwise(edges))
    exact = quantum_of(len(activations), float(activations.max()))
    assert (total(parts, exact) == total(parts[::-1], exact)).all()
    assert (total(parts, 1e-300) != total(parts[::-1], 1e-300)).any()  # without rounding
    assert rounded(np.array([0.3]), 0.25) == 0.25


def test_explanations_of_excerpts_are_simulated_as_by_score():
    from planted import corpus, harvested, on_pair, on_token

    tokens, _ = corpus("fit")
    records = [harvested(of, index=i) for i, of in enumerate(
        [on_token(tokens, 3), on_pair(tokens, 1, 2), on_token(tokens, 1)]
    )]  # fmt: skip
    held_out = corpus("held_out")[0][:600]
    text = BatchText(held_out.reshape(1, -1), np.zeros((1, 600), int))
    for kind in ("lookup", "trie"):
        payloads: list[dict[str, object]] = [{"default": 0.25, "tokens": [], "values": []}]
        for record in records:
            evidence = collect_evidence(record, depth=3, weight=0.5)
            mean = record.summary.mean
            made = (
                token_table(evidence, mean, 30)
                if kind == "lookup"
                else context_trie(evidence, mean, 30, depth=3)
            )
            payloads.append(made.payload())
        found = ByContext(tries_of(payloads)).predict(text)
        assert (found[:, 0] == 0.25).all()
        for h, payload in enumerate(payloads[1:], 1):
            expected = simulate(kind, payload, [held_out])[0]
            assert found[:, h] == pytest.approx(expected, abs=1e-6)
    assert ByContext(tries_of(payloads[:1])).predict(text).shape == (600, 1)


def test_means_of_cells_are_those_of_the_fit_text():
    strings = [f" w{i}" if i % 3 else str(i) for i in range(40)]
    reader = ConceptReader(builtin_library(), strings)
    text = text_of(split_of(documents(60, 30)))
    features = reader.features([text.ids[a:b] for a, b in text.segments()])
    first = reader.library.predicates[0].name
    names = [p.name for p in reader.library.predicates]
    digit = next(n for n in names if 0.2 < features.column(n).mean() < 0.6)
    payloads = [
        {"terms": [digit], "operators": [], "cells": []},
        {"terms": [digit, first], "operators": ["and"], "cells": []},
        {"terms": [], "operators": [], "cells": []},
    ]
    rng = np.random.default_rng(0)
    activations = rng.random((text.n_tokens, 3)).astype(np.float32)
    sums = CellSums(payloads, reader, 2.0**-40)
    sums.add(activations, text)
    made = sums.explanations()
    is_text = text.document >= 0
    holds = np.zeros(text.n_tokens, bool)
    holds[is_text] = features.column(digit)
    mean = activations[is_text, 0].mean()
    for value in (False, True):
        at = is_text & (holds == value)
        side = (activations[at, 0].sum() + STRENGTH * mean) / (at.sum() + STRENGTH)
        expected = (activations[at, 0].sum() + STRENGTH * side) / (at.sum() + STRENGTH)
        assert made.predict(text)[at, 0] == pytest.approx(expected, rel=1e-5)
    assert made.predict(text)[is_text, 2] == pytest.approx(activations[is_text, 2].mean(), rel=1e-5)
    assert made.predict(text)[~is_text, 0] == pytest.approx(mean, rel=1e-5)


def test_features_of_the_fit_split_are_those_of_its_batches():
    strings = [f" w{i}" if i % 3 else f"{i}." for i in range(40)]
    split = split_of(documents(60, 30))
    plan, reader = plan_of(split), ConceptReader(builtin_library(), strings)
    whole = [s for s in plan.sequences if plan.bounds(s)[1] - plan.bounds(s)[0] == 16]
    batch = plan.batch(whole[3:9], CPU)
    evaluated, fresh = BatchText.of(batch), BatchText.of(batch)
    features = FitFeatures(reader.library, strings, split, 16)
    share_features(evaluated, batch.position.numpy(), reader, features)
    names = [p.name for p in reader.library.predicates]
    payloads = [{"terms": [name], "operators": [], "cells": []} for name in names]
    rows, cells = cells_of(payloads, reader, evaluated)
    expected_rows, expected = cells_of(payloads, reader, fresh)
    assert (rows == expected_rows).all()
    assert (cells == expected).all()
    assert 0 < (cells % N_CELLS).mean() < 1


# ---- n-gram models --------------------------------------------------------------------------------


def test_ngrams_equal_their_formula():
    fit, held_out = (text_of(split_of(documents(60, 6, seed))) for seed in (0, 1))
    tree = Contexts.of(fit.contexts(2))
    matched, following = successors(fit, tree)
    model = NGrams.of(tree, matched, following, 40)
    at, after = successors(held_out, tree)
    losses = model.losses(at, after)
    assert losses.shape == (3, predicted(held_out).sum())
    for column in range(0, len(after), 7):
        p = ((following == after[column]).sum() + 1) / (len(following) + 40)
        assert losses[0, column] == pytest.approx(-np.log(p))
        for level in (0, 1):
            context = at[level, column]
            if context != ROOT:
                seen = following[matched[level] == context]
                types = len(set(seen.tolist()))
                p = ((seen == after[column]).sum() + types * p) / (len(seen) + types)
            assert losses[level + 1, column] == pytest.approx(-np.log(p))
    # probabilities of all next tokens add up to 1
    everything = [np.exp(-model.losses(at[:, :3], np.full(3, token)))[-1] for token in range(40)]
    assert np.sum(everything, axis=0) == pytest.approx(1)


# ---- running on explanations ----------------------------------------------------------------------


class Reads(nn.Module):
    """A block whose neurons are a function of its input, and whose output is a function of its neurons."""

    def __init__(self, width: int, n_neurons: int):
        super().__init__()
        self.w_in, self.w_out = nn.Linear(width, n_neurons), nn.Linear(n_neurons, width, bias=False)

    def forward(self, x):
        return self.w_out(F.relu(self.w_in(x)))


class Planted(nn.Module):
    """A language model whose neurons are functions of the last two tokens, and whose logits are of the neurons."""

    def __init__(self, vocabulary: int, width: int = 12, n_neurons: int = 20):
        super().__init__()
        torch.manual_seed(0)
        self.own, self.before = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Reads(width, n_neurons)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.config = SimpleNamespace(
            vocab_size=vocabulary, get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary)
        )
        with torch.no_grad():
            self.head.weight *= 6

    @property
    def base_model(self):
        return lambda input_ids, use_cache: self(input_ids)

    @property
    def device(self):
        return CPU

    def forward(self, input_ids, use_cache=False):
        # before a document stands its end mark, and nothing before a sequence: both count as the end mark
        previous = F.pad(input_ids[:, :-1], (1, 0), value=EOT)
        x = self.own(input_ids) + self.before(previous)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def measured(model, site, fit, held_out, depth, explainers, vocabulary=40, **options):
    """Losses and errors of a model, as the verb measures them, with plans in memory."""
    config = ReplaceConfig(
        explainers=explainers, depth=depth, quiet=True, batch_tokens=64, **options
    )
    opened: Any = SimpleNamespace(subject=SimpleNamespace(model=model), site=site)
    text = FitText.of(plan_of(fit), 64, depth, vocabulary)
    explained = Fit(config, opened, text, [10.0] * site.n_layers, Ranks()).explain()
    held = HeldOut(ExplainedModel(model, site), plan_of(held_out, "held_out"), 64, vocabulary, True)
    means = [of.tables.values[-1] for of in explained["lookup"]]  # type: ignore[attr-defined]
    sets = layer_sets(site.layer_numbers, config.layers)
    losses, errors = measure(
        held, explained, means, sets, (text.contexts, text.ngrams), [10.0] * site.n_layers, 0,
        Ranks(),
    )  # fmt: skip
    return SimpleNamespace(
        losses=losses, errors=errors, explained=explained, held_out=held, sets=sets, text=text
    )


def following_two(n: int, vocabulary: int, seed: int) -> Any:
    """Documents in which the next token mostly follows from the last two."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(n):
        tokens = rng.integers(1, vocabulary, 2).tolist()
        while len(tokens) < 30:
            regular = (2 * tokens[-1] + tokens[-2]) % (vocabulary - 1) + 1
            tokens.append(regular if rng.random() < 0.9 else int(rng.integers(1, vocabulary)))
        parts.append(np.array(tokens))
    return split_of(parts)


@pytest.fixture(scope="module")
def planted():
    """A model that predicts such text by neurons that are functions of the last two tokens, run on explanations."""
    vocabulary = 7
    model, fit = Planted(40, n_neurons=60), following_two(400, vocabulary, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    ids = torch.from_numpy(fit.tokens[: 16 * 700].reshape(700, 16))
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = ids[torch.from_numpy(rng.integers(0, 700, 64))]
        logits = model(chosen).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    site = Site("w", ("layers.0.w_out",), "input", (60,))
    held_out = following_two(80, vocabulary, 1)
    return measured(model.eval(), site, fit, held_out, 2, ("lookup", "trie", "trie:30"))


def test_a_model_that_its_explanations_describe_runs_on_them(planted):
    figures = Figures(planted.losses, 200, 0)
    rows = {(r.explainer, r.control): r for r in figures.rows(("lookup", "trie", "trie:30"), planted.sets)}  # fmt: skip
    whole = rows["trie", "none"]
    assert whole.carried.value > 0.5
    assert whole.recovered_mean.value == pytest.approx(1, abs=1e-6)
    assert whole.recovered_unigram.value == pytest.approx(1, abs=1e-5)
    assert whole.nats_lost.value == pytest.approx(0, abs=1e-6)
    # the last token alone does not
    assert rows["lookup", "none"].recovered_mean.value < 0.9
    assert rows["lookup", "none"].nats_lost.low > 0
    assert rows["trie:30", "none"].nats_lost.value < rows["lookup", "none"].nats_lost.value
    explained = planted.errors[0].explained("trie")
    assert np.nanmin(explained) == pytest.approx(1, abs=1e-6)
    shuffled = rows["trie", "shuffled"]
    assert shuffled.loss_replaced.value > whole.loss_replaced.value + 0.5


def test_shuffled_explanations_recover_nothing(planted):
    figures = Figures(planted.losses, 200, 0)
    own, shuffled = figures.rows(("trie",), planted.sets)
    assert (own.control, shuffled.control) == ("none", "shuffled")
    assert own.recovered_unigram.value > 0.9
    assert shuffled.recovered_unigram.high <= 0


def crate(**overrides):
    torch.manual_seed(3)
    model = build(
        "crate-2l", vocab_size=40, max_position_embeddings=48, seed=1, **SMALL, **overrides
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "dictionary" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_last_layer_of_crate_on_a_look_up_is_a_bigram_model():
    model, fit, held_out = crate(), split_of(documents(60, 30)), split_of(documents(20, 30, 1))
    site = site_of(model)
    found = measured(model, site, fit, held_out, 1, ("lookup",))
    # the table of the next token's log-probabilities after each token, from the explanations alone
    tables = found.explained["lookup"][1].tables
    rows = torch.from_numpy(
        tables.predict(Contexts.of(np.arange(40)[:, None]).match(np.arange(40)[:, None]) * 0
                       + tables.contexts.match(np.arange(40)[:, None]))
    )  # fmt: skip
    with torch.no_grad():
        hidden = model.model.norm(rows @ model.model.layers[1].ista.dictionary)
        bigram = F.log_softmax(model.lm_head(hidden), -1).numpy()
    total = 0.0
    for sequence in plan_of(held_out).sequences:
        low, high = plan_of(held_out).bounds(sequence)
        tokens = held_out.tokens[low:high]
        total -= sum(bigram[a, b] for a, b in pairwise(tokens) if a != EOT)
    for layers in ("1", "all"):
        sums = found.losses.sums[Variant("own", "lookup", layers)]
        assert sums.sum() == pytest.approx(total, rel=1e-5)
    assert found.losses.sums[Variant("own", "lookup", "0")].sum() != pytest.approx(total, rel=1e-3)


def naive_losses(model, site, batch, codes: dict[int, np.ndarray]) -> np.ndarray:
    """Losses with hooks on the whole model, no block skipped."""
    shape = batch.input_ids.shape

    def put(place, activations):
        return torch.from_numpy(codes[place]).view(*shape, -1) if place in codes else None

    with torch.no_grad(), hooked(model, site, put):
        logits = model(input_ids=batch.input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none").view(len(logits), -1).numpy()  # fmt: skip


VARIANTS = ["crate", "ista_residual", "decoupled_dictionary", "gpt2", "neox", "llama"]


def any_model(kind: str):
    if kind in ("ista_residual", "decoupled_dictionary"):
        return crate(**{kind: True})
    return model_of(kind) if kind in KINDS and kind != "crate" else crate()


@pytest.mark.parametrize("kind", VARIANTS)
def test_blocks_that_are_skipped_change_nothing(kind):
    model = any_model(kind)
    site = site_of(model)
    explained = ExplainedModel(model, site)
    passes = kind in ("crate", "decoupled_dictionary")
    assert explained.passes_nothing == [passes] * 2
    batch = plan_of(split_of(documents(12, 30))).batch([0, 1, 2], CPU)
    trace = explained.trace(batch.input_ids)
    rng = np.random.default_rng(0)
    codes = {
        place: rng.exponential(size=(48, width)).astype(np.float32)
        for place, width in enumerate(site.n_neurons)
    }
    for places in ((), (0,), (1,), (0, 1)):
        chosen = {p: codes[p] for p in places}
        expected = naive_losses(model, site, batch, chosen)
        assert explained.losses(trace, chosen).numpy() == pytest.approx(
            expected, rel=1e-4, abs=1e-5
        )
        needed = explained.needed(places)
        assert needed == ((places[-1],) if passes and places else places)
        of_needed = {p: codes[p] for p in needed}
        assert explained.losses(trace, of_needed).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)  # fmt: skip


def test_modules_before_a_replaced_site_do_not_run_again():
    model = any_model("gpt2")
    explained = ExplainedModel(model, site_of(model))
    ids, codes = ids_and_codes(explained.site)
    trace = explained.trace(ids)
    calls = []

    def counted(name, module):
        plain = module.forward
        # on the instance, as accelerate does: it must still be there after the losses
        module.forward = lambda x: (calls.append(name), plain(x))[1]

    for number, block in enumerate(model.transformer.h):
        counted(f"{number}.attn", block.attn.c_attn)
        counted(f"{number}.mlp", block.mlp.c_fc)

    def called(*places):
        calls.clear()
        explained.losses(trace, {p: codes[p] for p in places})
        return sorted(calls)

    assert called(0, 1) == ["1.attn"]
    assert called(0) == ["1.attn", "1.mlp"]
    assert called(1) == []
    assert called() == []  # from the stored outputs of the last block
    calls.clear()
    explained.trace(ids)
    assert sorted(calls) == ["0.attn", "0.mlp", "1.attn", "1.mlp"]


@pytest.mark.parametrize(
    ("family", "before", "feeds"), [("Llama", 3, 3), ("GPTNeoX", 4, 2), ("Bloom", 3, 2)]
)
def test_modules_before_a_site_are_those_of_the_architecture(family, before, feeds):
    """Norms and attention, also where attention and MLP are parallel; projections and the activation function of an MLP."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    explained = ExplainedModel(
        model := transformers.AutoModelForCausalLM.from_config(config).eval(), site_of(model, "mlp")
    )
    assert [(len(p.before), len(p.feeds)) for p in explained._prefixes] == [(before, feeds)] * 2
    ids, codes = ids_and_codes(explained.site)
    trace = explained.trace(ids)
    for places in ((0,), (1,), (0, 1)):
        chosen = {p: codes[p] for p in places}
        expected = naive_losses(model, explained.site, SimpleNamespace(input_ids=ids), chosen)
        found = explained.losses(trace, chosen).numpy()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_attention_weights_are_not_stored():
    model = any_model("gpt2")
    model.config._attn_implementation = "eager"
    explained = ExplainedModel(model, site_of(model))
    ids, _ = ids_and_codes(explained.site)
    outputs = [of for of in explained.trace(ids).before[0] if isinstance(of, tuple)]
    assert [len(of) for of in outputs] == [2]
    assert outputs[0][1] is None


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_losses_of_some_tokens_are_those_of_all(kind):
    explained = ExplainedModel(model := any_model(kind), site_of(model))
    ids, codes = ids_and_codes(explained.site)
    trace = explained.trace(ids)
    only = torch.arange(ids.shape[1] - 1)[None] % 3 == 0
    masks = {p: torch.arange(of.shape[1]) % 2 == 0 for p, of in codes.items()}
    for mixed in (None, masks):
        whole = explained.losses(trace, codes, mixed)
        some = explained.losses(trace, codes, mixed, only)
        assert some[only].numpy() == pytest.approx(whole[only].numpy(), abs=1e-6)


@pytest.mark.parametrize("kind", VARIANTS)
def test_nothing_of_the_true_activations_reaches_a_replaced_layer(kind):
    """The true codes of the replaced layers are poisoned: the losses stay what they were."""
    model = any_model(kind)
    site = site_of(model)
    explained = ExplainedModel(model, site)
    batch = plan_of(split_of(documents(12, 30))).batch([0, 1, 2], CPU)
    trace = explained.trace(batch.input_ids)
    codes = {p: np.full((48, w), 0.5, np.float32) for p, w in enumerate(site.n_neurons)}
    poisoned = [torch.full_like(a, torch.nan) for a in trace.activations]
    trace.activations[:] = poisoned

    def poison(module, args, output=None):
        bad = torch.full_like(args[0] if output is None else output, torch.nan)
        return (bad,) if output is None else bad

    for places in ((0,), (1,), (0, 1)):
        chosen = {p: codes[p] for p in places}
        expected = explained.losses(trace, chosen)
        assert torch.isfinite(expected).all()
        handles = []
        for place in places:  # before the hook that replaces, so that it sees the poison
            module = model.get_submodule(site.paths[place])
            if site.side == "output":
                handles.append(module.register_forward_hook(poison, prepend=True))
            else:
                handles.append(module.register_forward_pre_hook(poison, prepend=True))
        for whole in (False, True):
            if whole:  # no block is skipped
                trace.outputs.clear()
            assert torch.equal(explained.losses(trace, chosen), expected) or torch.allclose(
                explained.losses(trace, chosen), expected, rtol=1e-4
            )
        if places != (0,):  # where the other layer is not replaced, poison comes through
            assert torch.isnan(explained.losses(trace, {})).any()
        for handle in handles:
            handle.remove()
        trace = explained.trace(batch.input_ids)


@dataclass(eq=False)
class Halves:
    """An autoencoder that reconstructs only the first half of the activations."""

    cfg: Any = None

    def encode(self, x):
        return x[..., : x.shape[-1] // 2] * 2

    def decode(self, latents):
        return torch.cat([latents / 2, torch.zeros_like(latents)], -1)


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_latents_carry_no_error_past_the_explanations(kind):
    model = any_model(kind)
    below = site_of(model)
    widths = tuple(w // 2 for w in below.n_neurons)
    site = Site("latents", below.paths, below.side, widths, autoencoders=(Halves(), Halves()))
    explained = ExplainedModel(model, site)
    batch = plan_of(split_of(documents(12, 30))).batch([0, 1, 2], CPU)
    trace = explained.trace(batch.input_ids)
    assert trace.activations[0].shape[-1] == widths[0]
    assert torch.equal(explained.losses(trace, {}), ExplainedModel(model, below).losses(trace, {}))
    rng = np.random.default_rng(0)
    codes = {p: rng.random((48, w)).astype(np.float32) for p, w in enumerate(widths)}
    decoded = {p: np.concatenate([c / 2, 0 * c], 1) for p, c in codes.items()}
    for places in ((0,), (1,), (0, 1)):
        found = explained.losses(trace, {p: codes[p] for p in places}).numpy()
        expected = naive_losses(model, below, batch, {p: decoded[p] for p in places})
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_autoencoders_that_scale_by_what_they_read_are_refused():
    below = site_of(any_model("gpt2"))
    scaled = Halves(SimpleNamespace(normalize_activations="layer_norm"))
    site = Site("latents", below.paths, below.side, (8, 8), autoencoders=(scaled, scaled))
    with pytest.raises(InputError, match="normalize_activations is 'layer_norm'"):
        ExplainedModel(any_model("gpt2"), site)


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_some_neurons_replaced_and_others_true(kind):
    model = any_model(kind)
    site = site_of(model)
    explained = ExplainedModel(model, site)
    batch = plan_of(split_of(documents(12, 30))).batch([0, 1, 2], CPU)
    trace = explained.trace(batch.input_ids)
    codes = {p: np.full((48, w), 0.5, np.float32) for p, w in enumerate(site.n_neurons)}
    masks = {p: torch.arange(w) % 3 == 0 for p, w in enumerate(site.n_neurons)}

    def put(place, activations):
        return torch.where(masks[place], 0.5, activations)

    with torch.no_grad(), hooked(model, site, put):
        logits = model(input_ids=batch.input_ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")  # fmt: skip
    found = explained.losses(trace, codes, masks).flatten()
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


def ids_and_codes(site: Site, n: int = 20):
    """Token ids [1, n] and codes by place that no explanation would predict."""
    rng = np.random.default_rng(0)
    codes = {
        place: rng.exponential(size=(n, width)).astype(np.float32)
        for place, width in enumerate(site.n_neurons)
    }
    return torch.from_numpy(rng.integers(1, 30, (1, n))), codes


@pytest.mark.parametrize("kind", VARIANTS)
def test_log_probabilities_are_those_of_the_losses(kind, monkeypatch):
    model = any_model(kind)
    explained = ExplainedModel(model, site_of(model))
    ids, codes = ids_and_codes(explained.site)
    trace = explained.trace(ids)
    for places in ((), (0,), (1,), (0, 1)):
        chosen = {p: codes[p] for p in places}
        expected = naive_losses(model, explained.site, SimpleNamespace(input_ids=ids), chosen)[0]
        for rows in (256, 7):
            monkeypatch.setattr(
                "cratelm.replace.forward.rows_per_chunk", lambda *_, n=rows, **__: n
            )
            parts = list(explained.log_probabilities(trace, chosen))
            assert [len(p) for p in parts] == ([20] if rows == 256 else [7, 7, 6])
            whole = torch.cat(parts)
            assert whole.exp().sum(-1).numpy() == pytest.approx(1)
            losses = -whole[:-1].gather(1, ids[0, 1:, None])[:, 0]
            assert losses.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        as_tensors = {p: torch.from_numpy(of)[None] for p, of in chosen.items()}
        last = explained.last_log_probabilities(trace, as_tensors)
        assert last.detach().numpy() == pytest.approx(whole[-1:].numpy(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", VARIANTS)
def test_costs_of_neurons_add_up_to_the_cost_of_the_explanations(kind):
    model = any_model(kind)
    explained = ExplainedModel(model, site_of(model))
    ids, codes = ids_and_codes(explained.site)
    target = int(ids[0, -1])
    before, of_before = ids[:, :-1], {p: of[:-1] for p, of in codes.items()}
    cost = token_cost(explained, before, of_before, target, points=24)
    batch = SimpleNamespace(input_ids=ids)
    losses = [naive_losses(model, explained.site, batch, of)[0, -1] for of in ({}, codes)]
    assert [-float(of[target]) for of in (cost.plain, cost.explained)] == pytest.approx(losses, rel=1e-4)  # fmt: skip
    assert cost.cost == pytest.approx(losses[1] - losses[0], abs=1e-4)
    assert abs(cost.cost) > 0.05
    assert sum(of.sum() for of in cost.shares.values()) == pytest.approx(cost.cost, abs=1e-3)
    assert cost.dropped == 0
    decides_alone = kind in ("crate", "decoupled_dictionary")
    assert list(cost.shares) == ([1] if decides_alone else [0, 1])
    if decides_alone:  # of the last layer, only the codes at the last token reach its prediction
        assert not cost.shares[1][:-1].any()
    elif kind == "gpt2":  # attention reads the lower layer at every token
        assert np.abs(cost.shares[0]).sum(1).min() > 0
    assert token_cost(explained, before, of_before).target == int(cost.plain.argmax())


@pytest.mark.parametrize("kind", VARIANTS)
def test_cost_of_one_neuron_is_what_replacing_it_alone_changes(kind):
    """All others are predicted exactly, so that the whole cost is that of this neuron."""
    model = any_model(kind)
    explained = ExplainedModel(model, site_of(model))
    ids, codes = ids_and_codes(explained.site)
    true = {p: of[0].numpy() for p, of in enumerate(explained.trace(ids).activations)}
    batch = SimpleNamespace(input_ids=ids)
    for place, neuron in ((1, 3), (0, 5)):
        predicted = {p: of.copy() for p, of in true.items()}
        predicted[place][:, neuron] += 5 * codes[place][:, neuron]
        without, alone = (naive_losses(model, explained.site, batch, of)[0, -1] for of in (true, predicted))  # fmt: skip
        of_before = {p: of[:-1] for p, of in predicted.items()}
        shares = token_cost(explained, ids[:, :-1], of_before, int(ids[0, -1]), points=32).shares
        if place not in shares:  # nothing of the lower layer gets past the codes of the last one
            assert alone == pytest.approx(without, abs=1e-6)
            continue
        assert abs(alone - without) > 1e-4
        assert shares[place][:, neuron].sum() == pytest.approx(alone - without, abs=2e-4)
        assert np.abs(np.delete(shares[place], neuron, 1)).max() < 1e-5
        if (
            place == 1
        ):  # above the last layer, this is also what one edited neuron costs in the model
            mask = torch.arange(explained.site.n_neurons[1]) == neuron
            mixed = explained.losses(explained.trace(ids), {1: predicted[1]}, {1: mask})[0, -1]
            assert float(mixed) - without == pytest.approx(shares[1].sum(), abs=2e-4)


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_what_autoencoders_drop_is_no_cost_of_explanations(kind):
    model = any_model(kind)
    below = site_of(model)
    widths = tuple(w // 2 for w in below.n_neurons)
    site = Site("latents", below.paths, below.side, widths, autoencoders=(Halves(), Halves()))
    explained = ExplainedModel(model, site)
    ids, codes = ids_and_codes(site)
    cost = token_cost(explained, ids, codes, 7, points=32)
    halves = {
        p: np.concatenate([of[0].numpy() / 2, 0 * of[0].numpy()], 1)
        for p, of in enumerate(explained.trace(ids).activations)
    }
    batch = SimpleNamespace(input_ids=F.pad(ids, (0, 1), value=7))
    pad = {p: np.concatenate([of, of[-1:]]) for p, of in halves.items()}
    whole, reconstructed = (naive_losses(model, below, batch, of)[0, -1] for of in ({}, pad))
    assert cost.dropped == pytest.approx(reconstructed - whole, abs=1e-4)
    assert abs(cost.dropped) > 1e-3
    shares = sum(of.sum() for of in cost.shares.values())
    assert shares + cost.dropped == pytest.approx(cost.cost, abs=1e-3)


def test_single_neurons_need_numbered_blocks():
    """Elsewhere a whole pass would be needed for each neuron: all other figures are measured, the costs are not."""
    model, config = model_of("gpt2"), ReplaceConfig(neuron_tokens=16, quiet=True)
    split = SimpleNamespace(n_sequences=lambda length: 3)
    opened: Any = SimpleNamespace(
        subject=SimpleNamespace(model=model),
        site=site_of(model, "transformer.ln_f"),
        store=SimpleNamespace(split=lambda name: split, eot_id=EOT),
        sequence_length=16,
        beginning=PLAIN,
    )
    assert ExplainedModel(model, opened.site).passes_nothing == [False]
    assert replaced_alone(config, opened, [], Ranks()) is None


def test_layer_sets():
    sets = layer_sets((0, 1, 2), ("all", "one", "up-to"))
    assert {s.label: s.places for s in sets} == {
        "all": (0, 1, 2), "0": (0,), "1": (1,), "0-1": (0, 1), "2": (2,),
    }  # fmt: skip
    assert [s.label for s in layer_sets((4,), ("all", "one", "up-to"))] == ["all"]
    assert [s.label for s in layer_sets((3, 5), ("up-to",))] == ["3", "3-5"]
    assert layer_sets((3, 5), ("one",))[1].places == (1,)


def test_stacked_explanations_explain_what_is_left():
    model, fit, held_out = crate(), split_of(documents(60, 30)), split_of(documents(20, 30, 1))
    site = site_of(model)
    found = measured(model, site, fit, held_out, 2, ("trie:3", "lookup", "trie:3+lookup"))
    stacked = found.explained["trie:3+lookup"][0]
    assert isinstance(stacked, Stacked)
    text = text_of(held_out)
    first, second = (part.predict(text) for part in stacked.parts)
    assert stacked.predict(text) == pytest.approx(first + second)
    assert first == pytest.approx(found.explained["trie:3"][0].predict(text))
    scores = {name: np.nanmean(found.errors[0].explained(name)) for name in found.explained}
    assert scores["trie:3+lookup"] > scores["trie:3"]


# ---- figures --------------------------------------------------------------------------------------


def test_figures_are_paired_by_document():
    rng = np.random.default_rng(0)
    n = rng.integers(50, 500, 30)
    hard = rng.random(30) * 5
    a, b = n * (hard + 1), n * (hard + 1.5)
    documents = DocumentResamples(n, 2000, 0)
    mean, difference = documents.mean(a), documents.figure(lambda x, y: y - x, a, b)
    assert mean.value == pytest.approx(a.sum() / n.sum())
    assert mean.high - mean.low > 0.5
    assert difference.value == pytest.approx(0.5)
    assert difference.high - difference.low < 1e-9
    assert documents.figure(lambda x, y: x / (y - x) * np.nan, a, b) is None
    single = DocumentResamples([5], 10, 0).mean([10.0])
    assert (single.value, single.low) == (2.0, None)
    # nothing to recover in many resamples: a figure without an interval
    sometimes = documents.figure(lambda x: np.where(x > mean.value - 0.1, x, np.nan), a)
    assert sometimes.low is None


def test_curve_ends_where_everything_is_replaced(planted):
    points = ranking(planted.errors, "lookup")
    sizes = [of.sum() for of in points]
    assert sizes == [1, 2, 4, 8, 15, 30, 60]
    explained = "lookup", planted.explained["lookup"]
    partly = best_explained(planted.held_out, explained, points, 0, Ranks())
    whole = planted.losses
    measured_on = partly.n_tokens > 0
    assert measured_on.tolist() == [(i % 2 == 1) for i in range(len(measured_on))]
    everything = partly.sums[Variant("own", "lookup", "60")][measured_on]
    expected = whole.sums[Variant("own", "lookup", "all")][measured_on]
    assert everything == pytest.approx(expected, rel=1e-5)
    # neurons are ranked on the other half of the documents
    scores = planted.errors[0].explained("lookup", [0])
    assert np.flatnonzero(points[0]).item() == np.nanargmax(scores)


def test_budget_is_read_from_the_curve():
    curve = [(0.25, 0.1), (0.5, 0.2), (1.0, 1.2)]
    assert _within(curve, 0.05) == pytest.approx(0.125)
    assert _within(curve, 0.7) == pytest.approx(0.75)
    assert _within(curve, 2) == 1
    assert _within([(0.5, -0.1), (1.0, 0.1)], 0.0) == pytest.approx(0.75)


def test_constant_predictor_and_errors(planted):
    text = text_of(split_of(documents(5, 8)))
    constant = Constant(np.arange(3, dtype=np.float32))
    assert constant.predict(text).shape == (text.n_tokens, 3)
    figures = Figures(planted.losses, 100, 0)
    (unigram, *others) = figures.ngrams()
    assert unigram.depth == 0
    assert others[0].loss.value < unigram.loss.value  # frequent bigrams


# ---- the verb -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = small_run(tmp_path_factory.mktemp("replace") / "run")
    for model in ("crate-2l", "gpt2-2l"):
        cratelm.api.harvest(
            run=run.path, model=model, tokens=3000, top=10, random=10, per_bin=4, device="cpu",
            quiet=True,
        )  # fmt: skip
    return run


OPTIONS: dict[str, Any] = {
    "explainers": ("lookup", "trie", "trie:20", "trie@excerpts", "trie:20+lookup", "concepts", "concepts@excerpts", "lookup+concepts", "concepts+trie:20"),
    "fit_tokens": 4000, "tokens": 2000, "neuron_tokens": 128, "curve_tokens": 1000,
    "batch_tokens": 512, "resamples": 200, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def replaced(run):
    return {
        model: replace(ReplaceConfig(run=run.path, model=model, **OPTIONS))
        for model in ("crate-2l", "gpt2-2l")
    }


@pytest.mark.parametrize("model", ["crate-2l", "gpt2-2l"])
def test_the_verb_writes_what_it_says(run, replaced, model):
    result = replaced[model]
    folder = run.stage("replacement", model).path
    read = read_replacement_summary(folder)
    assert vars(read) == {k: v for k, v in vars(result).items() if k not in ("path", "calls")}
    sets = ["all", "0", "1"]
    assert [(r.explainer, r.layers, r.control) for r in read.rows][:4] == [
        ("lookup", "all", "none"), ("lookup", "all", "shuffled"), ("lookup", "0", "none"),
        ("lookup", "1", "none"),
    ]  # fmt: skip
    content = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name in ("loss_true", "loss_mean", "loss_zero", "loss_replaced", "nats_lost",
                 "recovered_unigram", "recovered_mean"):  # fmt: skip
        assert {"value", "low", "high"} <= content["rows"][0][name].keys()
    rows = read_documents(folder)
    assert {d.layers for d in rows if d.replaced_by == "own"} == set(sets)
    true = [d for d in rows if d.replaced_by == "none"]
    own = [d for d in rows if (d.replaced_by, d.explainer, d.layers) == ("own", "trie", "all")]
    n = sum(d.n_tokens for d in true)
    row = read.row("trie")
    assert n == read.n_tokens
    assert len(true) == read.n_documents > 5
    assert sum(d.loss for d in true) / n == pytest.approx(row.loss_true.value)
    assert sum(d.loss for d in own) / n == pytest.approx(row.loss_replaced.value)
    assert row.nats_lost.value == pytest.approx(row.loss_replaced.value - row.loss_true.value)
    assert row.carried.value == pytest.approx(row.loss_mean.value - row.loss_true.value)
    assert row.given_back.value == pytest.approx(row.loss_mean.value - row.loss_replaced.value)
    assert row.recovered_mean.value == pytest.approx(row.given_back.value / row.carried.value)
    assert read.headline is min(
        (r for r in read.rows if (r.layers, r.control) == ("all", "none")),
        key=lambda r: r.loss_replaced.value,
    )
    assert len(read.ngrams) == 5
    assert read.sizes["trie:20"] <= 20 < read.sizes["lookup"] < read.sizes["trie"]
    head, *_ = str(result).splitlines()
    assert head.startswith(f"{model}: on its explanations ({read.headline.explainer}) a loss of ")
    if model == "crate-2l":  # nothing passes round the codes: the last layer decides
        assert read.passes_nothing == (True, True)
        assert read.row("trie", "1").loss_replaced == row.loss_replaced
    else:
        assert read.passes_nothing == (False, False)
        assert read.row("trie", "1").loss_replaced != row.loss_replaced


def test_neurons_alone_and_the_curve(run, replaced):
    folder, summary = run.stage("replacement", "gpt2-2l").path, replaced["gpt2-2l"]
    neurons = read_neurons(folder)
    n = summary.n_neurons
    assert len(neurons) == len(OPTIONS["explainers"]) * n
    costs = [x for x in neurons if x.cost is not None]
    assert {x.explainer for x in costs} == {summary.alone} == {summary.headline.explainer}
    assert len(costs) == n
    assert {x.cost_tokens for x in costs} == {128}
    points = read_curve(folder)
    assert {p.explainer for p in points} == {summary.headline.explainer}
    assert [p.n_neurons for p in points][-1] == n
    assert points[-1].fraction == 1
    assert points[0].nats_lost.value < points[-1].nats_lost.value
    fractions = [r.fraction for r in summary.runnable]
    assert fractions == sorted(fractions)
    assert len(fractions) == 3


def test_cost_of_one_neuron_is_that_of_a_hook(run, replaced):
    """Its activations alone are replaced on the same text by what the stored explanations predict."""
    from cratelm.activations.open_harvest import open_harvested
    from cratelm.runs.model_options import HarvestedModelOptions
    from cratelm.steer.ablation import HeldOutText

    opened = open_harvested(run, "gpt2-2l", HarvestedModelOptions(device="cpu"))
    summary = replaced["gpt2-2l"]
    folder = run.stage("replacement", "gpt2-2l").path
    neurons = {x.neuron.key: x for x in read_neurons(folder) if x.cost is not None}
    explained = read_simulators(folder, summary.alone, opened.store.token_strings)
    split, model = opened.store.split("held_out"), opened.subject.model
    text = HeldOutText.of(split, opened.sequence_length, 128, 0)
    (tokens, _, positions), = text.batches(text.n_tokens)  # fmt: skip
    document = split.documents_at(positions.ravel()).reshape(positions.shape)
    inputs = tokens[:, :-1]
    of = BatchText(inputs, np.where(inputs == opened.store.eot_id, -1, document))
    for layer, index in ((0, 3), (1, 17)):
        values = torch.from_numpy(explained[layer].predict(of)).view(*inputs.shape, -1)

        def put(place, activations, layer=layer, index=index, values=values):
            if place != layer:
                return None
            changed = activations.clone()
            changed[..., index] = values[..., index]
            return changed

        losses = []
        for hook in (put, lambda place, activations: None):
            with torch.no_grad(), hooked(model, opened.site, hook):
                logits = model(input_ids=torch.from_numpy(inputs)).logits
            targets = torch.from_numpy(tokens[:, 1:])
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
        assert neurons[layer, index].cost.value == pytest.approx(losses[0] - losses[1], abs=2e-6)


def test_stored_explanations_predict_the_same(run, replaced):
    folder = run.stage("replacement", "crate-2l").path
    assert set(replaced["crate-2l"].simulators) == set(OPTIONS["explainers"])
    text = text_of(split_of(documents(20, 40)))
    strings = TokenStore(run.stage("tokens").path).token_strings
    for name in ("concepts", "concepts@excerpts"):
        (first, _) = read_simulators(folder, name, strings)
        predicted = first.predict(text)
        assert predicted.shape == (text.n_tokens, first.means.shape[0])
        assert len(np.unique(predicted[:, 0])) <= 8
    stacked = read_simulators(folder, "trie:20+lookup", [])
    assert [type(of) for of in stacked] == [Stacked, Stacked]
    by_trie = read_simulators(folder, "trie:20", [])
    assert stacked[1].parts[0].predict(text) == pytest.approx(by_trie[1].predict(text))
    with pytest.raises(InputError, match=r"no explanations by 'x': name one of concepts, "):
        read_simulators(folder, "x", [])


def test_a_finished_stage_is_only_read(run, replaced, capsys):
    before = (run.stage("replacement", "crate-2l").path / RECORD).stat().st_mtime_ns
    again = replace(ReplaceConfig(run=run.path, model="crate-2l", **OPTIONS))
    assert vars(again) == vars(replaced["crate-2l"])
    assert (run.stage("replacement", "crate-2l").path / RECORD).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--explainers lookups", "--explainers lookups: it must be lookup, trie or concepts"),
        ("--explainers lookup:0", "--explainers lookup:0: it must be"),
        ("--explainers lookup lookup", "give one or more, each once"),
        ("--layers all all", "give one or more of all, one, up-to, each once"),
        ("--depth 0", "--depth must be at least 1, not 0"),
        ("--model other", "other"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, capsys, options, message):
    status = main(["replace", "--run", str(run.path), "--quiet", *options.split()])
    out, err = capsys.readouterr()
    assert status == 2
    assert not out
    assert message in err
    assert err.count("\n") == 1
    assert not list((run.path / "replacement").glob("*.partial"))


def test_too_many_contexts_are_refused(run, monkeypatch):
    monkeypatch.setattr("cratelm.runs.memory.NEVER_REFUSED", 0)
    monkeypatch.setattr("cratelm.replace.prepared.available_on", lambda _: 1000)
    with pytest.raises(InputError, match=r"lower --(fit-tokens|explainers)"):
        replace(ReplaceConfig(run=run.path, model="crate-2l", **{**OPTIONS, "force": True}))


# ---- in the report --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(run, replaced) -> Any:
    """The part of a run's results that the section reads."""
    models = [
        SimpleNamespace(
            name=name,
            place=place,
            null_of="",
            replacement=read_replacement(run, name),
            replacement_curve=read_replacement_curve(run, name),
            replacement_sets=[],
        )
        for place, name in enumerate(("crate-2l", "gpt2-2l"))
    ]
    other = SimpleNamespace(
        name="x", place=2, null_of="", replacement=None, replacement_curve=[], replacement_sets=[]
    )
    return SimpleNamespace(models=[*models, other])


def test_the_report_has_every_row(reported, replaced):
    table, references, fractions = section.tables(reported)
    assert len(table.rows) == sum(len(of.rows) for of in replaced.values())
    for row in table.rows:
        control = "shuffled" if row[2].endswith(", shuffled") else "none"
        own = replaced[row[0]].row(row[2].removesuffix(", shuffled"), row[1], control)
        assert row[4].value == own.loss_replaced.value
        assert row[5].low == own.nats_lost.low
    assert [row[1] for row in references.rows[:3]] == [
        "unigram model", "bigram model", "n-gram model, 2 tokens of context"
    ]  # fmt: skip
    assert {row[0] for row in fractions.rows} == {"crate-2l", "gpt2-2l"}
    assert "documents" in table.note


def test_the_comparison_begins_with_both_losses(reported, replaced):
    first, second, explainer, carried, given_back = section.comparison_cells(reported.models[0])
    head = replaced["crate-2l"].headline
    assert (first.value, second.value) == (head.loss_true.value, head.loss_replaced.value)
    assert explainer == head.explainer
    assert (carried.value, given_back.value) == (head.carried.value, head.given_back.value)
    assert section.comparison_cells(reported.models[2]) == (None,) * 5


def test_the_figure_is_drawn(reported, tmp_path):
    (figure,) = section.figures(reported)
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["Loss", "Nats lost over neurons replaced"]
    figure.write(tmp_path)
    assert (tmp_path / "replacement.png").stat().st_size > 5000
    assert section.figures(SimpleNamespace(models=[reported.models[2]])) == [None]  # type: ignore[arg-type]
