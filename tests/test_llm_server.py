"""The server backend against a real local HTTP server: answers, faults, limits, secrets, offsets.

Every fault of `llm_server` is met one by one and all at once; no test needs a network.
"""

import asyncio
import builtins
import contextlib
import logging
import threading
import time
import traceback
from collections import Counter
from email.utils import formatdate
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm_server import MODEL, RETRIED, Fault, LLMServer, always, embedding, likely, storm

from cratelm.errors import InputError
from cratelm.llm.backends import openai as server_module
from cratelm.llm.backends import openai_responses
from cratelm.llm.backends.openai import LOST, ServerBackend
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.probe import probe_levels
from cratelm.llm.prompts.neurons import simulate_fill, simulate_read
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
)

SECRET = "sk-local-4f1d2c3b5a69788796a5b4c3d2e1f0"
STRINGS = ["The", " fox", " and", "é", " 中", "😀", "\n", "\t", '"', " fox", ""]
DIGITS = tuple("0123456789")
FILL = simulate_fill("word fox", np.arange(len(STRINGS)), STRINGS, 9)
READ = simulate_read("word fox", np.arange(len(STRINGS)), STRINGS, 9, full=True)
CHAT = Chat((("system", "Explain."), ("user", "«fox» and «fox»")))
EMBED = Embed("the quick fox")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts, and no proxy or key of the machine."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def backend(server: LLMServer, **options: Any) -> ServerBackend:
    return ServerBackend(MODEL, server.base_url, **{"method": "logprobs", **options})


def ask(backend: ServerBackend, *requests: Request) -> list[Outcome]:
    """In the order of the requests; every one has exactly one outcome."""
    got = [pair for group in backend.answer(requests) for pair in group]
    assert sorted(index for index, _ in got) == list(range(len(requests)))
    return [outcome for _, outcome in sorted(got, key=lambda pair: pair[0])]


