"""Read the responses of OpenAI-compatible servers: texts, integers, vectors, log-probabilities.

Servers and proxies can return anything, so every field is checked before it is used. Anything other than
the requested answer raises `UnusableAnswer`, which becomes a `Failure` and never a number.

Log-probabilities of a prompt arrive as tokens with character offsets. Offsets are checked, not trusted:
- vLLM adds up the lengths of decoded tokens. If the bytes of one character are split over several
  tokens, all but one of them decode to nothing, and later offsets drift;
- vLLM counts a begin token such as `<s>` as text, so that all offsets are shifted by its length;
- SGLang reports -1 for every offset.
A drift of one character would read the level of a neighbouring token: a wrong number that looks right.
So the tokens must end where the text ends, and at each slot the token's own string must match the text;
if either check fails, the request is `UNREADABLE`.

Shapes: n slots of a request, O options, P tokens of a prompt, E width of an embedding.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cratelm.llm.requests import (
    NO_RANK,
    Embed,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
    Request,
    Value,
)
from cratelm.llm.thinking import UnfinishedThoughts, answer_after_thoughts

Body = dict[str, Any]
_MINUS_INFINITY = -9999.0
"""the value that vLLM reports for minus infinity"""
SLOTS = "slots"
"""key of a body that holds the tokens reported at each slot, [n], instead of an echoed prompt"""
MOST_TOKENS = 10**9
"""of one call: a server that reports more counts something else, and its count is not used"""


class UnusableAnswer(Exception):
    """Raised for an answer that is not in the requested form."""

    def __init__(self, kind: FailureKind, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def read_value(request: Request, body: Body, n_top: int) -> Value:
    """Return the value of `request` in the response `body`.

    `n_top`: tokens reported at each position, for a `LogprobQuery`. Raises `UnusableAnswer` if the body
    does not hold an answer in the requested form.
    """
    if isinstance(request, LogprobQuery):
        return read_logprobs(request, body, n_top)
    if isinstance(request, Embed):
        return _read_vector(body)
    text = _message_text(body)
    return (
        _read_integers(request, text, choice_of(body)) if isinstance(request, JsonQuery) else text
    )


def parse_body(content: bytes) -> Body:
    """Return the JSON object in a response's bytes; raise `UnusableAnswer` if there is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _malformed(f"the server's {len(content):,} bytes are not a JSON object")
    return body


def _malformed(reason: str) -> UnusableAnswer:
    return UnusableAnswer(FailureKind.MALFORMED, reason)


def unreadable(reason: str) -> UnusableAnswer:
    """Return the error of log-probabilities that cannot be located."""
    return UnusableAnswer(FailureKind.UNREADABLE, reason)


