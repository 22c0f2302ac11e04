"""The field's scorers that need a language model and no simulation, each as a `Task`.

| metric | asked | value | chance |
|---|---|---|---|
| detection | does the text contain what the explanation says? | area under the ROC curve | 0.5 |
| fuzzing | are the marked tokens what the explanation says? | area under the ROC curve | 0.5 |
| intruder | which of five texts does not belong (no explanation)? | share of trials won | 0.2 |
| embedding | nothing: similarity of explanation and text | area under the ROC curve | 0.5 |

Detection, fuzzing and embedding are after Paulo et al. 2024 (arXiv 2410.13928), intruder after Paulo
& Belrose 2025 (arXiv 2507.08473). All use the excerpts of the top-and-random metric
(`cratelm.score.selection`). Active are the top excerpts. Inactive are the random ones in which the
neuron stays below half of the weakest top excerpt's peak: dense neurons fire in nearly every text, so
"never above 0" would leave them without any. Random excerpts between are left out: they are neither.

What a model is shown depends on activations only through which excerpts are active, which are
inactive, and which tokens are marked. Draws are seeded by neuron (and excerpt): equal in every process.

Shapes: n tokens of an excerpt, P active and Q inactive texts, E width of an embedding.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.llm.prompts.excerpts import excerpt_text
from cratelm.llm.prompts.scorers import (
    DETECTION,
    FUZZING,
    PLACES,
    Wording,
    fill_intruder,
    fill_yes_no,
    one_line,
    read_intruder,
    read_yes_no,
)
from cratelm.llm.requests import Answer, Embed, OptionLogprobs, Outcome, Request
from cratelm.records import Control, Excerpt, Metric, NeuronRecord, Score, Status, levels
from cratelm.score.selection import scored_on
from cratelm.score.tasks import Task, failed
from cratelm.stats.auc import roc_area

MOST_MARKED = 8
"""tokens marked in a text: marks on half of it would point at nothing"""
WINDOW = (16, 16)
"""tokens of an intruder text before the peak, and from it: five texts stand in one prompt"""


class ScorerTask(Protocol):
    """From a held-out record to what is asked, or to a score that needs no asking."""

    def __call__(
        self,
        record: NeuronRecord,
        explanation: str,
        control: Control,
        *,
        strings: Sequence[str],
        supports_logprobs: bool,
        seed: int,
    ) -> Task | Score:
        """`explanation`: the text scored, the donor's for the control `shuffled` (`constant` does not
        exist here); intruder ignores it. `strings` [V]: the display string of each token id.
        `reads`: the backend answers `Read`, else `Fill` is used. A `Score` where there is nothing to
        ask: DEAD, or UNDEFINED with the reason."""
        ...


def detection(
    record: NeuronRecord,
    explanation: str,
    control: Control,
    *,
    strings: Sequence[str],
    supports_logprobs: bool,
    seed: int,
) -> Task | Score:
    """Does the explanation tell texts in which the neuron is active from those in which it is not?

    One `Read` per text, or one `Fill` over all of them in a drawn order.
    """
    assert control != "constant"
    split = _active_and_inactive(record)
    if isinstance(split, Score):
        return split
    items = [
        (shown(e.token_ids, strings), active) for e, active in _drawn_order(record, split, seed)
    ]
    n_tokens = sum(len(e) for side in split for e in side)
    return _yes_no_task(DETECTION, explanation, [items], n_tokens, supports_logprobs, seed)


def fuzzing(
    record: NeuronRecord,
    explanation: str,
    control: Control,
    *,
    strings: Sequence[str],
    supports_logprobs: bool,
    seed: int,
) -> Task | Score:
    """Does the explanation tell the tokens that activate the neuron from others of the same text?

    Each top excerpt is shown twice: with its strongest tokens marked (`_strongest`), and with as
    many marked at random among those at level 0 or 1 of 10 of the excerpt's own peak. Drawing the
    wrong marks in active texts is one of the two ways of Paulo et al.'s code, the other being marks
    in inactive ones; this one leaves nothing but the marks to judge by. Where `Fill` is used no
    request holds both versions of an excerpt: two requests, half right each.
    """
    assert control != "constant"
    if record.summary.dead:
        return _dead()
    marked = []
    for excerpt in _top(record):
        strong = _strongest(excerpt)
        weak = np.flatnonzero(levels(excerpt.activations, float(excerpt.activations.max())) <= 1)
        k = min(len(strong), len(weak))
        if k:
            wrong = _rng(record, seed, excerpt).choice(weak, k, replace=False)
            marked.append((excerpt, strong[:k], wrong))
    if not marked:
        return _undefined("no top excerpt with both active and inactive tokens")
    order = _rng(record, seed).permutation(len(marked))
    halves: list[list[tuple[str, bool]]] = [[], []]
    for turn, place in enumerate(order):
        excerpt, right, wrong = marked[place]
        for half, marks in enumerate((right, wrong) if turn % 2 else (wrong, right)):
            halves[half].append((shown(excerpt.token_ids, strings, marks), marks is right))
    n_tokens = 2 * sum(len(excerpt) for excerpt, _, _ in marked)
    return _yes_no_task(FUZZING, explanation, halves, n_tokens, supports_logprobs, seed)


def intruder(
    record: NeuronRecord,
    explanation: str,
    control: Control,
    *,
    strings: Sequence[str],
    supports_logprobs: bool,
    seed: int,
) -> Task | Score:
    """Do the neuron's active texts have enough in common to find one that is not of them?

    Five trials: four top excerpts and an inactive one, which takes each of the five places once, so
    that a model that always names the same place wins exactly one trial. Which top excerpt is left
    out changes from trial to trial; where there are fewer inactive excerpts than trials they take
    turns. The strongest tokens are marked, in the intruder as many random ones as in the others on
    average. The value is the share of trials in which the intruder was the likeliest; where several
    are equally likely the trial is shared among them.

    Control `shuffled`: the five random excerpts, random tokens marked in all, each called the
    intruder once: nothing to find.
    """
    assert control != "constant"
    trials = _null_trials(record) if control == "shuffled" else _trials(record)
    if isinstance(trials, Score):
        return trials
    rng = _rng(record, seed)
    places = rng.permutation(len(PLACES))  # of the intruder, one per trial
    requests: list[Request] = []
    for place, (others, odd) in zip(places, trials, strict=True):
        texts = _intruder_texts(others, odd, strings, rng, at_random=control == "shuffled")
        texts.insert(place, texts.pop())
        requests.append(read_intruder(texts) if supports_logprobs else fill_intruder(texts, seed))
    n_tokens = sum(len(e.narrowed(*WINDOW)) for others, odd in trials for e in (*others, odd))

    def grade(outcomes: Sequence[Outcome]) -> Score:
        won = [_won(_answer(o), place) for o, place in zip(outcomes, places, strict=True)]
        return Score(float(np.mean(won)), n_tokens=n_tokens, n_records=len(requests))

    return _graded(requests, grade)


def embedding(
    record: NeuronRecord,
    explanation: str,
    control: Control,
    *,
    strings: Sequence[str],
    supports_logprobs: bool,
    seed: int,
) -> Task | Score:
    """Is the explanation closer (cosine of embeddings) to active texts than to inactive ones?"""
    assert control != "constant"
    split = _active_and_inactive(record)
    if isinstance(split, Score):
        return split
    excerpts = [e for side in split for e in side]
    texts = [shown(e.token_ids, strings) for e in excerpts]
    n_tokens = sum(map(len, excerpts))

    def grade(outcomes: Sequence[Outcome]) -> Score:
        vectors = np.array([_answer(o) for o in outcomes], dtype=np.float64)  # [1 + P + Q, E]
        norms = np.linalg.norm(vectors, axis=1)
        if not (np.isfinite(norms).all() and norms.min() > 0):
            return _undefined("an embedding is zero or not finite")
        unit = vectors / norms[:, None]
        near = unit[1:] @ unit[0]
        value = roc_area(near[: len(split[0])], near[len(split[0]) :])
        return Score(value, n_tokens=n_tokens, n_records=len(texts))

    return _graded([Embed(one_line(explanation)), *map(Embed, texts)], grade)


TASKS: dict[Metric, ScorerTask] = {
    "detection": detection,
    "fuzzing": fuzzing,
    "intruder": intruder,
    "embedding": embedding,
}


def shown(
    token_ids: Sequence[int] | NDArray[np.integer],
    strings: Sequence[str],
    marked: Collection[int] | NDArray[np.integer] = (),
) -> str:
    """Tokens as one line of text, runs of the tokens at the offsets `marked` inside guillemets.

    Line ends and other characters that do not print are escaped, so a text cannot pass for another
    field of a prompt.
    """
    ids = np.asarray(token_ids)
    mask = np.zeros(len(ids), dtype=bool)
    mask[np.asarray(list(marked), dtype=np.intp)] = True
    return excerpt_text(ids, strings, mask)


# --- which excerpts --------------------------------------------------------------------------------


def _top(record: NeuronRecord) -> tuple[Excerpt, ...]:
    return tuple(e for e in scored_on(record, "top_and_random") if e.kind == "top")


def _active_and_inactive(
    record: NeuronRecord,
) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]] | Score:
    """Top excerpts, and random ones below half of the weakest one's peak; a score where either is none."""
    if record.summary.dead:
        return _dead()
    top = _top(record)
    if not top:
        return _undefined("the neuron has too few top excerpts: none to score on")
    random = scored_on(record, "random_only")
    limit = min(float(e.activations.max()) for e in top) / 2
    quiet = tuple(e for e in random if float(e.activations.max()) < limit)
    if not quiet:
        return _undefined(
            f"no inactive excerpt: in each of the {len(random)} random ones the neuron reaches half"
            " of the weakest top excerpt's peak"
        )
    return top, quiet


