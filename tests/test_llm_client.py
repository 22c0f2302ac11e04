"""The ledger and the client: nothing is asked twice, nothing is lost, no limit is passed."""

import sqlite3

import numpy as np
import pytest
from fake_llm import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from cratelm.errors import BudgetReached, InputError
from cratelm.llm.client import Client, dry_run
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger, decode, encode
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
    key,
)

CHATS = [Chat((("user", f"question {i}"),)) for i in range(20)]
READ = LogprobQuery("pre\n", "the token ` a`\n", " a\t?\n b\t?\n", (3, 8), ("0", "1"))


def client_of(folder, model: FakeModel, **fields) -> Client:
    retry = fields.pop("retry_failed", False)
    return Client(model, Ledger(folder / "ledger.sqlite"), Budget(**fields), retry_failed=retry)


def test_equal_requests_are_sent_once_and_never_again(tmp_path):
    model = FakeModel()
    client = client_of(tmp_path, model)
    first = client.ask([*CHATS[:3], CHATS[0], READ])
    assert first[0].value == first[3].value
    assert sum(model.asked.values()) == 4
    other = client_of(tmp_path, FakeModel())
    again = other.ask([READ, *CHATS[:3]])
    assert sum(other.backend.asked.values()) == 0
    assert other.tally.known == 4
    np.testing.assert_array_equal(again[0].value.log_probs, first[4].value.log_probs)


def test_a_kill_loses_nothing_that_was_answered(tmp_path):
    dying = FakeModel(dies_after=7)
    with pytest.raises(KeyboardInterrupt):
        client_of(tmp_path, dying).ask(CHATS)
    rest = FakeModel()
    outcomes = client_of(tmp_path, rest).ask(CHATS)
    assert len(outcomes) == 20
    assert sum(rest.asked.values()) == 13
    assert not set(dying.asked) & set(rest.asked)


def test_what_is_used_is_what_the_ledger_gives_back(tmp_path):
    fresh = client_of(tmp_path, FakeModel()).ask([READ])[0].value
    stored = client_of(tmp_path, FakeModel()).ask([READ])[0].value
    np.testing.assert_array_equal(fresh.log_probs, stored.log_probs)
    assert fresh.log_probs[0, 1] > fresh.log_probs[0, 0]  # ` a` is in the explanation, ` b` is not
    assert fresh.log_probs[1, 1] < fresh.log_probs[1, 0]


def test_failures_are_kept_counted_and_retried_when_asked(tmp_path):
    failing = FakeModel(fails=0.5)
    client = client_of(tmp_path, failing)
    outcomes = client.ask(CHATS)
    failed = sum(isinstance(o, Failure) for o in outcomes)
    assert 0 < failed < 20
    assert client.tally.failed == {"status": failed}
    quiet = FakeModel()
    assert client_of(tmp_path, quiet).ask(CHATS)[0].prompt_tokens == outcomes[0].prompt_tokens
    assert sum(quiet.asked.values()) == 0
    willing = FakeModel()
    retried = client_of(tmp_path, willing, retry_failed=True).ask(CHATS)
    assert all(isinstance(o, Answer) for o in retried)
    assert sum(willing.asked.values()) == failed


def test_a_request_that_fails_again_is_sent_once_a_command(tmp_path):
    client_of(tmp_path, FakeModel(fails=1.0)).ask(CHATS[:4])
    still = FakeModel(fails=1.0)
    client = client_of(tmp_path, still, retry_failed=True)
    client.ask(CHATS[:4])
    client.ask(CHATS[:4])
    assert set(still.asked.values()) == {1}


