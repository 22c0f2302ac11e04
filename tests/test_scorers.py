"""The field's scorers: known answers, null answers, what is shown, leakage, and what has no value.

An answerer stands for the model: a function from the text asked about to how much it leans to yes.
"""

import dataclasses
from collections.abc import Callable
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import STRINGS, corpus, harvested, on_pair

from cratelm.llm.requests import (
    Answer,
    Embed,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
    Outcome,
    Request,
)
from cratelm.records import CHANCE, HARD_METRICS, Control, Excerpt, NeuronRecord, Score, Status
from cratelm.score.scorers import (
    BY_METRIC,
    MOST_MARKED,
    Prompting,
    Task,
    example_text,
    is_enough,
    scorer_task,
)
from cratelm.score.selection import hard_negatives, scored_on
from cratelm.stats.auc import roc_area

TOKENS, _ = corpus("held_out")
YES_NO = ("detection", "fuzzing")
ASKED = ("detection", "fuzzing", "intruder")
Answerer = Callable[[str], float]


def record(index: int = 0) -> NeuronRecord:
    """Active on ` import` after a line's end, which few random texts have."""
    return harvested(on_pair(TOKENS, 1, 2), "held_out", index)


def changed(found: NeuronRecord, change: Callable[[Excerpt], Excerpt]) -> NeuronRecord:
    return dataclasses.replace(found, excerpts=tuple(map(change, found.excerpts)))


def task(
    metric,
    found: NeuronRecord,
    control: Control = "none",
    supports_logprobs=True,
    strings=STRINGS,
    seed=0,
    text="w5",
):
    made = scorer_task(
        BY_METRIC[metric], found, text, control, Prompting(strings, supports_logprobs, seed)
    )
    assert isinstance(made, Task)
    return made


def judged(request: Request) -> list[str]:
    """The texts that a request asks about."""
    if isinstance(request, LogprobQuery):
        lines = request.body.splitlines()
        return [line.partition(": ")[2] for line in lines if line[:2] in ("Te", *NUMBERED)]
    assert isinstance(request, JsonQuery)
    lines = request.messages[1][1].splitlines()
    return [line.partition(": ")[2] for line in lines if line.partition(":")[0].isdigit()]


NUMBERED = tuple(f"{n}:" for n in range(1, 6))


def answers(asked: Task, leaning: Answerer) -> list[Outcome]:
    """What a model would answer that leans to yes (intruder: to each text) by `leaning`."""
    outcomes: list[Outcome] = []
    for request in asked.requests:
        leans = np.array([leaning(text) for text in judged(request)])
        if isinstance(request, JsonQuery):
            several = request.high > 1
            values = (int(leans.argmax()) + 1,) if several else tuple(int(x > 0) for x in leans)
            assert len(values) == request.n
            outcomes.append(Answer(values, 1, 1))
            continue
        assert isinstance(request, LogprobQuery)
        row = leans if len(request.options) > 2 else np.array([0.0, leans[0]])
        row = row - np.logaddexp.reduce(row)
        outcomes.append(Answer(OptionLogprobs(row[None].astype(np.float32)), 1, 0))
    return outcomes


def graded(
    metric, leaning: Answerer, control: Control = "none", supports_logprobs=True, found=None
) -> Score:
    made = task(metric, record() if found is None else found, control, supports_logprobs)
    return made.grade(answers(made, leaning))


def has_wanted(text: str) -> float:
    """Leans to texts in which the neuron's tokens stand, and are marked where any is."""
    return 4.0 if ("\\n« import" in text if "«" in text else "\\n import" in text) else -4.0


def test_embeddings_of_different_lengths_are_a_failure():
    made = task("embedding", record())
    vectors = [Answer(np.ones(3 + (i == 2), np.float32), 1, 0) for i in range(len(made.requests))]
    score = made.grade(vectors)
    assert score.status == Status.FAILED
    assert score.reason == "the server's embeddings have 3 to 4 numbers"


# --- known answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("supports_logprobs", [True, False])
@pytest.mark.parametrize("metric", YES_NO)
def test_perfect_reversed_and_constant_answers(metric, supports_logprobs):
    perfect = graded(metric, has_wanted, supports_logprobs=supports_logprobs)
    assert (perfect.value, perfect.accuracy, perfect.status) == (1.0, 1.0, Status.DEFINED)
    opposite = graded(metric, lambda t: -has_wanted(t), supports_logprobs=supports_logprobs)
    assert (opposite.value, opposite.accuracy) == (0.0, 0.0)
    for always in (3.0, 0.0, -3.0):
        constant = graded(metric, lambda _, a=always: a, supports_logprobs=supports_logprobs)
        assert (constant.value, constant.accuracy) == (0.5, 0.5)
        assert constant.status == Status.DEFINED