def failed(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    assert "\n" not in outcome.reason
    assert 0 < len(outcome.reason) <= 200
    return outcome


def answered(outcome: Outcome) -> Any:
    assert isinstance(outcome, Answer), outcome
    return outcome.value


# answers


def test_every_kind_of_request_is_answered():
    with LLMServer() as server:
        chat, fill, read, embed = ask(backend(server), CHAT, FILL, READ, EMBED)
    assert answered(chat) == "the token fox"
    assert chat.prompt_tokens == server.n_tokens("Explain.\n«fox» and «fox»")
    assert chat.completion_tokens == server.n_tokens("the token fox")
    values = answered(fill)
    assert len(values) == len(STRINGS)
    assert min(values[1], values[9]) >= 8 > 1 >= values[0]
    reading = answered(read)
    assert reading.log_probs.shape == (len(STRINGS), 10)
    assert reading.log_probs.dtype == np.float32
    assert np.exp(reading.log_probs).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert reading.log_probs.argmax(axis=1)[[1, 9]].min() >= 8
    assert answered(embed).tolist() == embedding("the quick fox")
    assert answered(embed).dtype == np.float32


def test_sent_options_are_the_requests():
    chat = Chat((("user", "x"),), max_tokens=7, temperature=0.5, seed=11)
    with LLMServer() as server:
        ask(backend(server), chat, FILL, READ, EMBED)
        sent = {(call.path, "response_format" in call.body): call.body for call in server.calls}
    body = sent["/v1/chat/completions", False]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (7, 0.5, 11)
    asked = sent["/v1/chat/completions", True]["response_format"]["json_schema"]
    values = asked["schema"]["properties"]["values"]
    assert asked["strict"] is True
    assert (values["minItems"], values["maxItems"]) == (len(STRINGS), len(STRINGS))
    assert (values["items"]["minimum"], values["items"]["maximum"]) == (0, 9)
    read = sent["/v1/completions", False]
    assert (read["prompt"], read["echo"], read["logprobs"]) == (READ.text, True, 20)
    assert (read["max_tokens"], read["temperature"]) == (1, 0)
    embed = sent["/v1/embeddings", False]
    assert (embed["input"], embed["encoding_format"]) == (EMBED.text, "float")


def test_mass_and_ranks_are_those_of_the_server():
    with LLMServer() as server:
        full, plain = ask(
            backend(server),
            READ,
            LogprobQuery("", READ.preamble + READ.context, READ.body, READ.slots, DIGITS),
        )
    reading = answered(full)
    for n, offset in enumerate(READ.offsets):
        top = likely(READ.text[:offset], 20, "?")
        order = sorted((t for t in top if t != "?"), key=lambda t: -top[t])
        told = {t: np.exp(top[t]) for t in top if t in DIGITS}
        assert reading.mass[n] == pytest.approx(sum(told.values()), rel=1e-5)
        for digit, rank in zip(DIGITS, reading.ranks[n], strict=True):
            assert rank == (order.index(digit) if digit in top else NO_RANK)
    assert answered(plain).mass is None
    assert answered(plain).ranks is None


def test_token_that_stands_there_has_no_rank_beyond_the_likeliest():
    read = LogprobQuery(
        "", "", "Neuron reacts to: the token fox\nfox\t0\n", (36,), DIGITS, full=True
    )
    assert read.text[36] == "0"
    with LLMServer(max_logprobs=5) as server:
        reading = answered(ask(backend(server), read)[0])
    assert reading.ranks[0, 0] == NO_RANK
    assert np.isfinite(reading.log_probs[0, 0])
    known = reading.ranks[0][reading.ranks[0] != NO_RANK]
    assert 0 < len(known) <= known.max() + 1 <= 5


def test_fewer_log_probabilities_are_asked_for_where_twenty_are_refused():
    other = LogprobQuery("", "", "a\t1\nb\t2\n", (6,), DIGITS)
    with LLMServer(max_logprobs=5) as server:
        model = backend(server)
        reading = answered(ask(model, READ)[0])
        answered(ask(model, other)[0])
        assert [call.body["logprobs"] for call in server.calls] == [20, 5, 5]
    assert (np.isfinite(reading.log_probs).sum(axis=1) <= 5).all()
    assert np.exp(reading.log_probs).sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_schema_is_given_up_once_where_it_is_refused():
    with LLMServer(schema=False) as server:
        model = backend(server)
        values = answered(ask(model, FILL)[0])
        assert len(values) == len(STRINGS)
        answered(ask(model, JsonQuery((*FILL.messages, ("user", "Give 11 integers")), 11, 0, 9))[0])
        assert ["response_format" in call.body for call in server.calls] == [True, False, False]


def test_usage_is_estimated_where_the_server_does_not_tell(monkeypatch):
    monkeypatch.setattr(LLMServer, "_usage", lambda self, prompt, said: {})
    with LLMServer() as server:
        chat, fill = ask(backend(server), CHAT, FILL)
    assert chat.prompt_tokens == 3 + 4 + 6 + 4  # 8 and 19 bytes by 3.5, 4 a message
    assert chat.completion_tokens == 4  # 13 bytes
    assert fill.completion_tokens == 16 + 4 * len(STRINGS)


# faults, one by one

AT_ONCE = {
    (Fault.TRUNCATED, CHAT): FailureKind.MALFORMED,
    (Fault.TRUNCATED, READ): FailureKind.MALFORMED,
    (Fault.REFUSAL, CHAT): FailureKind.REFUSED,
    (Fault.REFUSAL, FILL): FailureKind.REFUSED,
    (Fault.REFUSAL, READ): FailureKind.REFUSED,
    (Fault.EMPTY, CHAT): FailureKind.EMPTY,
    (Fault.EMPTY, FILL): FailureKind.EMPTY,
    (Fault.EMPTY, READ): FailureKind.UNREADABLE,
    (Fault.EMPTY, EMBED): FailureKind.MALFORMED,
    (Fault.GARBAGE, FILL): FailureKind.MALFORMED,
    (Fault.GARBAGE, READ): FailureKind.MALFORMED,
    (Fault.GARBAGE, EMBED): FailureKind.MALFORMED,
    (Fault.WRONG_COUNT, FILL): FailureKind.MALFORMED,
    (Fault.WRONG_COUNT, READ): FailureKind.UNREADABLE,
    (Fault.STALL, CHAT): FailureKind.DEADLINE,
    (Fault.DRIBBLE, READ): FailureKind.DEADLINE,
}


@pytest.mark.parametrize(
    ("fault", "request_"), AT_ONCE, ids=lambda x: type(x).__name__ + str(x)[:9]
)
def test_fault_is_its_kind_of_failure(fault, request_):
    deadline = 0.4 if fault in (Fault.STALL, Fault.DRIBBLE) else 20.0
    with LLMServer(always(fault)) as server:
        failure = failed(ask(backend(server, deadline=deadline), request_)[0])
        assert server.faults_served == {fault: 1}
    assert failure.kind == AT_ONCE[fault, request_]


def test_reasons_say_what_was_found():
    with LLMServer(always(Fault.WRONG_COUNT)) as server:
        failure = failed(ask(backend(server), FILL)[0])
        assert failure.reason == "9 values instead of 11"
        assert failure.completion_tokens > 0
    with LLMServer(always(Fault.GARBAGE)) as server:
        assert failed(ask(backend(server), FILL)[0]).reason == "JSON cut off at the token limit"


def test_garbage_in_a_chat_is_a_text():
    """Whatever a model says is its explanation; that it is 100 KB is the prompt's matter."""
    with LLMServer(always(Fault.GARBAGE)) as server:
        assert len(answered(ask(backend(server), CHAT)[0])) > 100_000


@pytest.mark.parametrize("fault", RETRIED)
def test_passing_fault_is_tried_again(fault):
    with LLMServer(always(fault, attempts=3)) as server:
        assert answered(ask(backend(server), CHAT)[0]) == "the token fox"
        assert server.faults_served == {fault: 3}


@pytest.mark.parametrize("fault", RETRIED)
def test_lasting_fault_fails_after_the_retries(fault):
    with LLMServer(always(fault)) as server:
        failure = failed(ask(backend(server, retries=2), CHAT)[0])
        assert server.faults_served == {fault: 3}
    lost = fault in (Fault.DROP, Fault.CUT)
    assert failure.kind == (FailureKind.CONNECTION if lost else FailureKind.STATUS)
    if not lost:
        assert failure.reason.startswith("HTTP 429" if fault == Fault.BUSY else "HTTP 500")


def test_retry_after_is_waited_for():
    with LLMServer(always(Fault.BUSY, attempts=1), retry_after=0.5) as server:
        started = time.monotonic()
        answered(ask(backend(server), CHAT)[0])
        assert 0.5 <= time.monotonic() - started < 5


def test_retry_after_may_be_a_date_and_a_long_one_is_not_waited_for():
    soon = formatdate(time.time() + 2, usegmt=True)
    with LLMServer(always(Fault.BUSY, attempts=1), retry_after=soon) as server:
        started = time.monotonic()
        answered(ask(backend(server), CHAT)[0])
        assert 0.8 <= time.monotonic() - started < 6
    for too_long in (3600, "soon", formatdate(0, usegmt=True)):
        with LLMServer(always(Fault.BUSY, attempts=1), retry_after=too_long) as server:
            started = time.monotonic()
            answered(ask(backend(server), CHAT)[0])
            assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "headers", "again"),
    [
        (400, {}, False), (401, {}, False), (404, {}, False), (422, {}, False),
        (408, {}, True), (409, {}, True), (429, {}, True), (500, {}, True), (503, {}, True),
        (429, {"x-should-retry": "false"}, False), (400, {"x-should-retry": "true"}, True),
    ],
)  # fmt: skip
def test_only_transient_errors_are_retried(status, headers, again):
    response = httpx.Response(status, headers=headers, request=httpx.Request("POST", "http://x"))
    error = openai.APIStatusError("no", response=response, body=None)  # type: ignore[arg-type]
    assert server_module._is_transient(error) is again
    assert server_module._is_transient(ValueError("a bug of ours")) is False


