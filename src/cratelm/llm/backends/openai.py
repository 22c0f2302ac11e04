"""Any OpenAI-compatible server as a backend: `openai:MODEL`, with `--base-url` for your own server.

A `LogprobQuery` is answered in the first of the ways of `cratelm.llm.backends.openai_ways` that a server
supports, which probe calls find. With `--method auto`, servers that support none are asked for JSON
(`JsonQuery`) instead.

This module sends requests: concurrency, retries, deadlines, lost servers, secrets.
"""

import asyncio
import contextlib
import email.utils
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
from cratelm.llm.backends.openai_parameters import Parameters, refusal_of
from cratelm.llm.backends.openai_responses import (
    SLOTS,
    Body,
    UnusableAnswer,
    parse_body,
    read_usage,
    read_value,
    token_begins,
    tokens_between,
)
from cratelm.llm.backends.openai_ways import N_PROBS, Way, as_echo, as_slots, options_of
from cratelm.llm.requests import (
    Answer,
    Chat,
    Embed,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    Outcome,
    Request,
    Value,
    completion_tokens,
    prompt_tokens,
)
from cratelm.llm.thinking import no_answer_before

Method = Literal["auto", "logprobs", "json"]
T = TypeVar("T")
R = TypeVar("R")

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
TOP_LOGPROBS = (20, 5)
"""number of most likely tokens requested at each position: vLLM allows up to 20 by default, OpenAI 5"""
CONNECT_SECONDS = 10.0
FIRST_PAUSE = 0.5
"""seconds before the first retry; each further pause is twice as long, plus a random amount"""
LONGEST_PAUSE = 8.0
"""seconds"""
LONGEST_RETRY_AFTER = 60.0
"""seconds: if a server asks for a longer wait, the usual pause is used, since waiting would use up the
deadline"""
PROBE_ATTEMPTS = 5
"""attempts at a probe call for token counts, in addition to the retries of each"""
BYTES_PER_TOKEN = 3.5
LARGEST_RESPONSE = 64_000_000
"""bytes after which a response is not read further: one of a long prompt with log-probabilities has 3 MB"""
LOST = 8
"""consecutive calls without a connection, each after all retries, after which a server counts as lost"""
_REASON_CHARACTERS = 200
_WAY_CHARACTERS = 150
"""of the reason why one of several ways does not work"""
_TRANSIENT = (FailureKind.CONNECTION, FailureKind.DEADLINE)
"""failures that say nothing about what a server supports"""

_PROBE = LogprobQuery(
    preamble="",
    context='é 中 😀 "numbers"\\n\n',
    body="one\t1\ntwo\t2\nthree\t3\nfour\t4\nfive\t5\nsix\t6\nseven\t7\neight\t8\n",
    slots=(38, 46, 54),
    options=tuple("0123456789"),
)
"""Any model can predict the last three digits of this sequence, so they are among the most likely tokens
if the offsets are correct even after non-ASCII text"""


