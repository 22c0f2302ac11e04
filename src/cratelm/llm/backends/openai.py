"""Any OpenAI-compatible server as a backend: `openai:MODEL`, with `--base-url` for one's own server.

`LogprobQuery` asks `/completions` to echo the prompt with log-probabilities, and places them by character
offsets. vLLM answers that, and llama-cpp-python; OpenAI has the endpoint for a few older models;
llama.cpp's own server refuses the echo (HTTP 500) and SGLang tells no offsets (-1): with `auto` such
servers are asked for JSON (`JsonQuery`) in its place.

Offsets are not trusted but checked: vLLM adds up the lengths of decoded tokens, which drifts where
the bytes of a character are cut over two tokens, and counts a begin token such as `<s>` as text. What
cannot be placed for certain is a failure (`UNREADABLE`), not a number.

Shapes: n slots of a request, O options, P tokens of a prompt, E width of an embedding.
"""

import asyncio
import contextlib
import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np

from cratelm.errors import InputError, missing_extra
from cratelm.llm.client import completion_tokens, prompt_tokens
from cratelm.llm.requests import (
    NO_RANK,
    Answer,
    Chat,
    Embed,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
    Outcome,
    Request,
    Value,
)

Method = Literal["auto", "logprobs", "json"]
Body = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
TOP_LOGPROBS = (20, 5)
"""likeliest tokens asked for at each place: vLLM takes 20 unless told otherwise, OpenAI 5"""
CONNECT_SECONDS = 10.0
TRIALS = 5
"""times that a call before the first request is tried, beside the retries of each"""
BYTES_PER_TOKEN = 3.5
LOST = 8
"""calls in a row without a connection, after all retries, after which a server counts as lost"""
_MINUS_INFINITY = -9999.0
"""what vLLM writes for it"""
_REASON_CHARACTERS = 200
_PASSING = (FailureKind.CONNECTION, FailureKind.DEADLINE)
"""failures that say nothing about what a server can do"""

_PROBE = LogprobQuery(
    preamble="",
    context='é 中 😀 "numbers"\\n\n',
    body="one\t1\ntwo\t2\nthree\t3\nfour\t4\nfive\t5\nsix\t6\nseven\t7\neight\t8\n",
    slots=(38, 46, 54),
    options=tuple("0123456789"),
)
"""whose last three digits any model that can be read tells, if offsets are right after non-ASCII text"""


