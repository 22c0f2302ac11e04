"""Ask a language model through the ledger, within a budget.

`Client.ask` reads earlier answers from the ledger and sends the other requests to the backend, in
batches that fit the budget. Outcomes are committed before they are returned. When the budget is used up,
`Client.ask` raises `BudgetReached` and nothing is lost: the same command with a higher limit resumes from
the ledger. A budget applies to a run: all spending recorded in its ledger counts.

Several processes may use one ledger: a client claims requests before it sends them, and waits for the
answers to those that another client has claimed (`cratelm.llm.claims`).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cratelm.errors import BudgetReached, InputError
from cratelm.llm.claims import Bill, Claim, Claims
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger, rounded
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
        self._attempts_before: dict[str, int] = {}
        """with `retry_failed`: how often each request had failed when it was first looked up"""
        self._prices = budget.prices
        self._billed, self._billed_at = Bill(), -1
        """the run's spending, without what this command spent, and the version of the ledger that says so"""
        self._n_answered = 0
        self._failed: dict[str, Failure] = {}
        """failures so far, while no request is answered; probe calls do not count in either"""
        self._has_waited = False

    def ask(self, requests: Sequence[Request], *, is_probe: bool = False) -> list[Outcome]:
        """Return one outcome per request, in order; equal requests are sent once.

        `is_probe`: these calls only prepare others, and `require_answers` ignores them. Raises
        `BudgetReached` before the first request that does not fit the budget; earlier answers are in the
        ledger.
        """
        keys = [key(r, self.identity) for r in requests]
        outcome_by_key = self._stored(keys)
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in outcome_by_key}
        self.tally.known += sum(k in outcome_by_key for k in keys)
        if missing:
            try:
                outcome_by_key |= self._obtain(missing)
            except InputError:
                if not self._n_answered:  # the server was never there: nothing is settled
                    self.ledger.unsettle([*self._failed, *missing])
                raise
        outcomes = [outcome_by_key[k] for k in keys]
        self.tally.failed.update(str(o.kind) for o in outcomes if isinstance(o, Failure))
        if not is_probe:
            self._note(outcome_by_key)
        return outcomes

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Return the requests that `ask` would send, without duplicates."""
        by_key = {key(r, self.identity): r for r in requests}
        stored = self._stored(list(by_key))
        return [r for k, r in by_key.items() if k not in stored]

    def require_answers(self) -> None:
        """Raise `InputError` if requests failed and none was answered; the next command sends them again."""
        if not self._failed:
            return
        self.ledger.unsettle(self._failed)
        first = next(iter(self._failed.values()))
        where = f" at {self.backend.address}" if self.backend.address else ""
        raise InputError(
            f"all {len(self._failed):,} calls to {self.backend.name}{where} failed, the first with"
            f" {first.kind}: {first.reason}; no stage was written: remove the cause, and type the same"
            " command again to repeat them"
        )

    def _note(self, outcomes: dict[str, Outcome]) -> None:
        self._n_answered += sum(isinstance(o, Answer) for o in outcomes.values())
        if self._n_answered:
            self._failed.clear()
        else:
            self._failed.update((k, o) for k, o in outcomes.items() if isinstance(o, Failure))

    def _stored(self, keys: list[str]) -> dict[str, Outcome]:
        stored = self.ledger.find(keys)
        if not self._retry_failed:
            return stored
        attempts = self.ledger.failed_attempts(keys)
        for k in keys:
            self._attempts_before.setdefault(k, attempts.get(k, 0))
        return {
            k: o
            for k, o in stored.items()
            if isinstance(o, Answer) or attempts.get(k, 0) > self._attempts_before[k]
        }

    def _obtain(self, missing: dict[str, Request]) -> dict[str, Outcome]:
        """Return the outcomes of requests: send those that no other client has claimed, wait for the others."""
        outcomes: dict[str, Outcome] = {}
        wanted = {k: self._claim_of(k, r) for k, r in missing.items()}
        with self.ledger.claims() as claims:
            while missing:
                stored, claimed = self._claim(claims, [wanted[k] for k in missing])
                self.tally.known += len(stored)
                sent = self._send([(k, missing[k]) for k in claimed])
                if not stored and not sent:
                    self._wait(claims, len(missing))
                outcomes |= stored | sent
                missing = {k: r for k, r in missing.items() if k not in outcomes}
        return outcomes

    def _claim_of(self, k: str, request: Request) -> Claim:
        if not (self.budget.max_tokens or self.budget.max_cost):
            return Claim(k)
        return Claim(k, prompt_tokens(request, self.backend), _most(request, self.backend))

    def _claim(
        self, claims: Claims, wanted: Sequence[Claim]
    ) -> tuple[dict[str, Outcome], list[str]]:
        """Claim the requests that nobody else has and that fit the budget.

        Returns the outcomes that other clients have stored meanwhile, and the keys that are claimed.
        """
        with claims.transaction():
            stored = self._stored([claim.key for claim in wanted])
            wanted = [claim for claim in wanted if claim.key not in stored]
            held = claims.held_by_others([claim.key for claim in wanted])
            free = [claim for claim in wanted if claim.key not in held]
            n = len(free)
            if free and self.budget.is_limited:
                spent = self._bill()
                n = self._room(free, spent + claims.reserved(self.backend.name, self._prices))
                if not n and not self._room(free, spent):  # not even once the others have finished
                    raise BudgetReached(self._limit(len(free)))
            claims.add(self.backend.name, free[:n], self._prices if any(self._prices) else None)
        return stored, [claim.key for claim in free[:n]]

    def _wait(self, claims: Claims, n_left: int) -> None:
        if not self._has_waited:
            self._has_waited = True
            print(
                f"another command uses {self.ledger.path} now: waiting for its answers or for what it"
                f" leaves of the budget ({n_left:,} requests left)",
                flush=True,
            )
        claims.wait()

    def _room(self, claims: Sequence[Claim], spent: Bill) -> int:
        """Return how many of `claims` fit into the limits, by the backend's count of tokens."""
        budget, n = self.budget, len(claims)
        if budget.max_calls:
            n = min(n, max(budget.max_calls - spent.calls, 0))
        prompt = completion = 0
        for n_before, claim in enumerate(claims[:n]):
            prompt += claim.prompt_tokens
            completion += claim.completion_tokens
            tokens = spent.tokens + prompt + completion
            cost = spent.cost + budget.cost(prompt, completion)
            over_tokens = budget.max_tokens and tokens > budget.max_tokens
            over_cost = budget.max_cost and cost > budget.max_cost
            if over_tokens or over_cost:
                return n_before
        return n

    def _bill(self) -> Bill:
        """Return the run's spending: that of other commands, from the ledger, and of this one.

        Limits apply to the run, not to this command: repeating a command grants no new budget. The
        ledger is added up again only after another process has written to it.
        """
        tally = self.tally
        tokens = tally.prompt_tokens + tally.completion_tokens
        cost = self.budget.cost(tally.prompt_tokens, tally.completion_tokens)
        version = self.ledger.version()
        if version != self._billed_at:
            whole = self.ledger.bill(self.backend.name, self._prices)
            self._billed_at = version
            self._billed = whole + Bill(-tally.calls, -tokens, -cost)
        return self._billed + Bill(tally.calls, tokens, cost)

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
        if not requests:
            return outcomes
        with contextlib.closing(self.backend.answer(requests)) as groups:
            for group in groups:
                rows = []
                for index, outcome in group:
                    k, kind = portion[index][0], kind_of(requests[index])
                    rows.append((k, kind, outcome))
                    outcomes[k] = rounded(kind, outcome)
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
            completion += _most(request, client.backend)
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


def _most(request: Request, backend: Backend) -> int:
    """Return the largest number of completion tokens of a request."""
    return completion_tokens(request, backend.thinking_tokens, by_slot=backend.reads_by_slot)