class ServerBackend:
    """A model behind an OpenAI-compatible server. Connects at the first call.

    The key is read from the environment variable `OPENAI_API_KEY` and sent to the server only.
    Transient errors (408, 409, 429, 5xx, lost connections) are retried after growing pauses, or after
    those that the server's Retry-After header requests, all within the deadline of the call.
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
        thinking_tokens: int = 0,
    ):
        """Check the arguments; nothing is sent.

        `base_url` None: OpenAI's API. `concurrency`: calls in flight at a time. `deadline`: seconds
        that one call may take, including all retries. `thinking_tokens`: tokens of thoughts that are allowed
        in addition to those of an answer.

        Raises `InputError` if `openai` is not installed, no key is set for OpenAI, or an argument
        is out of range.
        """
        _require_openai()
        if not model.strip() or concurrency < 1 or retries < 0 or not deadline > 0:
            raise InputError(
                f"model {model!r}, concurrency {concurrency}, retries {retries}, deadline {deadline}:"
                " these must be a model's name, at least 1, at least 0, and more than 0 seconds"
            )
        if method not in ("auto", "logprobs", "json"):
            raise InputError(f"method {method}: it must be auto, logprobs or json")
        self._model, self._url = model, base_url or OPENAI
        self.address = _address(self._url)
        self._key = _key(needed=base_url is None)
        self._concurrency, self._retries, self._deadline = concurrency, retries, deadline
        self._method: Method = method
        self.thinking_tokens = thinking_tokens
        self.name = re.sub(r"[^A-Za-z0-9._-]", "-", _last_part(model)).strip(".-") or "model"
        self.reason = ""
        """why no way of reading log-probabilities works; empty if one does, or none was tried"""
        self._has_answered = False  # the server has answered a request
        self._n_unconnected = 0  # consecutive calls without a connection
        self._is_lost = False  # too many of them: the remaining requests are not sent
        self._logprobs: bool | None = None  # not decided yet
        self._is_probing = False
        self._way, self._top = Way.ECHO, TOP_LOGPROBS[0]
        self._turns: asyncio.Semaphore | None = None
        """how many texts are read at a time if each slot takes a call"""
        self._takes_schema = True
        self._parameters = Parameters(self.name)

    @property
    def identity(self) -> dict[str, str]:
        """Return the model's name and the method, but not the address, since a server may move."""
        return {
            "backend": "openai",
            "model": self._model,
            "method": self._method,
        }

    @property
    def window(self) -> int:
        """Return how many requests to pass at a time."""
        return 32 * self._concurrency

    @property
    def parallel(self) -> int:
        """Return how many calls are in flight at a time."""
        return self._concurrency

    @property
    def way(self) -> str:
        """Return how log-probabilities are read; empty if they are not."""
        return str(self._way) if self._logprobs and not self.reason else ""

    @property
    def reads_by_slot(self) -> bool:
        """Return whether a `LogprobQuery` takes a call for each of its slots."""
        return self._way.by_slot

    @property
    def supports_logprobs(self) -> bool:
        """Return whether `LogprobQuery` is used; probe calls find in which way, see `way` and `reason`.

        True with the method `logprobs` even if no way works. Raises `InputError` if with `auto` a probe is
        inconclusive: no connection, or no answer in time.
        """
        if self._logprobs is None:
            self._logprobs = self._method != "json" and (
                self._found_way() or self._method == "logprobs"
            )
        return self._logprobs

    def _found_way(self) -> bool:
        """Return whether a way of reading log-probabilities works, and use it."""
        reasons = []
        ways = [way for way in Way if self._url != OPENAI or way is not Way.LLAMA]
        for self._way in ways:
            self._top = TOP_LOGPROBS[0]
            outcome = self._probe()
            if isinstance(outcome, Failure) and outcome.kind in _TRANSIENT:
                outcome = self._probe()
            if isinstance(outcome, Answer):
                return True
            if outcome.kind in _TRANSIENT and self._method == "auto":
                raise InputError(
                    f"{self.address} did not answer a probe call ({outcome.kind}: {outcome.reason}):"
                    " type the command again, with a longer --deadline or with --method json"
                )
            reasons.append(f"{self._way}: {outcome.kind}: {outcome.reason}")
        self._way = Way.ECHO
        self.reason = "; ".join(_shortened(reason, _WAY_CHARACTERS) for reason in reasons)
        return False

    def _probe(self) -> Outcome:
        self._is_probing = True
        try:
            ((_, outcome),) = [pair for group in self.answer([_PROBE]) for pair in group]
        finally:
            self._is_probing = False
        return outcome

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Yield outcomes one by one as they arrive; closing the generator early cancels the calls in flight.

        Raises `InputError` if, before the first answer, the key or the model is refused or the server
        cannot be reached. If the server is lost later, the remaining calls fail.
        """
        if self._is_lost:
            self._has_answered = False  # the server may have been replaced: start over
        self._is_lost, self._n_unconnected = False, 0
        with contextlib.closing(self._run_all(requests, self._outcome)) as outcomes:
            for index, outcome in outcomes:
                yield [(index, outcome)]

    def count_tokens(self, text: str) -> int:
        """Return an estimate from the number of bytes, since only the server has the tokenizer."""
        return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """Return the number of tokens of each option after `slot_before`; empty if it is not reported.

        Makes one call per option, and up to `PROBE_ATTEMPTS` if it fails. An option that is
        merged with its surroundings counts as one more token, since it is not a single token there. If only the
        likeliest next tokens are reported, a longer option that is not among them counts as two.
        """
        if not self.supports_logprobs or self.reason:
            return []
        if self.reads_by_slot:
            return self._counts_by_slot(options)
        start = len(slot_before)
        counts: dict[str, int] = {}
        ask_begins = partial(self._outcome, value=token_begins)
        for _ in range(PROBE_ATTEMPTS):
            uncounted = [option for option in options if option not in counts]
            echoes = [LogprobQuery("", slot_before, option + "\n", (), ()) for option in uncounted]
            with contextlib.closing(self._run_all(echoes, ask_begins)) as outcomes:
                for index, outcome in outcomes:
                    if isinstance(outcome, Failure):
                        self.reason = f"{outcome.kind}: {outcome.reason}"
                    else:
                        begins: Any = outcome.value
                        end = start + len(uncounted[index])
                        counts[uncounted[index]] = tokens_between(begins, start, end)
            if len(counts) == len(set(options)):
                self.reason = ""
                return [counts[option] for option in options]
        return []

    def _counts_by_slot(self, options: Sequence[str]) -> list[int]:
        """Return 1 for each option that is reported as a next token, and 2 for the others.

        Single characters count as 1 even if too few tokens are reported to hold all of them.
        """
        lines = [f"{option}\t{option}\n" for option in options]
        starts = [sum(map(len, lines[:i])) + len(option) + 1 for i, option in enumerate(options)]
        query = LogprobQuery("", _PROBE.context, "".join(lines), tuple(starts), tuple(options))
        for _ in range(PROBE_ATTEMPTS):
            ((_, outcome),) = [pair for group in self.answer([query]) for pair in group]
            if isinstance(outcome, Answer):
                self.reason = ""
                log_probs: Any = outcome.value
                reported = ~np.isneginf(log_probs.log_probs).all(axis=0)  # [O]
                return [
                    1 if len(option) == 1 or is_reported else 2
                    for option, is_reported in zip(options, reported, strict=True)
                ]
            self.reason = f"{outcome.kind}: {outcome.reason}"
        return []

    # calls

    def _run_all(
        self, items: Sequence[T], do: Callable[[Any, T], Awaitable[R]]
    ) -> Generator[tuple[int, R]]:
        """Yield the index and `do(client, item)` of all items as they finish, `concurrency` at a time.

        The event loop runs in a thread of its own, so that calls continue while the caller handles
        outcomes, and the caller may already have a running loop (notebooks). Exceptions of `do` are
        raised here.
        """
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        loop = runner.get_loop()
        thread = threading.Thread(
            target=_run_loop, args=(runner, self._work(items, do, done.put), done.put), daemon=True
        )
        thread.start()
        try:
            for _ in items:
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
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
        self._turns = None  # it belongs to an event loop
        timeout = Timeout(self._deadline, connect=min(CONNECT_SECONDS, self._deadline))
        async with (
            AsyncOpenAI(
                api_key=self._key or "none",
                base_url=self._url,
                max_retries=0,  # `_send` retries
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
        """Return the outcome of one request; `value` extracts it from the response's body."""
        from openai import OpenAIError

        if self._is_lost:
            return Failure(FailureKind.CONNECTION, "not sent: earlier calls lost the server")
        started = time.perf_counter()
        used: tuple[int | None, int | None] = (None, None)
        broken: OpenAIError | None = None
        kind, reason = FailureKind.MALFORMED, ""
        # a text that takes many calls has no deadline; each of its calls has
        many = isinstance(request, LogprobQuery) and self.reads_by_slot
        try:
            deadline = None if many else self._deadline
            body, n_top = await asyncio.wait_for(self._body(client, request), deadline)
            self._has_answered, self._n_unconnected = True, 0
            used = read_usage(body)
            answered = (value or read_value)(request, body, n_top)
        except TimeoutError:
            kind, reason = FailureKind.DEADLINE, f"no complete answer in {self._deadline:g} s"
        except UnusableAnswer as error:
            kind, reason = error.kind, error.reason
            if kind is FailureKind.CUT:
                cap = completion_tokens(request, self.thinking_tokens)
                reason = no_answer_before(cap, self.thinking_tokens)
                used = used[0] or prompt_tokens(request, self), used[1] or cap
        except OpenAIError as error:
            broken = error
        else:
            n_characters = len(answered) if isinstance(answered, str) else 0
            return Answer(
                answered,
                prompt_tokens(request, self) if used[0] is None else used[0],
                self._estimate(request, n_characters) if used[1] is None else used[1],
                time.perf_counter() - started,
            )
        # Outside the handler, because the library's error can contain the key and must not become the
        # context of an error that is raised here.
        if broken is not None:
            kind, reason = self._classify(broken, request)
        seconds = time.perf_counter() - started
        return Failure(kind, self._one_line(reason), used[0] or 0, used[1] or 0, seconds)

    def _estimate(self, request: Request, characters: int) -> int:
        """Return an estimate of the completion tokens, for servers that do not report them."""
        if isinstance(request, Chat):
            return min(
                completion_tokens(request, self.thinking_tokens),
                math.ceil(characters / BYTES_PER_TOKEN),
            )
        return completion_tokens(request, self.thinking_tokens, by_slot=self.reads_by_slot)

    async def _body(self, client: Any, request: Request) -> tuple[Body, int]:
        """Return the response's body, and how many tokens it reports per position (0 for other requests)."""
        if isinstance(request, LogprobQuery):
            return await self._label_body(client, request)
        if isinstance(request, JsonQuery):
            return await self._json_values(client, request), 0
        if isinstance(request, Embed):
            create = client.embeddings.with_streaming_response.create
            # by default the library asks for base64, which some servers do not support
            return await self._send(create, input=request.text, encoding_format="float"), 0
        return await self._send(
            client.chat.completions.with_streaming_response.create,
            messages=_messages(request),
            max_tokens=completion_tokens(request, self.thinking_tokens),
            temperature=request.temperature,
            seed=request.seed,
        ), 0

    async def _send(self, create: Any, **options: Any) -> Body:
        """Make one call, repeated after transient errors; the caller's deadline includes the pauses.

        It is also repeated without the parameters that the server refuses, if it can do without them.
        """
        from openai import BadRequestError, UnprocessableEntityError
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        while True:
            sent = self._parameters.accepted(options)
            retrying = AsyncRetrying(
                retry=retry_if_exception(_is_transient),
                stop=stop_after_attempt(1 + self._retries),
                wait=_pause,
                reraise=True,
            )
            try:
                return parse_body(await retrying(_content, create, model=self._model, **sent))
            except (BadRequestError, UnprocessableEntityError) as error:
                if not self._parameters.learn(refusal_of(error.body, error.message), sent):
                    raise

    async def _json_values(self, client: Any, request: JsonQuery) -> Body:
        """Request JSON with a schema, or without one if the server refuses it."""
        from openai import BadRequestError, UnprocessableEntityError

        options = {
            "messages": _messages(request),
            "max_tokens": completion_tokens(request, self.thinking_tokens),
            "temperature": 0.0,
            "seed": request.seed,
        }
        create = client.chat.completions.with_streaming_response.create
        if self._takes_schema:
            try:
                return await self._send(create, response_format=_schema(request), **options)
            except (BadRequestError, UnprocessableEntityError):
                pass
        body = await self._send(create, **options)
        self._takes_schema = False
        return body

    async def _label_body(self, client: Any, request: LogprobQuery) -> tuple[Body, int]:
        """Return log-probabilities in one of the forms of `read_logprobs`, and how many tokens they are of."""
        way, bodies, n_top = self._way, [], 0
        if not way.by_slot:
            body, n_top = await self._completion(client, way, request.text)
            body.pop(SLOTS, None)
            return (as_echo(body, request) if way is Way.PROMPT else body), n_top
        if self._turns is None:
            n = await self._n_turns(client)
            self._turns = self._turns or asyncio.Semaphore(n)  # another call may have been faster
        async with self._turns:
            for offset in request.offsets:
                one = self._completion(client, way, request.text[:offset])
                body, n_top = await asyncio.wait_for(one, self._deadline)
                bodies.append(body)
        return as_slots(bodies), n_top

    async def _n_turns(self, client: Any) -> int:
        """Return how many texts to read at a time, slot by slot.

        llama.cpp's server holds what it has computed of as many texts as it has slots; with more texts at a
        time each call would begin anew.
        """
        from openai import OpenAIError

        if self._way is not Way.LLAMA:
            return self._concurrency
        try:
            found = await client.with_options(base_url=self._root).get("/props", cast_to=object)
        except OpenAIError:
            return 1
        n = found.get("total_slots") if isinstance(found, dict) else None
        return min(max(n, 1), self._concurrency) if isinstance(n, int) else 1

    @property
    def _root(self) -> str:
        """Return the server's address without /v1, where llama.cpp's own interface is."""
        return self._url.rstrip("/").removesuffix("/v1")

    async def _completion(self, client: Any, way: Way, prompt: str) -> tuple[Body, int]:
        """Return a completion with as many log-probabilities per position as the server allows."""
        from openai import BadRequestError, UnprocessableEntityError

        if way is Way.LLAMA:
            client = client.with_options(base_url=self._root)
        allowed = [N_PROBS] if way is Way.LLAMA else [n for n in TOP_LOGPROBS if n <= self._top]
        for n_top in allowed:
            try:
                create = client.completions.with_streaming_response.create
                body = await self._send(create, **options_of(way, prompt, n_top))
            except (BadRequestError, UnprocessableEntityError):
                if n_top == allowed[-1]:
                    raise
                continue
            if way is not Way.LLAMA:
                self._top = n_top
            return body, n_top
        raise AssertionError("no number of log-probabilities to ask for")

    # errors

    def _classify(self, error: Exception, request: Request) -> tuple[FailureKind, str]:
        """Return kind and reason of a failed call; raise `InputError` if no call can succeed."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error, APIStatusError):
            self._n_unconnected = 0
            reason = f"HTTP {error.status_code}: {error.message}"
            # a server may lack the endpoint that a probe uses but support the others
            is_probe = isinstance(request, LogprobQuery) and (
                self._is_probing or self._method == "auto"
            )
            self._raise_if_hopeless(error.status_code, reason, is_probe)
            return FailureKind.STATUS, reason
        if not isinstance(error, APIConnectionError):
            return FailureKind.MALFORMED, str(error)
        cause = type(error.__cause__).__name__
        if isinstance(error, APITimeoutError) and cause != "ConnectTimeout":
            return FailureKind.DEADLINE, f"no answer in {self._deadline:g} s"
        self._n_unconnected += 1
        self._is_lost = self._is_lost or self._n_unconnected >= max(LOST, self._concurrency)
        if not self._has_answered and (
            self._is_lost or cause in ("ConnectError", "ConnectTimeout")
        ):
            raise InputError(
                f"{self.address} cannot be reached: check that the server is running, and check --base-url"
            )
        return FailureKind.CONNECTION, f"no connection, or a broken one ({cause})"

    def _raise_if_hopeless(self, status: int, reason: str, is_probe: bool) -> None:
        """Raise `InputError` if a refusal before the first answer means that all will be refused."""
        if self._has_answered:
            return
        if status == 401 or (status == 403 and not is_probe):
            check = f"check {KEY}" if self._key else f"set {KEY} to your key"
            raise InputError(self._one_line(f"{self.address} refused the key: {check} ({reason})"))
        if status == 404 and not is_probe:
            raise InputError(
                self._one_line(
                    f"{self.address} has no model {self._model}: check openai:MODEL and --base-url,"
                    f" which often ends in /v1 ({reason})"
                )
            )

    def _one_line(self, text: str) -> str:
        """Return `text` as one short line of printable characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
        return _shortened(text, _REASON_CHARACTERS)


