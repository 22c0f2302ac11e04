"""What newer servers do: refuse parameters, think before they answer, read label probabilities in other ways."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from llm_server import Call, LLMServer, likely
from test_llm_server import CHAT, FILL, READ, STRINGS, answered, ask, backend, failed, quick

from cratelm.errors import InputError
from cratelm.llm.backends.openai_parameters import Parameters, refusal_of
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.probe import ProbeResult, probe_levels
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Chat, FailureKind, JsonQuery, completion_tokens, prompt_tokens

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
    failure = failed(outcome)
    assert failure.kind is FailureKind.CUT
    assert f"cap of {cap} tokens" in failure.reason
    assert "--thinking-tokens (now 40)" in failure.reason
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
    failure = failed(outcome)
    assert failure.kind is FailureKind.EMPTY
    assert "thought" in failure.reason


def test_a_budget_reserves_the_thoughts(tmp_path):
    """Two calls at a time fit without thoughts, none with them."""
    with LLMServer() as server, Ledger(tmp_path / "l.sqlite") as ledger:
        model = backend(server, thinking_tokens=1000)
        client = Client(model, ledger, Budget(max_tokens=500))
        with pytest.raises(Exception, match="--max-tokens 500"):
            client.ask([CHAT])
        assert not server.calls


# ways to read label probabilities


class OtherWays:
    """Answers as servers that refuse the echo do: by `prompt_logprobs`, llama.cpp's `n_probs`, or the next token.

    The numbers are those that `LLMServer` echoes; `chat_form`: as llama.cpp reports them for completions.
    """

    def __init__(self, way: str, *, chat_form: bool = False, bos: bool = False, cut: str = ""):
        self.way, self.chat_form, self.bos, self.cut = way, chat_form, bos, cut
        self.server: LLMServer

    def __call__(self, call: Call) -> tuple[int, dict[str, Any]] | None:
        body = call.body
        if call.path == "/completions" and self.way == "n_probs":
            top = [
                {"id": 1, "token": token, "bytes": [], "logprob": value}
                for token, value in self.next_tokens(body["prompt"], body["n_probs"]).items()
            ]
            found = [{"id": 1, "token": "x", "bytes": [], "logprob": -1.0, "top_logprobs": top}]
            n = self.server.n_tokens(body["prompt"])
            return 200, {
                "completion_probabilities": found,
                "tokens_evaluated": n,
                "tokens_predicted": 1,
            }
        if call.path != "/v1/completions":
            return None
        if body.get("echo"):
            return 501, error("echo is not supported")
        usage = {"prompt_tokens": self.server.n_tokens(body["prompt"]), "completion_tokens": 1}
        choice: dict[str, Any] = {"text": "x"}
        if self.way == "prompt_logprobs" and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self.entries(body["prompt"], body["prompt_logprobs"])
        elif self.way == "next token" and "logprobs" in body:
            top = self.next_tokens(body["prompt"], body["logprobs"])
            choice["logprobs"] = {"tokens": ["x"], "top_logprobs": [top]}
            if self.chat_form:
                tops = [{"token": token, "logprob": value} for token, value in top.items()]
                choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": tops}]}
        return 200, {"choices": [choice], "usage": usage}

    def next_tokens(self, prompt: str, n_top: int) -> dict[str, float]:
        return dict(list(likely(prompt, n_top, "x").items())[:n_top])

    def entries(self, prompt: str, n_top: int) -> list[Any]:
        """As vLLM: per token {id: entry}, the prompt's own first, null for the first of all."""
        told = self.server.echoed(prompt, n_top)
        tokens, tops = told["tokens"][:-1], told["top_logprobs"][:-1]
        entries: list[Any] = []
        for token, top in zip(tokens, tops, strict=True):
            ordered = {token: (top or {}).get(token, -1.0), **(top or {})}
            decoded = {t: (t.replace(self.cut, "") if self.cut else t) for t in ordered}
            entries.append(
                {
                    str(i): {"logprob": value, "rank": i + 1, "decoded_token": decoded[t]}
                    for i, (t, value) in enumerate(ordered.items())
                }
            )
        return [None, *entries] if self.bos else [None, *entries[1:]]


def reads_by(way: OtherWays, **options: Any):
    server = LLMServer(override=way)
    way.server = server
    return server, {"method": "auto", "retries": 0, **options}