CONTENTS = {
    "[1, 2": "no JSON",
    "[1, 2]": 'JSON without a list of "values"',
    '{"values": 3}': 'JSON without a list of "values"',
    '{"values": [1, 2, 3]}': "3 values instead of 2",
    '{"values": [1, true]}': "1 values are not integers 0..9",
    '{"values": [1, 2.0]}': "1 values are not integers 0..9",
    '{"values": [-1, 10]}': "2 values are not integers 0..9",
    '{"values": ["1", null]}': "2 values are not integers 0..9",
    '{"values": [1, ' + "9" * 5000 + "]}": "no JSON",
    "[" * 100_000: "no JSON",
}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda c: c[:20])
def test_filled_values_are_taken_strictly(monkeypatch, content):
    monkeypatch.setattr(LLMServer, "_values", lambda *_: content)
    with LLMServer() as server:
        failure = failed(ask(backend(server), JsonQuery((("user", "?"),), 2, 0, 9))[0])
    assert (failure.kind, failure.reason) == (FailureKind.MALFORMED, CONTENTS[content])


@pytest.mark.parametrize("content", ['{"values": [0, 9]}', '```json\n{"values": [0, 9]}\n```\n'])
def test_values_may_be_fenced(monkeypatch, content):
    monkeypatch.setattr(LLMServer, "_values", lambda *_: content)
    with LLMServer() as server:
        assert answered(ask(backend(server), JsonQuery((("user", "?"),), 2, 0, 9))[0]) == (0, 9)