def _drawn_order(
    record: NeuronRecord, split: tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]], seed: int
) -> list[tuple[Excerpt, bool]]:
    """Active and inactive excerpts mixed: in a list of texts the place must not tell."""
    items = [(e, active) for side, active in zip(split, (True, False), strict=True) for e in side]
    return [items[i] for i in _rng(record, seed).permutation(len(items))]


def _strongest(excerpt: Excerpt) -> NDArray[np.intp]:
    """Offsets of the tokens at half the excerpt's maximum or above, the strongest first, `MOST_MARKED` at most."""
    a = excerpt.activations
    order = np.argsort(-a, kind="stable")
    return order[(a[order] >= a.max() / 2) & (a[order] > 0)][:MOST_MARKED]


_Trial = tuple[Sequence[Excerpt], Excerpt]
"""four excerpts, and the intruder"""


def _trials(record: NeuronRecord) -> list[_Trial] | Score:
    split = _active_and_inactive(record)
    if isinstance(split, Score):
        return split
    top, quiet = split
    n = len(PLACES)
    if len(top) < n - 1:
        return _undefined(f"{len(top)} top excerpts, {n - 1} were needed")
    # of five top excerpts each is left out once; of four, none is
    others = [[e for i, e in enumerate(top) if len(top) < n or i != t] for t in range(n)]
    return [(others[t], quiet[t % len(quiet)]) for t in range(n)]