@pytest.mark.parametrize(
    "way",
    [
        OtherWays("prompt_logprobs"),
        OtherWays("prompt_logprobs", bos=True),
        OtherWays("n_probs"),
        OtherWays("next token"),
        OtherWays("next token", chat_form=True),
    ],
    ids=lambda way: f"{way.way} {way.bos} {way.chat_form}",
)
def test_every_way_reads_the_numbers_of_the_echo(way):
    with LLMServer() as server:
        (expected,) = ask(backend(server), READ)
    server, options = reads_by(way)
    with server:
        model = backend(server, **options)
        assert model.supports_logprobs
        assert (model.way, model.reason) == (way.way, "")
        (outcome,) = ask(model, READ)
    found, expected = answered(outcome), answered(expected)
    reported = np.isfinite(expected.log_probs)
    if way.way == "n_probs":  # more tokens are reported, and the sum is over all of them
        assert np.isfinite(found.log_probs).all()
    else:
        assert (np.isfinite(found.log_probs) == reported).all()
    np.testing.assert_allclose(found.log_probs[reported], expected.log_probs[reported], atol=0.02)
    np.testing.assert_allclose(found.mass, expected.mass, atol=0.02)
    assert (found.ranks[found.ranks < 5] == expected.ranks[found.ranks < 5]).all()
    prompts = [READ.text[:o] for o in READ.offsets] if model.reads_by_slot else [READ.text]
    assert outcome.prompt_tokens == sum(map(server.n_tokens, prompts))
    assert outcome.completion_tokens == len(prompts)


def test_a_budget_counts_the_calls_of_each_slot():
    server, options = reads_by(OtherWays("n_probs"))
    with server:
        model = backend(server, **options)
        whole = prompt_tokens(READ, model)
        assert model.supports_logprobs
        assert model.reads_by_slot
        assert prompt_tokens(READ, model) > 5 * whole
        assert completion_tokens(READ, by_slot=True) == len(STRINGS)


@pytest.mark.parametrize("name", ["prompt_logprobs", "n_probs", "next token"])
def test_levels_are_probed_in_every_way(name, tmp_path):
    server, options = reads_by(OtherWays(name))
    with server, Ledger(tmp_path / "l.sqlite") as ledger:
        client = Client(backend(server, **options), ledger, Budget())
        result = probe_levels(client)
    # "10" is a token of this server's, which is only known if the tokens of the prompt are reported
    assert (result.supports_logprobs, result.way) == (True, name)
    assert result.top_level == (10 if name == "prompt_logprobs" else 9)
    assert result.mass is not None
    assert result.mass > 0.9
    assert f"read by {name}" in str(result)
    record = result.as_dict()
    assert ProbeResult(supports_logprobs=bool(record.pop("reads")), **record) == result  # type: ignore[arg-type]


def test_prompt_logprobs_that_are_not_of_the_text_are_unreadable():
    """Characters cut over tokens decode to nothing after the first slot: offsets before them are wrong."""
    server, options = reads_by(OtherWays("prompt_logprobs", cut="é"), method="logprobs")
    with server:
        model = backend(server, **options)
        assert model.supports_logprobs  # the probe has it before its first slot only
        (outcome,) = ask(model, READ)
    assert failed(outcome).kind is FailureKind.UNREADABLE


@pytest.mark.parametrize("method", ["auto", "logprobs"])
def test_the_reasons_of_all_ways_are_given(method, tmp_path):
    server, options = reads_by(OtherWays("none"), method=method)
    with server, Ledger(tmp_path / "l.sqlite") as ledger:
        model = backend(server, **options)
        assert model.supports_logprobs is (method == "logprobs")
        for way in ("echo", "prompt_logprobs", "n_probs", "next token"):
            assert f"{way}: " in model.reason
        assert model.way == ""
        if method == "logprobs":
            with pytest.raises(
                InputError, match=r"echo is not supported.*prompt_logprobs.*--method json"
            ):
                probe_levels(Client(model, ledger, Budget()))


def test_slots_of_a_server_limit_how_many_texts_are_read_at_a_time():
    """llama.cpp's server forgets what it computed of a text if others come in between."""
    way = OtherWays("n_probs")
    server, options = reads_by(way, concurrency=8)
    server.delay = 0.005
    texts = [simulate_read(f"word {n}", np.arange(4), STRINGS, 9) for n in range(6)]
    with server:
        model = backend(server, **options)
        assert model.supports_logprobs
        server.calls.clear()
        ask(model, *texts)
        prompts = [c.body["prompt"] for c in server.calls if c.path == "/completions"]
    assert len(prompts) == 24
    owners = [next(i for i, t in enumerate(texts) if t.text.startswith(p)) for p in prompts]
    assert sum(a != b for a, b in pairwise(owners)) == 5