def test_half_a_surrogate_pair_is_not_kept(monkeypatch):
    body = {"choices": [{"message": {"content": "fox \ud83d"}}]}
    monkeypatch.setattr(LLMServer, "answer", lambda *_: (200, body))
    with LLMServer() as server:
        assert answered(ask(backend(server), CHAT)[0]) == "fox ?"


BODIES = [
    {},
    {"choices": []},
    {"choices": [None]},
    {"choices": {"0": 1}},
    {"choices": [{"message": "text"}]},
    {"choices": [{"message": {"content": 3}}]},
    {"choices": [{"logprobs": [1]}], "data": [{}]},
    {"data": [{"embedding": ["1.0"]}]},
    {"data": [{"embedding": [True]}]},
    {"data": [{"embedding": [1e300]}], "usage": []},
    {"data": [{"embedding": [float("nan")]}], "usage": {"prompt_tokens": "many"}},
    {"choices": [{"logprobs": {"text_offset": [0], "tokens": [3], "top_logprobs": [None]}}]},
    {
        "choices": [
            {"logprobs": {"text_offset": [-1], "tokens": ["b"], "top_logprobs": [{"1": -1.0}]}}
        ]
    },
    {"choices": [{"logprobs": {"text_offset": ["a"], "tokens": ["b"], "top_logprobs": [{}]}}]},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda b: str(b)[:50])
def test_bodies_of_another_form_are_failures(monkeypatch, body):
    monkeypatch.setattr(LLMServer, "answer", lambda *_: (200, body))
    with LLMServer() as server:
        for outcome in ask(backend(server), CHAT, FILL, READ, EMBED):
            assert failed(outcome).kind in (
                FailureKind.MALFORMED, FailureKind.UNREADABLE, FailureKind.EMPTY,
            )  # fmt: skip


