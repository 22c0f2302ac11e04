"""Read the responses of OpenAI-compatible servers: texts, integers, vectors, log-probabilities.

Servers and proxies return anything: every field is checked before it is used, and what is not the
answer that was asked for raises `UnusableAnswer`, which becomes a `Failure` and never a number.

Log-probabilities of a prompt come as tokens with character offsets. Offsets are checked, not trusted:
- vLLM adds up the lengths of decoded tokens. Where the bytes of one character are cut over several
  tokens, all but one of them decode to nothing, and later offsets drift;
- vLLM counts a begin token such as `<s>` as text: all offsets are shifted by its length;
- SGLang reports -1 for every offset.
A drift of one character would read the level of a neighbouring token, a wrong number that looks like
a right one. So the tokens must end where the text ends, and at each slot the token's own string must be
the text that stands there; a slot that fails either check makes the request `UNREADABLE`.

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

Body = dict[str, Any]
_MINUS_INFINITY = -9999.0
"""written by vLLM for minus infinity"""


class UnusableAnswer(Exception):
    """An answer came, but not the one that was asked for."""

    def __init__(self, kind: FailureKind, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def read_value(request: Request, body: Body, n_top: int) -> Value:
    """Return the value of `request` in the response `body`.

    `n_top`: tokens reported at each place, for a `LogprobQuery`. Raises `UnusableAnswer`.
    """
    if isinstance(request, LogprobQuery):
        return read_logprobs(request, body, n_top)
    if isinstance(request, Embed):
        return _read_vector(body)
    text = _message_text(body)
    return _read_integers(request, text, _choice(body)) if isinstance(request, JsonQuery) else text


def parse_body(content: bytes) -> Body:
    """Return the JSON object in a response's bytes; raise `UnusableAnswer` if there is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _malformed(f"the server's {len(content):,} bytes are no JSON object")
    return body


def _malformed(reason: str) -> UnusableAnswer:
    return UnusableAnswer(FailureKind.MALFORMED, reason)


def _unreadable(reason: str) -> UnusableAnswer:
    return UnusableAnswer(FailureKind.UNREADABLE, reason)


def read_usage(body: Body) -> tuple[int | None, int | None]:
    """Return prompt and completion tokens, None if they are not reported."""
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return (prompt if _is_count(prompt) else None), (completion if _is_count(completion) else None)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _choice(body: Body) -> Body:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _malformed("the answer has no choices")
    if choices[0].get("finish_reason") == "content_filter":
        raise UnusableAnswer(FailureKind.REFUSED, "stopped by the server's content filter")
    return choices[0]


def _message_text(body: Body) -> str:
    """Return the assistant's text."""
    message = _choice(body).get("message")
    if not isinstance(message, dict):
        raise _malformed("the answer has no message")
    if message.get("refusal"):
        raise UnusableAnswer(FailureKind.REFUSED, f"the model refused: {message['refusal']}")
    text = message.get("content")
    if text is None or (isinstance(text, str) and not text.strip()):
        raise UnusableAnswer(FailureKind.EMPTY, "the answer is empty")
    if not isinstance(text, str):
        raise _malformed("the answer is no text")
    return text.encode(errors="replace").decode()  # halves of a cut pair of surrogates are no text


