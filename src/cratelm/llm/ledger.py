"""The ledger: every answer of a language model, stored in one file under a hash of its request.

One SQLite file per run (`ledger.sqlite`; table `calls`, one row per request, table `models`, one row
per backend). An answer is committed before it is used, so that a killed process repeats no call. The
value used equals the value stored: it is rounded as in the file before it is returned. Requests
themselves are not stored (they can be rebuilt from the run), nor is any API key.

Several processes on one machine may use one ledger: `cratelm.llm.claims` (table `claims`) keeps them from
asking the same request twice. Table `unsettled` names failed requests that the next command sends again.

Size: about 1.5 kB for a simulated excerpt of 64 tokens, 0.3 kB for one of 8, 0.2 kB for a chat.
"""

import contextlib
import json
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.errors import InputError
from cratelm.llm.claims import (
    BILLED_COLUMNS,
    KEYS_PER_QUERY,
    SCHEMA,
    Bill,
    Claims,
    Prices,
    cost_of,
    remove_dead_locks,
    version_of,
)
from cratelm.llm.requests import Answer, Failure, FailureKind, OptionLogprobs, Outcome, Value

FILE = "ledger.sqlite"
_DECIMALS = 3
"""decimals of log-probabilities: 0.1% of a probability"""
_SCHEMA = f"""
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
CREATE TABLE IF NOT EXISTS unsettled (key TEXT PRIMARY KEY) WITHOUT ROWID;
{SCHEMA}
"""
_COLUMNS = (
    "key, kind, model, status, reason, value, prompt_tokens, completion_tokens, seconds, attempts,"
    " finished_at, cost"
)
_OK = "ok"
_LOCK_SECONDS = 60.0
"""seconds to wait for another process that writes to the file; writing takes milliseconds"""
_ADVICE = {
    "SQLITE_NOTADB": "it must be an SQLite file; move it away to start a new one",
    "SQLITE_CORRUPT": "it is damaged; `sqlite3 OLD .recover | sqlite3 NEW` saves the answers that can be read",
    "SQLITE_FULL": "free some space on its disk",
    "SQLITE_READONLY": "make the file and its folder writable",
    "SQLITE_CANTOPEN": "make the file and its folder readable and writable",
    "SQLITE_IOERR": "check its disk",
    "SQLITE_BUSY": f"another process has locked it for {_LOCK_SECONDS:.0f} seconds; wait or stop that process",
}
"""what to do about an error of SQLite, by the beginning of its name"""