def test_a_failure_never_replaces_an_answer(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.write("m", [("k", "Chat", Answer("yes", 1, 1))])
    ledger.write("m", [("k", "Chat", Failure(FailureKind.STATUS, "status 500"))])
    assert ledger.find(["k"])["k"].value == "yes"


@pytest.mark.parametrize(
    ("limits", "sent"),
    [
        ({"max_calls": 5}, 5),
        ({"max_tokens": 200}, 3),  # 6 words with their marks + 60 of the answer each
        ({"max_cost": 0.065, "price_completion": 1000.0}, 1),
        ({"max_tokens": 10}, 0),
    ],
)
def test_a_limit_stops_before_it_is_passed_and_the_rest_goes_on(tmp_path, limits, sent):
    model = FakeModel()
    with pytest.raises(BudgetReached, match="same command again"):
        client_of(tmp_path, model, **limits).ask(CHATS)
    # tokens: what was spent is known after a portion, what will be is the most it can be
    assert sum(model.asked.values()) >= sent
    client = client_of(tmp_path, model, **limits)
    assert client.tally.calls <= limits.get("max_calls", 20)
    outcomes = client_of(tmp_path, model).ask(CHATS)
    assert len(outcomes) == 20
    assert set(model.asked.values()) == {1}


def test_tokens_never_pass_their_limit(tmp_path):
    client = client_of(tmp_path, FakeModel(), max_tokens=250)
    with pytest.raises(BudgetReached, match="--max-tokens 250"):
        client.ask(CHATS)
    assert 0 < client.tally.prompt_tokens + client.tally.completion_tokens <= 250


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_calls": 5}, 5),
        ({"max_tokens": 200}, 3),
        ({"max_cost": 0.1, "price_completion": 1000.0, "price_prompt": 1000.0}, 4),
    ],
)
def test_a_command_typed_again_spends_no_new_budget(tmp_path, limits, most):
    model = FakeModel()
    for _ in range(12):
        with pytest.raises(BudgetReached) as stop:
            client_of(tmp_path, model, **limits).ask(CHATS)
    sent = sum(model.asked.values())
    assert sent > 0
    # 11 tokens a call, of which it is known only afterwards that they are so few
    spent = {"max_calls": sent, "max_tokens": 11 * sent, "max_cost": 11 * sent / 1000}
    (name, limit) = next(iter(limits.items()))
    assert spent[name] <= limit
    assert f"{sent} calls, {11 * sent} tokens" in str(stop.value)
    assert "0 calls (" in str(stop.value)  # of this command
    assert "ledger.sqlite" in str(stop.value)
    assert "\n" not in str(stop.value)
    if name == "max_cost":
        assert f"${11 * sent / 1000:.4f} are spent" in str(stop.value)
    more = {k: 100 * v if k.startswith("max") else v for k, v in limits.items()}
    assert len(client_of(tmp_path, model, **more).ask(CHATS)) == 20


def test_other_models_cost_what_their_prices_said(tmp_path):
    paid, free, other = FakeModel(), FakeModel(), FakeModel()
    free.name, other.name = "free", "other"
    client_of(tmp_path, paid, price_prompt=1000.0).ask(CHATS[:3])  # 3 x 10 tokens: $0.03
    client_of(tmp_path, free).ask([READ, *CHATS[3:8]])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.bill("other", (5e9, 5e9)).cost == pytest.approx(0.03)
        assert ledger.bill("free", (1000.0, 0.0)).cost == pytest.approx(0.03 + 6 * 0.01)
        assert ledger.bill("other", (0, 0)).calls == 9
    client = client_of(tmp_path, other, price_prompt=1000.0, max_cost=0.0299)
    with pytest.raises(BudgetReached, match=r"9 calls, 99 tokens, \$0\.0300 are spent"):
        client.ask(CHATS[8:])


def test_repeated_calls_are_counted_each_time(tmp_path):
    failing = FakeModel(fails=1.0)
    for _ in range(3):
        client_of(tmp_path, failing, retry_failed=True).ask(CHATS[:4])
    with pytest.raises(BudgetReached, match="12 calls, 12 tokens"):
        client_of(tmp_path, failing, retry_failed=True, max_calls=12).ask(CHATS[:4])


def test_a_ledger_of_version_0_1_0_is_taken_over(tmp_path):
    client_of(tmp_path, FakeModel()).ask(CHATS[:5])
    with sqlite3.connect(tmp_path / "ledger.sqlite") as old:
        old.execute("ALTER TABLE calls DROP COLUMN cost")
    model = FakeModel()
    with pytest.raises(BudgetReached, match="5 calls"):
        client_of(tmp_path, model, max_calls=5).ask(CHATS)
    assert len(client_of(tmp_path, model).ask(CHATS)) == 20
    assert sum(model.asked.values()) == 15


def test_merged_ledgers_count_what_both_spent(tmp_path):
    with Ledger(tmp_path / "a.sqlite") as ours, Ledger(tmp_path / "b.sqlite") as theirs:
        ours.write("m", [("k", "Chat", Failure(FailureKind.STATUS, "status 500", 7, 0))], (1e6, 0))
        theirs.write("m", [("k", "Chat", Answer("yes", 5, 2))], (1e6, 1e6))
        for _ in range(2):  # the second time there is nothing to take over
            ours.merge(tmp_path / "b.sqlite")
            bill = ours.bill("m", (0, 0))
            assert (bill.calls, bill.tokens, bill.cost) == (2, 14, pytest.approx(14))