class _Unusable(Exception):
    """An answer came, but not the one that was asked for."""

    def __init__(self, kind: FailureKind, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class ServerBackend:
    """A model behind an OpenAI-compatible server. Connects at the first call.

    The key is read from the environment variable `OPENAI_API_KEY` and told to nobody but the
    server. Errors that are passed (429, 5xx, lost connections) are tried again with growing pauses,
    or those a server's Retry-After asks for.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        *,
        concurrency: int = 8,
        retries: int = 4,
        deadline: float = 120.0,
        method: Method = "auto",
    ):
        """`base_url` None: OpenAI's own. `concurrency`: calls in flight at a time. `deadline`: seconds
        that one call may take, all retries together.

        Raises `InputError` where `openai` is not installed, no key is set for OpenAI, or an argument
        is out of range.
        """
        _require_openai()
        if not model.strip() or concurrency < 1 or retries < 0 or not deadline > 0:
            raise InputError(
                f"model {model!r}, concurrency {concurrency}, retries {retries}, deadline {deadline}:"
                " a model's name, 1 or more, 0 or more and more than 0 seconds were expected"
            )
        if method not in ("auto", "logprobs", "json"):
            raise InputError(f"method {method}: auto, logprobs or json was expected")
        self._model, self._url, self._server = model, base_url or OPENAI, _place(base_url or OPENAI)
        self._key = _key(needed=base_url is None)
        self._concurrency, self._retries, self._deadline = concurrency, retries, deadline
        self._method: Method = method
        self.name = re.sub(r"[^A-Za-z0-9._-]", "-", _last(model)).strip(".-") or "model"
        self.reason = ""
        """why `reads` is False though `auto` was asked for, or why `tokens_at_slot` gave nothing; empty
        otherwise"""
        self._reached = False  # the server has answered a request
        self._lost = 0  # calls in a row without a connection
        self._gone = False  # too many of them: what is left is not sent
        self._reads: bool | None = None  # not decided yet
        self._top = TOP_LOGPROBS[0]
        self._takes_schema = True

    @property
    def identity(self) -> dict[str, str]:
        return {
            "backend": "openai",
            "model": self._model,
            "method": self._method,
        }

    @property
    def window(self) -> int:
        return 32 * self._concurrency

    @property
    def parallel(self) -> int:
        return self._concurrency

    @property
    def reads(self) -> bool:
        """Decided once, with `auto` by a trial call: see `reason`.

        Raises `InputError` where the trial decides nothing: no connection, no answer in time.
        """
        if self._reads is None:
            self._reads = self._readable()
        return self._reads

    def _readable(self) -> bool:
        if self._method != "auto":
            return self._method == "logprobs"
        outcome = self._trial()
        if isinstance(outcome, Failure) and outcome.kind in _PASSING:
            outcome = self._trial()
        if isinstance(outcome, Answer):
            return True
        if outcome.kind in _PASSING:
            raise InputError(
                f"{self._server} gave no answer to a trial call ({outcome.kind}: {outcome.reason}):"
                " type the command again, with a longer --deadline or with --method json"
            )
        self.reason = f"{outcome.kind}: {outcome.reason}"
        return False

    def _trial(self) -> Outcome:
        ((_, outcome),) = [pair for group in self.answer([_PROBE]) for pair in group]
        return outcome

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Outcomes one by one as they come. Closed early, it cancels the calls in flight.

        Raises `InputError` where, before anything was answered, the key or the model is refused or
        the server cannot be reached. A server that is lost later fails the calls that are left.
        """
        if self._gone:
            self._reached = False  # these calls begin like the first
        self._gone, self._lost = False, 0
        with contextlib.closing(self._each(requests, self._outcome)) as outcomes:
            for index, outcome in outcomes:
                yield [(index, outcome)]

    def count_tokens(self, text: str) -> int:
        """An estimate: the tokenizer is with the server."""
        return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """One echoed call an option, `TRIALS` at most; empty where the server does not tell.

        An option that is merged with its surroundings counts one token more.
        """
        if not self.reads:
            return []
        start = len(slot_before)
        counts: dict[str, int] = {}
        told = partial(self._outcome, value=_token_begins)
        for _ in range(TRIALS):
            left = [option for option in options if option not in counts]
            echoes = [LogprobQuery("", slot_before, option + "\n", (), ()) for option in left]
            with contextlib.closing(self._each(echoes, told)) as outcomes:
                for index, outcome in outcomes:
                    if isinstance(outcome, Failure):
                        self.reason = f"{outcome.kind}: {outcome.reason}"
                    else:
                        begins: Any = outcome.value
                        end = start + len(left[index])
                        counts[left[index]] = _n_tokens(begins, start, end)
            if len(counts) == len(set(options)):
                self.reason = ""
                return [counts[option] for option in options]
        return []

    # calls

    def _each(
        self, items: Sequence[T], do: Callable[[Any, T], Awaitable[R]]
    ) -> Generator[tuple[int, R]]:
        """`do(client, item)` of all items with their index, as they are done, `concurrency` at a time.

        The event loop has a thread of its own: calls go on while the caller works on what came, and
        a caller may have a loop already (notebooks). What `do` raises is raised here.
        """
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        loop = runner.get_loop()
        thread = threading.Thread(
            target=_drive, args=(runner, self._work(items, do, done.put), done.put), daemon=True
        )
        thread.start()
        try:
            for _ in items:
                got = done.get()
                if isinstance(got, BaseException):
                    raise got
                yield got
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing to cancel
                loop.call_soon_threadsafe(_cancel_all, loop)
            raise
        finally:
            thread.join()

    async def _work(
        self,
        items: Sequence[T],
        do: Callable[[Any, T], Awaitable[R]],
        put: Callable[[Any], None],
    ) -> None:
        from openai import AsyncOpenAI, Timeout

        async def worker(client: Any) -> None:
            for index, item in todo:
                try:
                    put((index, await do(client, item)))
                except Exception as error:
                    put(error)
                    return

        todo = iter(enumerate(items))
        timeout = Timeout(self._deadline, connect=min(CONNECT_SECONDS, self._deadline))
        async with (
            AsyncOpenAI(
                api_key=self._key or "none",
                base_url=self._url,
                max_retries=self._retries,
                timeout=timeout,
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self._concurrency, len(items))):
                group.create_task(worker(client))

    async def _outcome(
        self,
        client: Any,
        request: Request,
        value: Callable[[Request, Body, int], Value] | None = None,
    ) -> Outcome:
        """What comes of one request; `value` takes it from the response's body."""
        from openai import OpenAIError

        if self._gone:
            return Failure(FailureKind.CONNECTION, "not sent: the server was lost in calls before")
        started = time.perf_counter()
        used: tuple[int | None, int | None] = (None, None)
        broken: OpenAIError | None = None
        kind, reason = FailureKind.MALFORMED, ""
        try:
            body, n_top = await asyncio.wait_for(self._body(client, request), self._deadline)
            self._reached, self._lost = True, 0
            used = _usage(body)
            answered = (value or _value)(request, body, n_top)
        except TimeoutError:
            kind, reason = FailureKind.DEADLINE, f"no complete answer in {self._deadline:g} s"
        except _Unusable as error:
            kind, reason = error.kind, error.reason
        except OpenAIError as error:
            broken = error
        else:
            said = len(answered) if isinstance(answered, str) else 0
            return Answer(
                answered,
                prompt_tokens(request, self) if used[0] is None else used[0],
                self._estimate(request, said) if used[1] is None else used[1],
                time.perf_counter() - started,
            )
        if broken is not None:  # out of its handler: it can hold the key, and is no error's context
            kind, reason = self._explained(broken, request)
        seconds = time.perf_counter() - started
        return Failure(kind, self._line(reason), used[0] or 0, used[1] or 0, seconds)

    def _estimate(self, request: Request, characters: int) -> int:
        """Completion tokens where the server does not say."""
        if isinstance(request, Chat):
            return min(request.max_tokens, math.ceil(characters / BYTES_PER_TOKEN))
        return completion_tokens(request)

    async def _body(self, client: Any, request: Request) -> tuple[Body, int]:
        """The response's body; and for a `LogprobQuery`, how many tokens it tells at each place."""
        if isinstance(request, LogprobQuery):
            return await self._echo(client, request.text)
        if isinstance(request, JsonQuery):
            return await self._filled(client, request), 0
        if isinstance(request, Embed):
            create = client.embeddings.with_raw_response.create
            # without a format the library asks for base64, which some servers do not have
            return await self._sent(create, input=request.text, encoding_format="float"), 0
        return await self._sent(
            client.chat.completions.with_raw_response.create,
            messages=_messages(request),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        ), 0

    async def _sent(self, create: Any, **options: Any) -> Body:
        response = await create(model=self._model, **options)
        return _parsed(response.content)

    async def _filled(self, client: Any, request: JsonQuery) -> Body:
        """With a schema, or without where the server takes none."""
        from openai import BadRequestError, UnprocessableEntityError

        options = {
            "messages": _messages(request),
            "max_tokens": completion_tokens(request),
            "temperature": 0.0,
            "seed": request.seed,
        }
        create = client.chat.completions.with_raw_response.create
        if self._takes_schema:
            try:
                return await self._sent(create, response_format=_schema(request), **options)
            except (BadRequestError, UnprocessableEntityError):
                pass
        body = await self._sent(create, **options)
        self._takes_schema = False
        return body

    async def _echo(self, client: Any, text: str) -> tuple[Body, int]:
        """The prompt's log-probabilities, of as many tokens a place as the server takes."""
        from openai import BadRequestError, UnprocessableEntityError

        wanted = [n for n in TOP_LOGPROBS if n <= self._top]
        for n_top in wanted:
            try:
                body = await self._sent(
                    client.completions.with_raw_response.create,
                    prompt=text,
                    echo=True,
                    logprobs=n_top,
                    max_tokens=1,  # not 0, which some servers refuse; the token is ignored
                    temperature=0.0,
                )
            except (BadRequestError, UnprocessableEntityError):
                if n_top == wanted[-1]:
                    raise
                continue
            self._top = n_top
            return body, n_top
        raise AssertionError("no number of log-probabilities to ask for")

    # errors

    def _explained(self, error: Exception, request: Request) -> tuple[FailureKind, str]:
        """Kind and reason of a call that did not succeed; `InputError` where none can."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error, APIStatusError):
            self._lost = 0
            told = f"HTTP {error.status_code}: {error.message}"
            # a server may be without the one endpoint that a trial asks for
            trial = isinstance(request, LogprobQuery) and self._method == "auto"
            self._stop_early(error.status_code, told, trial)
            return FailureKind.STATUS, told
        if not isinstance(error, APIConnectionError):
            return FailureKind.MALFORMED, str(error)
        cause = type(error.__cause__).__name__
        if isinstance(error, APITimeoutError) and cause != "ConnectTimeout":
            return FailureKind.DEADLINE, f"no answer in {self._deadline:g} s"
        self._lost += 1
        self._gone = self._gone or self._lost >= max(LOST, self._concurrency)
        if not self._reached and (self._gone or cause in ("ConnectError", "ConnectTimeout")):
            raise InputError(
                f"{self._server} cannot be reached: check that the server runs, and --base-url"
            )
        return FailureKind.CONNECTION, f"no connection, or it broke ({cause})"

    def _stop_early(self, status: int, told: str, trial: bool) -> None:
        """Raises `InputError` where a refusal before the first answer means that all will be refused."""
        if self._reached:
            return
        if status == 401 or (status == 403 and not trial):
            check = f"check {KEY}" if self._key else f"set {KEY}, which is not set"
            raise InputError(self._line(f"{self._server} refused the key: {check} ({told})"))
        if status == 404 and not trial:
            raise InputError(
                self._line(
                    f"{self._server} has no model {self._model}: check openai:MODEL, and --base-url,"
                    f" which often ends in /v1 ({told})"
                )
            )

    def _line(self, text: str) -> str:
        """One short line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 1] + "…"


