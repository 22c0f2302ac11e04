"""Scorers from the literature that need a language model but no simulation.

| metric | question | value | chance |
|---|---|---|---|
| detection | does the text contain what the explanation says? | area under the ROC curve | 0.5 |
| fuzzing | are the marked tokens what the explanation says? | area under the ROC curve | 0.5 |
| detection_hard, fuzzing_hard | the same, with hard negatives | area under the ROC curve | 0.5 |
| intruder | which of five texts does not belong (no explanation)? | fraction of trials won | 0.2 |
| embedding | none: similarity of explanation and text | area under the ROC curve | 0.5 |

Detection, fuzzing and embedding follow Paulo et al. 2024 (arXiv 2410.13928), intruder follows Paulo
& Belrose 2025 (arXiv 2507.08473). All use the excerpts of the top-and-random metric
(`cratelm.score.selection`). The top excerpts are active. Inactive are the random excerpts in which the
neuron stays below half of the weakest top excerpt's peak: dense neurons fire in nearly every text, so
with "never above 0" they would have no inactive text. Random excerpts in between are not used.

Hard negatives (`selection.hard_negatives`) carry the same token as a top excerpt, but the neuron is silent
there: an explanation that names the token and not its context is at chance on them. `detection_hard` asks
about the same top excerpts as `detection`, so that the two differ only in their negatives. (The code of
Paulo et al., delphi, finds hard negatives by the similarity of texts instead.)

Prompts depend on activations only through which excerpts are active, which are inactive, and which
tokens are marked. Random draws are seeded by neuron (and excerpt), and so are equal in every process.

Excerpts whose call failed are left out and counted. The score exists if at least half of the excerpts are
left, and at least one of each class: active and inactive, or right and wrong marks (`is_enough`).

A scorer is a dataclass whose methods choose texts and marks (`examples`), write the requests about them
(`prompt`), and turn the answers into a score (`grade`); `answered` and `classes` say which texts a failed
request costs. To add a scorer, add its metric to `cratelm.records` and an instance to `BY_METRIC`.

Shapes: n tokens of an excerpt, P active and Q inactive texts, E width of an embedding.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
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
from cratelm.llm.requests import Answer, Embed, Failure, OptionLogprobs, Outcome, Request, Value
from cratelm.records import Control, Excerpt, Metric, NeuronRecord, Score, Status, levels
from cratelm.score.controls import dead_score
from cratelm.score.selection import LEAST_HARD, hard_negatives, inactive_limit, scored_on
from cratelm.stats.auc import roc_area

MOST_MARKED = 8
"""maximum number of marked tokens in a text: marks on half of the text would not be informative"""
WINDOW = (16, 16)
"""tokens of an intruder text before the peak, and from it on; short, because one prompt has five texts"""


@dataclass(frozen=True, eq=False)
class Task:
    """The requests for one score, and the function that computes the score from their answers."""

    requests: tuple[Request, ...]
    grade: Callable[[Sequence[Outcome]], Score]
    """returns the score for the outcomes, in the order of the requests; it also handles failures"""


def failed(outcomes: Sequence[Outcome]) -> Score | None:
    """Return FAILED, with a count and the first reason, if any of the outcomes is a failure; else None."""
    failures = [o for o in outcomes if isinstance(o, Failure)]
    if not failures:
        return None
    first = failures[0]
    reason = (
        f"{len(failures)} of {len(outcomes)} calls failed, the first: {first.kind}: {first.reason}"
    )
    return Score(None, Status.FAILED, reason)


def is_enough(remaining: Sequence[Hashable], planned: Sequence[Hashable]) -> bool:
    """Return True if the excerpts whose calls were answered are enough for a score.

    Both arguments have the class of each excerpt: its kind if it is simulated, else the right answer. At least
    half of the excerpts must remain, and at least one of each class that was planned: a correlation over top
    excerpts alone, for example, would be another metric than top-and-random.
    """
    return 2 * len(remaining) >= len(planned) and set(remaining) == set(planned)


def too_few(
    outcomes: Sequence[Outcome], remaining: Sequence[Hashable], planned: Sequence[Hashable]
) -> Score | None:
    """Return FAILED as `failed` does, with the number of excerpts lost, if not `is_enough`; else None."""
    score = None if is_enough(remaining, planned) else failed(outcomes)
    return score and replace(score, n_failed=len(planned) - len(remaining))


@dataclass(frozen=True, eq=False)
class Example:
    """A text in a question."""

    excerpt: Excerpt
    positive: bool
    """True if the right answer is yes; for intruder, True if this text does not belong"""
    marked: NDArray[np.intp] | None = None
    """offsets of the marked tokens; None for no marks"""

    def text(self, strings: Sequence[str]) -> str:
        """Return the text as it appears in prompts; `strings` [V] is the text of each token id."""
        return example_text(
            self.excerpt.token_ids, strings, () if self.marked is None else self.marked
        )


Examples = Sequence[Sequence[Example]]
"""texts in groups; the texts of one group may share a request"""


@dataclass(frozen=True, eq=False)
class Prompting:
    """Settings of requests that are the same for all neurons."""

    strings: Sequence[str]
    """[V] text of each token id"""
    supports_logprobs: bool
    """True: `LogprobQuery` is used; False: `JsonQuery`"""
    seed: int
    """seed of the random draws, and of a server's sampling"""


