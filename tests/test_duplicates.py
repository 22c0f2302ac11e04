"""Near-duplicates: what was copied is found, what was not is not, and dropping it is what it says.

T tokens of a document.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.corpus.documents import Document
from cratelm.records import Control, Excerpt, NeuronId, NeuronScore, Score, Split
from cratelm.score import duplicates
from cratelm.score.duplicates import (
    GRID,
    PASSAGE,
    THRESHOLD,
    NearDuplicates,
    min_hashes,
    shingles_of,
)
from cratelm.score.metrics import Sample
from cratelm.tokens.shards import StoreWriter, TokenStore

VOCABULARY = 2000
T = 200


def words(seed: int, n: int = T) -> list[int]:
    return np.random.default_rng([3, seed]).integers(0, VOCABULARY, n).tolist()


def store_of(folder: Path, fit: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]):
    """Shards of these documents; fit ones have the first ordinals."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)} | {"<|endoftext|>": VOCABULARY}
    writer = StoreWriter(folder, Tokenizer(WordLevel(vocabulary, "w0")), VOCABULARY)
    splits: dict[Split, Sequence[Sequence[int]]] = {"fit": fit, "held_out": held_out}
    for split, documents in splits.items():
        for ids in documents:
            writer.append(split, ids, Document("", "made up", "", 0, ""))
    writer.close()
    return TokenStore(folder)


def excerpt(store: TokenStore, split: Split, document: int, at: int, n: int = 8) -> Excerpt:
    """`n` tokens from `at` on, chosen for the first of them, of the `document`-th document of a split."""
    source = store.split(split)
    start = int(source.starts[document]) + at
    ids = source.read(start, min(start + n, int(source.starts[document + 1]))).astype(np.int32)
    ordinal = int(source.ordinals[document])
    return Excerpt("top", 0, -1, ids, ids.astype(np.float32), 0, ordinal, start)


def everything(store: TokenStore, split: Split) -> list[Excerpt]:
    """An excerpt at every fourth token of a split."""
    lengths = np.diff(store.split(split).starts)
    return [
        excerpt(store, split, d, at) for d, length in enumerate(lengths) for at in range(0, length, 4)
    ]  # fmt: skip


def audited(store: TokenStore) -> NearDuplicates:
    """All of the fit split was explained from."""
    found = NearDuplicates(store)
    found.register(everything(store, "fit"))
    return found


def shifted(ids: list[int], by: int) -> list[int]:
    return words(999, by) + ids


def one_in_ten_changed(ids: list[int], seed: int) -> list[int]:
    changed = list(ids)
    for place in range(seed % 10, len(ids), 10):
        changed[place] = (ids[place] + 1) % VOCABULARY
    return changed