@pytest.mark.parametrize("tokens", [2**63, 10**400, 10**9 + 1, -1, 1.5, True, "7", None])
def test_absurd_counts_of_tokens_are_estimated(tmp_path, monkeypatch, tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    monkeypatch.setattr(LLMServer, "_usage", lambda *_: usage)
    with LLMServer() as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        client = Client(backend(server), ledger, Budget(max_tokens=1000))
        (outcome,) = client.ask([CHAT])  # a larger integer than SQLite's cannot be stored
        assert ledger.bill(MODEL, (0, 0)).tokens == 3 + 4 + 6 + 4 + 4
    assert outcome.completion_tokens == 4


@pytest.mark.parametrize("text", ["\ud83d", "\x1b[2Jgone", "\x00", "a\u202eb", "\u2028next"])
@pytest.mark.parametrize("status", [200, 400])
def test_reasons_are_printable_and_can_be_stored(tmp_path, monkeypatch, text, status):
    message = {"content": None, "refusal": text}
    refused = {"choices": [{"message": message}], "error": {"message": text}}
    monkeypatch.setattr(LLMServer, "answer", lambda *_: (status, refused))
    with LLMServer() as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        (outcome,) = Client(backend(server), ledger, Budget()).ask([CHAT])
    assert failed(outcome).reason.isprintable()


def test_a_response_without_an_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(server_module, "LARGEST_RESPONSE", 100_000)
    with LLMServer(always(Fault.GARBAGE)) as server:
        failure = failed(ask(backend(server), EMBED)[0])
        assert server.faults_served == {Fault.GARBAGE: 1}  # it is not requested again
    assert failure.kind == FailureKind.MALFORMED
    assert failure.reason == "the server's response is longer than 0 MB"


# limits


def test_storm_of_all_faults_gives_every_request_one_outcome():
    chats = [Chat((("user", f"«word{i}»"),)) for i in range(50)]
    fills = [JsonQuery((("user", f"{i}"),), 8, 0, 9) for i in range(50)]
    reads = [LogprobQuery("", f"Description: {i}\n", "Answer:1\n", (7,), DIGITS) for i in range(50)]
    embeds = [Embed(f"text {i}") for i in range(50)]
    requests = [*chats, *fills, *reads, *embeds]
    with LLMServer(storm(0.5), seed=0) as server:
        model = backend(server, deadline=1.5, concurrency=32, retries=1)
        outcomes = ask(model, *requests)
        assert set(server.faults_served) == set(Fault)
        again = ask(
            model, *(r for r, o in zip(requests, outcomes, strict=True) if isinstance(o, Failure))
        )
    kinds = Counter(o.kind for o in outcomes if isinstance(o, Failure))
    assert set(kinds) == set(FailureKind) - {FailureKind.CUT}  # only thoughts are cut
    n_answers = sum(isinstance(o, Answer) for o in outcomes)
    assert n_answers + kinds.total() == 200
    assert n_answers > 60
    assert any(isinstance(o, Answer) for o in again)
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            failed(outcome)


def test_calls_in_flight_are_bounded():
    with LLMServer(delay=0.02) as server:
        ask(backend(server, concurrency=3), *(Embed(str(i)) for i in range(30)))
        assert server.most_at_once == 3


@pytest.mark.parametrize("fault", [Fault.DRIBBLE, Fault.STALL, Fault.BUSY])
def test_deadline_covers_dribbling_bodies_and_retries(fault):
    with LLMServer(always(fault), retry_after=0.2) as server:
        started = time.monotonic()
        failure = failed(ask(backend(server, deadline=0.7, retries=100), CHAT)[0])
        assert 0.6 < time.monotonic() - started < 3
    assert failure.kind == FailureKind.DEADLINE
    assert failure.seconds == pytest.approx(0.7, abs=0.5)


def test_waiting_for_a_turn_is_not_part_of_the_deadline():
    with LLMServer(delay=0.15) as server:
        outcomes = ask(backend(server, concurrency=1, deadline=0.6), *map(Embed, "abcdefgh"))
    assert all(isinstance(o, Answer) for o in outcomes)


def test_outcomes_come_one_by_one():
    slow = always(Fault.STALL)
    with LLMServer(
        lambda seed, call: slow(seed, call) if "slow" in str(call.body) else None
    ) as server:
        groups = backend(server, deadline=1.0).answer([Embed("slow"), Embed("a"), Embed("b")])
        started = time.monotonic()
        first, second = next(groups), next(groups)
        assert time.monotonic() - started < 0.9
        assert {first[0][0], second[0][0]} == {1, 2}
        assert failed(next(groups)[0][1]).kind == FailureKind.DEADLINE


def test_closing_early_cancels_what_is_in_flight():
    with LLMServer(lambda seed, call: None if "first" in str(call.body) else Fault.STALL) as server:
        requests = [Embed("first"), *(Embed(str(i)) for i in range(100))]
        groups = backend(server, concurrency=4).answer(requests)
        ((index, outcome),) = next(groups)
        assert index == 0
        answered(outcome)
        started = time.monotonic()
        groups.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2
        until(lambda: server.now == 0)
        assert len(server.calls) <= 5
    assert not [t for t in threading.enumerate() if t.name.startswith("cratelm")]


def test_an_interrupt_of_the_caller_ends_the_calls():
    def interrupted(groups: Any) -> None:
        with contextlib.closing(groups):
            for _ in groups:
                raise KeyboardInterrupt

    with LLMServer(lambda seed, call: None if "first" in str(call.body) else Fault.STALL) as server:
        groups = backend(server).answer([Embed("first"), Embed("second")])
        with pytest.raises(KeyboardInterrupt):
            interrupted(groups)
        until(lambda: server.now == 0)


def test_works_inside_a_running_loop():
    async def notebook(model: ServerBackend) -> list[Outcome]:
        return ask(model, CHAT)

    with LLMServer() as server:
        assert answered(asyncio.run(notebook(backend(server)))[0]) == "the token fox"


def until(true: Any) -> None:
    deadline = time.monotonic() + 3
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


# servers that can answer nothing


def test_wrong_key_stops_at_the_first_call(monkeypatch):
    with LLMServer(key=SECRET) as server:
        with pytest.raises(InputError, match="set OPENAI_API_KEY"):
            ask(backend(server), CHAT)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
        with pytest.raises(InputError, match="check OPENAI_API_KEY") as told:
            ask(backend(server), CHAT, EMBED)
        assert "sk-wrong" not in "".join(traceback.format_exception(told.value))
        assert told.value.__context__ is None
        monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
        answered(ask(backend(server), CHAT)[0])


def test_unknown_model_stops_at_the_first_call():
    with (
        LLMServer() as server,
        pytest.raises(InputError, match="no model huge: check openai:MODEL"),
    ):
        ask(ServerBackend("huge", server.base_url), CHAT)


def test_server_that_is_not_there_stops_at_the_first_call():
    with LLMServer() as server:
        model = backend(server, retries=1)
    with pytest.raises(InputError, match="cannot be reached: check that the server is running"):
        ask(model, CHAT)


def test_server_that_only_hangs_up_stops_the_first_calls():
    with LLMServer(always(Fault.DROP)) as server, pytest.raises(InputError, match="be reached"):
        ask(backend(server, retries=0, concurrency=1), *(Embed(str(i)) for i in range(LOST)))


def test_refusals_after_an_answer_are_failures():
    with LLMServer() as server:
        model = backend(server)
        answered(ask(model, CHAT)[0])
        server.key = SECRET
        failure = failed(ask(model, EMBED)[0])
    assert failure.kind == FailureKind.STATUS
    assert failure.reason.startswith("HTTP 401")


def test_server_that_dies_half_way_fails_the_rest_at_once():
    with LLMServer() as server:
        model = backend(server, retries=1)
        groups = model.answer([Embed(str(i)) for i in range(2000)])
        outcomes = [group[0][1] for group in [next(groups), next(groups)]]
        server.stop()
        started = time.monotonic()
        outcomes += [outcome for group in groups for _, outcome in group]
        assert time.monotonic() - started < 5
        assert len(outcomes) == 2000
        failures = [failed(o) for o in outcomes if isinstance(o, Failure)]
        assert {f.kind for f in failures} == {FailureKind.CONNECTION}
        assert sum(not f.reason.startswith("not sent") for f in failures) < 4 * LOST
        with pytest.raises(InputError, match="cannot be reached"):
            ask(model, CHAT)


def test_server_that_answers_with_errors_is_not_lost():
    def alternating(seed: int, call: Any) -> Fault | None:
        text = call.body.get("input", "")
        return (Fault.DROP, Fault.ERROR)[int(text) % 2] if text.isdigit() else None

    with LLMServer(alternating) as server:
        model = backend(server, retries=0, concurrency=1)
        outcomes = ask(model, CHAT, *(Embed(str(i)) for i in range(4 * LOST)))
        kinds = Counter(o.kind for o in outcomes if isinstance(o, Failure))
        assert kinds == {FailureKind.CONNECTION: 2 * LOST, FailureKind.STATUS: 2 * LOST}
        assert len(server.calls) == 1 + 4 * LOST


def test_server_that_comes_back_is_used_again():
    with LLMServer() as server:
        model = backend(server, retries=0, concurrency=1)
        answered(ask(model, CHAT)[0])
        server.faults = always(Fault.DROP)
        outcomes = ask(model, *(Embed(str(i)) for i in range(LOST + 2)))
        assert [failed(o).reason.startswith("not sent") for o in outcomes] == [False] * LOST + [
            True
        ] * 2
        server.faults = None
        answered(ask(model, EMBED)[0])


# secrets


def test_key_appears_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with LLMServer(always(Fault.ERROR), key=SECRET) as server:
        model = backend(server, retries=1)
        failures = [failed(o) for o in ask(model, CHAT, FILL, READ, EMBED)]
        assert all("Bearer ***" in f.reason for f in failures)
    told = [model.identity, model.name, model, failures, *(r.getMessage() for r in caplog.records)]
    assert caplog.records
    assert SECRET not in repr(told)
    assert all(SECRET not in repr(vars(record)) for record in caplog.records)


def test_cut_reason_does_not_hold_a_part_of_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(
        LLMServer,
        "answer",
        lambda *_: (400, {"error": {"message": "x" * 160 + SECRET + "y" * 500}}),
    )
    with LLMServer() as server:
        assert "sk-" not in failed(ask(backend(server), CHAT)[0]).reason


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@127.0.0.1:1/v1",
        "https://host/v1?api-key=hunter2",
        "https://host/v1#hunter2",
        "https://hunter2@host/v1",
        "http://host:hunter2/v1",
    ],
)
def test_secrets_in_the_address_are_refused_unseen(url):
    with pytest.raises(InputError, match="--base-url") as told:
        ServerBackend(MODEL, url)
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://host/v1", "http:///v1"])
def test_addresses_of_no_server_are_refused(url):
    with pytest.raises(InputError, match="must be an address"):
        ServerBackend(MODEL, url)