def _drive(runner: asyncio.Runner, work: Any, put: Callable[[Any], None]) -> None:
    """Runs the loop to its end; what it raises goes to whoever waits, if anybody still does."""
    try:
        with runner:
            runner.run(work)
    except BaseException as error:
        put(error)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


# what is sent


def _messages(request: Chat | JsonQuery) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in request.messages]


def _schema(request: JsonQuery) -> Body:
    values = {
        "type": "array",
        "items": {"type": "integer", "minimum": request.low, "maximum": request.high},
        "minItems": request.n,
        "maxItems": request.n,
    }
    schema = {
        "type": "object",
        "properties": {"values": values},
        "required": ["values"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "values", "strict": True, "schema": schema},
    }


# what comes back


def _value(request: Request, body: Body, n_top: int) -> Value:
    if isinstance(request, LogprobQuery):
        return _reading(request, body, n_top)
    if isinstance(request, Embed):
        return _vector(body)
    text = _text(body)
    return _integers(request, text, _choice(body)) if isinstance(request, JsonQuery) else text


def _parsed(content: bytes) -> Body:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _malformed(f"the server's {len(content):,} bytes are no JSON object")
    return body


def _malformed(reason: str) -> _Unusable:
    return _Unusable(FailureKind.MALFORMED, reason)