class Scorer(Protocol):
    """A way to score an explanation by questions about texts."""

    @property
    def uses_explanation(self) -> bool:
        """Return True if the score depends on the explanation, False if it depends only on the excerpts."""
        ...

    def examples(self, record: NeuronRecord, control: Control, seed: int) -> Examples | Score:
        """Return the texts of a held-out record, or, if there are none, an undefined or dead score.

        `control` is `none` or `shuffled`; these metrics have no control `constant`.
        """
        ...

    def prompt(
        self, explanation: str, examples: Examples, prompting: Prompting
    ) -> Sequence[Request]:
        """Return the requests about `examples`; for the control `shuffled`, `explanation` is another neuron's."""
        ...

    def answered(self, examples: Examples, answered: Sequence[bool]) -> Examples:
        """Return the texts that can be graded; `answered` says of each request of `prompt` if it was answered."""
        ...

    def classes(self, examples: Examples) -> Sequence[bool]:
        """Return the right answer for each text; for intruder, True for each trial."""
        ...

    def grade(self, examples: Examples, values: Sequence[Value]) -> Score:
        """Return the score; `examples` are those that `answered` returns, `values` the answers, in order."""
        ...


def scorer_task(
    scorer: Scorer, record: NeuronRecord, explanation: str, control: Control, prompting: Prompting
) -> Task | Score:
    """Return the task that scores `record`, or an undefined or dead score if there is nothing to ask.

    Texts whose requests failed are left out of the score and counted in `n_failed`. If those left are not
    enough (`is_enough`), it is FAILED.
    """
    assert control != "constant"
    examples = scorer.examples(record, control, prompting.seed)
    if isinstance(examples, Score):
        return examples
    requests = tuple(scorer.prompt(explanation, examples, prompting))

    def grade(outcomes: Sequence[Outcome]) -> Score:
        remaining = scorer.answered(examples, [isinstance(o, Answer) for o in outcomes])
        classes, planned = scorer.classes(remaining), scorer.classes(examples)
        if failure := too_few(outcomes, classes, planned):
            return failure
        values = [o.value for o in outcomes if isinstance(o, Answer)]
        score = scorer.grade(remaining, values)
        return replace(score, n_failed=len(planned) - len(classes))

    return Task(requests, grade)