def test_key_with_other_characters_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2\nhunter3é")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as told:
        ServerBackend(MODEL, None)
    assert "hunter" not in str(told.value)


# arguments and identity


def test_openai_itself_needs_a_key(monkeypatch):
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        ServerBackend("gpt", None)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert ServerBackend("gpt", None).identity["model"] == "gpt"


def test_missing_library_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install '\.\[openai\]'"):
        ServerBackend("m", "http://h/v1")


def test_the_model_and_how_it_is_asked_tell_answers_apart_and_not_the_address():
    """A server that moves to another port has not given other answers."""

    def identity(model: str, url: str, method: Any = "auto") -> dict[str, str]:
        return ServerBackend(model, url, method=method).identity

    base = identity("m", "http://h:1/v1")
    assert base == identity("m", "http://g:2/v2")
    assert base != identity("n", "http://h:1/v1")
    assert base != identity("m", "http://h:1/v1", "json")


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/Model-1.5", "Model-1.5"), ("a:Q4_K", "a-Q4_K"), ("/x/y.gguf", "y"), ("../..", "model")],
)
def test_name_is_a_slug(model, name):
    assert ServerBackend(model, "http://h/v1").name == name


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"deadline": 0.0},
        {"deadline": float("nan")},
        {"method": "x"},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        ServerBackend(MODEL, "http://h/v1", **wrong)