def _unreadable(reason: str) -> _Unusable:
    return _Unusable(FailureKind.UNREADABLE, reason)


def _usage(body: Body) -> tuple[int | None, int | None]:
    """Prompt and completion tokens, None where they are not told."""
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return (prompt if _count(prompt) else None), (completion if _count(completion) else None)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _choice(body: Body) -> Body:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _malformed("the answer has no choices")
    if choices[0].get("finish_reason") == "content_filter":
        raise _Unusable(FailureKind.REFUSED, "stopped by the server's content filter")
    return choices[0]


def _text(body: Body) -> str:
    """What the assistant says."""
    message = _choice(body).get("message")
    if not isinstance(message, dict):
        raise _malformed("the answer has no message")
    if message.get("refusal"):
        raise _Unusable(FailureKind.REFUSED, f"the model refused: {message['refusal']}")
    text = message.get("content")
    if text is None or (isinstance(text, str) and not text.strip()):
        raise _Unusable(FailureKind.EMPTY, "the answer is empty")
    if not isinstance(text, str):
        raise _malformed("the answer is no text")
    return text.encode(errors="replace").decode()  # halves of a cut pair of surrogates are no text


def _integers(request: JsonQuery, text: str, choice: Body) -> tuple[int, ...]:
    """[n] the values asked for; a fence of Markdown around them is no fault."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        cut = choice.get("finish_reason") == "length"
        raise _malformed("JSON cut off at the limit of tokens" if cut else "no JSON") from None
    values = found.get("values") if isinstance(found, dict) else None
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


def _vector(body: Body) -> np.ndarray:
    """[E]"""
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


# log-probabilities of the prompt


def _reading(request: LogprobQuery, body: Body, n_top: int) -> OptionLogprobs:
    """Raises `UNREADABLE` where a slot cannot be placed or none of the options is told at it."""
    begins, tokens, tops = _echoed(body, request.text)
    first: dict[int, int] = {}
    for i, begin in enumerate(begins):
        first.setdefault(begin, i)
    at = [_entry(first.get(slot), tokens, request.text, slot) for slot in request.offsets]
    if None in at:
        raise _unreadable(f"no token begins at {at.count(None)} of {len(at)} slots")
    found = [_found(tops[i], request.options, n_top) for i in at if i is not None]
    absolute = np.array([log_probs for log_probs, _ in found])  # [n, O]
    n_silent = int(np.isneginf(absolute).all(axis=1).sum())
    if n_silent:
        raise _unreadable(
            f"none of the options is among the {n_top} likeliest tokens at {n_silent} of {len(at)}"
            " slots"
        )
    total = np.logaddexp.reduce(absolute, axis=1, keepdims=True)  # [n, 1]
    return OptionLogprobs(
        (absolute - total).astype(np.float32),
        np.exp(total[:, 0]).clip(0, 1).astype(np.float32) if request.full else None,
        np.array([ranks for _, ranks in found], dtype=np.uint16) if request.full else None,
    )


def _echoed(body: Body, text: str) -> tuple[list[int], list[str], list[Any]]:
    """[P] of each token of the prompt: where in `text` it begins, its string, what could stand there.

    Raises `UNREADABLE` unless the tokens end where the text ends, with or without a begin token in
    front and with or without the generated token behind.
    """
    told = _choice(body).get("logprobs")
    told = told if isinstance(told, dict) else {}
    offsets, tokens, tops = (_list(told.get(k)) for k in ("text_offset", "tokens", "top_logprobs"))
    if (
        not 0 < len(offsets) == len(tokens) == len(tops)
        or not all(map(_count, offsets))
        or not all(isinstance(token, str) for token in tokens)
    ):
        raise _unreadable("the server tells no log-probabilities and offsets of the prompt")
    ends = [*offsets[1:], offsets[-1] + len(tokens[-1])]
    # a begin token is counted as text; it is not in the text
    special = 0 if text.startswith(_plain(tokens[0])) else len(tokens[0])
    for shift in sorted({0, special}):
        for n in (len(tokens) - 1, len(tokens)):
            if n and ends[n - 1] - shift == len(text):
                return [offset - shift for offset in offsets[:n]], tokens[:n], tops[:n]
    raise _unreadable(
        f"the offsets of the prompt's tokens end at {ends[-1]}, and it has {len(text)} characters:"
        " they are not those of its characters"
    )


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else []


def _entry(i: int | None, tokens: list[str], text: str, slot: int) -> int | None:
    """`i`, the first token told to begin at a slot, if it is the text that stands there; else None.

    Where the bytes of a character are cut over tokens, all but one of them are told as empty.
    """
    token = "" if i is None else _plain(tokens[i])
    return i if token and text.startswith(token, slot) else None


def _plain(token: str) -> str:
    return token.replace("▁", " ")  # SentencePiece's mark of a space


def _found(top: Any, options: tuple[str, ...], n_top: int) -> tuple[list[float], list[int]]:
    """[O] absolute log-probabilities (-inf where not told) and ranks.

    Tokens are matched as they are, or without spaces around them where no option is told as it is.
    The token that stands there is told even if it is not among the likeliest: its rank is unknown.
    """
    told = {
        token: float(x)
        for token, x in (top if isinstance(top, dict) else {}).items()
        if isinstance(x, int | float) and _MINUS_INFINITY < x <= 0.01
    }
    exact: dict[str, tuple[float, int]] = {}
    bare: dict[str, tuple[float, int]] = {}
    for rank, token in enumerate(sorted(told, key=lambda t: -told[t])):
        entry = told[token], rank if rank < n_top else NO_RANK
        exact[token] = entry
        bare.setdefault(_plain(token).strip(" "), entry)
    matches = exact if any(option in exact for option in options) else bare
    entries = [matches.get(option, (-math.inf, NO_RANK)) for option in options]
    return [log_prob for log_prob, _ in entries], [rank for _, rank in entries]


def _token_begins(request: Request, body: Body, n_top: int) -> tuple[int, ...]:
    """[P] offsets at which the prompt's tokens begin."""
    assert isinstance(request, LogprobQuery)
    return tuple(_echoed(body, request.text)[0])


def _n_tokens(begins: Sequence[int], start: int, end: int) -> int:
    """Tokens with a part between `start` and `end`, one more where they reach beyond."""
    inside = sum(start <= b < end for b in begins) + (start not in begins)
    return inside if start in begins and end in begins else inside + 1


# arguments


def _require_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError:
        raise missing_extra("openai", "openai:MODEL", "openai") from None


def _key(*, needed: bool) -> str:
    """Empty where none is set and none is needed."""
    key = os.environ.get(KEY, "").strip()
    if not key and needed:
        raise InputError(
            f"{KEY} is not set: set it to your key, or give --base-url for a server of your own"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError(f"{KEY} holds characters that no key has: set it to your key alone")
    return key


def _place(url: str) -> str:
    """Host and path of a server's address, without anything secret."""
    expected = "http://HOST:PORT/v1 or the like was expected"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"--base-url is no address: {expected}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"--base-url holds a password or a query: {expected}; a key goes into {KEY}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"--base-url {url}: {expected}")
    return f"{host}:{port}{parts.path}".rstrip("/") if port else f"{host}{parts.path}".rstrip("/")


def _last(model: str) -> str:
    return model.strip().rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
