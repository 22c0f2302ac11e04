"""Prompts of detection, fuzzing and intruder: for log-probabilities (plain text) and for JSON (chat).

The prompts for log-probabilities are plain text to be continued, so that base models and small models can
answer them: an instruction, worked examples, then the question in the same form up to the answer. The
answer is on a line of its own. After a colon and a space no token would begin at the answer, since
tokenizers like GPT-2's merge a space and a digit into one token; directly after a colon
SmolLM2-135M-Instruct expects a space. On 72 easy questions it put 0.8 of all probability on the two answers
after a colon, and 0.9 after a line break.

`VERSION` changes whenever any of the texts does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cratelm.llm.requests import JsonQuery, LogprobQuery, Role

VERSION = "scorers-1"
YES_NO = ("0", "1")
PLACES = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class Wording:
    """The wording of a yes-or-no question about a text and a description."""

    preamble: str
    """for a `LogprobQuery`: instruction and examples, ending before the description"""
    slot: str
    """the line before the answer"""
    system: str
    """system message of a `JsonQuery`"""


DETECTION = Wording(
    preamble="""\
Does the text contain what the description says? 1 means yes, 0 means no.

Description: words for parts of the body
Text: The committee will publish its budget on Friday.\\n
Fits:
0

Description: words for parts of the body
Text:  fell off the ladder and broke his arm in two places
Fits:
1

Description: opening brackets of function calls
Text: \\n    total = sum(values) / len(values)\\n
Fits:
1

Description: opening brackets of function calls
Text:  and her sister waited by the gate until it was dark
Fits:
0

Description: names of cities
Text: \\n        self.close()\\n
Fits:
0

Description: names of cities
Text:  took the night train from Vienna to Prague
Fits:
1

Description: verbs in the past
Text:  she walked home and cooked
Fits:
1

Description: verbs in the past
Text:  to be or not to be
Fits:
0

""",
    slot="Fits:\n",
    system="""\
You are given a description of something that occurs in texts, and numbered texts. Decide for each \
text whether it contains what the description says: 1 for yes, 0 for no. Line ends in the texts are \
written \\n. Answer with JSON alone, {"values": [...]}, one number for each text, in their order.""",
)

FUZZING = Wording(
    preamble="""\
In the text, some words are marked «like this». Are the marked words what the description says? \
1 means yes, 0 means no.

Description: words for parts of the body
Text:  fell off the ladder and broke his« arm» in two places
Marked right:
1

Description: words for parts of the body
Text:  fell off the« ladder» and broke his arm in two places
Marked right:
0

Description: opening brackets of function calls
Text: \\n    total« =» sum(values) / len«(»values)\\n
Marked right:
0

Description: opening brackets of function calls
Text: \\n    total = sum«(»values) / len«(»values)\\n
Marked right:
1

""",
    slot="Marked right:\n",
    system="""\
You are given a description of something that occurs in texts, and numbered texts in which some \
words are marked «like this». Decide for each text whether the marked words are what the \
description says: 1 for yes, 0 for no. Line ends in the texts are written \\n. Answer with JSON \
alone, {"values": [...]}, one number for each text, in their order.""",
)

_INTRUDER_PREAMBLE = """\
Four of the five texts have something in common, seen best in the words marked «like this». One \
does not belong to them. Which one?

1:  fell off the ladder and broke his« arm» in two places
2:  she shook her« head» and left
3: The committee will publish« its» budget on Friday.\\n
4:  warm gloves for cold« hands» and a scarf
5:  a pain in the« knee» after running
Does not belong:
3

1: \\n    for name« in» sorted(names):\\n
2:  return len«(»values) + 1
3: print«(»'done')\\n
4:  x = max«(»x, 0)
5:  if isinstance«(»value, str):
Does not belong:
1

"""
_INTRUDER_SLOT = "Does not belong:\n"
_INTRUDER_SYSTEM = """\
You are given five numbered texts. Four have something in common, seen best in the words marked \
«like this»; one does not belong to them. Decide which one. Line ends in the texts are written \
\\n. Answer with JSON alone: {"values": [N]}, N being the number of the text that does not belong."""


def read_yes_no(wording: Wording, explanation: str, text: str) -> LogprobQuery:
    """Return the request that judges one text by the probability of 1 versus 0."""
    body = f"Text: {text}\n{wording.slot}"
    context = f"Description: {one_line(explanation)}\n"
    return LogprobQuery(wording.preamble, context, body + YES_NO[0], (len(body),), YES_NO)


def fill_yes_no(wording: Wording, explanation: str, texts: Sequence[str], seed: int) -> JsonQuery:
    """Return the request that judges several texts as 0 or 1 each, in JSON."""
    question = f"Description: {one_line(explanation)}\n\n{_numbered(texts)}"
    return JsonQuery(_chat(wording.system, question), len(texts), 0, 1, seed)


def read_intruder(texts: Sequence[str]) -> LogprobQuery:
    """Return the request for which of five texts does not belong, by the probability of its number."""
    body = f"{_numbered(texts)}\n{_INTRUDER_SLOT}"
    return LogprobQuery(_INTRUDER_PREAMBLE, "", body + PLACES[0], (len(body),), PLACES)


def fill_intruder(texts: Sequence[str], seed: int) -> JsonQuery:
    """Return the request for the number of the one of five texts that does not belong, in JSON."""
    return JsonQuery(_chat(_INTRUDER_SYSTEM, _numbered(texts)), 1, 1, len(PLACES), seed)


def one_line(text: str) -> str:
    """Return `text` with each run of white space replaced by one space, so that it stays on one prompt line."""
    return " ".join(text.split())


def _chat(system: str, user: str) -> tuple[tuple[Role, str], ...]:
    return (("system", system), ("user", user))


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}: {text}" for number, text in enumerate(texts, 1))
