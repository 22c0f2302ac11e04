"""Prompts that explain a neuron from excerpts, and that simulate it from an explanation.

The wording is ours; the protocol is that of Bills et al. (2023) as used by Bai & Ma (2025): the explainer
reads excerpts with levels 0..10, the simulator reads one line `token<TAB>level` per token, and all levels
of an excerpt are read from one pass. `VERSION` is stored with every explanation and changes with any word
here.

Levels: integers 0..top, where top is 10, or 9 if the model splits "10" in two (`cratelm.llm.probe`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cratelm.llm.prompts.excerpts import excerpt_text
from cratelm.llm.requests import Chat, JsonQuery, LogprobQuery, Role
from cratelm.records import Excerpt, levels
from cratelm.text.display import printable

VERSION = "1"
UNKNOWN = "unknown"
"""placeholder at each position whose level is requested"""
MOST_LISTED = 10
"""tokens listed with their strength after the excerpts"""

EXPLAIN_SYSTEM = (
    "A neuron of a language model reacts to some tokens of a text. You see excerpts in which the tokens"
    " it reacts to stand between « and », and then the strongest tokens with their strength from 1 to"
    " 10. You say in a few words what the tokens have in common."
)
_QUESTION = "In a few words, what does the neuron react to?"
_EXPLAIN_EXAMPLES = (
    (
        "1. We drove to« Lyon» and, a week later, on to« Turin».\n"
        "2. the trains between« Kyoto» and Osaka stop here\n"
        "Strongest: « Lyon» 10, « Turin» 9, « Kyoto» 8",
        "names of cities",
    ),
    (
        "1. if (count« >=» limit) return;\n"
        "2. while x« <» 3 and y« !=» 0:\n"
        "Strongest: « >=» 10, « <» 8, « !=» 8",
        "comparison operators in program code",
    ),
    (
        "1. the« unhappy» man looked up\n"
        "2. an« unlikely» story,« undone» in a day\n"
        "Strongest: « unhappy» 10, « undone» 7, « unlikely» 6",
        "words that begin with un-",
    ),
)

SIMULATE_EXAMPLES: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    (
        "names of cities",
        (
            ("We", 0), (" drove", 0), (" to", 0.1), (" Lyon", 1), (" and", 0), (" then", 0),
            (" on", 0), (" to", 0.1), (" Tur", 0.7), ("in", 0.9), (".", 0),
        ),
    ),
    (
        "comparison operators in program code",
        (
            ("if", 0), (" (", 0), ("count", 0), (" >=", 1), (" limit", 0), (")", 0), ("\\n", 0),
            (" x", 0), (" =", 0.2), (" x", 0), (" <", 0.8), (" 3", 0),
        ),
    ),
)  # fmt: skip
"""explanation, then tokens with their activation as a fraction of the largest"""


def explain_request(
    excerpts: Sequence[Excerpt],
    contrast: Sequence[Excerpt],
    strings: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Chat:
    """Return the request for an explanation of `excerpts`.

    `contrast` are excerpts without a reaction, possibly none; `strings` [V] is the text of each token id.
    Levels are relative to the largest activation in `excerpts` (Bills et al. 2023).
    """
    maximum = max((float(e.activations.max()) for e in excerpts if len(e)), default=0.0)
    level = [levels(e.activations, maximum) for e in excerpts]  # [n] each
    lines = [
        f"{number}. {excerpt_text(e.token_ids, strings, _marked(n))}"
        for number, (e, n) in enumerate(zip(excerpts, level, strict=True), 1)
    ]
    if contrast:
        lines.append("No reaction in:")
        lines += [f"- {excerpt_text(e.token_ids, strings)}" for e in contrast]
    lines.append(f"Strongest: {_strongest(excerpts, level, strings)}")
    messages: list[tuple[Role, str]] = []
    messages.append(("system", EXPLAIN_SYSTEM))
    for example, answer in _EXPLAIN_EXAMPLES:
        messages.append(("user", f"{example}\n\n{_QUESTION}"))
        messages.append(("assistant", answer))
    messages.append(("user", "\n".join(lines) + f"\n\n{_QUESTION}"))
    return Chat(tuple(messages), max_tokens, temperature, seed, stop="\n")


def simulate_preamble(top: int) -> str:
    """Return instructions and examples for levels 0..`top`, the same for all neurons."""
    head = (
        f"A neuron of a language model reacts to each token with a strength from 0 to {top}; most"
        f" strengths are 0. Each part says what the neuron reacts to, then lists the tokens of a text,"
        f" one a line, each followed by a tab and the neuron's strength.\n"
    )
    examples = [
        f"\nNeuron reacts to: {explanation}\n"
        + "".join(f"{token}\t{_level(value, top)}\n" for token, value in tokens)
        for explanation, tokens in SIMULATE_EXAMPLES
    ]
    return head + "".join(examples)


def simulate_context(explanation: str) -> str:
    """Return the line with the explanation."""
    return f"\nNeuron reacts to: {printable(explanation)}\n"


def simulate_read(
    explanation: str, token_ids: NDArray, strings: Sequence[str], top: int, *, full: bool = False
) -> LogprobQuery:
    """Return the request for the level of each token of one excerpt, all in one pass: n slots."""
    lines = [f"{printable(strings[int(t)])}\t{UNKNOWN}\n" for t in token_ids]
    ends = np.cumsum([len(line) for line in lines])
    return LogprobQuery(
        preamble=simulate_preamble(top),
        context=simulate_context(explanation),
        body="".join(lines),
        # each line ends with `UNKNOWN` and a line break; the slot is the beginning of `UNKNOWN`
        slots=tuple(int(end) - 1 - len(UNKNOWN) for end in ends),
        options=tuple(map(str, range(top + 1))),
        full=full,
    )


def simulate_fill(
    explanation: str, token_ids: NDArray, strings: Sequence[str], top: int
) -> JsonQuery:
    """Return the request of `simulate_read` for servers without log-probabilities: one integer per token in JSON."""
    n = len(token_ids)
    system = (
        f"A neuron of a language model reacts to each token with a strength from 0 to {top}; most"
        ' strengths are 0. You answer with JSON alone: {"values": [...]}, one integer for each token,'
        " in order."
    )
    messages: list[tuple[Role, str]] = []
    messages.append(("system", system))
    for example, tokens in SIMULATE_EXAMPLES:
        values = ", ".join(str(_level(value, top)) for _, value in tokens)
        messages.append(("user", _simulation_question(example, [token for token, _ in tokens])))
        messages.append(("assistant", f'{{"values": [{values}]}}'))
    texts = [printable(strings[int(t)]) for t in token_ids]
    messages.append(("user", _simulation_question(explanation, texts)))
    return JsonQuery(tuple(messages), n, 0, top)


def _simulation_question(explanation: str, tokens: Sequence[str]) -> str:
    numbered = "\n".join(f"{i}\t{token}" for i, token in enumerate(tokens, 1))
    return (
        f"Neuron reacts to: {printable(explanation)}\nThe {len(tokens)} tokens:\n{numbered}\n"
        f"Give {len(tokens)} integers."
    )


def _level(value: float, top: int) -> int:
    return min(top, int(top * value + 0.5))


def _marked(level: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens of an excerpt are marked, [n]: those at half of its highest level or above."""
    return (level > 0) & (2 * level >= level.max(initial=0))


def _strongest(
    excerpts: Sequence[Excerpt], level: Sequence[NDArray[np.int64]], strings: Sequence[str]
) -> str:
    """Return the tokens with the highest levels over all excerpts, each once."""
    highest: dict[str, int] = {}
    for excerpt, levels_ in zip(excerpts, level, strict=True):
        for token_id, n in zip(excerpt.token_ids, levels_, strict=True):
            token = f"«{printable(strings[int(token_id)])}»"
            highest[token] = max(highest.get(token, 0), int(n))
    best = sorted(((n, t) for t, n in highest.items() if n), key=lambda pair: -pair[0])
    return ", ".join(f"{token} {n}" for n, token in best[:MOST_LISTED]) or "nothing"