@dataclass(frozen=True)
class YesNoScorer:
    """Asks for each text whether it contains, or its marked tokens are, what the explanation says."""

    wording: Wording
    choose: Callable[[NeuronRecord, int], Examples | Score]
    """returns the texts for a record and a seed"""
    uses_explanation: bool = True

    def examples(self, record: NeuronRecord, control: Control, seed: int) -> Examples | Score:
        """Return the texts that `choose` returns, the same for both controls."""
        return self.choose(record, seed)

    def prompt(
        self, explanation: str, examples: Examples, prompting: Prompting
    ) -> Sequence[Request]:
        """Return one `LogprobQuery` per text, or one `JsonQuery` per group."""
        groups = [[e.text(prompting.strings) for e in group] for group in examples]
        if prompting.supports_logprobs:
            return [read_yes_no(self.wording, explanation, t) for texts in groups for t in texts]
        return [fill_yes_no(self.wording, explanation, texts, prompting.seed) for texts in groups]

    def answered(self, examples: Examples, answered: Sequence[bool]) -> Examples:
        """Return the texts whose own request, or whose group's, was answered."""
        if len(answered) == len(examples):  # one request per group
            answered = np.repeat(answered, [len(group) for group in examples]).tolist()
        return _where(examples, answered)

    def classes(self, examples: Examples) -> Sequence[bool]:
        """Return the right answer for each text."""
        return [e.positive for group in examples for e in group]

    def grade(self, examples: Examples, values: Sequence[Value]) -> Score:
        """Return the area under the ROC curve of the answers' leaning to yes, and the balanced accuracy."""
        leaning = np.concatenate([_leaning(value) for value in values])
        positive = np.array(self.classes(examples))
        yes, no = leaning[positive], leaning[~positive]
        accuracy = float((_share_above(yes) + _share_above(-no)) / 2)
        n_tokens = sum(len(e.excerpt) for group in examples for e in group)
        return Score(
            roc_area(yes, no), accuracy=accuracy, n_tokens=n_tokens, n_records=len(positive)
        )


def detection_examples(record: NeuronRecord, seed: int) -> Examples | Score:
    """Return active and inactive texts in one group, in random order.

    They are mixed so that the position in the list does not reveal the answer.
    """
    split = _active_and_inactive(record)
    if isinstance(split, Score):
        return split
    examples = [
        Example(e, active) for side, active in zip(split, (True, False), strict=True) for e in side
    ]
    return [[examples[i] for i in _rng(record, seed).permutation(len(examples))]]


def fuzzing_examples(record: NeuronRecord, seed: int) -> Examples | Score:
    """Return each top excerpt twice, once with right and once with wrong marks, in two groups.

    The right marks are on its strongest tokens (`_strongest`). The wrong marks are on equally many random
    tokens among those at level 0 or 1 of 10, relative to the excerpt's own peak. Paulo et al.'s code can
    put wrong marks in active texts or in inactive ones; here they are in active texts, so that only the
    marks differ. No group contains both versions of an excerpt, since one would reveal the answer to the
    other; each of the two groups has right marks in half of its texts.
    """
    if record.summary.silent:
        return dead_score("held-out")
    versions = []
    for excerpt in _top(record):
        strong = _strongest(excerpt)
        weak = np.flatnonzero(levels(excerpt.activations, float(excerpt.activations.max())) <= 1)
        k = min(len(strong), len(weak))
        if k:
            wrong = _rng(record, seed, excerpt).choice(weak, k, replace=False)
            versions.append((Example(excerpt, True, strong[:k]), Example(excerpt, False, wrong)))
    if not versions:
        return _undefined("no top excerpt with both active and inactive tokens")
    groups: list[list[Example]] = [[], []]
    for turn, i in enumerate(_rng(record, seed).permutation(len(versions))):
        right, wrong = versions[i]
        for group, example in zip(
            groups, (right, wrong) if turn % 2 else (wrong, right), strict=True
        ):
            group.append(example)
    return groups


def hard_detection_examples(record: NeuronRecord, seed: int) -> Examples | Score:
    """Return the top excerpts and the hard negatives in one group, in random order."""
    split = _top_and_hard(record)
    if isinstance(split, Score):
        return split
    top, hard = split
    examples = [*(Example(e, True) for e in top), *(Example(e, False) for e in hard)]
    return [[examples[i] for i in _rng(record, seed).permutation(len(examples))]]


