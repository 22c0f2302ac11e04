"""`cratelm intervene`: does steering a neuron change the text as its explanation says?

Writes `steer/MODEL@NAME/`:

`interventions.parquet`, a row a neuron and control: model, site, layer, index; explainer; control
(`none`: own explanation, own continuations; `shuffled`: another neuron's explanation of the layer, own
continuations; `random`: own explanation, continuations with another neuron of the layer steered as
strongly); explanation (the text judged by); value (mean probability that the judge names the steered
text, 0..1, chance 0.5); status and reason; pairs (judged) and same (left out, since steering changed
nothing); steered (index of the neuron that was steered), setting (its activation) and kl (nats a token).

`continuations.parquet`, a row a neuron and text: model, site, layer, index; prompt, plain, steered,
random. `summary.json`: the figures. `calls.json`: what was asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import NEURON_FIELDS, read_summaries
from cratelm.errors import InputError
from cratelm.explain.store import (
    SampledNeuron,
    explanation_set_name,
    read_explanations,
    read_selected,
    read_unexplained,
)
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.config import NO_LLM
from cratelm.llm.requests import Request
from cratelm.llm.session import is_finished, open_client, write_calls
from cratelm.records import Interval, NeuronId, Score, Status, parse_neuron_ids
from cratelm.runs import Draft, Run, Stage, write_json
from cratelm.score.controls import shuffled
from cratelm.score.scorers import Task
from cratelm.stats.intervals import bootstrap
from cratelm.steer import judging
from cratelm.steer.config import PROMOTED, InterveneConfig
from cratelm.steer.continuations import Continuations, SteeringStrength, continued, prompts

Control = Literal["none", "shuffled", "random"]
CONTROLS: tuple[Control, ...] = ("none", "shuffled", "random")
NEURONS_A_TIME = 16
"""neurons that are asked about together"""
ABLE = 0.75
"""below this on pairs whose answer is known, a judge's answers say little"""
_PROMOTED_SHOWN = 6
SCHEMA = pa.schema(
    [
        *NEURON_FIELDS,
        ("explainer", pa.string()),
        ("control", pa.string()),
        ("explanation", pa.string()),
        ("value", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("pairs", pa.int32()),
        ("same", pa.int32()),
        ("steered", pa.int32()),
        ("setting", pa.float64()),
        ("kl", pa.float64()),
    ]
)
CONTINUATIONS_SCHEMA = pa.schema(
    [*NEURON_FIELDS, *((name, pa.string()) for name in ("prompt", "plain", "steered", "random"))]
)


@dataclass(frozen=True)
class ControlResult:
    """One control over all neurons."""

    control: Control
    mean: Interval | None
    """chance of naming the steered text; interval over neurons"""
    defined: int
    undefined: int
    dead: int
    failed: int


@dataclass(frozen=True)
class InterveneResult:
    """What `intervene` found."""

    path: Path
    model: str
    judge: str
    explainer: str
    n_neurons: int
    controls: tuple[ControlResult, ...]
    over_shuffled: Interval | None
    """own less shuffled explanation, paired by neuron"""
    over_random: Interval | None
    """own less another neuron steered, paired by neuron"""
    kl: Interval | None
    """what steering does to the next token, nats"""
    mass: float | None
    """mean share of all probability that falls on the judge's two answers; None where none is told"""
    known: float | None
    """what the judge gives the right answer in made-up questions; None where a call failed. Near 0.5 it
    cannot judge"""
    n_failed: int = 0
    calls: str = ""

    def __str__(self) -> str:
        by = "" if self.mass is None else f" ({self.mass:.0%} of its probability on the answers)"
        known = "unknown" if self.known is None else f"{self.known:.2f}"
        if self.known is not None and self.known < ABLE:
            known += " - WARNING: it hardly can tell, and what follows says little"
        lines = [
            f"{self.model}, explained by {self.explainer}, judged by {self.judge}{by}:"
            f" {self.n_neurons} neurons, KL {_shown(self.kl, '.3f')} nats a token: {self.path}",
            f"  the judge on made-up pairs, whose right answer is known: {known}",
            "chance that the steered text is named (0.5 where nothing is told):",
        ]
        for found in self.controls:
            told = f"{found.defined} neurons, {found.undefined} undefined, {found.dead} dead"
            mean = _shown(found.mean, ".3f")
            lines.append(f"  {_NAMES[found.control]:<30} {mean:<22} {told}, {found.failed} failed")
        lines.append(f"  own less shuffled              {_shown(self.over_shuffled, '+.3f')}")
        lines.append(f"  own less random neuron         {_shown(self.over_random, '+.3f')}")
        return "\n".join([*lines, *([f"  {self.calls}"] if self.calls else [])])


_NAMES: dict[Control, str] = {
    "none": "own explanation",
    "shuffled": "another neuron's explanation",
    "random": "another neuron steered",
}


def _shown(found: Interval | None, form: str) -> str:
    return "-" if found is None else found.show(form)


@dataclass(frozen=True, eq=False)
class Explained:
    """What is judged: the explanations of one explainer."""

    explainer: str
    selected: list[SampledNeuron]
    """neurons that were to be explained"""
    texts: dict[NeuronId, str]
    reasons: dict[NeuronId, str]
    """why a neuron has none"""


@dataclass(frozen=True, eq=False)
class JudgeRequest:
    """One row in the making."""

    row: dict[str, Any]
    made: Task | Score

    @property
    def requests(self) -> tuple[Request, ...]:
        return self.made.requests if isinstance(self.made, Task) else ()


def intervene(config: InterveneConfig) -> InterveneResult | DryRun | WorkerResult:
    """Steers neurons of a model and asks the judge.

    Writes `steer/MODEL@NAME/`. With `--dry-run` nothing is asked or written and the `DryRun` is
    returned; with `--shard` answers go to the worker's ledger alone.

    Raises `InputError` where the run has no harvest or no such explanations of the model, or the
    judge cannot be reached; `BudgetReached` at a limit, with all answers so far in the ledger.
    """
    run = Run(config.run)
    source = _source(run, config)
    inputs = {
        "activations": run.stage("activations", config.model).require("harvest").identity,
        "explanations": source.require("explain").identity,
        "prompts": judging.VERSION,
    }
    with open_client(config, config.judge) as client:
        judge = client.backend.name
        made_by = judge if config.explanations == NO_LLM else f"{config.explanations}-by-{judge}"
        stage = run.stage("steer", explanation_set_name(config.model, config.name or made_by))
        if is_finished(config, stage, inputs):
            return _read(stage.path, stage.require("intervene").results)
        harvested = open_harvested(run, config.model)
        _check_length(config, harvested)
        explained = _explained(config, source.path)
        selected = _chosen(config, explained.selected)
        index, count = config.worker()
        mine = selected[index::count]
        asked = _asked(
            config, harvested, explained, selected, mine, client.backend.supports_logprobs
        )
        known = judging.known_task(
            supports_logprobs=client.backend.supports_logprobs, seed=config.seed
        )
        if config.dry_run:
            needed = ([r for a in some for r in a.requests] for some, _ in asked)
            return dry_run(client, chain([known.requests], needed))
        able = known.grade(client.ask(known.requests)).value
        rows, continuations, masses = _answers(config, client, asked, len(mine))
        if config.shard:
            return WorkerResult(client.ledger.path, len(mine), str(client.tally))
        with stage.write(config, inputs) as draft:
            write_calls(draft, client)
            _write(draft, config, judge, explained, rows, continuations, masses, able)
            results = draft.results
    return _read(stage.path, results, str(client.tally))


def _source(run: Run, config: InterveneConfig) -> Stage:
    """The stage that holds the explanations. Raises `InputError` where it is not finished."""
    if config.explanations == PROMOTED:
        stage = run.stage("steer", config.model)
        stage.require("effects")
        return stage
    name = "" if config.explanations == NO_LLM else config.explanations
    stage = run.stage("explanations", explanation_set_name(config.model, name))
    if stage.completion() is None:
        prefix = f"{config.model}@"
        there = [n.removeprefix(prefix) for n in run.models("explanations") if n.startswith(prefix)]
        if run.stage("explanations", config.model).completion():
            there.append(NO_LLM)
        raise InputError(
            f"{run.path} has no explanations of {config.model} called {config.explanations}: those"
            f" there are {', '.join(there) or 'none'}; type `cratelm explain --run {run.path} --model"
            f" {config.model}` first, or name others with --explanations"
        )
    return stage


def _explained(config: InterveneConfig, folder: Path) -> Explained:
    """Explanations of one explainer. Raises `InputError` where the set has none of that name."""
    if config.explanations == PROMOTED:
        return _promoted(folder)
    found = [
        e for e in read_explanations(folder) if e.payload.get("evidence", "top") == "top"
    ]  # of a language model's two kinds of evidence the strongest excerpts
    names = sorted({e.explainer for e in found})
    explainer = config.explainer or (names[0] if names else "")
    if explainer not in names:
        raise InputError(
            f"--explainer {explainer or '(none)'}: {folder} has {', '.join(names) or 'no explanation'}"
        )
    return Explained(
        explainer,
        read_selected(folder),
        {e.neuron: e.text for e in found if e.explainer == explainer},
        {f.neuron: f.reason for f in read_unexplained(folder)},
    )


def _promoted(folder: Path) -> Explained:
    """The tokens that `cratelm effects` found to be promoted, as explanations."""

    def neuron(row: Mapping[str, Any]) -> NeuronId:
        return NeuronId(row["model"], row["site"], row["layer"], row["index"])

    rows = pq.read_table(folder / "logit_effects.parquet").to_pylist()
    texts = {
        neuron(row): ", ".join(f"`{token}`" for token in row["promoted"][:_PROMOTED_SHOWN])
        for row in rows
        if row["kind"] == "exact"
    }
    selected = pq.read_table(folder / "ablation.parquet").to_pylist()
    return Explained(PROMOTED, [SampledNeuron(neuron(r), r["dead"]) for r in selected], texts, {})


def _chosen(config: InterveneConfig, selected: Sequence[SampledNeuron]) -> list[SampledNeuron]:
    """`--only`, or some of each layer drawn by seed and layer. Raises `InputError` for one not explained."""
    there = {(s.neuron.layer, s.neuron.index): s for s in selected}
    if config.only:
        wanted = parse_neuron_ids("--only", config.only)
        missing = [place for place in wanted if place not in there]
        if missing:
            layer, index = missing[0]
            raise InputError(f"--only {layer}:{index}: this neuron was not to be explained")
        return [there[place] for place in wanted]
    chosen = []
    for layer in sorted({layer for layer, _ in there}):
        mine = sorted(index for at, index in there if at == layer)
        if config.neurons:
            order = np.random.default_rng([config.seed, layer]).permutation(len(mine))
            mine = sorted(mine[i] for i in order[: config.neurons])
        chosen += [there[layer, index] for index in mine]
    return chosen


def _check_length(config: InterveneConfig, harvested: HarvestContext) -> None:
    whole, most = config.prompt_tokens + config.generate, harvested.subject.longest
    if most is not None and whole > most:
        raise InputError(
            f"--prompt-tokens {config.prompt_tokens} and --generate {config.generate} are {whole}"
            f" tokens, the model takes {most}: give fewer"
        )


def _asked(
    config: InterveneConfig,
    harvested: HarvestContext,
    explained: Explained,
    selected: Sequence[SampledNeuron],
    mine: Sequence[SampledNeuron],
    supports_logprobs: bool,
) -> Iterator[tuple[list[JudgeRequest], list[dict[str, Any]]]]:
    """The rows in the making of each of `mine`, and its continuations."""
    strings: list[str] = harvested.store.decode_tokens(range(harvested.store.vocab_size))
    known = {s.neuron: s for s in read_summaries(harvested.folder, "fit")}
    donors = shuffled([s.neuron for s in selected if s.neuron in explained.texts], config.seed)
    alive: dict[int, list[int]] = {}
    for summary in known.values():
        if not summary.dead:
            alive.setdefault(summary.neuron.layer, []).append(summary.neuron.index)
    for one in mine:
        neuron = one.neuron
        if one.dead:
            dead = Score(None, Status.DEAD, "never above 0 on the fit split")
            yield [_row(neuron, explained, c, "", dead, None, 0) for c in CONTROLS], []
            continue
        value = config.strength * known[neuron].maximum
        made = _continuations(config, harvested, neuron, value, alive[neuron.layer])
        texts = _texts(made, strings)
        rows = [
            _judged(config, neuron, explained, control, donors, made, texts, supports_logprobs)
            for control in CONTROLS
        ]
        yield rows, [{**vars(neuron), **text} for text in texts]


def _continuations(
    config: InterveneConfig,
    harvested: HarvestContext,
    neuron: NeuronId,
    value: float,
    alive: Sequence[int],
) -> Continuations:
    rng = np.random.default_rng([config.seed, neuron.layer, neuron.index, 1])
    others = sorted(set(alive) - {neuron.index})
    split, layer = harvested.store.split("held_out"), neuron.layer
    given = prompts(
        split,
        harvested.store.eot_id,
        config.texts,
        config.prompt_tokens,
        config.seed,
        layer,
        neuron.index,
    )
    return continued(
        harvested,
        layer,
        neuron.index,
        value,
        int(rng.choice(others)) if others else None,
        given,
        count=config.generate,
        temperature=config.temperature,
        seed=int(rng.integers(2**31)),
    )


def _texts(made: Continuations, strings: list[str]) -> list[dict[str, str]]:
    """Prompt and continuations of each text, as strings."""

    def text(ids: NDArray[np.int64]) -> str:
        return "".join(strings[i] if i < len(strings) else f"[{i}]" for i in ids.tolist())

    found: list[dict[str, str]] = []
    for row, prompt in enumerate(made.prompts):
        random = "" if made.random is None else text(made.random[row])
        plain, steered = text(made.plain[row]), text(made.steered[row])
        found.append({"prompt": text(prompt), "plain": plain, "steered": steered, "random": random})
    return found


def _judged(
    config: InterveneConfig,
    neuron: NeuronId,
    explained: Explained,
    control: Control,
    donors: Mapping[NeuronId, NeuronId],
    made: Continuations,
    texts: Sequence[Mapping[str, str]],
    supports_logprobs: bool,
) -> JudgeRequest:
    """One control of one neuron."""
    which = "random" if control == "random" else "steered"
    pairs = [judging.Pair(t["plain"], t[which]) for t in texts]
    same = sum(p.plain == p.steered for p in pairs)
    push = made.other if control == "random" else made.push
    giver = donors.get(neuron) if control == "shuffled" else neuron
    text = explained.texts.get(giver, "") if giver else ""
    score: Score | Task
    if neuron not in explained.texts:
        reason = explained.reasons.get(neuron, "there is none")
        score = Score(None, Status.FAILED, f"no explanation: {reason}")
    elif giver is None or push is None:
        score = Score(None, Status.UNDEFINED, "the layer has no other neuron to compare with")
    else:
        score = judging.task(text, pairs, supports_logprobs=supports_logprobs, seed=config.seed)
    return _row(neuron, explained, control, text, score, push, same)


def _row(
    neuron: NeuronId,
    explained: Explained,
    control: Control,
    text: str,
    made: Task | Score,
    push: SteeringStrength | None,
    same: int,
) -> JudgeRequest:
    row = {
        **vars(neuron),
        "explainer": explained.explainer,
        "control": control,
        "explanation": text,
        "same": same,
        "steered": push.index if push else None,
        "setting": push.value if push else None,
        "kl": push.kl if push else None,
    }
    return JudgeRequest(row, made)


def _answers(
    config: InterveneConfig,
    client: Client,
    asked: Iterator[tuple[list[JudgeRequest], list[dict[str, Any]]]],
    n_neurons: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Rows of both files, and the share of probability on the answers of each reading."""
    rows: list[dict[str, Any]] = []
    continuations: list[dict[str, Any]] = []
    masses: list[float] = []
    with tqdm(
        total=n_neurons, desc=f"intervene {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        while some := list(islice(asked, NEURONS_A_TIME)):
            together = [one for of_neuron, _ in some for one in of_neuron]
            outcomes = client.ask([r for one in together for r in one.requests])
            masses += judging.mass(outcomes)
            at = 0
            for one in together:
                mine = outcomes[at : at + len(one.requests)]
                at += len(mine)
                score = one.made.grade(mine) if isinstance(one.made, Task) else one.made
                rows.append({**one.row, **_graded(score)})
            continuations += [text for _, texts in some for text in texts]
            bar.update(len(some))
    return rows, continuations, masses


def _graded(score: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "status": str(score.status),
        "reason": score.reason,
        "pairs": score.n_records,
    }


def _write(
    draft: Draft,
    config: InterveneConfig,
    judge: str,
    explained: Explained,
    rows: Sequence[dict[str, Any]],
    continuations: Sequence[dict[str, Any]],
    masses: Sequence[float],
    able: float | None,
) -> None:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), draft.path / "interventions.parquet")
    pq.write_table(
        pa.Table.from_pylist(continuations, CONTINUATIONS_SCHEMA),
        draft.path / "continuations.parquet",
    )
    own = [row for row in rows if row["control"] == "none"]
    draft.results.update(
        model=config.model,
        judge=judge,
        explainer=explained.explainer,
        n_neurons=len(own),
        controls=[asdict(_control(config, control, rows)) for control in CONTROLS],
        over_shuffled=_plain(_gap(config, rows, "shuffled")),
        over_random=_plain(_gap(config, rows, "random")),
        kl=_plain(_mean(config, [row["kl"] for row in own])),
        mass=float(np.mean(masses)) if masses else None,
        known=able,
        n_failed=sum(row["status"] == Status.FAILED for row in rows),
    )
    write_json(draft.path / "summary.json", draft.results)


def _control(
    config: InterveneConfig, control: Control, rows: Sequence[dict[str, Any]]
) -> ControlResult:
    mine = [row for row in rows if row["control"] == control]
    counts = {s: sum(row["status"] == s for row in mine) for s in Status}
    return ControlResult(
        control=control,
        mean=_mean(config, [row["value"] for row in mine]),
        defined=counts[Status.DEFINED],
        undefined=counts[Status.UNDEFINED],
        dead=counts[Status.DEAD],
        failed=counts[Status.FAILED],
    )


def _gap(
    config: InterveneConfig, rows: Sequence[dict[str, Any]], control: Control
) -> Interval | None:
    """Own less a control, over the neurons that have both."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row["value"] is not None:
            found.setdefault((row["layer"], row["index"]), {})[row["control"]] = row["value"]
    both = [v for v in found.values() if {"none", control} <= v.keys()]
    return _mean(config, [v["none"] - v[control] for v in both])


def _mean(config: InterveneConfig, values: Sequence[float | None]) -> Interval | None:
    return bootstrap([v for v in values if v is not None], config.seed, config.resamples)


def _plain(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _read(path: Path, results: dict[str, Any], calls: str = "") -> InterveneResult:
    told = dict(results)
    for name in ("over_shuffled", "over_random", "kl"):
        told[name] = None if told[name] is None else Interval(**told[name])
    controls = tuple(
        ControlResult(**{**c, "mean": None if c["mean"] is None else Interval(**c["mean"])})
        for c in told.pop("controls")
    )
    return InterveneResult(path=path, controls=controls, calls=calls, **told)
