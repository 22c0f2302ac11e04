"""What claims cost: requests through a ledger with and without them, to a model that answers at once.

Alternates both in one process. `--clients` also lets several clients, each with a thread of its own, ask the
same requests through one ledger, and compares the time with one client's.
"""

import argparse
import contextlib
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from statistics import median
from unittest import mock

from common import timed

from cratelm.llm.claims import Claims
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.requests import Answer, Chat, Outcome, Request


class InstantModel:
    """Answers each request by itself, as servers do, and at once."""

    name = "instant"
    address = ""
    reason = ""
    supports_logprobs = True
    parallel = 1

    def __init__(self, window: int):
        self.window = window
        self.identity = {"backend": "instant"}

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        for index in range(len(requests)):
            yield [(index, Answer("the token fox", 300, 5))]

    def count_tokens(self, text: str) -> int:
        return len(text) // 4

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        return []


class NoClaims(Claims):
    """Claims nothing."""

    def __enter__(self) -> "NoClaims":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        yield

    def add(self, *_: object) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256, help="requests passed at a time")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    chats = [Chat((("user", f"«word{i}» " * 20),)) for i in range(options.requests)]
    with_claims, without = [], []
    for _ in range(options.turns):
        with_claims.append(timed(lambda: ask_all(chats, options.window)))
        with mock.patch("cratelm.llm.ledger.Claims", NoClaims):
            without.append(timed(lambda: ask_all(chats, options.window)))
    per_request = [1000 * median(times) / options.requests for times in (with_claims, without)]
    ratios = [a / b for a, b in zip(with_claims, without, strict=True)]
    print(
        f"{per_request[0]:.3f} ms per request with claims, {per_request[1]:.3f} ms without:"
        f" {median(ratios):.3f} times as long ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    shared = timed(lambda: ask_all(chats, options.window, options.clients))
    print(
        f"{options.clients} clients that ask the same: {shared / median(with_claims):.2f} times as long"
        " as one"
    )


def ask_all(chats: Sequence[Chat], window: int, clients: int = 1) -> None:
    """Ask all `chats` through a new ledger, in windows, as `cratelm explain` does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger(path)
        threads = [threading.Thread(target=ask, args=(path, chats, window)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def ask(path: Path, chats: Sequence[Chat], window: int) -> None:
    with Ledger(path) as ledger:
        client = Client(InstantModel(window), ledger, Budget())
        for start in range(0, len(chats), window):
            client.ask(chats[start : start + window])


if __name__ == "__main__":
    main()