def hard_fuzzing_examples(record: NeuronRecord, seed: int) -> Examples | Score:
    """Return the top excerpts with their peak marked, and the hard negatives with the silent token marked.

    Each text has one mark, so that the number of marks does not reveal the answer. They are in one group, in
    random order.
    """
    split = _top_and_hard(record)
    if isinstance(split, Score):
        return split
    examples = [
        Example(e, positive, np.array([e.peak]))
        for side, positive in zip(split, (True, False), strict=True)
        for e in side
    ]
    return [[examples[i] for i in _rng(record, seed).permutation(len(examples))]]


@dataclass(frozen=True)
class IntruderScorer:
    """Asks which of five texts does not belong, which tests whether the active texts have enough in common.

    Each of five trials has four top excerpts and an inactive one, the intruder. The intruder takes each of
    the five positions once, so that a model that always names the same position wins exactly one trial.
    Each trial omits a different top excerpt; if there are fewer inactive excerpts than trials, they are
    reused in turn. The strongest tokens are marked; in the intruder, random tokens are marked, as many as
    in the other texts on average. The value is the fraction of trials in which the intruder is the most
    likely answer; a tie of m answers counts 1 / m.

    Control `shuffled`: the five random excerpts with random marks, each treated as the intruder once, so
    that there is no right answer to find.
    """

    uses_explanation: bool = False

    def examples(self, record: NeuronRecord, control: Control, seed: int) -> Examples | Score:
        """Return the five texts of each trial, in the order of the prompt."""
        trials = _null_trials(record) if control == "shuffled" else _trials(record)
        if isinstance(trials, Score):
            return trials
        rng = _rng(record, seed)
        positions = rng.permutation(len(PLACES))  # of the intruder, one per trial
        groups = []
        for position, (others, odd) in zip(positions, trials, strict=True):
            texts = _intruder_texts(others, odd, rng, at_random=control == "shuffled")
            texts.insert(position, texts.pop())
            groups.append(texts)
        return groups

    def prompt(
        self, explanation: str, examples: Examples, prompting: Prompting
    ) -> Sequence[Request]:
        """Return one request per trial."""
        trials = [[e.text(prompting.strings) for e in group] for group in examples]
        if prompting.supports_logprobs:
            return [read_intruder(texts) for texts in trials]
        return [fill_intruder(texts, prompting.seed) for texts in trials]

    def answered(self, examples: Examples, answered: Sequence[bool]) -> Examples:
        """Return the trials that were answered."""
        return list(compress(examples, answered))

    def classes(self, examples: Examples) -> Sequence[bool]:
        """Return True for each trial: they are of one class."""
        return [True] * len(examples)

    def grade(self, examples: Examples, values: Sequence[Value]) -> Score:
        """Return the fraction of trials won."""
        positions = [[e.positive for e in group].index(True) for group in examples]
        won = [_won(value, at) for value, at in zip(values, positions, strict=True)]
        n_tokens = sum(len(e.excerpt) for group in examples for e in group)
        return Score(float(np.mean(won)), n_tokens=n_tokens, n_records=len(examples))


