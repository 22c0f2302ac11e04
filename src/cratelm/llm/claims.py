"""Claims: who is asking which request now, so that processes that share a ledger ask each request once.

A client claims requests before it sends them, in one transaction that also reads what other processes have
answered, claimed and spent. A claim reserves the most that its request can cost, so that a budget holds over
all processes. The transaction that stores an outcome deletes its claim. A client never waits while it
has claims, so two clients cannot wait for each other.

A claim is valid while its holder lives. The holder locks a file next to the ledger; the operating system
releases the lock of a process that was killed, and a process that was stopped no longer touches the file
(`cratelm.runs.atomic`). A client that waits for such claims deletes them and asks the requests itself.
"""

import contextlib
import secrets
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import lock
from cratelm.runs.atomic import EXPIRES, check_unlocked

SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL
) WITHOUT ROWID;
"""
POLL_SECONDS, CHECK_SECONDS = 0.2, 1.0
"""seconds between two looks at the ledger while waiting, and between two checks that the holders live"""
KEYS_PER_QUERY = 500
Prices = tuple[float, float]
"""US dollars per million prompt tokens, and per million completion tokens"""


@dataclass(frozen=True)
class Bill:
    """Cost of calls, of every model and every command; repeated calls count each time."""

    calls: int = 0
    tokens: int = 0
    """prompt and completion tokens together"""
    cost: float = 0.0
    """US dollars"""

    def __add__(self, other: "Bill") -> "Bill":
        return Bill(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)


@dataclass(frozen=True)
class Claim:
    """A request to be claimed, and the most tokens that it can take; 0 if they are not limited."""

    key: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Claims:
    """The claims of one client in a ledger. A context manager; leaving it ends the claims.

    Raises `sqlite3.Error` if the ledger cannot be read or written.
    """

    def __init__(self, ledger: Path, database: sqlite3.Connection):
        self._ledger, self._database = ledger, database
        self._holder = secrets.token_hex(4)
        self._held = contextlib.ExitStack()
        self._version = -1
        """of the ledger, at the last transaction"""
        self._touched: dict[str, tuple[float, float]] = {}
        """by holder: when it last touched its lock, by its clock, and when this was first seen, by ours"""

    def __enter__(self) -> "Claims":
        self._held.enter_context(lock(_path_of(self._ledger, self._holder)))
        return self

    def __exit__(self, *_: object) -> None:
        # if they cannot be deleted, they end with the lock
        with self._held, contextlib.suppress(sqlite3.Error), self._database:
            self._release([self._holder])

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the ledger's write lock, and end the claims of holders that no longer live."""
        dead = [holder for holder in self._others() if not self._is_alive(holder)]
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._version = version_of(self._database)
            if dead:
                self._release(dead)
            yield

    def held_by_others(self, keys: Sequence[str]) -> set[str]:
        """Return those of `keys` that another client has claimed."""
        held: set[str] = set()
        for start in range(0, len(keys), KEYS_PER_QUERY):
            portion = keys[start : start + KEYS_PER_QUERY]
            rows = self._database.execute(
                f"SELECT key FROM claims WHERE holder <> ? AND key IN ({_placeholders(portion)})",
                (self._holder, *portion),
            )
            held.update(key for (key,) in rows)
        return held

    def reserved(self, model: str, prices: Prices) -> Bill:
        """Return the most that the claims of other clients can cost, priced as in `Ledger.bill`."""
        row = self._database.execute(
            f"SELECT COUNT(*), {BILLED_COLUMNS} FROM claims WHERE holder <> ?",
            (model, *prices, self._holder),
        ).fetchone()
        return Bill(*(value or 0 for value in row))

    def add(self, model: str, claims: Collection[Claim], prices: Prices | None) -> None:
        """Claim requests to `model`; `prices` are None if they are unknown."""
        self._database.executemany(
            "INSERT INTO claims VALUES (?,?,?,?,?,?)",
            [
                (
                    claim.key,
                    self._holder,
                    model,
                    claim.prompt_tokens,
                    claim.completion_tokens,
                    cost_of(claim.prompt_tokens, claim.completion_tokens, prices),
                )
                for claim in claims
            ],
        )

    def wait(self) -> None:
        """Wait until another process has written to the ledger, but at most `CHECK_SECONDS`."""
        until = time.monotonic() + CHECK_SECONDS
        while version_of(self._database) == self._version and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _others(self) -> list[str]:
        rows = self._database.execute(
            "SELECT DISTINCT holder FROM claims WHERE holder <> ?", (self._holder,)
        )
        return [holder for (holder,) in rows]

    def _is_alive(self, holder: str) -> bool:
        if not _is_locked(self._ledger, holder):
            return False
        try:
            touched = _lock_file(self._ledger, holder).stat().st_mtime
        except OSError:  # it has ended just now
            return False
        # Our own clock, which stands still while the machine is suspended: after that, every lock is old.
        now = time.monotonic()
        before, since = self._touched.get(holder, (touched, now))
        if before != touched:
            since = now
        self._touched[holder] = touched, since
        return now - since < EXPIRES

    def _release(self, holders: Sequence[str]) -> None:
        self._database.execute(
            f"DELETE FROM claims WHERE holder IN ({_placeholders(holders)})", tuple(holders)
        )


BILLED_COLUMNS = (
    "SUM(prompt_tokens + completion_tokens), SUM(COALESCE(cost,"
    " CASE WHEN model = ? THEN (prompt_tokens * ? + completion_tokens * ?) / 1e6 END))"
)
"""tokens and cost of a `Bill`, in SQL, for a model and its prices"""


def cost_of(prompt_tokens: int, completion_tokens: int, prices: Prices | None) -> float | None:
    """Return US dollars; None without prices."""
    if prices is None:
        return None
    return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6


def version_of(database: sqlite3.Connection) -> int:
    """Return a number that changes when another connection writes to the file, and not by own writes."""
    return database.execute("PRAGMA data_version").fetchone()[0]


def remove_dead_locks(ledger: Path) -> None:
    """Remove the lock files of clients that were killed, also of those that had no claim yet."""
    for file in ledger.parent.glob(f".{ledger.name}.????????.lock"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - file.stat().st_mtime > EXPIRES:  # a new file may not be locked yet
                _is_locked(ledger, file.name.split(".")[-2])


def _path_of(ledger: Path, holder: str) -> Path:
    """Return the path whose lock a holder has; there is no such file, only that of the lock."""
    return ledger.with_name(f"{ledger.name}.{holder}")


def _lock_file(ledger: Path, holder: str) -> Path:
    return ledger.with_name(f".{ledger.name}.{holder}.lock")


def _is_locked(ledger: Path, holder: str) -> bool:
    """Return whether a living process has the lock of a holder; if none has, its file is removed."""
    if not holder.isalnum():  # no name that a client chose
        return False
    try:
        check_unlocked(_path_of(ledger, holder))
        return False
    except (InputError, OSError):  # locked, or the file of another user
        return True


def _placeholders(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