def test_biased_answers_still_rank():
    """All above even odds, but the right ones more: the area is 1, the accuracy of the likelier answer 0.5."""
    score = graded("detection", lambda t: 6 + has_wanted(t))
    assert (score.value, score.accuracy) == (1.0, 0.5)


@pytest.mark.parametrize("metric", YES_NO)
def test_hard_answers_are_worth_their_balanced_accuracy(metric):
    score = graded(metric, lambda t: len(t) % 2 - 0.5, supports_logprobs=False)
    assert score.value == pytest.approx(score.accuracy)


@pytest.mark.parametrize("supports_logprobs", [True, False])
def test_intruder_found_missed_and_places(supports_logprobs):
    assert (
        graded("intruder", lambda t: -has_wanted(t), supports_logprobs=supports_logprobs).value
        == 1.0
    )
    assert graded("intruder", has_wanted, supports_logprobs=False).value == 0.0
    made = task("intruder", record(), supports_logprobs=supports_logprobs)
    assert len(made.requests) == 5
    for place in range(5):  # a model that always names one place wins one trial of five
        row = np.full((1, 5), -9, np.float32)
        row[0, place] = 0
        value = OptionLogprobs(row) if supports_logprobs else (place + 1,)
        assert made.grade([Answer(value, 1, 1)] * 5).value == pytest.approx(0.2)


def test_intruder_ties_are_shared():
    assert graded("intruder", lambda _: 0.0).value == pytest.approx(0.2)
    assert graded("intruder", has_wanted).value == 0.0  # four tie, the intruder is not among them


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_intruder_texts(control):
    """Four texts and another, all with marks; the null has only random ones."""
    found = record()
    made = task("intruder", found, control)
    kind = {"none": "top", "shuffled": "random"}[control]
    own = {e.kind: [] for e in found.excerpts}
    for e in scored_on(found, "top_and_random"):
        own[e.kind].append(example_text(e.narrowed(16, 16).token_ids, STRINGS))
    for request in made.requests:
        texts = [t.replace("«", "").replace("»", "") for t in judged(request)]
        assert sum(t in own[kind] for t in texts) == (4 if kind == "top" else 5)
        assert all("«" in t for t in judged(request))
    if control == "none":  # each top excerpt is left out of one trial
        plain = [[t.replace("«", "").replace("»", "") for t in judged(r)] for r in made.requests]
        for text in own["top"]:
            assert sum(text not in texts for texts in plain) == own["top"].count(text) == 1


def test_null_of_intruder_is_chance_whatever_the_texts():
    """An answerer that always prefers the same text, or any other rule over texts, wins a fifth."""

    def plain(text: str) -> float:
        return float(crc32(text.replace("«", "").replace("»", "").encode()))

    assert graded("intruder", plain, "shuffled").value == pytest.approx(0.2)


@pytest.mark.parametrize("metric", ASKED)
def test_random_answers_are_worth_chance(metric):
    rng = np.random.default_rng(1)
    values = []
    for index in range(200):
        value = graded(metric, lambda _: rng.normal(), found=record(index)).value
        assert value is not None
        values.append(value)
    assert np.mean(values) == pytest.approx(CHANCE[metric], abs=3 * np.std(values) / 200**0.5)
    assert np.std(values) > 0.05