@pytest.mark.parametrize("by", [0, 1, 3, GRID // 2, GRID - 1, GRID, 5 * GRID + 7])
def test_a_copy_at_any_offset_is_found(tmp_path, by):
    originals = [words(seed) for seed in range(12)]
    store = store_of(tmp_path, originals, [shifted(ids, by) for ids in originals])
    found = audited(store)
    for document in range(12):
        for at in range(by + PASSAGE // 2, by + T - PASSAGE // 2, 5):
            assert found.is_duplicate(excerpt(store, "held_out", document, at))


def test_an_edited_copy_is_found(tmp_path):
    """One token in ten changed. Proposals are drawn, so one passage in 20 may be missed."""
    originals = [words(seed) for seed in range(40)]
    copies = [one_in_ten_changed(ids, seed) for seed, ids in enumerate(originals)]
    store = store_of(tmp_path, originals, copies)
    found = audited(store)
    verdicts = [found.is_duplicate(e) for e in everything(store, "held_out")]
    assert np.mean(verdicts) > 0.95


def test_a_header_is_found_and_what_follows_it_is_not(tmp_path):
    licence = words(1, 90)
    store = store_of(tmp_path, [licence + words(2)], [licence + words(3)])
    found = audited(store)
    assert [found.is_duplicate(excerpt(store, "held_out", 0, at)) for at in (0, 8, 50)] == [
        True
    ] * 3
    assert not any(found.is_duplicate(excerpt(store, "held_out", 0, at)) for at in range(140, 290))


def test_unrelated_documents_are_not_found(tmp_path):
    """Nor do their neighbours count: the documents beside them are the same, the passages end with them."""
    same = words(0)
    fit = [d for seed in range(1, 20) for d in (words(seed, 30), same)]
    held_out = [d for seed in range(21, 40) for d in (words(seed, 30), same)]
    store = store_of(tmp_path, fit, held_out)
    found = NearDuplicates(store)
    found.register(excerpt(store, "fit", d, at) for d in range(0, 38, 2) for at in (0, 15, 29))
    assert not any(
        found.is_duplicate(excerpt(store, "held_out", d, at))
        for d in range(0, 38, 2)
        for at in (0, 15, 29)
    )
    assert found.audit([]).n_near_duplicates == 0
    assert found.audit([]).examples == ()


def test_only_what_was_explained_from_counts(tmp_path):
    """A copied document of which another part was shown, or which only its tokens out of context are from."""
    original = words(0, 600)
    store = store_of(tmp_path, [original], [original])
    found = NearDuplicates(store)
    shown = excerpt(store, "fit", 0, 100)
    alone = excerpt(store, "fit", 0, 500, 3)
    out_of_context = replace(alone, kind="out_of_context")
    found.register([shown, out_of_context])
    assert found.audit([]).n_passages_explained == 3  # its own and the two that share half of it
    verdicts = {
        at: found.is_duplicate(excerpt(store, "held_out", 0, at)) for at in range(0, 600, 4)
    }
    assert verdicts[100]
    assert all(verdicts[at] for at in range(70, 130) if at in verdicts)  # shares half the passage
    assert not any(hit for at, hit in verdicts.items() if at > 100 + 2 * PASSAGE)


def test_each_passage_is_hashed_once(tmp_path, monkeypatch):
    """Work and memory are bounded by the split, however many excerpts were shown."""
    store = store_of(tmp_path, [words(s, 639) for s in range(4)], [words(9)])
    read = []
    count = duplicates.shingles_of

    def counted(tokens, lengths):
        read.extend(lengths.tolist())
        return count(tokens, lengths)

    monkeypatch.setattr(duplicates, "shingles_of", counted)
    found = NearDuplicates(store)
    for _ in range(5):
        found.register(everything(store, "fit"))
    n_tokens = store.split("fit").n_tokens
    assert len(read) == found.audit([]).n_passages_explained <= n_tokens / GRID
    for e in everything(store, "held_out") * 5:
        found.is_duplicate(e)
    assert len(read) <= (n_tokens + store.split("held_out").n_tokens) / GRID
    assert max(read) == PASSAGE
    assert min(read) >= PASSAGE - GRID // 2


def test_the_same_whatever_the_order(tmp_path):
    originals = [words(seed) for seed in range(10)]
    copies = [one_in_ten_changed(ids, seed) for seed, ids in enumerate(originals)]
    store = store_of(tmp_path, originals, copies)
    asked = everything(store, "held_out")
    first, second, backwards = audited(store), audited(store), NearDuplicates(store)
    backwards.register(everything(store, "fit")[::-1])
    verdicts = [[found.is_duplicate(e) for e in asked] for found in (first, second, backwards)]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert first.audit([]) == second.audit([])


def test_hashes_are_those_of_datasketch():
    tokens = np.random.default_rng(0).integers(0, 50, (20, PASSAGE))
    lengths = np.arange(20) * 3 + 7
    lengths[:4] = 1, 4, 5, 6
    shingles = shingles_of(tokens, lengths)
    for row, length, own, hashes in zip(
        tokens.tolist(), lengths.tolist(), shingles, min_hashes(shingles), strict=True
    ):
        runs = {tuple(row[at : at + 5][:length]) for at in range(max(1, length - 4))}
        assert len(np.unique(own)) == len(runs)
        reference = MinHash(64, seed=1, hashfunc=int)
        reference.update_batch(own.tolist())
        assert hashes.tolist() == reference.hashvalues.tolist()


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Of the runs of five tokens, counted plainly."""
    one, other = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(one & other) / len(one | other)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(5, 150), min_size=1, max_size=4),
    st.integers(0, 60),
    st.floats(0, 0.3),
    st.integers(0, 9),
)
def test_verdicts_are_those_of_plain_counting(tmp_path_factory, lengths, shift, changed, seed):
    """Below the threshold nothing is called a duplicate; well above it, everything."""
    draw = np.random.default_rng(seed)
    fit = [words(seed + i, n) for i, n in enumerate(lengths)]
    held_out = []
    for ids in fit:
        edits = draw.uniform(size=len(ids)) < changed
        new = draw.integers(0, VOCABULARY, len(ids))
        held_out.append(shifted(np.where(edits, new, ids).tolist(), shift))
    store = store_of(tmp_path_factory.mktemp("shards"), fit, held_out)
    found = audited(store)

    def passages(split: Split) -> dict[int, list[int]]:
        source = store.split(split)
        known = found._explained if split == "fit" else found._scored
        ends = source.starts[np.searchsorted(source.starts, list(known), side="right")]
        return {
            start: source.read(start, min(int(end), start + PASSAGE)).tolist()
            for start, end in zip(known, ends, strict=True)
        }

    for e in everything(store, "held_out"):
        found.is_duplicate(e)
    explained = passages("fit").values()
    for start, tokens in passages("held_out").items():
        nearest = max(jaccard(tokens, other) for other in explained)
        if nearest < THRESHOLD:
            assert not found._scored[start]
        if nearest > 0.55:
            assert found._scored[start]


def test_examples_name_the_documents(tmp_path):
    copied = words(5)
    store = store_of(tmp_path, [words(1), copied], [words(2), words(3), copied])
    found = audited(store)
    for e in everything(store, "held_out"):
        found.is_duplicate(e)
    audit = found.audit([])
    assert [(x.fit_document, x.held_out_document, x.similarity) for x in audit.examples] == [
        (1, 4, 1)
    ]
    assert audit.threshold == THRESHOLD
    assert 0 < audit.n_near_duplicates < audit.n_passages_scored


def test_dropping_them_changes_the_score_as_counted_by_hand(tmp_path):
    copied = words(0)
    store = store_of(tmp_path, [copied], [copied, words(1), words(2)])
    found = audited(store)
    draw = np.random.default_rng(0)
    asked = [excerpt(store, "held_out", d, at) for d in range(3) for at in (40, 100)]
    simulated = [e.activations + draw.normal(0, 500, len(e)) for e in asked]
    score = Sample(asked, found.are_duplicates).score(simulated)
    both = [(asked, simulated), (asked[2:], simulated[2:])]
    with_all, without = (
        np.corrcoef(np.concatenate([e.activations for e in true]), np.concatenate(guess))[0, 1]
        for true, guess in both
    )
    assert score.value == pytest.approx(with_all)
    assert score.without_duplicates == pytest.approx(without)
    assert abs(with_all - without) > 0.01
    assert (score.n_duplicates, score.n_records) == (2, 6)
    clean = Sample(asked[2:], found.are_duplicates).score(simulated[2:])
    assert (clean.n_duplicates, clean.without_duplicates) == (0, None)


def test_the_effect_is_over_the_neurons_it_concerns(tmp_path):
    def scored(index: int, control: Control = "none", explainer="trie", **score) -> NeuronScore:
        neuron = NeuronId("m", "ista", 0, index)
        return NeuronScore(neuron, explainer, "anthropic", control, Score(**score))

    found = audited(store_of(tmp_path, [words(0)], [words(1)]))
    audit = found.audit(
        [
            scored(0, value=0.5, n_duplicates=2, without_duplicates=0.4),
            scored(1, value=0.3, n_duplicates=1, without_duplicates=0.4),
            scored(2, value=0.9),
            scored(3, value=0.7, n_duplicates=9, without_duplicates=None),
            scored(0, control="shuffled", value=0.1, n_duplicates=2, without_duplicates=0.9),
            scored(0, explainer="lookup", value=0.9),
        ]
    )
    trie, lookup = audit.effects
    assert (trie.explainer, trie.metric, trie.n_neurons, trie.n_records) == (
        "trie",
        "anthropic",
        3,
        12,
    )
    assert (trie.mean_with, trie.mean_without) == pytest.approx((40, 40))
    assert (lookup.n_neurons, lookup.mean_with, lookup.mean_without) == (0, None, None)
