"""`cratelm intervene`: test whether steering a neuron changes the text as its explanation says.

For each neuron: choose its explanation (`explanations`), continue texts with and without steering
(`continuations`), ask a language model which of two texts fits the explanation better (`judging`), and repeat
under two controls. Writes the folder `steer/MODEL@NAME/` of the run; `cratelm.steer.store` documents its files
and reads them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.explain.store import SampledNeuron
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.requests import Request
from cratelm.llm.session import is_finished, ledger_path, open_client, write_calls
from cratelm.records import Interval, NeuronId, Score, Status
from cratelm.runs import Draft, Run
from cratelm.score.controls import shuffled
from cratelm.score.scorers import Task
from cratelm.stats.ends import neuron_means
from cratelm.stats.intervals import bootstrap
from cratelm.steer import judging
from cratelm.steer.config import NO_LLM, InterveneConfig
from cratelm.steer.continuations import (
    Continuations,
    SteeringStrength,
    continue_prompts,
    draw_prompts,
)
from cratelm.steer.explanations import (
    JudgedExplanations,
    choose_neurons,
    explanation_source,
    read_judged_explanations,
)
from cratelm.steer.store import (
    CONTROL_LABELS,
    STEERING_CONTROLS,
    ContinuationTexts,
    ControlSummary,
    Intervention,
    InterventionSummary,
    SteeringControl,
    interventions_stage,
    read_intervention_summary,
    write_continuations,
    write_intervention_summary,
    write_interventions,
)

NEURONS_A_TIME = 16
"""number of neurons whose requests are sent to the judge together"""
RELIABLE = 0.75
"""if a judge scores below this on pairs with a known answer, its other answers are unreliable"""


@dataclass(frozen=True, kw_only=True)
class InterveneResult(InterventionSummary):
    """Result of `cratelm intervene`."""

    path: Path
    """folder of `interventions.parquet`, `continuations.parquet` and `summary.json`"""
    calls: str = ""
    """number and cost of this command's calls to the judge, in words; empty if the stage was finished before"""

    def __str__(self) -> str:
        mass = "" if self.mass is None else f" ({self.mass:.0%} of its probability on the answers)"
        known = "unknown" if self.known is None else f"{self.known:.2f}"
        if self.known is not None and self.known < RELIABLE:
            known += " - WARNING: near chance; do not rely on the scores below"
        lines = [
            f"{self.model}, explained by {self.explainer}, judged by {self.judge}{mass}:"
            f" {self.n_neurons} neurons, KL {_show(self.kl, '.3f')} nats per token: {self.path}",
            f"  the judge's score on made-up pairs with a known answer: {known}",
            "probability that the judge names the steered text (chance 0.5):",
        ]
        for control in self.controls:
            counts = (
                f"{control.defined} neurons, {control.undefined} undefined, {control.dead} dead,"
                f" {control.failed} failed"
            )
            label = CONTROL_LABELS[control.control]
            lines.append(f"  {label:<30} {_show(control.mean, '.3f'):<22} {counts}")
        lines.append(f"  {'own minus shuffled':<30} {_show(self.over_shuffled, '+.3f')}")
        lines.append(f"  {'own minus random neuron':<30} {_show(self.over_random, '+.3f')}")
        return "\n".join([*lines, *([f"  {self.calls}"] if self.calls else [])])


def _show(mean: Interval | None, form: str) -> str:
    return "-" if mean is None else mean.show(form)