def test_embedding():
    made = task("embedding", record(), text="about\n \\n import")
    first, *others = made.requests
    about = "about \\n import"
    assert first == Embed(about)
    assert all(isinstance(r, Embed) for r in others)

    def grade(of_text: Callable[[str], list[float]]) -> Score:
        vectors = [np.array(of_text(r.text), np.float32) for r in made.requests]  # type: ignore[union-attr]
        return made.grade([Answer(v, 1, 0) for v in vectors])

    near = lambda t: [1.0, 0.1] if has_wanted(t) > 0 else [-1.0, 3.0]  # noqa: E731
    assert grade(near).value == 1.0
    # direction counts, not length: the product with the explanation's vector is larger for the others
    assert grade(lambda t: [0.1, 0.01] if has_wanted(t) > 0 else [5.0, 5.0]).value == 1.0
    assert grade(lambda t: [1.0, 0.0]).value == 0.5
    assert grade(lambda t: [1.0, 0.0] if t == about else near(t)[::-1]).value == 0.0
    score = grade(lambda t: [0.0, 0.0] if t == about else [1.0, 0.0])
    assert (score.value, score.status) == (None, Status.UNDEFINED)
    assert "zero or not finite" in score.reason


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_area_is_the_share_of_pairs_won(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert roc_area(positive, negative) == pytest.approx(np.mean(pairs))


def test_area_of_infinite_odds():
    assert roc_area([np.inf, 0.0], [-np.inf, 0.0]) == 0.875


# --- which texts -----------------------------------------------------------------------------------


def test_inactive_are_below_half_of_the_weakest_peak():
    """One random text at 0.49 of the weakest top peak counts, one at 0.5 does not."""
    found = record()
    weakest = 10.0  # of the top ranks 1, 3, 5, 7 and 9

    def with_peaks(e: Excerpt) -> Excerpt:
        if e.kind != "random":
            return dataclasses.replace(e, activations=np.full(len(e), 100 - 10.0 * e.rank))
        share = {0: 0.49, 1: 0.5}.get(e.rank, 0.9)
        flat = np.full(len(e), share * weakest)
        return dataclasses.replace(e, activations=flat)

    made = task("detection", changed(found, with_peaks))
    assert len(made.requests) == 5 + 1
    random = [e for e in found.excerpts if e.kind == "random" and e.rank == 0]
    texts = [judged(r)[0] for r in made.requests]
    assert example_text(random[0].token_ids, STRINGS) in texts


def test_fuzzing_marks_the_strongest_and_as_many_of_the_weak():
    found = record()
    made = task("fuzzing", found)
    for e in scored_on(found, "top_and_random")[:5]:
        plain = example_text(e.token_ids, STRINGS)
        versions = [
            t
            for r in made.requests
            for t in judged(r)
            if t.replace("«", "").replace("»", "") == plain
        ]
        right = example_text(
            e.token_ids, STRINGS, np.flatnonzero(e.activations >= e.activations.max() / 2)
        )
        assert right in versions
        assert len(versions) == 2
        (wrong,) = [v for v in versions if v != right]
        assert has_wanted(wrong) < 0
        assert wrong.count("«") <= right.count("«")


def test_fuzzing_marks_at_most_some():
    def first_twenty(e: Excerpt) -> Excerpt:
        return dataclasses.replace(e, activations=(np.arange(len(e)) < 20).astype(np.float32))

    found = changed(record(), first_twenty)
    for request in task("fuzzing", found).requests:
        inside = "".join(part.partition("»")[0] for part in judged(request)[0].split("«")[1:])
        n_marked = len(inside.replace("\\n", " x").replace("\\t", " ").split())
        assert n_marked == MOST_MARKED


def test_fuzzing_marks_as_many_right_as_wrong():
    """Six strong tokens and two weak ones, the rest between: two marked in each version."""
    levels = np.array([8, 9, 10, 8, 9, 10, 0, 0])

    def mostly_between(e: Excerpt) -> Excerpt:
        values = np.full(len(e), 3.0)
        values[: min(8, len(e))] = levels[: len(e)]
        return dataclasses.replace(e, activations=values)

    for request in task("fuzzing", changed(record(), mostly_between)).requests:
        (text,) = judged(request)
        inside = "".join(part.partition("»")[0] for part in text.split("«")[1:])
        assert len(inside.replace("\\n", " x").replace("\\t", " ").split()) == 2


def test_no_fill_of_fuzzing_holds_both_versions():
    requests = task("fuzzing", record(), supports_logprobs=False).requests
    assert len(requests) == 2
    for request in requests:
        plain = [t.replace("«", "").replace("»", "") for t in judged(request)]
        assert len(set(plain)) == len(plain) == 5
        assert sum(has_wanted(t) > 0 for t in judged(request)) in (2, 3)


def test_place_in_a_fill_does_not_tell():
    """Over neurons the first text of a list is active about as often as any other."""
    first = []
    for index in range(60):
        (request,) = task("detection", record(index), supports_logprobs=False).requests
        first.append(has_wanted(judged(request)[0]) > 0)
    assert 0.3 < np.mean(first) < 0.8


# --- hard negatives ----------------------------------------------------------------------------------


def with_rare_token() -> NeuronRecord:
    """The neuron on ` import` after a line's end; the first random texts lack ` import`, as most texts lack a word."""
    found = record()
    random = sorted(found.of_kind("random"), key=lambda e: (2 in e.token_ids, e.rank))
    ranked = [dataclasses.replace(e, rank=rank) for rank, e in enumerate(random)]
    others = [e for e in found.excerpts if e.kind != "random"]
    return dataclasses.replace(found, excerpts=tuple(others + ranked))


def names_token(text: str) -> float:
    """An answerer that knows the token and not its context: yes where ` import` stands, or is marked."""
    return 4.0 if ("« import»" if "«" in text else " import") in text else -4.0


@pytest.mark.parametrize("supports_logprobs", [True, False])
@pytest.mark.parametrize("metric", HARD_METRICS)
def test_who_knows_the_token_alone_is_at_chance_on_hard_negatives(metric, supports_logprobs):
    found, hard = with_rare_token(), HARD_METRICS[metric]
    token_alone, in_context = (
        [
            graded(m, of, supports_logprobs=supports_logprobs, found=found).value
            for m in (metric, hard)
        ]
        for of in (names_token, has_wanted)
    )
    assert token_alone == [1.0, 0.5]
    assert in_context == [1.0, 1.0]


def test_hard_negatives_carry_the_token_in_silence():
    found = with_rare_token()
    hard = hard_negatives(found)
    assert len(hard) == 5
    for e in hard:
        (before, at), value = e.token_ids[e.peak - 1 : e.peak + 1], e.activations[e.peak]
        assert (at, value, e.activations.max()) == (2, 0, 0)
        assert before != 1
        assert e.peak >= 16
        assert len(e) > 32
        assert TOKENS[e.position] == 2
    assert all(e.document % 2 == 1 for e in hard)
    made = task("detection_hard", found)
    top = {r for r in made.requests if has_wanted(judged(r)[0]) > 0}
    assert len(top) == 5
    assert top < set(task("detection", found).requests)  # asked once for both metrics
    assert all(judged(r)[0].count("«") == 1 for r in task("fuzzing_hard", found).requests)


@pytest.mark.parametrize("share", [0.09, 0.11, 0.6])
def test_silent_is_below_a_tenth_and_inactive_below_half(share):
    """At a tenth of the maximum the token is not silent; a text that reaches half of a peak is not inactive."""
    found = with_rare_token()

    def raised(e: Excerpt) -> Excerpt:
        where = np.arange(len(e)) == 0 if share > 0.5 else e.token_ids == 2
        return dataclasses.replace(e, activations=np.maximum(e.activations, share * where))

    assert len(hard_negatives(changed(found, raised))) == (5 if share < 0.1 else 0)


def test_two_hard_negatives_are_too_few():
    found = with_rare_token()
    ranks = {e.rank for e in hard_negatives(found)[:2]}
    few = [e for e in found.excerpts if e.kind != "random" or e.rank in ranks]
    score = unasked("detection_hard", dataclasses.replace(found, excerpts=tuple(few)))
    assert score.status == Status.UNDEFINED
    assert score.reason == "2 hard negatives, but 3 are needed"


# --- what a model is shown -------------------------------------------------------------------------

pieces = st.text(max_size=5) | st.sampled_from(
    ["\n", "\t", "\r\n", '"', "<<", ">>", "«", "»", "\\x", "\\xf0\\x9f", "🙂", "\u2028", "\x85", "\x00",
     "Fits:\n1", "Description:", " 0"]
)  # fmt: skip


@given(
    strings=st.lists(pieces, min_size=50, max_size=50),
    metric=st.sampled_from(ASKED),
    text=st.text(max_size=30),
)
def test_slots_stand_on_the_answer(strings, metric, text):
    made = task(metric, record(), strings=strings, text=text)
    for request in made.requests:
        assert isinstance(request, LogprobQuery)
        (slot,), (offset,) = request.slots, request.offsets
        assert request.body[slot:] == request.options[0]
        assert request.text[offset:] == request.options[0]
        assert request.text[:offset].endswith(":\n")
        assert len(request.body.splitlines()) == {"intruder": 7}.get(metric, 3)
        assert len(request.context.splitlines()) == {"intruder": 0}.get(metric, 1)
        assert all(len(o) == 1 for o in request.options)


@given(st.lists(st.tuples(pieces, st.booleans()), max_size=20))
def test_shown_is_one_line_and_marks_runs(tokens):
    strings = [s for s, _ in tokens]
    marks = [i for i, (_, marked) in enumerate(tokens) if marked]
    text = example_text(range(len(tokens)), strings, marks)
    assert len(text.splitlines()) <= 1
    runs = sum(1 for i in marks if i - 1 not in marks)
    own = sum(s.count("«") for s in strings)
    assert text.count("«") == runs + own
    assert example_text(range(len(tokens)), strings) == text if not marks else True


def test_shown_known():
    strings = ["a", "\n", "\t", " b", "\\xf0"]
    assert example_text([0, 1, 2, 3, 4, 0], strings, [0, 3, 4]) == "«a»\\n\\t« b\\xf0»a"


# --- leakage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("supports_logprobs", [True, False])
@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_activations_show_in_no_request(metric, supports_logprobs):
    """Activations changed without a change of what is chosen and marked: the requests stay the same."""
    found = record()

    def scaled(e: Excerpt) -> Excerpt:
        return dataclasses.replace(e, activations=e.activations * np.float32(1234.5))

    before = task(metric, found, supports_logprobs=supports_logprobs).requests
    assert (
        task(metric, changed(found, scaled), supports_logprobs=supports_logprobs).requests == before
    )
    assert not any(
        str(a)[:5] in repr(before) for e in found.excerpts for a in e.activations if a > 0
    )


@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_explanation_is_shown_as_given_and_not_for_intruder(metric):
    one, other = (
        task(metric, record(), text=text).requests for text in ("of sailing", "of\nDescription: 1")
    )
    if metric == "intruder":
        assert one == other
    else:
        assert any("of sailing" in repr(r) for r in one)
        assert "of Description: 1" in repr(other)


@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_same_draws_each_time_and_others_for_another_seed(metric):
    one = task(metric, record(), supports_logprobs=False)
    assert one.requests == task(metric, record(), supports_logprobs=False).requests
    if metric != "embedding":
        other = task(metric, record(), supports_logprobs=False, seed=1).requests
        assert {r.seed for r in other if isinstance(r, JsonQuery)} == {1}
        unseeded = [dataclasses.replace(r, seed=0) for r in other if isinstance(r, JsonQuery)]
        assert list(one.requests) != unseeded


# --- without a value -------------------------------------------------------------------------------


GONE = Failure(FailureKind.DEADLINE, "no answer within 60 s")


def by_hash(text: str) -> float:
    return crc32(text.encode()) % 1000 / 100 - 5


@pytest.mark.parametrize("metric", ["detection", "detection_hard", "fuzzing", "fuzzing_hard"])
def test_a_failed_call_loses_its_text_alone(metric):
    made = task(metric, record())
    texts = [judged(request)[0] for request in made.requests]
    outcomes = answers(made, by_hash)
    for lost in ({2}, {0, 3, 7}):
        score = made.grade([GONE if i in lost else o for i, o in enumerate(outcomes)])
        kept = [text for i, text in enumerate(texts) if i not in lost]
        yes, no = ([by_hash(t) for t in kept if (has_wanted(t) > 0) == y] for y in (True, False))
        assert score.value == pytest.approx(roc_area(yes, no))
        assert (score.status, score.n_failed) == (Status.DEFINED, len(lost))
        assert score.n_records == len(kept) == len(texts) - len(lost)
    assert score.value != pytest.approx(made.grade(outcomes).value)
    assert made.grade(outcomes).n_failed == 0


def test_a_failed_call_loses_its_trial_or_embedding():
    made = task("intruder", record())
    won = answers(made, lambda t: -has_wanted(t))
    lost = answers(made, has_wanted)
    score = made.grade([GONE, lost[1], won[2], GONE, won[4]])
    assert score.value == pytest.approx(2 / 3)
    assert (score.n_records, score.n_failed) == (3, 2)
    made = task("embedding", record(), text="about")
    near = [Answer(np.array([1.0, has_wanted(r.text)], np.float32), 1, 0) for r in made.requests]  # type: ignore[union-attr]
    near[0] = Answer(np.array([0.0, 1.0], np.float32), 1, 0)
    score = made.grade([near[0], GONE, *near[2:]])
    assert (score.value, score.n_failed, score.n_records) == (1.0, 1, len(near) - 2)
    score = made.grade([GONE, *near[1:]])  # nothing is close to an explanation without an embedding
    assert (score.status, score.n_failed) == (Status.FAILED, len(near) - 1)


def test_a_failed_list_loses_its_texts():
    """Of the two lists of fuzzing one is enough; of detection there is only one."""
    made = task("fuzzing", record(), supports_logprobs=False)
    score = made.grade([GONE, answers(made, has_wanted)[1]])
    assert (score.value, score.n_records, score.n_failed) == (1.0, 5, 5)
    made = task("detection", record(), supports_logprobs=False)
    assert made.grade([GONE]).status == Status.FAILED


@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_too_few_answers_are_no_score(metric):
    made = task(metric, record())
    outcomes: list[Outcome] = [GONE] * len(made.requests)
    if metric != "embedding":
        answered = len(made.requests) // 2 - (len(made.requests) % 2 == 0)  # below half
        outcomes[:answered] = answers(made, has_wanted)[:answered]
    score = made.grade(outcomes)
    assert (score.value, score.accuracy, score.status) == (None, None, Status.FAILED)
    assert "no answer within 60 s" in score.reason
    assert score.n_failed > score.n_records == 0


def test_both_classes_must_be_left():
    """Seven of ten texts, but no inactive one; half of the texts of both kinds are enough."""
    made = task("detection", record())
    outcomes = answers(made, has_wanted)
    active = [has_wanted(judged(r)[0]) > 0 for r in made.requests]
    score = made.grade([o if a else GONE for o, a in zip(outcomes, active, strict=True)])
    assert 2 * sum(active) >= len(active)
    assert (score.status, score.n_failed) == (Status.FAILED, len(active) - sum(active))
    assert is_enough([True, False], [True, False, True, False])
    assert not is_enough([True, False], [True, False, True, False, False])


def unasked(metric, found: NeuronRecord, control: Control = "none") -> Score:
    score = scorer_task(BY_METRIC[metric], found, "w5", control, Prompting(STRINGS, True, 0))
    assert isinstance(score, Score)
    assert score.value is None
    return score


@pytest.mark.parametrize("control", ["none", "shuffled"])
@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_dead(metric, control):
    found = harvested(np.zeros(len(TOKENS)), "held_out")
    score = unasked(metric, found, control)
    assert (score.status, score.reason) == (Status.DEAD, "never above 0 on the held-out split")


@pytest.mark.parametrize("metric", ["detection", "intruder", "embedding"])
def test_dense_neuron_has_no_inactive_text(metric):
    dense = np.random.default_rng(0).uniform(0.9, 1, len(TOKENS))
    score = unasked(metric, harvested(dense, "held_out"))
    assert score.status == Status.UNDEFINED
    assert "in each of the 5 random excerpts" in score.reason


def test_fuzzing_without_inactive_tokens():
    dense = np.random.default_rng(0).uniform(0.9, 1, len(TOKENS))
    score = unasked("fuzzing", harvested(dense, "held_out"))
    assert score.status == Status.UNDEFINED
    assert "both active and inactive tokens" in score.reason


@pytest.mark.parametrize("metric", sorted(BY_METRIC))
def test_too_few_top_excerpts(metric):
    """Active in one document alone: its excerpt has rank 0, which explanations come from."""
    values = np.zeros(len(TOKENS))
    values[77] = 1
    score = unasked(metric, harvested(values, "held_out"))
    assert score.status == Status.UNDEFINED
    assert "top excerpt" in score.reason


def test_intruder_needs_four_top_and_its_null_five_random():
    few = dataclasses.replace(
        record(), excerpts=tuple(e for e in record().excerpts if e.rank not in (1, 3))
    )
    assert "3 top excerpts, but 4 are needed" in unasked("intruder", few).reason
    assert "random excerpts, but 5 are needed" in unasked("intruder", few, "shuffled").reason


def test_counts():
    found = record()
    score = graded("detection", has_wanted, found=found)
    assert score.n_records == len(task("detection", found).requests)
    assert graded("fuzzing", has_wanted, found=found).n_records == 10
    assert graded("intruder", has_wanted, found=found).n_records == 5
    tops = scored_on(found, "top_and_random")[:5]
    assert graded("fuzzing", has_wanted, found=found).n_tokens == 2 * sum(map(len, tops))