def test_counts():
    model = ServerBackend(MODEL, "http://h/v1", concurrency=4)
    assert (model.window, model.parallel) == (128, 4)
    assert [model.count_tokens(t) for t in ("", "a", "abcd", "é中")] == [0, 1, 2, 2]


# what can be read


def test_auto_reads_where_offsets_are_right():
    with LLMServer() as server:
        model = backend(server, method="auto")
        assert model.supports_logprobs
        assert model.supports_logprobs
        assert len(server.calls) == 1
    assert model.reason == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"echo": False}, "Only no echo is supported"),
        ({"offsets": "decoded"}, "do not count its characters"),
        ({"faults": always(Fault.ERROR)}, "HTTP 500"),
        ({"faults": always(Fault.EMPTY)}, "reports no log-probabilities"),
    ],
)
def test_auto_fills_where_it_cannot_read_and_says_why(options, reason):
    with LLMServer(**options) as server:
        model = backend(server, method="auto", retries=0)
        assert not model.supports_logprobs
        assert reason in model.reason
        server.faults = None
        answered(ask(model, FILL)[0])


def test_auto_fills_where_there_is_no_such_endpoint(monkeypatch):
    real = LLMServer.answer
    monkeypatch.setattr(
        LLMServer,
        "answer",
        lambda self, call, fault: (
            (404, {}) if call.path == "/v1/completions" else real(self, call, fault)
        ),
    )
    with LLMServer() as server:
        assert not backend(server, method="auto").supports_logprobs


def test_auto_decides_nothing_without_an_answer():
    with LLMServer(always(Fault.STALL, attempts=1)) as server:
        assert backend(server, method="auto", deadline=0.5).supports_logprobs
    with LLMServer(always(Fault.STALL)) as server:
        with pytest.raises(InputError, match="did not answer a probe call"):
            _ = backend(server, method="auto", deadline=0.3).supports_logprobs
        assert not backend(server, method="json").supports_logprobs
        assert backend(server, method="logprobs", deadline=0.3).supports_logprobs


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_at_a_slot_are_counted_by_the_server(bos):
    options = [str(n) for n in range(11)] + ["77", "the fox"]
    with LLMServer(bos=bos) as server:
        counts = backend(server).tokens_at_slot(options, " word\t")
        expected = [server.n_tokens(option) for option in options]
        assert server.tokenizer.encode("the fox\n").tokens == ["the", "Ġfox", "Ċ"]
        merged = backend(server).tokens_at_slot(["x"], "the fo")
    assert counts == expected
    assert max(expected) > 1
    assert merged == [2]


def test_tokens_at_a_slot_are_unknown_without_an_echo():
    with LLMServer(echo=False) as server:
        assert backend(server).tokens_at_slot(["1"], "a\t") == []
        assert backend(server, method="json").tokens_at_slot(["1"], "a\t") == []


def test_why_levels_cannot_be_read_is_told(tmp_path):
    with LLMServer(echo=False) as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        client = Client(backend(server, method="logprobs"), ledger, Budget())
        with pytest.raises(
            InputError, match=r"levels failed \(.*no echo is supported.*--method json"
        ):
            probe_levels(client)