@dataclass(frozen=True)
class Spent:
    """Cost of the calls to one model, including failed ones."""

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Ledger:
    """The answers stored in one file. A context manager; opening it creates the file.

    Several processes on one machine may write to one ledger. On shared storage each worker has a
    separate one (`--shard`), and `merge` combines them.

    All methods raise `InputError` if the file is not a ledger, is damaged, or cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._in_words():
            self._database = sqlite3.connect(path, timeout=_LOCK_SECONDS)
            with self._database:
                self._database.executescript(_SCHEMA)
                if not self._has_cost():  # a file of version 0.1.0
                    self._database.execute("BEGIN IMMEDIATE")
                    if not self._has_cost():  # no other process was faster
                        self._database.execute("ALTER TABLE calls ADD COLUMN cost REAL")
        remove_dead_locks(self.path)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def _has_cost(self) -> bool:
        columns = self._database.execute("PRAGMA table_info(calls)").fetchall()
        return "cost" in {column[1] for column in columns}

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Raise an error of SQLite as one line that names the file and says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if not name:  # raised by Python's module: a mistake in this program
                raise
            advice = next((text for begin, text in _ADVICE.items() if name.startswith(begin)), "")
            raise InputError(
                f"{self.path} cannot be read as a ledger, or written ({error}):"
                f" {f'{advice}, then ' if advice else ''}type the same command again"
            ) from None

    @contextlib.contextmanager
    def claims(self) -> Iterator[Claims]:
        """Yield the claims of one client, which end with the context."""
        with self._in_words(), Claims(self.path, self._database) as claims:
            yield claims

    def find(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """Return the stored outcomes of these keys, without failures that are unsettled."""
        outcomes: dict[str, Outcome] = {}
        query = (
            f"SELECT {_COLUMNS} FROM calls WHERE key IN ({{}})"
            f" AND (status = '{_OK}' OR key NOT IN (SELECT key FROM unsettled))"
        )
        for row in self._select(query, keys):
            try:
                outcomes[row[0]] = _outcome(row)
            except (zlib.error, ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{self.path} is damaged: the answer of {row[2]} with the key {row[0]} cannot be read"
                    f" ({error}); take this row out with SQLite, and the same command asks for it again"
                ) from None
        return outcomes

    def failed_attempts(self, keys: Sequence[str]) -> dict[str, int]:
        """Return how often the requests were sent that have no answer, for those of `keys` that were."""
        query = f"SELECT key, attempts FROM calls WHERE status <> '{_OK}' AND key IN ({{}})"
        return dict(self._select(query, keys))

    def _select(self, query: str, keys: Sequence[str]) -> Iterator[tuple]:
        """Yield the rows of a query with `{}` for placeholders of keys."""
        for start in range(0, len(keys), KEYS_PER_QUERY):
            portion = keys[start : start + KEYS_PER_QUERY]
            with self._in_words():
                rows = self._database.execute(
                    query.format(",".join("?" * len(portion))), portion
                ).fetchall()
            yield from rows

    def write(
        self, model: str, outcomes: Iterable[tuple[str, str, Outcome]], prices: Prices | None = None
    ) -> None:
        """Store (key, kind, outcome) rows in one transaction, which ends the claims on these keys.

        A stored answer stays: what a later call to the same key cost is added. `prices` are None if they
        are unknown.
        """
        rows = [_row(key, kind, model, outcome, prices) for key, kind, outcome in outcomes]
        keys = [row[:1] for row in rows]
        unless_answered = ", ".join(
            f"{c} = CASE calls.status WHEN '{_OK}' THEN calls.{c} ELSE excluded.{c} END"
            for c in ("status", "reason", "value", "finished_at")
        )
        with self._in_words(), self._database:
            self._database.executemany(
                f"INSERT INTO calls ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,1,?,?)"
                f" ON CONFLICT (key) DO UPDATE SET {unless_answered},"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens,"
                " seconds = seconds + excluded.seconds, attempts = attempts + 1,"
                " cost = cost + excluded.cost",  # NULL (unknown) if either is
                rows,
            )
            self._database.executemany("DELETE FROM claims WHERE key = ?", keys)
            self._database.executemany("DELETE FROM unsettled WHERE key = ?", keys)

    def unsettle(self, keys: Collection[str]) -> None:
        """Let the next command send these failed requests again; what they cost stays on the bill."""
        with self._in_words(), self._database:
            self._database.executemany(
                "INSERT OR IGNORE INTO unsettled VALUES (?)", [(key,) for key in keys]
            )

    def merge(self, other: str | Path) -> int:
        """Copy the rows of another ledger that this one lacks; return their number.

        An answer replaces a failure, never the reverse.
        """
        with Ledger(other) as source, source._in_words():
            rows = source._database.execute(f"SELECT {_COLUMNS} FROM calls").fetchall()
            models = source._database.execute("SELECT specification, record FROM models").fetchall()
            unsettled = source._database.execute("SELECT key FROM unsettled").fetchall()
        with self._in_words(), self._database:
            # only those that are new here: this ledger may have settled the others since
            self._database.executemany(
                "INSERT OR IGNORE INTO unsettled SELECT ?1 WHERE ?1 NOT IN (SELECT key FROM calls)",
                unsettled,
            )
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
        with self._in_words(), self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO models VALUES (?,?)", (specification, json.dumps(record))
            )

    def recall(self, specification: str) -> dict[str, Any] | None:
        """Return the facts that `remember` stored; None if there are none."""
        with self._in_words():
            row = self._database.execute(
                "SELECT record FROM models WHERE specification = ?", (specification,)
            ).fetchone()
        try:
            return json.loads(row[0]) if row else None
        except ValueError:
            raise InputError(
                f"{self.path} is damaged: its record of {specification} is not JSON; take this row out of"
                " the table `models` with SQLite, and type the same command again"
            ) from None

    def spent(self, model: str, kinds: Sequence[str]) -> Spent:
        """Return the cost of all calls of these kinds to `model`, by all processes."""
        placeholders = ",".join("?" * len(kinds))
        with self._in_words():
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
        with self._in_words():
            row = self._database.execute(
                f"SELECT SUM(attempts), {BILLED_COLUMNS} FROM calls", (model, *prices)
            ).fetchone()
        return Bill(*(value or 0 for value in row))

    def version(self) -> int:
        """Return a number that changes when another process writes to the ledger."""
        with self._in_words():
            return version_of(self._database)


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
        cost_of(outcome.prompt_tokens, outcome.completion_tokens, prices),
    )


def _outcome(row: tuple) -> Outcome:
    _, kind, _, status, reason, value, prompt_tokens, completion_tokens, seconds, *_ = row
    cost = (prompt_tokens, completion_tokens, seconds)
    if status == _OK:
        return Answer(decode(kind, value), *cost)
    return Failure(FailureKind(status), reason, *cost)