def _shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _run_loop(runner: asyncio.Runner, work: Any, put: Callable[[Any], None]) -> None:
    """Run the loop to its end and pass its exception to `put`, even if nobody is waiting any more."""
    try:
        with runner:
            runner.run(work)
    except BaseException as error:
        put(error)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


# retries


def _is_transient(error: BaseException) -> bool:
    """Return True if the same call may succeed later; the header `x-should-retry` takes precedence."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        verdict = error.response.headers.get("x-should-retry")
        if verdict in ("true", "false"):
            return verdict == "true"
        # 501, not implemented, is final
        return error.status_code in (408, 409, 429) or (
            error.status_code >= 500 and error.status_code != 501
        )
    return isinstance(error, APIConnectionError)  # time-outs among them


def _pause(state: Any) -> float:
    """Return the seconds before the next attempt: as the server requests, else growing, with jitter."""
    from tenacity import wait_exponential_jitter

    seconds = _retry_after(state.outcome.exception())
    if seconds is not None:
        return seconds
    return wait_exponential_jitter(FIRST_PAUSE, LONGEST_PAUSE, jitter=FIRST_PAUSE)(state)


def _retry_after(error: BaseException | None) -> float | None:
    """Return the seconds to wait from a Retry-After header, a number or an HTTP date; None if unusable."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0 < seconds <= LONGEST_RETRY_AFTER else None


