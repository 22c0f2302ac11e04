"""The ledger: every answer of a language model, stored in one file under a hash of its request.

One SQLite file per run (`ledger.sqlite`; table `calls`, one row per request, table `models`, one row
per backend). An answer is committed before it is used, so that a killed process repeats no call. The
value used equals the value stored: it is rounded as in the file before it is returned. Requests
themselves are not stored (they can be rebuilt from the run), nor is any API key.

Size: about 1.5 kB for a simulated excerpt of 64 tokens, 0.3 kB for one of 8, 0.2 kB for a chat.
"""

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.errors import InputError
from cratelm.llm.requests import Answer, Failure, FailureKind, OptionLogprobs, Outcome, Value

FILE = "ledger.sqlite"
_DECIMALS = 3
"""decimals of log-probabilities: 0.1% of a probability"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    value BLOB,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    attempts INTEGER NOT NULL,
    finished_at TEXT NOT NULL,
    cost REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (specification TEXT PRIMARY KEY, record TEXT NOT NULL);
"""
_COLUMNS = (
    "key, kind, model, status, reason, value, prompt_tokens, completion_tokens, seconds, attempts,"
    " finished_at, cost"
)
_OK = "ok"
Prices = tuple[float, float]
"""US dollars per million prompt tokens, and per million completion tokens"""


@dataclass(frozen=True)
class Spent:
    """Cost of the calls to one model, including failed ones."""

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Bill:
    """Cost of all calls in a ledger, of every model and every command; repeated calls count each time."""

    calls: int = 0
    tokens: int = 0
    """prompt and completion tokens together"""
    cost: float = 0.0
    """US dollars"""