@dataclass(frozen=True, eq=False)
class JudgeRequest:
    """One row of `interventions.parquet` before it is judged; `task` yields its score, or is the score."""

    row: Intervention
    task: Task | Score

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests to the judge for this row."""
        return self.task.requests if isinstance(self.task, Task) else ()

    def judged(self, score: Score) -> Intervention:
        """Return the row with its score."""
        return replace(
            self.row,
            value=score.value,
            status=str(score.status),
            reason=score.reason,
            pairs=score.n_records,
        )


NeuronRequests = tuple[list[JudgeRequest], list[ContinuationTexts]]
"""the rows of one neuron, and its prompts with continuations"""


def intervene(config: InterveneConfig) -> InterveneResult | DryRun | WorkerResult:
    """Steer neurons of a model, have a language model judge the texts, and return the summary.

    Writes `steer/MODEL@NAME/`. With `--dry-run` no judgement is requested, nothing is written and a `DryRun`
    is returned; with `--shard` answers are written only to the worker's ledger.

    Raises `InputError` if the run has no harvest or no such explanations of the model, or the
    judge cannot be reached or fails every call; `BudgetReached` at a limit. All answers so far are in
    the ledger.
    """
    run = Run(config.run)
    source = explanation_source(run, config)
    inputs = {
        "activations": run.stage("activations", config.model).require("harvest"),
        "explanations": source.require("explain"),
        "prompts": judging.VERSION,
    }
    with open_client(config, config.judge) as client, ExitStack() as held:
        judge = client.backend.name
        default = judge if config.explanations == NO_LLM else f"{config.explanations}-by-{judge}"
        stage = interventions_stage(run, config.model, config.name or default)
        if is_finished(config, stage, inputs):
            return _result(stage.path)
        if not (
            config.dry_run or config.shard
        ):  # no other process may make the same calls meanwhile
            held.enter_context(stage.lock())
        harvested = open_harvested(run, config.model, config)
        _check_length(config, harvested)
        explained = read_judged_explanations(config, source.path)
        selected = choose_neurons(config, explained.selected)
        index, count = config.worker()
        share = selected[index::count]
        requests = _requests(
            config, harvested, explained, selected, share, client.backend.supports_logprobs
        )
        known = judging.known_task(
            supports_logprobs=client.backend.supports_logprobs, seed=config.seed
        )
        if config.dry_run:
            needed = ([r for a in rows for r in a.requests] for rows, _ in requests)
            return dry_run(client, chain([known.requests], needed))
        known_score = known.grade(client.ask(known.requests, is_probe=True)).value
        rows, continuations, masses = _ask(config, client, requests, len(share))
        client.require_answers()
        if config.shard:
            return WorkerResult(ledger_path(config), len(share), str(client.tally))
        summary = _summarise(config, judge, explained.explainer, rows, masses, known_score)
        with stage.write(config, inputs) as draft:
            _write(draft, client, summary, rows, continuations)
    return _result(stage.path, str(client.tally))


def _check_length(config: InterveneConfig, harvested: HarvestContext) -> None:
    begin, longest = harvested.beginning, harvested.subject.longest
    whole = config.prompt_tokens + config.generate + begin.extra + begin.skip
    if longest is not None and whole > longest:
        raise InputError(
            f"--prompt-tokens {config.prompt_tokens} and --generate {config.generate} add up to {whole}"
            f" tokens, but the model takes at most {longest}: give lower numbers"
        )


def _requests(
    config: InterveneConfig,
    harvested: HarvestContext,
    explained: JudgedExplanations,
    selected: Sequence[SampledNeuron],
    share: Sequence[SampledNeuron],
    supports_logprobs: bool,
) -> Iterator[NeuronRequests]:
    """Yield the rows and continuations of each neuron in `share`, the neurons of this worker.

    The shuffled control draws from all of `selected`, so that the partners do not depend on the workers.
    """
    strings = harvested.store.token_strings
    summaries = {s.neuron: s for s in read_summaries(harvested.folder, "fit")}
    donors = shuffled([s.neuron for s in selected if s.neuron in explained.texts], config.seed)
    alive: dict[int, list[int]] = {}
    for summary in summaries.values():
        if not summary.silent:
            alive.setdefault(summary.neuron.layer, []).append(summary.neuron.index)
    for sampled in share:
        neuron = sampled.neuron
        if sampled.dead:
            dead = Score(None, Status.DEAD, "never above 0 on the fit split")
            yield [_row(neuron, explained, c, "", dead, None, 0) for c in STEERING_CONTROLS], []
            continue
        value = config.strength * summaries[neuron].maximum
        continuations = _continuations(config, harvested, neuron, value, alive[neuron.layer])
        texts = continuations.texts(neuron, strings)
        rows = [
            _judge_request(
                config, neuron, explained, control, donors, continuations, texts, supports_logprobs
            )
            for control in STEERING_CONTROLS
        ]
        yield rows, texts


def _continuations(
    config: InterveneConfig,
    harvested: HarvestContext,
    neuron: NeuronId,
    value: float,
    alive: Sequence[int],
) -> Continuations:
    """Return three continuations of held-out texts; the other neuron is drawn from those alive in the layer."""
    # the last number makes this stream differ from that of `draw_prompts`
    rng = np.random.default_rng([config.seed, neuron.layer, neuron.index, 1])
    own = {neuron.index, *([neuron.opposite.index] if neuron.opposite else [])}
    others = sorted(set(alive) - own)
    prompts = draw_prompts(
        harvested.store.split("held_out"),
        harvested.store.eot_id,
        config.texts,
        config.prompt_tokens,
        config.seed,
        neuron.layer,
        neuron.index,
        harvested.beginning,
    )
    return continue_prompts(
        harvested,
        neuron.layer,
        neuron.index,
        value,
        int(rng.choice(others)) if others else None,
        prompts,
        count=config.generate,
        temperature=config.temperature,
        seed=int(rng.integers(2**31)),
    )


def _judge_request(
    config: InterveneConfig,
    neuron: NeuronId,
    explained: JudgedExplanations,
    control: SteeringControl,
    donors: Mapping[NeuronId, NeuronId],
    continuations: Continuations,
    texts: Sequence[ContinuationTexts],
    supports_logprobs: bool,
) -> JudgeRequest:
    """Return the row of one neuron under one control, with its requests."""
    random = control == "random"
    pairs = [judging.Pair(t.plain, t.random if random else t.steered) for t in texts]
    same = sum(p.plain == p.steered for p in pairs)
    strength = continuations.other_strength if random else continuations.strength
    explained_neuron = donors.get(neuron) if control == "shuffled" else neuron
    text = explained.texts.get(explained_neuron, "") if explained_neuron else ""
    task: Score | Task
    if neuron not in explained.texts:
        reason = explained.reasons.get(neuron, "there is none")
        task = Score(None, Status.FAILED, f"no explanation: {reason}")
    elif explained_neuron is None or strength is None:
        task = Score(None, Status.UNDEFINED, "the layer has no other neuron to compare with")
    else:
        task = judging.task(text, pairs, supports_logprobs=supports_logprobs, seed=config.seed)
    return _row(neuron, explained, control, text, task, strength, same)


def _row(
    neuron: NeuronId,
    explained: JudgedExplanations,
    control: SteeringControl,
    text: str,
    task: Task | Score,
    strength: SteeringStrength | None,
    same: int,
) -> JudgeRequest:
    row = Intervention(
        neuron=neuron,
        explainer=explained.explainer,
        control=control,
        explanation=text,
        value=None,
        status="",
        reason="",
        pairs=0,
        same=same,
        steered=strength.index if strength else None,
        setting=strength.value if strength else None,
        kl=strength.kl if strength else None,
    )
    return JudgeRequest(row, task)


def _ask(
    config: InterveneConfig,
    client: Client,
    requests: Iterator[NeuronRequests],
    n_neurons: int,
) -> tuple[list[Intervention], list[ContinuationTexts], list[float]]:
    """Return the rows of both files, and the fraction of probability on the two answers for each request."""
    rows: list[Intervention] = []
    continuations: list[ContinuationTexts] = []
    masses: list[float] = []
    with tqdm(
        total=n_neurons, desc=f"intervene {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        while neurons := list(islice(requests, NEURONS_A_TIME)):
            together = [request for of_neuron, _ in neurons for request in of_neuron]
            outcomes = client.ask([r for request in together for r in request.requests])
            masses += judging.mass(outcomes)
            answers = iter(outcomes)
            for request in together:
                of_row = list(islice(answers, len(request.requests)))
                task = request.task
                rows.append(request.judged(task.grade(of_row) if isinstance(task, Task) else task))
            continuations += [text for _, texts in neurons for text in texts]
            bar.update(len(neurons))
    return rows, continuations, masses


def _write(
    draft: Draft,
    client: Client,
    summary: InterventionSummary,
    rows: Sequence[Intervention],
    continuations: Sequence[ContinuationTexts],
) -> None:
    write_calls(draft, client)
    write_interventions(draft.path, rows)
    write_continuations(draft.path, continuations)
    draft.results.update(write_intervention_summary(draft.path, summary))


# ---- figures --------------------------------------------------------------------------------------


def _summarise(
    config: InterveneConfig,
    judge: str,
    explainer: str,
    rows: Sequence[Intervention],
    masses: Sequence[float],
    known: float | None,
) -> InterventionSummary:
    own = [row for row in rows if row.control == "none"]
    return InterventionSummary(
        model=config.model,
        judge=judge,
        explainer=explainer,
        n_neurons=len(own),
        controls=tuple(_control(config, control, rows) for control in STEERING_CONTROLS),
        over_shuffled=_own_minus(config, rows, "shuffled"),
        over_random=_own_minus(config, rows, "random"),
        kl=_mean(config, (r.neuron for r in own), [r.kl for r in own]),
        mass=float(np.mean(masses)) if masses else None,
        known=known,
        n_failed=sum(row.status == Status.FAILED for row in rows),
    )


def _control(
    config: InterveneConfig, control: SteeringControl, rows: Sequence[Intervention]
) -> ControlSummary:
    of_control = [row for row in rows if row.control == control]
    counts = {s: sum(row.status == s for row in of_control) for s in Status}
    return ControlSummary(
        control=control,
        mean=_mean(config, (r.neuron for r in of_control), [r.value for r in of_control]),
        defined=counts[Status.DEFINED],
        undefined=counts[Status.UNDEFINED],
        dead=counts[Status.DEAD],
        failed=counts[Status.FAILED],
    )


def _own_minus(
    config: InterveneConfig, rows: Sequence[Intervention], control: SteeringControl
) -> Interval | None:
    """Return the mean of own score minus control, over the neurons that have both."""
    values: dict[NeuronId, dict[SteeringControl, float]] = {}
    for row in rows:
        if row.value is not None:
            values.setdefault(row.neuron, {})[row.control] = row.value
    both = {n: v for n, v in values.items() if {"none", control} <= v.keys()}
    return _mean(config, both, [v["none"] - v[control] for v in both.values()])


def _mean(
    config: InterveneConfig, neurons: Iterable[NeuronId], values: Sequence[float | None]
) -> Interval | None:
    """Return the mean over neurons; the value of a neuron is the mean over its ends."""
    of_neurons = list(neuron_means(neurons, values).values())
    return bootstrap(of_neurons, config.seed, config.resamples)


def _result(folder: Path, calls: str = "") -> InterveneResult:
    return InterveneResult(path=folder, calls=calls, **vars(read_intervention_summary(folder)))
