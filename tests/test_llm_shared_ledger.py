"""Processes that share a ledger: each request is asked once, budgets hold over all, and a killed one harms no other."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import planted
import pytest
from fake_llm import FakeModel
from llm_server import MODEL, Call, LLMServer

from cratelm.errors import BudgetReached, InputError
from cratelm.explain.store import read_explanations
from cratelm.llm import claims as claims_module
from cratelm.llm import ledger as ledger_module
from cratelm.llm.claims import Claim
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.requests import Answer, Chat, Failure, FailureKind, Request, key

CHATS = [Chat((("user", f"question {i}"),)) for i in range(40)]
IDENTITY = {"backend": "fake"}


# ---- two commands -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return planted.run_with_harvest(tmp_path / "run", n_neurons=12, layers=1).path


def started(run: Path, server: LLMServer, name: str, *options: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "cratelm", "explain", "--run", str(run), "--model", "m", "--quiet"),
        *("--explainer", f"openai:{MODEL}", "--base-url", server.base_url, "--name", name),
        *("--concurrency", "2", "--method", "json", *options),  # without a probe call
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def texts(run: Path, name: str) -> list[tuple]:
    found = read_explanations(run / "explanations" / f"m@{name}")
    return [(e.neuron, e.payload["evidence"], e.text) for e in found]


class Gate:
    """The server's answers after the first `n` wait until the gate is opened."""

    def __init__(self, server: LLMServer, n: int):
        self.server, self.n, self.opened = server, n, threading.Event()
        server.faults = self

    def __call__(self, seed: int, call: Call) -> None:
        if len(self.server.calls) > self.n:
            self.opened.wait(60)


def starts_waiting(command: subprocess.Popen[str]) -> bool:
    assert command.stdout is not None
    return "waiting for its answers" in command.stdout.readline()


@pytest.mark.fault("two commands ask the same of a language model", "each request is sent once")
def test_two_commands_ask_each_request_once(run):
    with LLMServer() as server:
        gate = Gate(server, 4)
        first = started(run, server, "a")
        wait_until(lambda: len(server.calls) > 4)
        second = started(run, server, "b")
        assert starts_waiting(second)
        gate.opened.set()
        for command in (first, second):
            _, error = command.communicate(timeout=60)
            assert command.returncode == 0, error
        assert set(server.requests.values()) == {1}
        assert len(server.requests) == 22
    assert texts(run, "a") == texts(run, "b")
    assert len(texts(run, "a")) == 22
    calls = [json.loads((run / f"explanations/m@{n}/calls.json").read_text()) for n in "ab"]
    assert [(c["calls"], c["known"]) for c in calls] == [(22, 0), (0, 22)]
    assert not list(run.glob(".ledger*"))


@pytest.mark.fault("two commands share a limit of calls", "together they do not pass it")
def test_limits_hold_over_two_commands(run):
    with LLMServer() as server:
        gate = Gate(server, 4)
        first = started(run, server, "a", "--max-calls", "9")
        wait_until(lambda: len(server.calls) > 4)
        second = started(run, server, "b", "--max-calls", "9")
        assert starts_waiting(second)
        gate.opened.set()
        for command in (first, second):
            _, error = command.communicate(timeout=60)
            assert command.returncode == 3
            assert "stopped at --max-calls 9: 9 calls" in error
        assert len(server.calls) == 9


@pytest.mark.fault("one of two commands is killed with requests in flight", "the other asks them")
def test_the_requests_of_a_killed_command_are_asked_by_the_other(run):
    with LLMServer() as server:
        gate = Gate(server, 6)
        first = started(run, server, "a")
        wait_until(lambda: len(server.calls) == 8)  # with two in flight
        second = started(run, server, "b")
        assert starts_waiting(second)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        gate.opened.set()
        _, error = second.communicate(timeout=60)
        assert second.returncode == 0, error
        assert len(server.requests) == 22
        assert sorted(server.requests.values()) == [1] * 20 + [2] * 2
    assert len(texts(run, "b")) == 22
    assert not (run / "explanations" / "m@a").exists()
    assert not list(run.glob(".ledger*.lock"))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- clients --------------------------------------------------------------------------------------------