def _null_trials(record: NeuronRecord) -> list[_Trial] | Score:
    if record.summary.dead:
        return _dead()
    random, n = scored_on(record, "random_only"), len(PLACES)
    if len(random) < n:
        return _undefined(f"{len(random)} random excerpts, {n} were needed")
    return [([e for i, e in enumerate(random) if i != t], random[t]) for t in range(n)]


def _intruder_texts(
    others: Sequence[Excerpt],
    odd: Excerpt,
    strings: Sequence[str],
    rng: np.random.Generator,
    at_random: bool,
) -> list[str]:
    """[5] texts around the peaks: the four in drawn order, then the intruder's."""
    short = [others[i].narrowed(*WINDOW) for i in rng.permutation(len(others))]
    odd = odd.narrowed(*WINDOW)
    marks: list[NDArray[np.intp]] = [_strongest(e) for e in short]
    k = max(1, round(np.mean([len(m) for m in marks])))
    if at_random:
        marks = [rng.permutation(len(e))[:k] for e in short]
    marks.append(rng.permutation(len(odd))[:k])
    return [shown(e.token_ids, strings, m) for e, m in zip([*short, odd], marks, strict=True)]


# --- from answers to scores ------------------------------------------------------------------------


def _yes_no_task(
    wording: Wording,
    explanation: str,
    groups: Sequence[Sequence[tuple[str, bool]]],
    n_tokens: int,
    supports_logprobs: bool,
    seed: int,
) -> Task:
    """`groups`: (text, whether yes is right) of each request, where a request takes several."""
    items = [item for group in groups for item in group]
    right = np.array([yes for _, yes in items])
    requests: list[Request]
    if supports_logprobs:
        requests = [read_yes_no(wording, explanation, text) for text, _ in items]
    else:
        requests = [
            fill_yes_no(wording, explanation, [text for text, _ in group], seed) for group in groups
        ]

    def grade(outcomes: Sequence[Outcome]) -> Score:
        leaning = np.concatenate([_leaning(_answer(o)) for o in outcomes])
        yes, no = leaning[right], leaning[~right]
        return Score(
            roc_area(yes, no),
            accuracy=float((_share_above(yes) + _share_above(-no)) / 2),
            n_tokens=n_tokens,
            n_records=len(items),
        )

    return _graded(requests, grade)