def _read_integers(request: JsonQuery, text: str, choice: Body) -> tuple[int, ...]:
    """Return the [n] values asked for; a Markdown fence around them is accepted."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        cut = choice.get("finish_reason") == "length"
        raise _malformed("JSON cut off at the limit of tokens" if cut else "no JSON") from None
    values = answer.get("values") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise _malformed('JSON without a list of "values"')
    if len(values) != request.n:
        raise _malformed(f"{len(values)} values, {request.n} were expected")
    wrong = [
        v
        for v in values
        if not isinstance(v, int) or isinstance(v, bool) or not request.low <= v <= request.high
    ]
    if wrong:
        raise _malformed(f"{len(wrong)} values are no integers {request.low}..{request.high}")
    return tuple(values)


def _read_vector(body: Body) -> np.ndarray:
    """Return an embedding, [E]."""
    data = body.get("data")
    first = data[0] if isinstance(data, list) and data else None
    numbers = first.get("embedding") if isinstance(first, dict) else None
    if not isinstance(numbers, list) or not numbers:
        raise _malformed("no vector")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise _malformed("a vector of other things than numbers")
    with np.errstate(over="ignore"):
        vector = np.array(numbers, dtype=np.float64).astype(np.float32)
    if not np.isfinite(vector).all():
        raise _malformed("a vector with infinite or undefined numbers")
    return vector


def read_logprobs(request: LogprobQuery, body: Body, n_top: int) -> OptionLogprobs:
    """Return the log-probabilities of the options at each slot.

    Raises `UnusableAnswer` of kind `UNREADABLE` if no token begins at a slot, or none of the options
    is among the `n_top` tokens reported there.
    """
    begins, tokens, tops = _prompt_tokens(body, request.text)
    first: dict[int, int] = {}
    for i, begin in enumerate(begins):
        first.setdefault(begin, i)
    places = [
        _checked_token(first.get(slot), tokens, request.text, slot) for slot in request.offsets
    ]
    if None in places:
        raise _unreadable(f"no token begins at {places.count(None)} of {len(places)} slots")
    matched = [_match_options(tops[i], request.options, n_top) for i in places if i is not None]
    absolute = np.array([log_probs for log_probs, _ in matched])  # [n, O]
    n_silent = int(np.isneginf(absolute).all(axis=1).sum())
    if n_silent:
        raise _unreadable(
            f"none of the options is among the {n_top} likeliest tokens at {n_silent} of"
            f" {len(places)} slots"
        )
    total = np.logaddexp.reduce(absolute, axis=1, keepdims=True)  # [n, 1]
    return OptionLogprobs(
        (absolute - total).astype(np.float32),
        np.exp(total[:, 0]).clip(0, 1).astype(np.float32) if request.full else None,
        np.array([ranks for _, ranks in matched], dtype=np.uint16) if request.full else None,
    )


def _prompt_tokens(body: Body, text: str) -> tuple[list[int], list[str], list[Any]]:
    """Return of each token of the prompt [P]: its offset in `text`, its string, its top log-probabilities.

    Raises `UNREADABLE` unless the tokens end where the text ends, with or without a begin token before
    the text and with or without the generated token after it.
    """
    logprobs = _choice(body).get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    offsets, tokens, tops = (
        _as_list(logprobs.get(k)) for k in ("text_offset", "tokens", "top_logprobs")
    )
    if (
        not 0 < len(offsets) == len(tokens) == len(tops)
        or not all(map(_is_count, offsets))
        or not all(isinstance(token, str) for token in tokens)
    ):
        raise _unreadable("the server reports no log-probabilities and offsets of the prompt")
    ends = [*offsets[1:], offsets[-1] + len(tokens[-1])]
    # A begin token counts in the offsets though it is not in the text: then all offsets are too large
    # by its length. Both readings are tried, each with and without the one generated token at the end
    # (servers echo it, too); the last offset decides which of them is that of this text.
    special = 0 if text.startswith(_with_spaces(tokens[0])) else len(tokens[0])
    for shift in sorted({0, special}):
        for n in (len(tokens) - 1, len(tokens)):
            if n and ends[n - 1] - shift == len(text):
                return [offset - shift for offset in offsets[:n]], tokens[:n], tops[:n]
    raise _unreadable(
        f"the offsets of the prompt's tokens end at {ends[-1]}, and it has {len(text)} characters:"
        " they are not those of its characters"
    )


def _as_list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else []


def _checked_token(i: int | None, tokens: list[str], text: str, slot: int) -> int | None:
    """Return `i`, the first token reported to begin at a slot, if its string is in `text` there; else None.

    An empty string proves nothing: where the bytes of a character are cut over tokens, servers report
    all but one of them as empty.
    """
    token = "" if i is None else _with_spaces(tokens[i])
    return i if token and text.startswith(token, slot) else None


def _with_spaces(token: str) -> str:
    return token.replace("▁", " ")  # SentencePiece's mark of a space


def _match_options(top: Any, options: tuple[str, ...], n_top: int) -> tuple[list[float], list[int]]:
    """Return [O] absolute log-probabilities (-inf where not reported) and ranks of the options.

    Tokens are matched as they are, or without spaces around them where no option matches as it is.
    Servers also report the token of the prompt itself, beyond the `n_top` likeliest: its rank is unknown.
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
        bare.setdefault(_with_spaces(token).strip(" "), entry)
    matches = exact if any(option in exact for option in options) else bare
    entries = [matches.get(option, (-math.inf, NO_RANK)) for option in options]
    return [log_prob for log_prob, _ in entries], [rank for _, rank in entries]


def token_begins(request: Request, body: Body, n_top: int) -> tuple[int, ...]:
    """Return the offsets at which the prompt's tokens begin, [P]."""
    assert isinstance(request, LogprobQuery)
    return tuple(_prompt_tokens(body, request.text)[0])


def tokens_between(begins: Sequence[int], start: int, end: int) -> int:
    """Return the number of tokens with a part between `start` and `end`, plus 1 where they reach beyond."""
    inside = sum(start <= b < end for b in begins) + (start not in begins)
    return inside if start in begins and end in begins else inside + 1