class SlowModel(FakeModel):
    """Answers after a moment, and counts over all threads."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.begun = threading.Event()

    def answer(self, requests: Sequence[Request]):
        for outcome in super().answer(requests):
            self.begun.set()
            time.sleep(0.002)
            yield outcome


def together(asks: Sequence[Callable[[], object]]) -> list[object]:
    """Results of functions that are called at the same time, each in a thread; errors are results, too."""

    def result(ask: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return ask()
        except (BudgetReached, InputError) as error:
            return error

    barrier = threading.Barrier(len(asks))
    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(result, asks))


def asking(folder: Path, model: FakeModel, requests: Sequence[Request], **fields):
    retry_failed = fields.pop("retry_failed", False)

    def ask():
        with Ledger(folder / "ledger.sqlite") as ledger:
            client = Client(model, ledger, Budget(**fields), retry_failed=retry_failed)
            return client.ask(requests)

    return ask


def n_claims(folder: Path) -> int:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        return database.execute("SELECT COUNT(*) FROM claims").fetchone()[0]


def test_many_clients_ask_each_request_once_whatever_their_order(tmp_path):
    model = SlowModel()
    orders = [CHATS, CHATS[::-1], CHATS[7:] + CHATS[:7], CHATS[20:], CHATS[::3]]
    results = together([asking(tmp_path, model, order) for order in orders])
    assert set(model.asked.values()) == {1}
    assert len(model.asked) == 40
    for order, outcomes in zip(orders, results, strict=True):
        assert isinstance(outcomes, list)
        assert len(outcomes) == len(order)
        assert all(isinstance(o, Answer) for o in outcomes)
    assert n_claims(tmp_path) == 0


def test_failed_requests_are_repeated_once_over_all_clients(tmp_path):
    asking(tmp_path, FakeModel(fails=1.0), CHATS)()
    still = SlowModel(fails=0.5)
    results = together([asking(tmp_path, still, CHATS, retry_failed=True) for _ in range(3)])
    assert set(still.asked.values()) == {1}
    failed = [[isinstance(o, Failure) for o in outcomes] for outcomes in results]  # type: ignore[union-attr]
    assert failed[0] == failed[1] == failed[2]
    assert 0 < sum(failed[0]) < 40


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_calls": 10}, 10),
        ({"max_tokens": 300}, 27),  # 11 tokens a call, at most 66 before it is sent
        ({"max_cost": 0.3, "price_prompt": 1000.0, "price_completion": 1000.0}, 27),
    ],
)
def test_limits_are_never_passed_and_used_up(tmp_path, limits, most):
    model = SlowModel()
    parts = [CHATS[:20], CHATS[20:], CHATS[10:30]]
    results = together([asking(tmp_path, model, part, **limits) for part in parts])
    assert any(isinstance(r, BudgetReached) for r in results)
    assert not any(isinstance(r, InputError) for r in results)
    sent = sum(model.asked.values())
    assert most - 6 <= sent <= most  # what a reservation took is given back as answers come
    assert n_claims(tmp_path) == 0


def test_a_limit_that_another_reserves_is_waited_for(tmp_path):
    """60 tokens of each answer are reserved, 1 is used: there is room for both, once the first has finished."""
    model = SlowModel()
    limits = {"max_tokens": 20 * 66}
    results = together(
        [asking(tmp_path, model, part, **limits) for part in (CHATS[:20], CHATS[20:])]
    )
    assert [len(r) for r in results] == [20, 20]  # type: ignore[arg-type]


def test_claims_end_with_an_error(tmp_path):
    class Broken(FakeModel):
        def answer(self, requests):
            yield [(0, Answer("yes", 1, 1))]
            raise InputError("no server")

    with pytest.raises(InputError, match="no server"):
        asking(tmp_path, Broken(), CHATS)()
    assert n_claims(tmp_path) == 0
    assert not list(tmp_path.glob(".*.lock"))


def test_a_killed_client_in_the_middle_of_its_claims(tmp_path):
    """Its lock is free, its claims are there."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger, sqlite3.connect(ledger.path) as database:
        rows = [(key(r, IDENTITY), "0123abcd", "fake", 10**6, 0, 99.0) for r in CHATS]
        database.executemany("INSERT INTO claims VALUES (?,?,?,?,?,?)", rows)
        database.commit()
        model = FakeModel()
        assert len(asking(tmp_path, model, CHATS[:30], max_tokens=10_000)()) == 30
        assert sum(model.asked.values()) == 30
    assert n_claims(tmp_path) == 0