def _graded(requests: Sequence[Request], grade: Callable[[Sequence[Outcome]], Score]) -> Task:
    """The task whose answers `grade` scores; no score is made of some of them: any failure is FAILED."""
    return Task(tuple(requests), lambda outcomes: failed(outcomes) or grade(outcomes))


def _answer(outcome: Outcome) -> object:
    assert isinstance(outcome, Answer)
    return outcome.value


def _leaning(value: object) -> NDArray[np.float64]:
    """How much each answer leans to yes, above 0 for yes: log-odds of a reading, +-1/2 of a 0 or 1."""
    if isinstance(value, OptionLogprobs):
        no, yes = value.log_probs[0].astype(np.float64)
        return np.array([yes - no])
    assert isinstance(value, tuple)
    return np.array(value) - 0.5


def _won(value: object, place: int) -> float:
    """1 where `place` (from 0) is the likeliest alone, 1 / m where it is one of m, else 0."""
    if isinstance(value, OptionLogprobs):
        row = value.log_probs[0]
        likeliest = np.flatnonzero(row == row.max())
        return float(place in likeliest) / len(likeliest)
    assert isinstance(value, tuple)
    return float(value[0] == place + 1)


def _share_above(leaning: NDArray[np.float64]) -> float:
    """Share above 0, half of those at 0."""
    return float(np.mean((leaning > 0) + 0.5 * (leaning == 0)))


def _rng(record: NeuronRecord, seed: int, excerpt: Excerpt | None = None) -> np.random.Generator:
    neuron = record.neuron
    of_excerpt = [] if excerpt is None else [excerpt.position]
    return np.random.default_rng([seed, neuron.layer, neuron.index, *of_excerpt])


def _dead() -> Score:
    return Score(None, Status.DEAD, "never above 0 on the held-out split")


def _undefined(reason: str) -> Score:
    return Score(None, Status.UNDEFINED, reason)