def test_slots_that_no_token_begins_at_are_told():
    text = "def total(values): return\n"
    with LLMServer() as server:
        begins = {begin for begin, _ in server.tokenizer.encode(text).offsets}
        inside = [offset for offset in range(1, len(text)) if offset not in begins]
        read = LogprobQuery("", "", text, (min(begins - {0}), *inside[:2]), DIGITS)
        failure = failed(ask(backend(server), read)[0])
    assert (failure.kind, failure.reason) == (
        FailureKind.UNREADABLE,
        "no token begins at 2 of 3 slots",
    )


def test_slots_without_an_option_are_told():
    read = LogprobQuery("", "", READ.text, READ.offsets, ("yes", "no"))
    with LLMServer() as server:
        failure = failed(ask(backend(server), read)[0])
    told = f"none of the options is among the 20 most likely tokens at 11 of {len(STRINGS)} slots"
    assert (failure.kind, failure.reason) == (FailureKind.UNREADABLE, told)


def test_options_are_matched_as_they_are_before_they_are_stripped():
    top = {"1": -1.0, " 1": -0.5, "▁2": -0.7, "\n": -2.0, "0": -9999.0, "3": float("nan"), "4": 1.0}
    log_probs, ranks = openai_responses._match_options(top, ("0", "1", "2", "3", "4"), 20)
    assert log_probs == [-np.inf, -1.0, -np.inf, -np.inf, -np.inf]
    assert ranks == [NO_RANK, 2, NO_RANK, NO_RANK, NO_RANK]
    log_probs, ranks = openai_responses._match_options(
        {" 1": -0.5, "▁2": -0.7, "x": -0.6}, ("1", "2"), 20
    )
    assert (log_probs, ranks) == ([-0.5, -0.7], [0, 2])


def test_a_drift_that_is_made_up_for_later_is_seen():
    """A character told as two, a line break as none: the end is right, the slot is not."""
    tokens = ["\ufffd", "\ufffd", "\t", "?", "", "a", "7"]
    offsets = [0, 1, 2, 3, 4, 4, 5]
    tops = [None, *({"1": -1.0, "2": -2.0} for _ in tokens[1:])]
    told = {"text_offset": offsets, "tokens": tokens, "top_logprobs": tops}
    body = {"choices": [{"logprobs": told}]}
    at_tab = LogprobQuery("", "", "中\t?\na", (2,), ("1", "2"))
    with pytest.raises(openai_responses.UnusableAnswer, match="no token begins at 1 of 1 slots"):
        openai_responses.read_logprobs(at_tab, body, 20)
    told["text_offset"] = [0, 0, 1, 2, 3, 4, 5]
    assert openai_responses.read_logprobs(at_tab, body, 20).log_probs.argmax() == 0


LINE = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\t\n\"'\\é中文😀 a1")),
    max_size=6,
)


@pytest.fixture(scope="module")
def servers():
    with LLMServer() as plain, LLMServer(bos=True) as bos, LLMServer(offsets="decoded") as decoded:
        yield {"true": plain, "bos": bos, "decoded": decoded}


@pytest.mark.parametrize("kind", ["true", "bos", "decoded"])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(preamble=LINE, lines=st.lists(LINE, min_size=1, max_size=5))
def test_every_reading_is_that_of_its_slot(servers, kind, preamble, lines):
    """Whatever stands before: what is read at a slot is what the server has there, or it is a failure."""
    body = "".join(f"{line}\t?\n" for line in lines)
    ends = np.cumsum([len(line) + 3 for line in lines])
    slots = tuple(int(end) - 2 for end in ends)
    read = LogprobQuery(preamble, "c\n", body, slots, DIGITS)
    server = servers[kind]
    outcome = ask(backend(server), read)[0]
    spans = server.tokenizer.encode(read.text).offsets
    begins = Counter(begin for begin, _ in spans)
    if kind != "decoded" and all(begins[offset] == 1 for offset in read.offsets):
        assert isinstance(outcome, Answer), outcome
    if isinstance(outcome, Failure):
        assert outcome.kind == FailureKind.UNREADABLE
        return
    assert isinstance(outcome.value, OptionLogprobs)
    for log_probs, offset in zip(outcome.value.log_probs, read.offsets, strict=True):
        top = likely(read.text[:offset], 20, "?")
        expected = np.array([top.get(digit, -np.inf) for digit in DIGITS])
        expected -= np.logaddexp.reduce(expected)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-5)