class Ledger:
    """The answers stored in one file. A context manager; opening it creates the file.

    Several processes on one machine may write to one ledger. On shared storage each worker has a
    separate one (`--shard`), and `merge` combines them.

    Raises `InputError` if the file is not a ledger.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=60)
            with self._database:
                self._database.executescript(_SCHEMA)
                if not self._has_cost():  # a file of version 0.1.0
                    self._database.execute("BEGIN IMMEDIATE")
                    if not self._has_cost():  # no other process was faster
                        self._database.execute("ALTER TABLE calls ADD COLUMN cost REAL")
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{path} cannot be read as a ledger ({error}): it must be an SQLite file; move it"
                " away to start a new one"
            ) from None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def _has_cost(self) -> bool:
        columns = self._database.execute("PRAGMA table_info(calls)").fetchall()
        return "cost" in {column[1] for column in columns}

    def find(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """Return the stored outcomes of these keys."""
        outcomes: dict[str, Outcome] = {}
        for start in range(0, len(keys), 500):
            portion = keys[start : start + 500]
            placeholders = ",".join("?" * len(portion))
            for row in self._database.execute(
                f"SELECT {_COLUMNS} FROM calls WHERE key IN ({placeholders})", portion
            ):
                outcomes[row[0]] = _outcome(row)
        return outcomes

    def write(
        self, model: str, outcomes: Iterable[tuple[str, str, Outcome]], prices: Prices | None = None
    ) -> None:
        """Store (key, kind, outcome) rows in one transaction. A failure never replaces an answer.

        `prices` are None if they are unknown.
        """
        rows = [_row(key, kind, model, outcome, prices) for key, kind, outcome in outcomes]
        with self._database:
            self._database.executemany(
                f"INSERT INTO calls ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,1,?,?)"
                " ON CONFLICT (key) DO UPDATE SET status = excluded.status,"
                " reason = excluded.reason, value = excluded.value,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens,"
                " seconds = seconds + excluded.seconds, attempts = attempts + 1,"
                " cost = cost + excluded.cost,"  # NULL (unknown) if either is
                f" finished_at = excluded.finished_at WHERE calls.status <> '{_OK}'",
                rows,
            )

    def merge(self, other: str | Path) -> int:
        """Copy the rows of another ledger that this one lacks; return their number.

        An answer replaces a failure, never the reverse.
        """
        with Ledger(other) as source:
            rows = source._database.execute(f"SELECT {_COLUMNS} FROM calls").fetchall()
            models = source._database.execute("SELECT specification, record FROM models").fetchall()
        with self._database:
            before = self._database.total_changes
            self._database.executemany(
                f"INSERT INTO calls ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (key) DO"
                " UPDATE SET status = excluded.status, reason = excluded.reason,"
                " value = excluded.value, finished_at = excluded.finished_at,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens,"
                " seconds = seconds + excluded.seconds, attempts = attempts + excluded.attempts,"
                " cost = cost + excluded.cost"
                f" WHERE calls.status <> '{_OK}' AND excluded.status = '{_OK}'",
                rows,
            )
            changed = self._database.total_changes - before
            self._database.executemany("INSERT OR IGNORE INTO models VALUES (?,?)", models)
        return changed

    def remember(self, specification: str, record: dict[str, Any]) -> None:
        """Store facts about a backend: its identity, its capabilities, its tokenisation."""
        with self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO models VALUES (?,?)", (specification, json.dumps(record))
            )

    def recall(self, specification: str) -> dict[str, Any] | None:
        """Return the facts that `remember` stored; None if there are none."""
        row = self._database.execute(
            "SELECT record FROM models WHERE specification = ?", (specification,)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def spent(self, model: str, kinds: Sequence[str]) -> Spent:
        """Return the cost of all calls of these kinds to `model`, by all processes."""
        placeholders = ",".join("?" * len(kinds))
        row = self._database.execute(
            "SELECT COUNT(*), SUM(status <> 'ok'), SUM(prompt_tokens), SUM(completion_tokens),"
            f" SUM(seconds) FROM calls WHERE model = ? AND kind IN ({placeholders})",
            (model, *kinds),
        ).fetchone()
        return Spent(*(value or 0 for value in row))

    def bill(self, model: str, prices: Prices) -> Bill:
        """Return the cost of all calls so far.

        Calls stored without prices cost nothing, except those to `model`, which count at `prices`.
        """
        row = self._database.execute(
            "SELECT SUM(attempts), SUM(prompt_tokens + completion_tokens), SUM(COALESCE(cost,"
            " CASE WHEN model = ? THEN (prompt_tokens * ? + completion_tokens * ?) / 1e6 END))"
            " FROM calls",
            (model, *prices),
        ).fetchone()
        return Bill(*(value or 0 for value in row))


def encode(value: Value) -> bytes:
    """Return a value as compressed JSON with rounded numbers."""
    return zlib.compress(json.dumps(_plain(value), separators=(",", ":")).encode())


def decode(kind: str, data: bytes) -> Value:
    """Return the value that `encode` stored for a request of this kind (`cratelm.llm.requests.kind_of`)."""
    plain = json.loads(zlib.decompress(data))
    if kind == "Chat":
        return plain
    if kind == "Fill":
        return tuple(plain)
    if kind == "Embed":
        return np.array(plain, dtype=np.float32)
    log_probs = np.array(
        [[-np.inf if x is None else x for x in row] for row in plain["log_probs"]], np.float32
    )
    mass, ranks = plain.get("mass"), plain.get("ranks")
    return OptionLogprobs(
        log_probs,
        None if mass is None else np.array(mass, np.float32),
        None if ranks is None else np.array(ranks, np.uint16),
    )


def rounded(kind: str, outcome: Outcome) -> Outcome:
    """Return an outcome as the ledger will return it."""
    if isinstance(outcome, Failure):
        return outcome
    value = decode(kind, encode(outcome.value))
    return Answer(value, outcome.prompt_tokens, outcome.completion_tokens, outcome.seconds)


def _plain(value: Value) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.ndarray):
        return [float(f"{x:.6g}") for x in value.tolist()]
    plain: dict[str, Any] = {
        "log_probs": [
            [None if x == -np.inf else round(x, _DECIMALS) for x in row]
            for row in value.log_probs.tolist()
        ]
    }
    if value.mass is not None:
        plain["mass"] = [round(x, 4) for x in value.mass.tolist()]
    if value.ranks is not None:
        plain["ranks"] = value.ranks.tolist()
    return plain


def _row(key: str, kind: str, model: str, outcome: Outcome, prices: Prices | None) -> tuple:
    failed = isinstance(outcome, Failure)
    tokens = (outcome.prompt_tokens, outcome.completion_tokens)
    return (
        key,
        kind,
        model,
        str(outcome.kind) if failed else _OK,
        outcome.reason if failed else "",
        None if failed else encode(outcome.value),
        outcome.prompt_tokens,
        outcome.completion_tokens,
        outcome.seconds,
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        sum(n * p for n, p in zip(tokens, prices, strict=True)) / 1e6 if prices else None,
    )


def _outcome(row: tuple) -> Outcome:
    _, kind, _, status, reason, value, prompt_tokens, completion_tokens, seconds, *_ = row
    cost = (prompt_tokens, completion_tokens, seconds)
    if status == _OK:
        return Answer(decode(kind, value), *cost)
    return Failure(FailureKind(status), reason, *cost)
