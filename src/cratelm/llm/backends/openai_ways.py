"""The ways in which servers report the probability of labels at the slots of a text.

`probe` of a server tries them in this order and uses the first that works:

    echo              /v1/completions echoes the prompt with log-probabilities: llama-cpp-python, vLLM, OpenAI's
                      older models. One call for a text
    prompt_logprobs   a parameter of vLLM, for servers that refuse the echo. One call for a text
    n_probs           /completions outside of /v1, of llama.cpp's own server. One call for a slot, with the text up to
                      it; the server keeps what it has computed, so that each call costs the tokens since the last
    next token        /v1/completions with log-probabilities of the one token that it generates. One call for a slot

Chat models that report log-probabilities only of their own answers are asked for JSON instead: a text with n
slots would take n conversations, each with the whole prompt. So are servers of typed decisions (/v1/systemone,
/v1/decisions): they put the labels into a prompt of their own.

Each way is brought into one of two forms before it is read (`openai_responses.read_logprobs`): that of an echo, or
a list with the tokens reported at each slot.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from cratelm.llm.backends.openai_responses import (
    SLOTS,
    Body,
    as_list,
    choice_of,
    read_usage,
    unreadable,
    with_spaces,
)
from cratelm.llm.requests import LogprobQuery

N_PROBS = 100
"""number of most likely tokens requested from llama.cpp's server, which has no limit"""


class Way(StrEnum):
    """A way of reading label probabilities."""

    ECHO = "echo"
    PROMPT = "prompt_logprobs"
    LLAMA = "n_probs"
    NEXT = "next token"

    @property
    def by_slot(self) -> bool:
        """Return whether it takes a call for each slot."""
        return self in (Way.LLAMA, Way.NEXT)


def options_of(way: Way, prompt: str, n_top: int) -> dict[str, Any]:
    """Return the parameters of a call to /completions; `n_top` most likely tokens are requested."""
    options: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 1,  # some servers refuse 0; the token is ignored
        "temperature": 0.0,
    }
    if way is Way.ECHO:
        return {**options, "echo": True, "logprobs": n_top}
    if way is Way.PROMPT:
        return {**options, "extra_body": {"prompt_logprobs": n_top}}
    if way is Way.LLAMA:
        return {**options, "extra_body": {"n_predict": 1, "n_probs": n_top, "cache_prompt": True}}
    return {**options, "logprobs": n_top}


def as_echo(body: Body, request: LogprobQuery) -> Body:
    """Return vLLM's `prompt_logprobs` in the form of an echo.

    There is an entry per token of the prompt, null for the first: {id: {"logprob", "rank", "decoded_token"}},
    in which the prompt's own token comes first. Offsets are counted back from the end of the text, since the
    first token, which may be a begin token, is not reported. From the first slot on every token must be in the
    text at its offset. Raises `UnusableAnswer` (`UNREADABLE`) otherwise.
    """
    choice = choice_of(body)
    entries = as_list(choice.get("prompt_logprobs") or body.get("prompt_logprobs"))
    tops = [_decoded(entry) for entry in entries[1:]]
    if not tops or not all(tops):
        raise unreadable("the server reports no prompt_logprobs")
    tokens = [next(iter(top)) for top in tops]
    begins, end = [], len(request.text)
    for token in reversed(tokens):
        end -= len(token)
        begins.insert(0, end)
    first = min(request.offsets, default=0)
    if begins[0] < 0 or not all(
        request.text.startswith(with_spaces(token), begin)
        for token, begin in zip(tokens, begins, strict=True)
        if begin >= first
    ):
        raise unreadable("the tokens of prompt_logprobs are not those of the text")
    logprobs = {
        "text_offset": [0, *begins],
        "tokens": [request.text[: begins[0]], *tokens],
        "top_logprobs": [None, *tops],
    }
    return {**body, "choices": [{"logprobs": logprobs}]}


def as_slots(bodies: Sequence[Body]) -> Body:
    """Return the responses to one call per slot as one body, with the sum of what they cost."""
    usages = [_usage(body) for body in bodies]
    known = all(prompt is not None for prompt, _ in usages)
    usage = {
        "prompt_tokens": sum(prompt or 0 for prompt, _ in usages),
        "completion_tokens": sum(completion or 0 for _, completion in usages),
    }
    return {SLOTS: [_next_token(body) for body in bodies], "usage": usage if known else None}


def _usage(body: Body) -> tuple[int | None, int | None]:
    if "tokens_evaluated" not in body:
        return read_usage(body)
    counts = {
        "prompt_tokens": body["tokens_evaluated"],
        "completion_tokens": body.get("tokens_predicted"),
    }
    return read_usage({"usage": counts})


def _next_token(body: Body) -> dict[str, Any]:
    """Return the tokens reported for the one that follows the prompt, with their log-probabilities.

    Understands llama.cpp's own form, that of OpenAI's completions, and that of its chats, which llama.cpp also
    uses for completions.
    """
    if "completion_probabilities" in body:
        reported = as_list(body["completion_probabilities"])
    else:
        logprobs = choice_of(body).get("logprobs")
        logprobs = logprobs if isinstance(logprobs, dict) else {}
        tops = as_list(logprobs.get("top_logprobs"))
        if tops and isinstance(tops[0], dict):
            return tops[0]
        reported = as_list(logprobs.get("content"))
    top = as_list(reported[0].get("top_logprobs")) if _is_object(reported[:1]) else []
    if not top or not _is_object(top):
        raise unreadable("the server reports no log-probabilities of the next token")
    found: dict[str, Any] = {}
    for entry in top:
        # incomplete characters share a string; the first of them is the most likely one
        found.setdefault(str(entry.get("token")), entry.get("logprob"))
    return found


def _decoded(entry: Any) -> dict[str, Any]:
    """Return an entry of `prompt_logprobs` as {token: log-probability}; empty if it has another form."""
    values = list(entry.values()) if isinstance(entry, dict) else []
    if not _is_object(values) or not all(isinstance(v.get("decoded_token"), str) for v in values):
        return {}
    top: dict[str, Any] = {}
    for value in values:
        top.setdefault(value["decoded_token"], value.get("logprob"))
    return top


def _is_object(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)
