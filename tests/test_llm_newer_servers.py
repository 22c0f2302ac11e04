"""What newer servers do: refuse parameters, think before they answer, read label probabilities in other ways."""

from typing import Any

import pytest
from llm_server import Call, LLMServer
from test_llm_server import CHAT, FILL, STRINGS, answered, ask, backend, failed, quick

from cratelm.llm.backends.openai_parameters import Parameters, refusal_of
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.requests import Chat, FailureKind, JsonQuery, completion_tokens

__all__ = ["quick"]
VALUES = '{"values": [' + ", ".join("1" for _ in STRINGS) + "]}"


def error(message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param}}


def pydantic(name: str) -> dict[str, Any]:
    """As FastAPI refuses an unknown field."""
    item = {"type": "extra_forbidden", "loc": ["body", name], "input": 0}
    return {"detail": [{**item, "msg": "Extra inputs are not permitted"}]}


REFUSALS = {
    "max_tokens": [
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            " 'max_completion_tokens' instead.",
            "max_tokens",
        ),
        error("max_tokens is deprecated for this model, use max_completion_tokens"),
    ],
    "temperature": [
        error(
            "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value"
            " is supported.",
            "temperature",
        ),
        error("invalid temperature: only 1 is allowed for this model"),
        error("`temperature` may only be set to 1 when thinking is enabled."),
        pydantic("temperature"),
    ],
    "seed": [
        error("Unrecognized request argument supplied: seed"),
        error("property 'seed' is unsupported"),
        error('Invalid JSON payload received. Unknown name "seed": Cannot find field.'),
        pydantic("seed"),
        {"detail": "Unsupported fields in the request: {'seed'}"},
    ],
}


def refusing(body_of: dict[str, tuple[int, dict[str, Any]]]):
    """Refuses chats with any of these parameters, one at a time, as OpenAI does."""

    def override(call: Call) -> tuple[int, dict[str, Any]] | None:
        for name, refusal in body_of.items():
            if name in call.body:
                return refusal
        return None

    return override


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    ("name", "body"), [(name, body) for name, bodies in REFUSALS.items() for body in bodies]
)
def test_a_refused_parameter_is_not_sent_again(name, body, status, capsys):
    override = refusing({name: (status, body)})
    with LLMServer(override=override) as server:
        model = backend(server, concurrency=1)
        first, second = ask(model, CHAT, Chat((("user", "«owl»"),)))
        sent = [call.body for call in server.calls]
    assert answered(first) == "the token fox"
    assert answered(second) == "the token owl"
    assert [name in b for b in sent] == [True, False, False]
    if name == "max_tokens":
        assert sent[-1]["max_completion_tokens"] == 60
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if name in line] == lines
    assert len(lines) == 1


def test_several_refusals_of_many_calls_at_once_are_said_once_each(capsys):
    bodies = {name: (400, refusals[0]) for name, refusals in REFUSALS.items()}
    chats = [Chat((("user", f"«word{n}»"),)) for n in range(20)]
    with LLMServer(override=refusing(bodies), delay=0.02) as server:
        outcomes = ask(backend(server, concurrency=8), *chats, FILL)
        sent = [set(call.body) for call in server.calls]
    assert [answered(o) for o in outcomes[:20]] == [f"the token word{n}" for n in range(20)]
    assert len(answered(outcomes[20])) == len(STRINGS)
    assert not sent[-1] & {"max_tokens", "temperature", "seed"}
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 60. This model's maximum context length is 50",
        "This model's maximum context length is 4096 tokens. However, you requested 5000 (60 in max_tokens)",
        "Unsupported parameter: 'messages' is not supported with this model",
        "the temperature of the hall was 21 degrees",
        "something else",
    ],
)
def test_other_refusals_fail_at_once(message, capsys):
    with LLMServer(override=lambda call: (400, error(message))) as server:
        (outcome,) = ask(backend(server), CHAT)
        assert len(server.calls) == 1
    assert failed(outcome).kind is FailureKind.STATUS
    assert capsys.readouterr().err == ""


def test_a_limit_under_neither_name_is_a_failure():
    def override(call: Call):
        name = next(n for n in ("max_tokens", "max_completion_tokens") if n in call.body)
        return 400, error(f"Unsupported parameter: {name}")

    with LLMServer(override=override) as server:
        (outcome,) = ask(backend(server), CHAT)
        assert len(server.calls) == 2
    assert "max_completion_tokens" in failed(outcome).reason


