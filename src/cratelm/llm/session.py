"""Opening a language model for a verb: its backend, the run's ledger, the budget."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.llm.client import Client
from cratelm.llm.config import AskConfig
from cratelm.llm.ledger import FILE, Ledger
from cratelm.llm.requests import Backend, Outcome, Request


@contextlib.contextmanager
def open_client(config: AskConfig, specification: str) -> Iterator[Client]:
    """A client of the language model that `specification` names, over the ledger of the run.

    With `config.shard` the ledger is that worker's own; without it, those of workers are merged
    first. Raises `InputError` where the model or the ledger cannot be opened.
    """
    with Ledger(ledger_path(config)) as ledger:
        if not config.shard:
            for other in sorted(config.run.glob("ledger-*-of-*.sqlite")):
                ledger.merge(other)
        label = f"{specification} --dtype {config.dtype} --method {config.method}"
        backend = _recorded(ledger, label) if config.offline else _backend(config, specification)
        if not config.offline:
            ledger.remember(label, _facts(backend))
        yield Client(backend, ledger, config.budget(), retry_failed=config.retry_failed)


def ledger_path(config: AskConfig) -> Path:
    if not config.shard:
        return config.run / FILE
    index, count = config.worker()
    return config.run / f"ledger-{index}-of-{count}.sqlite"


class ReplayBackend:
    """A model that is not there: what the ledger knows of it, and nothing more."""

    window = 4096
    parallel = 1

    def __init__(self, label: str, facts: dict[str, Any]):
        self._label = label
        self.name: str = facts["name"]
        self.identity: dict[str, str] = facts["identity"]
        self.reads: bool = facts["reads"]
        self.reason: str = facts["reason"]

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        raise InputError(
            f"--offline: {len(requests):,} answers of {self._label} are not in the ledger: type the"
            " command without --offline to ask for them"
        )
        yield []

    def count_tokens(self, text: str) -> int:
        return len(text.encode()) // 4 + 1

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        return []


def _recorded(ledger: Ledger, label: str) -> Backend:
    facts = ledger.recall(label)
    if facts is None:
        raise InputError(
            f"--offline: {ledger.path} has no answers of {label}: type the command without --offline"
        )
    return ReplayBackend(label, facts)


def _facts(backend: Backend) -> dict[str, Any]:
    return {
        "name": backend.name,
        "identity": backend.identity,
        "reads": backend.reads,
        "reason": backend.reason,
    }


def _backend(config: AskConfig, specification: str) -> Backend:
    kind, _, rest = specification.partition(":")
    if kind == "hf":
        from cratelm.llm.backends.transformers import LocalBackend

        return LocalBackend(rest, device=config.device, dtype=config.dtype)
    from cratelm.llm.backends.openai import ServerBackend

    return ServerBackend(
        rest,
        config.base_url or None,
        concurrency=config.concurrency,
        retries=config.retries,
        deadline=config.deadline,
        method=config.method,
    )