# bodies


async def _content(create: Any, **options: Any) -> bytes:
    """Make one call, and return the response's content, or as much of it as shows that it is too long."""
    from openai import APIConnectionError, APITimeoutError

    content = bytearray()
    async with create(**options) as response:
        try:
            async for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST_RESPONSE:
                    break
        except (
            Exception
        ) as error:  # of the library's HTTP client, whose errors it wraps only earlier
            if "Timeout" in type(error).__name__:
                raise APITimeoutError(request=response.http_request) from error
            raise APIConnectionError(request=response.http_request) from error
    if len(content) > LARGEST_RESPONSE:
        reason = f"the server's response is longer than {LARGEST_RESPONSE / 1e6:.0f} MB"
        raise UnusableAnswer(FailureKind.MALFORMED, reason)
    return bytes(content)


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


# arguments


def _require_openai() -> None:
    try:
        import openai  # noqa: F401
        import tenacity  # noqa: F401
    except ImportError:
        raise missing_extra("openai", "openai:MODEL", "openai and tenacity") from None


def _key(*, needed: bool) -> str:
    """Return the API key; empty if none is set and none is needed.

    Raises `InputError` if a needed key is not set, or if it contains characters that no key has.
    """
    key = os.environ.get(KEY, "").strip()
    if not key and needed:
        raise InputError(
            f"{KEY} is not set: set it to your key, or give --base-url for your own server"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError(f"{KEY} contains characters that no key has: set it to your key only")
    return key


def _address(url: str) -> str:
    """Return host and path of a server's address, without anything secret.

    Raises `InputError` if `url` is not an HTTP address, or contains a password or a query.
    """
    expected = "it must be an address such as http://HOST:PORT/v1"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"--base-url is not an address: {expected}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"--base-url contains a password or a query: {expected}; a key goes into {KEY}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"--base-url {url}: {expected}")
    return f"{host}:{port}{parts.path}".rstrip("/") if port else f"{host}{parts.path}".rstrip("/")


def _last_part(model: str) -> str:
    return model.strip().rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
