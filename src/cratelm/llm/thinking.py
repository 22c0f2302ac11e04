"""Separate the answer of a language model from what it thought before.

Reasoning models write their thoughts before the answer, between markers of their own. Only what follows is the
answer. Many chat templates write the opening marker into the prompt, so that only the closing one is in the text.

    <think> ... </think>                DeepSeek R1, Qwen 3, SmolLM3, Nemotron; also thinking, thought, reasoning ...
    [THINK] ... [/THINK]                Magistral
    ◁think▷ ... ◁/think▷                Kimi
    <|START_THINKING|> ... <|END_THINKING|>    Command A
    <|inner_prefix|> ... <|inner_suffix|>      Apertus
    <|channel>thought ... <channel|>           Gemma 4
    <|channel|>analysis ... <|channel|>final<|message|>    gpt-oss; "analysis ... assistantfinal" if special tokens
                                                           are not decoded
"""

import re

_TAGS = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
_MARKERS = (
    (rf"<{_TAGS}>", rf"</{_TAGS}>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("◁think▷", "◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    (r"<\|channel>thought\b", r"<channel\|>"),
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>\s*(?:analysis|commentary)\b",
        r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    ),
    (r"\Aanalysis(?=[A-Z\"'(\d])", "assistantfinal"),
)
"""patterns of the markers that open and close thoughts"""
_FLAGS = re.IGNORECASE | re.MULTILINE
_PAIRS = [
    (re.compile(rf"^[ \t]*(?:{opening})", _FLAGS), re.compile(closing, _FLAGS))
    for opening, closing in _MARKERS
]
"""the same, the opening ones at the start of a line"""
_OPEN_END = re.compile("|".join(rf"(?:{opening}\s*\Z)" for opening, _ in _MARKERS), re.IGNORECASE)
_FRAMES = re.compile(
    r"\A(?:\s|<\|START_RESPONSE\|>|<\|START_TEXT\|>|<\|message\|>|<answer>|<response>)+"
    r"|(?:\s|<\|END_RESPONSE\|>|<\|END_TEXT\|>|<\|return\|>|<\|end\|>|</answer>|</response>)+\Z",
    re.IGNORECASE,
)
"""what models write around the answer that follows their thoughts"""


class UnfinishedThoughts(Exception):
    """Raised for a text that ends within the model's thoughts."""


def answer_after_thoughts(text: str, *, opened: bool = False) -> str:
    """Return what a model wrote after its thoughts, possibly nothing; `text` unchanged if it holds no thoughts.

    Markers that a text only mentions, within a line, are no thoughts. `opened`: the text begins with thoughts,
    since the prompt ended with their opening marker. Raises `UnfinishedThoughts` if thoughts are not closed.
    """
    end = _end_of_thoughts(text, opened)
    if end is None:
        return text
    while (further := _end_of_block(text, end)) is not None:
        end = further
    return _FRAMES.sub("", text[end:])


def no_answer_before(cap: int, thinking_tokens: int) -> str:
    """Return the reason of a failure: thoughts used up all of `cap` tokens."""
    return (
        f"no answer before the cap of {cap:,} tokens, in which thoughts count: raise --thinking-tokens"
        f" (now {thinking_tokens:,}) and add --retry-failed"
    )


def prompt_opens_thoughts(prompt: str) -> bool:
    """Return whether a prompt ends with a marker that opens thoughts, so that the answer begins with thoughts."""
    return _OPEN_END.search(prompt[-80:]) is not None


def _end_of_thoughts(text: str, opened: bool) -> int | None:
    """Return the offset at which the first thoughts end; None if there are none."""
    end = None if opened else _end_of_block(text, 0)
    if end is not None:
        return end
    closings = sorted(
        match.span()
        for _, closing in _PAIRS
        for match in closing.finditer(text)
        if opened or _is_alone(text, *match.span())
    )
    if opened and not closings:
        raise UnfinishedThoughts
    return closings[0][1] if closings else None


def _end_of_block(text: str, start: int) -> int | None:
    """Return the end of the first thoughts after `start` that have an opening marker; None if there are none."""
    opened = [
        (match.start(), match.end(), closing)
        for opening, closing in _PAIRS
        if (match := opening.search(text, start))
    ]
    if not opened:
        return None
    _, inside, closing = min(opened, key=lambda found: found[:2])
    closed = closing.search(text, inside)
    if closed is None:
        raise UnfinishedThoughts
    return closed.end()


def _is_alone(text: str, start: int, end: int) -> bool:
    """Return whether a closing marker without an opening one begins a line or ends one that others follow."""
    before = text[text.rfind("\n", 0, start) + 1 : start]
    return not before.strip() or text[end:].lstrip(" \t")[:1] == "\n"
