"""Ask a language model through the ledger, within a budget.

`Client.ask` reads earlier answers from the ledger and sends the other requests to the backend, in
batches that fit the budget. Outcomes are committed before they are returned. When the budget is used up,
`Client.ask` raises `BudgetReached` and nothing is lost: the same command with a higher limit resumes from
the ledger. A budget applies to a run: all spending recorded in its ledger counts.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cratelm.errors import BudgetReached, InputError
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Bill, Ledger, rounded
from cratelm.llm.requests import (
    Answer,
    Backend,
    Failure,
    Outcome,
    Request,
    completion_tokens,
    key,
    kind_of,
    prompt_tokens,
)


@dataclass
class Tally:
    """Counts of a command's requests and their cost so far."""

    known: int = 0
    """requests answered from the ledger"""
    calls: int = 0
    """requests sent"""
    prompt_tokens: int = 0
    """prompt tokens of the requests sent, counted as a server counts them: the whole prompt of each"""
    completion_tokens: int = 0
    seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    """failures among all outcomes returned, new ones and those in the ledger, by kind"""

    def as_dict(self) -> dict[str, object]:
        """Return the content of `calls.json`."""
        return {**vars(self), "failed": dict(sorted(self.failed.items()))}

    def __str__(self) -> str:
        failures = ", ".join(f"{n} {kind}" for kind, n in sorted(self.failed.items()))
        return (
            f"{self.calls:,} calls ({self.known:,} answers were in the ledger),"
            f" {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens,"
            f" {failures or 'none'} failed"
        )


class Client:
    """A backend behind a ledger and a budget."""

    def __init__(
        self, backend: Backend, ledger: Ledger, budget: Budget, *, retry_failed: bool = False
    ):
        """`retry_failed`: requests that failed in an earlier command are sent again, once."""
        self.backend, self.ledger, self.budget = backend, ledger, budget
        self.tally = Tally()
        self._retry_failed = retry_failed
        self.identity = dict(backend.identity)
        self._tried: set[str] = set()
        self._prices = budget.prices
        # limits apply to the run, not to this command: repeating a command grants no new budget
        self._before = ledger.bill(backend.name, self._prices) if budget.is_limited else Bill()

    def ask(self, requests: Sequence[Request]) -> list[Outcome]:
        """Return one outcome per request, in order; equal requests are sent once.

        Raises `BudgetReached` before the first request that does not fit the budget; earlier answers are
        in the ledger.
        """
        keys = [key(r, self.identity) for r in requests]
        outcome_by_key = self._stored(keys)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in outcome_by_key}
        self.tally.known += sum(k in outcome_by_key for k in keys)
        for portion in self._portions(list(missing.items())):
            outcome_by_key |= self._send(portion)
        outcomes = [outcome_by_key[k] for k in keys]
        self.tally.failed.update(str(o.kind) for o in outcomes if isinstance(o, Failure))
        return outcomes

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Return the requests that `ask` would send, without duplicates."""
        by_key = {key(r, self.identity): r for r in requests}
        stored = self._stored(list(by_key))
        return [r for k, r in by_key.items() if k not in stored]

    def _stored(self, keys: list[str]) -> dict[str, Outcome]:
        stored = self.ledger.find(keys)
        if not self._retry_failed:
            return stored
        return {k: o for k, o in stored.items() if isinstance(o, Answer) or k in self._tried}

    def _portions(self, unsent: list[tuple[str, Request]]) -> Iterator[list[tuple[str, Request]]]:
        """Yield `unsent` in batches that fit the budget; raise `BudgetReached` if the next one does not."""
        while unsent:
            portion = unsent[: self._room(unsent)]
            if not portion:
                raise BudgetReached(self._limit(len(unsent)))
            yield portion
            unsent = unsent[len(portion) :]

    def _room(self, unsent: list[tuple[str, Request]]) -> int:
        """Return how many of `unsent` fit into the limits, by the backend's count of tokens."""
        budget, spent = self.budget, self._bill()
        n = len(unsent)
        if budget.max_calls:
            n = min(n, budget.max_calls - spent.calls)
        if not (budget.max_tokens or budget.max_cost):
            return max(n, 0)
        prompt = completion = 0
        for n_before, (_, request) in enumerate(unsent[: max(n, 0)]):
            prompt += prompt_tokens(request, self.backend)
            completion += completion_tokens(request)
            tokens = spent.tokens + prompt + completion
            cost = spent.cost + budget.cost(prompt, completion)
            over_tokens = budget.max_tokens and tokens > budget.max_tokens
            over_cost = budget.max_cost and cost > budget.max_cost
            if over_tokens or over_cost:
                return n_before
        return max(n, 0)

    def _bill(self) -> Bill:
        """Return the run's spending: that of earlier commands, from the ledger, and of this one."""
        tally = self.tally
        return Bill(
            self._before.calls + tally.calls,
            self._before.tokens + tally.prompt_tokens + tally.completion_tokens,
            self._before.cost + self.budget.cost(tally.prompt_tokens, tally.completion_tokens),
        )

    def _limit(self, n_left: int) -> str:
        budget, spent = self.budget, self._bill()
        limits = [
            f"--max-calls {budget.max_calls}" if budget.max_calls else "",
            f"--max-tokens {budget.max_tokens}" if budget.max_tokens else "",
            f"--max-cost {budget.max_cost:g}" if budget.max_cost else "",
        ]
        return (
            f"stopped at {' '.join(filter(None, limits))}: {spent.calls:,} calls, {spent.tokens:,}"
            f" tokens{f', ${spent.cost:,.4f}' if any(self._prices) else ''} are spent according to"
            f" {self.ledger.path}; this command made {self.tally}. At least {n_left:,} calls remain:"
            " raise the limit and type the same command again, and it resumes from the ledger"
        )

    def _send(self, portion: list[tuple[str, Request]]) -> dict[str, Outcome]:
        requests = [request for _, request in portion]
        outcomes: dict[str, Outcome] = {}
        with contextlib.closing(self.backend.answer(requests)) as groups:
            for group in groups:
                rows = []
                for index, outcome in group:
                    k, kind = portion[index][0], kind_of(requests[index])
                    rows.append((k, kind, outcome))
                    outcomes[k] = rounded(kind, outcome)
                    self._tried.add(k)
                    self._count(outcome)
                self.ledger.write(
                    self.backend.name, rows, self._prices if any(self._prices) else None
                )
        if len(outcomes) != len(portion):
            raise InputError(
                f"{self.backend.name} returned {len(outcomes)} outcomes for {len(portion)} requests:"
                " type the same command again to ask for the others"
            )
        return outcomes

    def _count(self, outcome: Outcome) -> None:
        self.tally.calls += 1
        self.tally.prompt_tokens += outcome.prompt_tokens
        self.tally.completion_tokens += outcome.completion_tokens
        self.tally.seconds += outcome.seconds