@pytest.mark.fault(
    "a command is stopped with requests in flight", "another takes them over after 150 s"
)
def test_a_stopped_client_loses_its_claims_and_a_slow_one_does_not(tmp_path, monkeypatch):
    """A living one touches its lock; this one does so only as long as it is told to."""
    monkeypatch.setattr(claims_module, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(claims_module, "EXPIRES", 0.5)
    is_claimed, is_stopped, ending = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with Ledger(tmp_path / "ledger.sqlite") as ledger, ledger.claims() as claims:
            with claims.transaction():
                claims.add("fake", [Claim(key(CHATS[0], IDENTITY))], None)
            (lock_file,) = tmp_path.glob(".*.lock")
            is_claimed.set()
            while not is_stopped.wait(0.05):
                os.utime(lock_file)
            ending.wait()

    model = FakeModel()
    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(hold)
        is_claimed.wait()
        waiting = pool.submit(asking(tmp_path, model, CHATS[:1]))
        time.sleep(1.2)
        assert not waiting.done()
        is_stopped.set()
        try:
            assert isinstance(waiting.result(timeout=10)[0], Answer)
        finally:
            ending.set()
        holding.result()
    assert sum(model.asked.values()) == 1


def test_locks_of_killed_clients_are_removed(tmp_path):
    old, new = (tmp_path / f".ledger.sqlite.{n}.lock" for n in ("0123abcd", "4567abcd"))
    for file in (old, new):
        file.write_text("")
    os.utime(old, (1, 1))
    Ledger(tmp_path / "ledger.sqlite")
    assert not old.exists()
    assert new.exists()  # its process may not have locked it yet


def test_an_answer_that_comes_twice_is_paid_twice_and_kept_once(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for text in ("first", "second"):
            ledger.write("m", [("k", "Chat", Answer(text, 5, 2))], (1e6, 0))
        assert ledger.find(["k"])["k"].value == "first"  # type: ignore[union-attr]
        bill = ledger.bill("m", (0, 0))
        assert (bill.calls, bill.tokens, bill.cost) == (2, 14, 10)


def test_a_ledger_of_an_earlier_version_is_shared_too(tmp_path):
    asking(tmp_path, FakeModel(), CHATS[:5])()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as old:
        old.execute("DROP TABLE claims")
        old.execute("DROP TABLE unsettled")
    model = SlowModel()
    together([asking(tmp_path, model, CHATS), asking(tmp_path, model, CHATS)])
    assert len(model.asked) == 35
    assert set(model.asked.values()) == {1}


# ---- a file that cannot be used -------------------------------------------------------------------------


def test_a_ledger_that_another_program_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_LOCK_SECONDS", 0.05)
    Ledger(tmp_path / "ledger.sqlite")
    other = sqlite3.connect(tmp_path / "ledger.sqlite")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match=r"ledger\.sqlite .*another process has locked it"):
        asking(tmp_path, FakeModel(), CHATS)()
    other.rollback()


@pytest.mark.fault("no space for the ledger", "one line; no answer is lost")
def test_a_full_disk_is_one_line_and_loses_no_answer(tmp_path):
    asking(tmp_path, FakeModel(), CHATS[:3])()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
        ledger._database.execute(f"PRAGMA max_page_count={pages}")
        rows = [(f"k{i}", "Chat", Answer("word " * 500, 1, 1)) for i in range(200)]
        with pytest.raises(InputError, match=r"ledger\.sqlite .*free some space on its disk"):
            ledger.write("m", rows)
    model = FakeModel()
    assert len(asking(tmp_path, model, CHATS[:3])()) == 3
    assert not model.asked


def test_a_damaged_answer_is_named(tmp_path):
    asking(tmp_path, FakeModel(), CHATS)()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("UPDATE calls SET value = X'00' WHERE key = ?", (key(CHATS[3], IDENTITY),))
    with pytest.raises(InputError, match=r"ledger\.sqlite is damaged: .*key [0-9a-f]{64}"):
        asking(tmp_path, FakeModel(), CHATS)()


@pytest.mark.fault("the ledger is damaged", "one line names it")
def test_a_damaged_file_is_one_line(tmp_path):
    asking(tmp_path, FakeModel(), CHATS)()
    path = tmp_path / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"ledger\.sqlite cannot be read as a ledger"):
        asking(tmp_path, FakeModel(), CHATS)()


def test_failures_that_are_unsettled_are_merged_once(tmp_path):
    with Ledger(tmp_path / "a.sqlite") as ours, Ledger(tmp_path / "b.sqlite") as theirs:
        failure = Failure(FailureKind.STATUS, "status 500")
        theirs.write("m", [("k", "Chat", failure)])
        theirs.unsettle(["k"])
        ours.merge(theirs.path)
        assert ours.find(["k"]) == {}
        ours.write("m", [("k", "Chat", failure)])  # asked again: settled here
        ours.merge(theirs.path)
        assert ours.find(["k"])