@dataclass(frozen=True)
class EmbeddingScorer:
    """Tests whether the explanation's embedding is closer (cosine) to active texts than to inactive ones."""

    uses_explanation: bool = True

    def examples(self, record: NeuronRecord, control: Control, seed: int) -> Examples | Score:
        """Return two groups: active texts, then inactive ones."""
        split = _active_and_inactive(record)
        if isinstance(split, Score):
            return split
        active, inactive = split
        return [[Example(e, True) for e in active], [Example(e, False) for e in inactive]]

    def prompt(
        self, explanation: str, examples: Examples, prompting: Prompting
    ) -> Sequence[Request]:
        """Return requests for the embeddings of the explanation and of each text."""
        texts = [e.text(prompting.strings) for group in examples for e in group]
        return [Embed(one_line(explanation)), *map(Embed, texts)]

    def answered(self, examples: Examples, answered: Sequence[bool]) -> Examples:
        """Return the texts that have an embedding; none if the explanation has none."""
        return _where(examples, [answered[0] and of_text for of_text in answered[1:]])

    def classes(self, examples: Examples) -> Sequence[bool]:
        """Return whether each text is active."""
        return [e.positive for group in examples for e in group]

    def grade(self, examples: Examples, values: Sequence[Value]) -> Score:
        """Return the area under the ROC curve of the cosines, active versus inactive texts."""
        widths = {len(value) for value in values if isinstance(value, np.ndarray)}
        if len(widths) > 1:
            reason = f"the server's embeddings have {min(widths)} to {max(widths)} numbers"
            return Score(None, Status.FAILED, reason)
        vectors = np.array(values, dtype=np.float64)  # [1 + P + Q, E]
        norms = np.linalg.norm(vectors, axis=1)
        if not (np.isfinite(norms).all() and norms.min() > 0):
            return _undefined("an embedding is zero or not finite")
        unit = vectors / norms[:, None]
        near = unit[1:] @ unit[0]  # [P + Q]
        n_active = len(examples[0])
        n_tokens = sum(len(e.excerpt) for group in examples for e in group)
        value = roc_area(near[:n_active], near[n_active:])
        return Score(value, n_tokens=n_tokens, n_records=len(near))


BY_METRIC: dict[Metric, Scorer] = {
    "detection": YesNoScorer(DETECTION, detection_examples),
    "detection_hard": YesNoScorer(DETECTION, hard_detection_examples),
    "fuzzing": YesNoScorer(FUZZING, fuzzing_examples),
    "fuzzing_hard": YesNoScorer(FUZZING, hard_fuzzing_examples),
    "intruder": IntruderScorer(),
    "embedding": EmbeddingScorer(),
}


def example_text(
    token_ids: Sequence[int] | NDArray[np.integer],
    strings: Sequence[str],
    marked: Collection[int] | NDArray[np.integer] = (),
) -> str:
    """Return tokens as one line of text, runs of the tokens at the offsets `marked` inside guillemets.

    `strings` [V] is the text of each token id. Line breaks and other non-printing characters are escaped,
    so that a text cannot be mistaken for another field of a prompt.
    """
    ids = np.asarray(token_ids)
    mask = np.zeros(len(ids), dtype=bool)
    mask[np.asarray(list(marked), dtype=np.intp)] = True
    return excerpt_text(ids, strings, mask)


# --- choice of excerpts ----------------------------------------------------------------------------


def _top(record: NeuronRecord) -> tuple[Excerpt, ...]:
    return tuple(e for e in scored_on(record, "top_and_random") if e.kind == "top")


def _active_and_inactive(
    record: NeuronRecord,
) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]] | Score:
    """Return the top excerpts, and the random ones below half of the weakest top peak.

    If there are none of either, the undefined or dead score is returned.
    """
    if record.summary.silent:
        return dead_score("held-out")
    top = _top(record)
    if not top:
        return _undefined("the neuron has no top excerpt to score on")
    random = scored_on(record, "random_only")
    limit = inactive_limit(top)
    inactive = tuple(e for e in random if float(e.activations.max()) < limit)
    if not inactive:
        return _undefined(
            f"no inactive excerpt: in each of the {len(random)} random excerpts the neuron reaches half"
            " of the weakest top excerpt's peak"
        )
    return top, inactive


def _top_and_hard(
    record: NeuronRecord,
) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]] | Score:
    """Return the top excerpts and the hard negatives; the undefined or dead score if there are too few."""
    if record.summary.silent:
        return dead_score("held-out")
    top, hard = _top(record), hard_negatives(record)
    if not top:
        return _undefined("the neuron has no top excerpt to score on")
    if len(hard) < LEAST_HARD:
        return _undefined(f"{len(hard)} hard negatives, but {LEAST_HARD} are needed")
    return top, hard