@dataclass(frozen=True)
class DryRun:
    """Result of a command with `--dry-run`: the calls that it would make, and an estimate of their cost."""

    requests: int
    known: int
    """requests that the ledger already has an answer for"""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    """at most"""
    cost: float | None
    """US dollars, at most; None without prices"""
    seconds: float | None
    """extrapolated from the rate of earlier calls to this model in this run; None before the first call"""

    def __str__(self) -> str:
        cost = "unknown (give --price-prompt and --price-completion)"
        if self.cost is not None:
            cost = f"at most ${self.cost:,.2f}"
        time_ = "unknown before the first calls (try --max-calls 20)"
        if self.seconds is not None:
            time_ = f"about {self.seconds / 60:,.1f} min at the rate of the calls so far"
        return (
            f"dry run: {self.requests:,} requests, {self.known:,} of them already in the ledger,"
            f" {self.calls:,} calls to make\n  tokens  {self.prompt_tokens:,} prompt, at most"
            f" {self.completion_tokens:,} completion\n  cost    {cost}\n  time    {time_}"
        )


@dataclass(frozen=True)
class WorkerResult:
    """Result of one of several workers (`--shard`), which writes answers to its own ledger and nothing else."""

    ledger: Path
    n_neurons: int
    calls: str

    def __str__(self) -> str:
        return (
            f"answers for the {self.n_neurons:,} neurons of this shard: {self.ledger}\n  {self.calls}\n"
            "  when all shards are done, the same command without --shard merges them and finishes the stage"
        )


def dry_run(client: Client, requests: Iterable[Sequence[Request]]) -> DryRun:
    """Return an estimate of the cost of these lists of requests, without sending any.

    Equal requests count once, even in different lists. Only half of each key is held, about 80
    bytes per request, so that a run of millions of requests can be estimated on a laptop.
    """
    calls, prompt, completion = 0, 0, 0
    kinds: set[str] = set()
    counted: set[bytes] = set()
    for group in requests:
        new = {key(r, client.identity): r for r in group}
        new = {k: r for k, r in new.items() if bytes.fromhex(k[:32]) not in counted}
        counted.update(bytes.fromhex(k[:32]) for k in new)
        for request in client.missing(list(new.values())):
            calls += 1
            prompt += prompt_tokens(request, client.backend)
            completion += completion_tokens(request)
            kinds.add(kind_of(request))
    budget = client.budget
    priced = budget.price_prompt or budget.price_completion
    so_far = client.ledger.spent(client.backend.name, sorted(kinds))
    tokens = so_far.prompt_tokens + so_far.completion_tokens
    seconds = None
    if tokens:
        share = (prompt + completion) / tokens
        seconds = so_far.seconds * share / client.backend.parallel
    return DryRun(
        requests=len(counted),
        known=len(counted) - calls,
        calls=calls,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=budget.cost(prompt, completion) if priced else None,
        seconds=0.0 if not calls else seconds,
    )
