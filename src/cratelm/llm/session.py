"""Open a language model for a verb: its backend, the run's ledger, the budget.

A verb first reads its inputs, then enters `open_client`, and makes all its requests through that client.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.llm.client import Client
from cratelm.llm.config import LLMConfig
from cratelm.llm.ledger import FILE, Ledger
from cratelm.llm.requests import Backend, Outcome, Request
from cratelm.runs import Draft, Inputs, Stage, write_json


@contextlib.contextmanager
def open_client(config: LLMConfig, specification: str) -> Iterator[Client]:
    """Open the language model that `specification` names, with the ledger of the run.

    With `config.shard` the worker's ledger is used; without it, the ledgers of workers are merged
    first. Weights are loaded and servers are called at the first request only. Raises `InputError`
    if the model or the ledger cannot be opened.
    """
    with Ledger(ledger_path(config)) as ledger:
        if not config.shard:
            for other in sorted(config.run.glob("ledger-*-of-*.sqlite")):
                ledger.merge(other)
        label = f"{specification} --dtype {config.dtype} --method {config.method}"
        backend = _replayed(ledger, label) if config.offline else _backend(config, specification)
        if not config.offline:
            ledger.remember(label, _facts(backend))
        yield Client(backend, ledger, config.budget(), retry_failed=config.retry_failed)


def ledger_path(config: LLMConfig) -> Path:
    """Return the path of the run's ledger, or of the ledger of the worker that `config.shard` names."""
    if not config.shard:
        return config.run / FILE
    index, count = config.worker()
    return config.run / f"ledger-{index}-of-{count}.sqlite"


def is_finished(config: LLMConfig, stage: Stage, inputs: Inputs) -> bool:
    """Return True and print a note if a verb that calls a language model has nothing to do.

    Never True for `--dry-run` and `--shard`, which write no stage, for `--force`, and for
    `--retry-failed` if a call failed. Raises `InputError` as `Stage.is_finished` does.
    """
    if config.dry_run or config.shard:
        return False
    done = stage.completion()
    counts = ("n_failed", "n_lost")
    has_failed = done is not None and any(done.results.get(name) for name in counts)
    redo = config.force or (config.retry_failed and has_failed)
    return stage.is_finished(config, inputs, force=redo)


def write_calls(draft: Draft, client: Client) -> None:
    """Write `calls.json`, the counts of calls. It holds times, so it does not enter the stage's identity."""
    write_json(draft.path / "calls.json", client.tally.as_dict())
    draft.unhashed.add("calls.json")


class ReplayBackend:
    """A model that is not opened: its facts are read from the ledger, and it answers no request.

    Used with `--offline`, where the client answers all requests from the ledger.
    """

    window = 4096
    parallel = 1
    reads_by_slot = False
    thinking_tokens = 0
    address = ""

    def __init__(self, label: str, facts: dict[str, Any]):
        self._label = label
        self.name: str = facts["name"]
        self.identity: dict[str, str] = facts["identity"]
        self.supports_logprobs: bool = facts["reads"]
        self.reason: str = facts["reason"]
        self.way: str = facts.get("way", "")  # version 0.1.0 has none

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Raise `InputError`: these answers are not in the ledger."""
        raise InputError(
            f"--offline: {len(requests):,} answers of {self._label} are not in the ledger: type the"
            " command without --offline to request them"
        )
        yield []

    def count_tokens(self, text: str) -> int:
        """Return an estimate of the number of tokens."""
        return len(text.encode()) // 4 + 1

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """Return an empty list: the tokenizer is not available."""
        return []


def _replayed(ledger: Ledger, label: str) -> Backend:
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
        "reads": backend.supports_logprobs,  # the key of version 0.1.0: old ledgers replay, too
        "reason": backend.reason,
        "way": backend.way,
    }


def _backend(config: LLMConfig, specification: str) -> Backend:
    kind, _, name = specification.partition(":")
    if kind == "hf":
        from cratelm.llm.backends.transformers import LocalBackend

        return LocalBackend(
            name,
            device=config.device,
            dtype=config.dtype,
            thinking_tokens=config.thinking_tokens,
        )
    from cratelm.llm.backends.openai import ServerBackend

    return ServerBackend(
        name,
        config.base_url or None,
        concurrency=config.concurrency,
        retries=config.retries,
        deadline=config.deadline,
        method=config.method,
        thinking_tokens=config.thinking_tokens,
    )