def read_usage(body: Body) -> tuple[int | None, int | None]:
    """Return prompt and completion tokens, None if they are not reported.

    Tokens of hidden reasoning are completion tokens. Some servers leave them out of `completion_tokens`, but
    not out of `total_tokens`.
    """
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion, total = (
        _tokens(counts.get(name)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    if prompt is not None and completion is not None and total is not None:
        completion = max(completion, total - prompt)
    return prompt, completion


def _tokens(x: Any) -> int | None:
    return x if _is_count(x) and x <= MOST_TOKENS else None


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def choice_of(body: Body) -> Body:
    """Return the first choice of a response. Raises `UnusableAnswer` if there is none, or it was filtered."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _malformed("the answer has no choices")
    if choices[0].get("finish_reason") == "content_filter":
        raise UnusableAnswer(FailureKind.REFUSED, "stopped by the server's content filter")
    return choices[0]


def _message_text(body: Body) -> str:
    """Return the assistant's text, without its thoughts."""
    choice = choice_of(body)
    message, is_cut = choice.get("message"), choice.get("finish_reason") == "length"
    if not isinstance(message, dict):
        raise _malformed("the answer has no message")
    if message.get("refusal"):
        raise UnusableAnswer(FailureKind.REFUSED, f"the model refused: {message['refusal']}")
    text = _content(message.get("content"))
    try:
        answer = answer_after_thoughts(text)
    except UnfinishedThoughts:
        raise _only_thoughts(is_cut) from None
    if not answer.strip():
        # thoughts may be in a field of their own, or hidden: then only the reason for the end tells
        thought = bool(text.strip() or message.get("reasoning_content") or message.get("reasoning"))
        if is_cut or thought:
            raise _only_thoughts(is_cut)
        raise UnusableAnswer(FailureKind.EMPTY, "the answer is empty")
    return answer.encode(errors="replace").decode()  # an unpaired surrogate cannot be encoded


def _content(content: Any) -> str:
    """Return the text of a message's content, which may be a list of parts; parts of thoughts are left out."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str | None):
        raise _malformed("the answer is not text")
    return content or ""


def _only_thoughts(is_cut: bool) -> UnusableAnswer:
    if is_cut:
        return UnusableAnswer(FailureKind.CUT, "no answer before the cap on tokens")
    return UnusableAnswer(FailureKind.EMPTY, "the model thought and gave no answer")


def _read_integers(request: JsonQuery, text: str, choice: Body) -> tuple[int, ...]:
    """Return the [n] requested values; a Markdown fence around the JSON is accepted."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        cut = choice.get("finish_reason") == "length"
        raise _malformed("JSON cut off at the token limit" if cut else "no JSON") from None
    values = answer.get("values") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise _malformed('JSON without a list of "values"')
    if len(values) != request.n:
        raise _malformed(f"{len(values)} values instead of {request.n}")
    wrong = [
        v
        for v in values
        if not isinstance(v, int) or isinstance(v, bool) or not request.low <= v <= request.high
    ]
    if wrong:
        raise _malformed(f"{len(wrong)} values are not integers {request.low}..{request.high}")
    return tuple(values)


def _read_vector(body: Body) -> np.ndarray:
    """Return an embedding, [E]."""
    data = body.get("data")
    first = data[0] if isinstance(data, list) and data else None
    numbers = first.get("embedding") if isinstance(first, dict) else None
    if not isinstance(numbers, list) or not numbers:
        raise _malformed("no vector")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise _malformed("a vector with entries that are not numbers")
    with np.errstate(over="ignore"):
        vector = np.array(numbers, dtype=np.float64).astype(np.float32)
    if not np.isfinite(vector).all():
        raise _malformed("a vector with infinite or undefined numbers")
    return vector


def read_logprobs(request: LogprobQuery, body: Body, n_top: int) -> OptionLogprobs:
    """Return the log-probabilities of the options at each slot.

    `n_top`: number of most likely tokens that were requested at each position. Raises `UnusableAnswer` of
    kind `UNREADABLE` if no token begins at a slot, or none of the options is among the tokens reported there.
    """
    tops = body[SLOTS] if SLOTS in body else _tops_at_slots(request, body)
    matched = [_match_options(top, request.options, n_top) for top in tops]
    absolute = np.array([log_probs for log_probs, _ in matched])  # [n, O]
    n_silent = int(np.isneginf(absolute).all(axis=1).sum())
    if n_silent:
        raise unreadable(
            f"none of the options is among the {n_top} most likely tokens at {n_silent} of"
            f" {len(tops)} slots"
        )
    total = np.logaddexp.reduce(absolute, axis=1, keepdims=True)  # [n, 1]
    return OptionLogprobs(
        (absolute - total).astype(np.float32),
        np.exp(total[:, 0]).clip(0, 1).astype(np.float32) if request.full else None,
        np.array([ranks for _, ranks in matched], dtype=np.uint16) if request.full else None,
    )


def _tops_at_slots(request: LogprobQuery, body: Body) -> list[Any]:
    """Return the top log-probabilities of the token that begins at each slot, [n], from an echoed prompt."""
    begins, tokens, tops = _prompt_tokens(body, request.text)
    first: dict[int, int] = {}
    for i, begin in enumerate(begins):
        first.setdefault(begin, i)
    found = [
        _checked_token(first.get(slot), tokens, request.text, slot) for slot in request.offsets
    ]
    if None in found:
        raise unreadable(f"no token begins at {found.count(None)} of {len(found)} slots")
    return [tops[i] for i in found if i is not None]


def _prompt_tokens(body: Body, text: str) -> tuple[list[int], list[str], list[Any]]:
    """Return the offset in `text`, the string and the top log-probabilities of each token of the prompt, [P].

    Raises `UnusableAnswer` (`UNREADABLE`) unless the tokens end where the text ends, with or without a begin
    token before the text and with or without the generated token after it.
    """
    logprobs = choice_of(body).get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    offsets, tokens, tops = (
        as_list(logprobs.get(k)) for k in ("text_offset", "tokens", "top_logprobs")
    )
    if (
        not 0 < len(offsets) == len(tokens) == len(tops)
        or not all(map(_is_count, offsets))
        or not all(isinstance(token, str) for token in tokens)
    ):
        raise unreadable("the server reports no log-probabilities and offsets of the prompt")
    ends = [*offsets[1:], offsets[-1] + len(tokens[-1])]
    # A begin token that is not in the text may count in the offsets: then all of them are too large by its
    # length. Both interpretations are tried, each with and without the one generated token at the end
    # (servers echo it too); the last offset decides which one matches this text.
    special = 0 if text.startswith(with_spaces(tokens[0])) else len(tokens[0])
    for shift in sorted({0, special}):
        for n in (len(tokens) - 1, len(tokens)):
            if n and ends[n - 1] - shift == len(text):
                return [offset - shift for offset in offsets[:n]], tokens[:n], tops[:n]
    raise unreadable(
        f"the offsets of the prompt's tokens end at {ends[-1]}, but the prompt has {len(text)} characters:"
        " the offsets do not count its characters"
    )


def as_list(x: Any) -> list[Any]:
    """Return `x` if it is a list, else an empty one."""
    return x if isinstance(x, list) else []


def _checked_token(i: int | None, tokens: list[str], text: str, slot: int) -> int | None:
    """Return `i`, the first token reported to begin at a slot, if its string is in `text` there; else None.

    An empty string is no evidence: if the bytes of a character are split over several tokens, servers
    report all but one of them as empty.
    """
    token = "" if i is None else with_spaces(tokens[i])
    return i if token and text.startswith(token, slot) else None


def with_spaces(token: str) -> str:
    """Return a token with spaces for SentencePiece's marks of them."""
    return token.replace("▁", " ")


def _match_options(top: Any, options: tuple[str, ...], n_top: int) -> tuple[list[float], list[int]]:
    """Return absolute log-probabilities [O] (-inf if not reported) and ranks [O] of the options.

    Tokens are matched exactly, or, if no option matches exactly, without the spaces around them. Servers
    also report the prompt's own token in addition to the `n_top` most likely ones: its rank is unknown.
    """
    reported = {
        token: float(x)
        for token, x in (top if isinstance(top, dict) else {}).items()
        if isinstance(x, int | float) and _MINUS_INFINITY < x <= 0.01
    }
    exact: dict[str, tuple[float, int]] = {}
    bare: dict[str, tuple[float, int]] = {}
    for rank, token in enumerate(sorted(reported, key=lambda t: -reported[t])):
        entry = reported[token], rank if rank < n_top else NO_RANK
        exact[token] = entry
        bare.setdefault(with_spaces(token).strip(" "), entry)
    matches = exact if any(option in exact for option in options) else bare
    entries = [matches.get(option, (-math.inf, NO_RANK)) for option in options]
    return [log_prob for log_prob, _ in entries], [rank for _, rank in entries]


def token_begins(request: Request, body: Body, n_top: int) -> tuple[int, ...]:
    """Return the offsets at which the prompt's tokens begin, [P]."""
    assert isinstance(request, LogprobQuery)
    return tuple(_prompt_tokens(body, request.text)[0])


def tokens_between(begins: Sequence[int], start: int, end: int) -> int:
    """Return the number of tokens that overlap `start`..`end`, plus 1 if they extend beyond it."""
    inside = sum(start <= b < end for b in begins) + (start not in begins)
    return inside if start in begins and end in begins else inside + 1