def test_a_request_that_a_refusal_repeats_refuses_nothing():
    body = {
        "detail": [{"loc": ["body", "x"], "msg": "Field required, only x", "input": {"seed": 0}}]
    }
    assert not Parameters("m").learn(refusal_of(body, "whole {'seed': 0}"), {"seed": 0})


# thoughts


def saying(message: dict[str, Any], finish: str = "stop", usage: dict[str, int] | None = None):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    body = {"choices": [choice], "usage": usage or {}}
    return lambda call: (200, body) if "/chat/" in call.path else None


THOUGHTS = "Okay, cats and dogs.\n\nBoth are plural."


@pytest.mark.parametrize(
    "message",
    [
        {"content": f"<think>{THOUGHTS}</think>\n\n{{}}"},
        {"content": f"{THOUGHTS}\n</think>\n\n{{}}"},
        {"content": f"[THINK]{THOUGHTS}[/THINK]{{}}"},
        {"content": "{}", "reasoning_content": THOUGHTS},
        {"content": "{}", "reasoning": THOUGHTS},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]},
                {"type": "text", "text": "{}"},
            ]
        },
    ],
)
@pytest.mark.parametrize(("request_", "text"), [(CHAT, "plural nouns"), (FILL, VALUES)])
def test_what_a_model_thinks_is_not_its_answer(message, request_, text):
    import json

    filled = json.loads(json.dumps(message).replace("{}", json.dumps(text)[1:-1]))
    with LLMServer(override=saying(filled)) as server:
        (outcome,) = ask(backend(server), request_)
    expected = (1,) * len(STRINGS) if isinstance(request_, JsonQuery) else text
    assert answered(outcome) == expected


@pytest.mark.parametrize("request_", [CHAT, FILL])
@pytest.mark.parametrize(
    "message",
    [
        {"content": f"<think>{THOUGHTS}"},
        {"content": ""},  # hidden reasoning
        {"content": None},
        {"content": None, "reasoning_content": THOUGHTS},
        {"content": "", "reasoning": THOUGHTS},
    ],
)
def test_thoughts_that_reach_the_cap_are_a_failure_that_is_charged(message, request_):
    usage = {"prompt_tokens": 20, "completion_tokens": 60, "total_tokens": 80}
    with LLMServer(override=saying(message, "length", usage)) as server:
        (outcome,) = ask(backend(server, thinking_tokens=40), request_)
        cap = completion_tokens(request_, 40)
        assert server.calls[0].body["max_tokens"] == cap
    assert failed(outcome).kind is FailureKind.CUT
    assert f"cap of {cap} tokens" in outcome.reason
    assert "--thinking-tokens (now 40)" in outcome.reason
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (20, 60)


def test_thoughts_of_a_server_that_counts_no_tokens_are_charged_up_to_the_cap():
    with LLMServer(override=saying({"content": ""}, "length")) as server:
        (outcome,) = ask(backend(server, thinking_tokens=40), CHAT)
    assert failed(outcome).completion_tokens == 100
    assert outcome.prompt_tokens > 0


def test_hidden_reasoning_outside_of_the_completion_tokens_is_charged():
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 300}
    with LLMServer(override=saying({"content": "plural nouns"}, "stop", usage)) as server:
        (outcome,) = ask(backend(server), CHAT)
    assert answered(outcome) == "plural nouns"
    assert outcome.completion_tokens == 280


def test_a_model_that_stops_after_its_thoughts_has_not_answered():
    message = {"content": f"<think>{THOUGHTS}</think>\n"}
    with LLMServer(override=saying(message)) as server:
        (outcome,) = ask(backend(server), CHAT)
    assert failed(outcome).kind is FailureKind.EMPTY
    assert "thought" in outcome.reason


def test_a_budget_reserves_the_thoughts(tmp_path):
    """Two calls at a time fit without thoughts, none with them."""
    with LLMServer() as server, Ledger(tmp_path / "l.sqlite") as ledger:
        model = backend(server, thinking_tokens=1000)
        client = Client(model, ledger, Budget(max_tokens=500))
        with pytest.raises(Exception, match="--max-tokens 500"):
            client.ask([CHAT])
        assert not server.calls