def test_a_plan_sends_nothing_and_knows_what_is_there(tmp_path):
    client_of(tmp_path, FakeModel()).ask(CHATS[:5])
    model = FakeModel()
    client = client_of(tmp_path, model, price_prompt=1e6, price_completion=0)
    found = dry_run(client, [CHATS[:10], CHATS[10:]])
    assert (found.requests, found.known, found.calls) == (20, 5, 15)
    assert found.prompt_tokens == 15 * (2 + 4)
    assert found.completion_tokens == 15 * 60
    assert found.cost == pytest.approx(90)
    assert found.seconds == pytest.approx(0.01 * 5 / 55 * (90 + 900))
    assert sum(model.asked.values()) == 0
    assert "15 calls to make" in str(found)


def test_ledgers_of_workers_merge_exactly(tmp_path):
    whole = client_of(tmp_path / "whole", FakeModel()).ask(CHATS)
    for worker in range(3):
        client_of(tmp_path / str(worker), FakeModel()).ask(CHATS[worker::3])
    with Ledger(tmp_path / "all.sqlite") as merged:
        merged.write(
            "fake", [(key(CHATS[0], {"backend": "fake"}), "Chat", Failure(FailureKind.EMPTY, ""))]
        )
        added = [merged.merge(tmp_path / str(w) / "ledger.sqlite") for w in range(3)]
        assert sum(added) == 20  # an answer replaced the failure
        assert merged.merge(tmp_path / "0" / "ledger.sqlite") == 0
        model = FakeModel()
        again = Client(model, merged, Budget()).ask(CHATS)
        assert [o.value for o in again] == [o.value for o in whole]
        assert not model.asked


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    (tmp_path / "ledger.sqlite").write_text("hello " * 300)
    with pytest.raises(InputError, match="cannot be read as a ledger"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_ledger_holds_no_text_of_requests(tmp_path):
    client_of(tmp_path, FakeModel()).ask([Chat((("user", "sk-secret-words"),)), READ])
    rows = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT * FROM calls").fetchall()
    assert len(rows) == 2
    assert b"sk-secret" not in (tmp_path / "ledger.sqlite").read_bytes()


def test_keys_depend_on_all_that_is_asked_and_not_on_how_it_is_cut():
    whole = LogprobQuery("", "", READ.text, tuple(READ.offsets), READ.options)
    assert key(whole, {}) == key(READ, {})
    others = [
        LogprobQuery("pre\n", "x", READ.body, READ.slots, READ.options),
        LogprobQuery(READ.preamble, READ.context, READ.body, (3,), READ.options),
        LogprobQuery(READ.preamble, READ.context, READ.body, READ.slots, ("0", "2")),
        LogprobQuery(READ.preamble, READ.context, READ.body, READ.slots, READ.options, full=True),
        JsonQuery((("user", "x"),), 2, 0, 9),
        Embed(READ.text),
    ]
    keys = {key(r, {}) for r in [READ, *others]} | {key(READ, {"weights": "other"})}
    assert len(keys) == len(others) + 2


def test_keys_are_those_of_version_0_1_0():
    """Or every answer that was paid for would be asked for again."""
    fake = {"backend": "fake"}
    filled = JsonQuery((("user", "x"),), 2, 0, 9)
    assert key(READ, fake) == "bf32683fab183fcf5a2742a3568c7f7d8a1b7590684eff60d6f9614d6e358137"
    assert key(filled, fake) == "437cd27e620679aa76472e9e033ac74ab3d49ea5c6192bcbf855a2eb4db160d3"


def test_json_answers_come_back_from_the_ledger(tmp_path):
    filled = JsonQuery((("user", "x"),), 2, 0, 9)
    first = client_of(tmp_path, FakeModel()).ask([filled])[0]
    (again,) = client_of(tmp_path, FakeModel(fails=1.0)).ask([filled])
    assert again.value == first.value == (0, 0)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.lists(st.integers(0, 10), max_size=70), st.integers(0, 2**32 - 1))
def test_values_survive_the_ledger(text, integers, seed):
    assert decode("Chat", encode(text)) == text
    assert decode("Fill", encode(tuple(integers))) == tuple(integers)
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=7).astype(np.float32)
    np.testing.assert_allclose(decode("Embed", encode(vector)), vector, rtol=1e-5)
    log_probs = np.log(rng.dirichlet(np.ones(5), 3)).astype(np.float32)
    log_probs[0, 0] = -np.inf
    ranks = np.array([[0, 3, NO_RANK, 1, 2]] * 3, np.uint16)
    found = decode("Read", encode(OptionLogprobs(log_probs, np.float32([0.1, 0.5, 1]), ranks)))
    np.testing.assert_allclose(found.log_probs, log_probs, atol=6e-4)
    np.testing.assert_array_equal(found.ranks, ranks)
    assert decode("Read", encode(OptionLogprobs(log_probs))).mass is None