def _strongest(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the offsets of tokens at half of the excerpt's maximum or above, strongest first.

    At most `MOST_MARKED` of them.
    """
    a = excerpt.activations
    order = np.argsort(-a, kind="stable")
    return order[(a[order] >= a.max() / 2) & (a[order] > 0)][:MOST_MARKED]


_Trial = tuple[Sequence[Excerpt], Excerpt]
"""four excerpts, and the intruder"""


def _trials(record: NeuronRecord) -> list[_Trial] | Score:
    split = _active_and_inactive(record)
    if isinstance(split, Score):
        return split
    top, inactive = split
    n = len(PLACES)
    if len(top) < n - 1:
        return _undefined(f"{len(top)} top excerpts, but {n - 1} are needed")
    # of five top excerpts, each is omitted once; of four, none is
    others = [[e for i, e in enumerate(top) if len(top) < n or i != t] for t in range(n)]
    return [(others[t], inactive[t % len(inactive)]) for t in range(n)]


def _null_trials(record: NeuronRecord) -> list[_Trial] | Score:
    if record.summary.silent:
        return dead_score("held-out")
    random, n = scored_on(record, "random_only"), len(PLACES)
    if len(random) < n:
        return _undefined(f"{len(random)} random excerpts, but {n} are needed")
    return [([e for i, e in enumerate(random) if i != t], random[t]) for t in range(n)]


def _intruder_texts(
    others: Sequence[Excerpt], odd: Excerpt, rng: np.random.Generator, at_random: bool
) -> list[Example]:
    """Return five texts around the peaks: the four others in random order, then the intruder."""
    short = [others[i].narrowed(*WINDOW) for i in rng.permutation(len(others))]
    odd = odd.narrowed(*WINDOW)
    marks: list[NDArray[np.intp]] = [_strongest(e) for e in short]
    k = max(1, round(np.mean([len(m) for m in marks])))
    if at_random:
        marks = [rng.permutation(len(e))[:k] for e in short]
    examples = [Example(e, False, m) for e, m in zip(short, marks, strict=True)]
    return [*examples, Example(odd, True, rng.permutation(len(odd))[:k])]


# --- from answers to scores ------------------------------------------------------------------------


def _where(examples: Examples, mask: Sequence[bool]) -> Examples:
    """Return the texts at which `mask` is True, in the same groups; it has one value per text."""
    flags = iter(mask)
    return [[e for e in group if next(flags)] for group in examples]


def _leaning(value: Value) -> NDArray[np.float64]:
    """Return how much each answer leans to yes, above 0 for yes: the log-odds, or 1/2 or -1/2 for JSON."""
    if isinstance(value, OptionLogprobs):
        no, yes = value.log_probs[0].astype(np.float64)
        return np.array([yes - no])
    assert isinstance(value, tuple)
    return np.array(value) - 0.5


def _won(value: Value, position: int) -> float:
    """Return 1 if `position` (from 0) is the only most likely answer, 1 / m if it is one of m, else 0."""
    if isinstance(value, OptionLogprobs):
        row = value.log_probs[0]
        likeliest = np.flatnonzero(row == row.max())
        return float(position in likeliest) / len(likeliest)
    assert isinstance(value, tuple)
    return float(value[0] == position + 1)


def _share_above(leaning: NDArray[np.float64]) -> float:
    """Return the fraction of values above 0; values at 0 count half."""
    return float(np.mean((leaning > 0) + 0.5 * (leaning == 0)))


def _rng(record: NeuronRecord, seed: int, excerpt: Excerpt | None = None) -> np.random.Generator:
    neuron = record.neuron
    of_excerpt = [] if excerpt is None else [excerpt.position]
    return np.random.default_rng([seed, neuron.layer, neuron.index, *of_excerpt])


def _undefined(reason: str) -> Score:
    return Score(None, Status.UNDEFINED, reason)
