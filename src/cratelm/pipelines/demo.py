"""`cratelm demo`: run every stage in turn, at a scale that fits a laptop.

The models are the twins CRATE and GPT-2, or one model of each family that `--families` names.
"""

import difflib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.analysis.analyze import analyze
from cratelm.analysis.config import AnalyzeConfig
from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig, ExplainerName
from cratelm.explain.explain import explain
from cratelm.models import FAMILIES, build
from cratelm.models.families import different_families, import_outside_families
from cratelm.models.sae_lens import import_sae_lens
from cratelm.pipelines.chains import Step, run_models
from cratelm.pipelines.config import DemoConfig, SaeCompareConfig
from cratelm.pipelines.sae_compare import steps as autoencoder_steps
from cratelm.pipelines.study_config import StudyConfig
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.replace import replace as replace_codes
from cratelm.report.config import ReportConfig
from cratelm.report.report import ReportResult, comparison_table, report
from cratelm.runs import Run, StageName
from cratelm.runs.devices import device_of
from cratelm.runs.minis import PREFIX, mini_folder
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.steer.config import EffectsConfig
from cratelm.steer.effects import effects
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

_HELD_BACK = 0.15
"""fraction of the documents in each of fit and held_out: enough for 50 top excerpts from 50 documents"""
_SEQUENCE = 256
_HARVEST_COST = 2.0
"""duration of a harvest divided by that of its forward passes, rounded up (benchmarks/harvest.py)"""
_WHOLE_COST = 2.0
"""duration of scoring over all tokens divided by that of its forward passes (benchmarks/measures.py)"""
_SHARED = 0.8
"""duration of training or harvesting two models at a time, each with half of the cores, divided by that of one after
another with all cores: 286 and 263 s for the twins at a time, 234 and 176 s alone, on 2 cores"""
_EXPLAINERS = ExplainConfig.explainers
_CONTROLLED = ("lookup", "trie")
"""explainers of the untrained controls: searching and scoring their concepts would take a minute for a figure of less
interest, since concepts explain them worse than the last token does. With `--families` those of all models"""
_SECONDS_PER_NEURON = 0.04
"""time to explain and score a neuron on one core, three metrics and controls (benchmarks/explain_score.py)"""
_ANALYZED = 20_000
"""held-out tokens of each twin for the white-box measurements and for the evaluation of autoencoders"""
_PRETRAINED_TOKENS = 60_000
"""tokens harvested from each split with models that are not trained here"""
_PRETRAINED_NEURONS = 64
"""neurons per layer that are then explained and scored"""
_REPLACED = 50_000
"""held-out tokens on which each twin runs on its explanations"""
_REPLACED_BY = ("lookup", "trie", "concepts+trie")
"""explanations that the twins run on: of the last token, of the last four, and of these on top of concepts"""
_REPLACED_COST = 29.0
"""duration of that, with making the explanations, divided by that of the forward passes over both kinds of tokens,
without the head, on all cores: 104 and 113 s for the demo's twins, two at a time on 2 cores"""
_FAMILIES_REPLACED_BY = ("lookup", "trie")
"""explanations that the models of `--families` run on"""
_FAMILIES_REPLACED_COST = 12.0
"""a guess at the same figure for these two, which need no predicates; it was not measured"""
_ABLATED = 1024
"""held-out tokens on which the loss without each neuron is measured; few, because it is slow"""
_SECONDS_PER_EFFECT = 0.026
"""time to measure the tokens that a neuron promotes and the loss without it, per layer that runs, on 2 cores"""
_SAE_TOKENS = 204_800
"""tokens on which an autoencoder is trained"""
_SAE_SECONDS = 55
"""time to train and evaluate an autoencoder of one layer, and to harvest, explain and score its latents, on 2 cores"""
_FIXED_SECONDS = 65
"""time to tokenize the built-in corpus, load libraries, analyze the models and draw the report"""


@dataclass(frozen=True)
class DemoResult:
    """Result of `cratelm demo`."""

    report: Path
    """page of the report"""
    table: str
    """comparison of the models as text"""
    seconds: float
    """duration of the command"""

    def __str__(self) -> str:
        return (
            f"{self.table}\n\nreport: {self.report}  (open it in a browser)\n"
            f"{self.seconds / 60:.1f} minutes\n\n"
            f"browse the neurons: {_browse(self.report.parent.parent)}"
        )


def _browse(run: Path) -> str:
    """Return the command that opens the browser, with the path of `cratelm` if its environment is not activated."""
    script = Path(sys.executable).parent / "cratelm"
    command = shutil.which("cratelm")
    activated = command is not None and Path(command).samefile(script) if script.exists() else True
    if activated:
        return f"cratelm view {run}"
    path = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"{path} view {run}"


def demo(config: DemoConfig) -> DemoResult:
    """Run every stage in turn, and return the report. Finished stages are skipped.

    Raises the same `InputError` as the commands of the stages, and `InputError` for a family that does not exist, and
    for a run that holds a demo with other explainers.
    """
    started = time.monotonic()
    if config.sae:
        import_sae_lens()  # report a missing package before training
    _check_families(config)
    if config.pretrained:
        for name in _models(config)[0]:
            mini_folder(name)
    if config.force or Run(config.run).stage("tokens").completion() is None:
        open_corpus(config.corpus)  # a missing corpus is reported before the machine is measured
    if not config.quiet:
        print(_plan(config), flush=True)
    common = {"run": config.run, "force": config.force, "quiet": config.quiet}
    n_steps = 2 + sum(map(len, model_chains(config)))
    numbers = count(1)

    def announce(step: Step) -> Step:
        if not config.quiet:
            print(f"[{next(numbers)}/{n_steps}] {step.label}", flush=True)
        return step

    announce(Step("tokens", "", lambda: tokenize(_tokenize_config(config)))).work()
    for step in run_models(model_chains, config, n_jobs(config)):
        announce(step)
    reporting = Step("report", "", lambda: report(ReportConfig(**common, seed=config.seed)))
    done: ReportResult = announce(reporting).work()
    return DemoResult(done.page, comparison_table(done), round(time.monotonic() - started, 1))


def n_jobs(config: DemoConfig | StudyConfig) -> int:
    """Return the number of models that are made at the same time: two if they share the cores of a CPU."""
    shares_cores = device_of("auto").type == "cpu" and torch.get_num_threads() > 1
    return config.jobs or (2 if shares_cores else 1)


def _models(config: DemoConfig) -> tuple[list[str], list[str]]:
    """Return the names of the models that are trained, and of their randomly initialised controls."""
    trained = [f"{family}-{config.size}" for family in families_of(config)]
    return trained, [] if config.pretrained else [f"{name}-init" for name in trained]


def families_of(config: DemoConfig) -> tuple[str, ...]:
    """Return the families that are compared: those of the twins, those that are named, or all that differ."""
    if config.families is None:
        return ("crate", "gpt2")
    return config.families or different_families()


def _check_families(config: DemoConfig) -> None:
    """Raise `InputError` for a family that does not exist, and for a run with explanations by other explainers."""
    import_outside_families()
    for name in families_of(config):
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(
                f"--families names {name!r}, which is no family{hint}: choose from {', '.join(FAMILIES)}"
            )
    if config.force:
        return
    for name in _models(config)[0]:
        explained = Run(config.run).stage("explanations", name).completion()
        if explained is None or explained.config.get("explainers") == list(_explainers(config)):
            continue
        raise InputError(
            f"{config.run} has explanations of {name} by {', '.join(explained.config.get('explainers', ()))}, but"
            f" this demo makes those by {', '.join(_explainers(config))}: give it another --run"
        )


def _explainers(config: DemoConfig, is_trained: bool = True) -> tuple[ExplainerName, ...]:
    """Return the explainers of a model without a language model."""
    everything = is_trained and config.families is None
    return _EXPLAINERS if everything else _CONTROLLED


def _n_tokens(config: DemoConfig) -> int:
    """Return the number of tokens that are harvested from each split."""
    return min(config.tokens, _PRETRAINED_TOKENS) if config.pretrained else config.tokens


def _n_neurons(config: DemoConfig) -> int:
    """Return the number of neurons per layer that are explained; 0 = all."""
    if not config.pretrained:
        return config.neurons
    return min(config.neurons or _PRETRAINED_NEURONS, _PRETRAINED_NEURONS)


def model_chains(config: DemoConfig) -> list[list[Step]]:
    """Return the steps of each model, in order; those of one model need nothing of another."""
    trained, controls = _models(config)
    return [list(_steps_of(config, name, name in trained)) for name in trained + controls]


def _steps_of(config: DemoConfig, name: str, is_trained: bool) -> Iterator[Step]:
    common = {"run": config.run, "force": config.force, "quiet": config.quiet}
    n_tokens, n_neurons = _n_tokens(config), _n_neurons(config)
    harvesting = HarvestConfig(
        **common,
        model=f"{PREFIX}{name}" if config.pretrained else name,
        tokens=n_tokens,
        sequence_length=_SEQUENCE,
        seed=config.seed,
    )
    explaining = ExplainConfig(
        **common,
        model=name,
        neurons=n_neurons,
        explainers=_explainers(config, is_trained),
        seed=config.seed,
    )
    scoring = ScoreConfig(**common, model=name, seed=config.seed)
    if not config.pretrained:
        yield Step("model", name, lambda: train(_train_config(config, name)))
    yield Step("activations", name, lambda: harvest(harvesting))
    yield Step("explanations", name, lambda: explain(explaining))
    yield Step("scores", name, lambda: score(scoring))
    if not is_trained:
        return
    if config.sae:
        yield from autoencoder_steps(_sae_config(config), [name])
    replacing = ReplaceConfig(
        **common,
        model=name,
        fit_tokens=n_tokens,
        tokens=min(n_tokens, _REPLACED),
        curve_tokens=min(n_tokens, _REPLACED // 5),
        neuron_tokens=0 if config.pretrained else _SEQUENCE,
        explainers=_replaced_by(config),
        seed=config.seed,
    )
    yield Step("replacement", name, lambda: replace_codes(replacing))
    if config.families is not None or config.pretrained:
        return
    analyzing = AnalyzeConfig(**common, model=name, tokens=_ANALYZED, seed=config.seed)
    writing = EffectsConfig(
        **common, model=name, tokens=_ABLATED, neurons=n_neurons, seed=config.seed
    )
    yield Step("analysis", name, lambda: analyze(analyzing))
    yield Step("steer", name, lambda: effects(writing))


def _replaced_by(config: DemoConfig) -> tuple[str, ...]:
    """Return the explanations that models run on."""
    return (
        _REPLACED_BY if config.families is None and not config.pretrained else _FAMILIES_REPLACED_BY
    )


def _tokenize_config(config: DemoConfig) -> TokenizeConfig:
    return TokenizeConfig(
        run=config.run,
        force=config.force,
        quiet=config.quiet,
        corpus=config.corpus,
        vocab_size=config.vocab_size,
        tokenizer=f"{PREFIX}crate-{config.size}" if config.pretrained else "train",
        fit=_HELD_BACK,
        held_out=_HELD_BACK,
        sequence_length=_SEQUENCE,
    )


def _train_config(config: DemoConfig, name: str) -> TrainConfig:
    return TrainConfig(
        run=config.run,
        force=config.force,
        quiet=config.quiet,
        model=name.removesuffix("-init"),
        name=name if config.seed else "",  # the names of the demo do not depend on its seed
        steps=0 if name.endswith("-init") else config.steps,
        sequence_length=_SEQUENCE,
        seed=config.seed,
    )


def _sae_config(config: DemoConfig) -> SaeCompareConfig:
    """Return the options of small autoencoders: 2 latents per input, 32 active, a twelfth of the twins' tokens."""
    return SaeCompareConfig(
        run=config.run,
        architecture="topk",
        k=32,
        expansion=2,
        train_tokens=_SAE_TOKENS,
        lr=3e-3,
        batch_size=1024,
        evaluate_tokens=_ANALYZED,
        seed=config.seed,
        force=config.force,
        quiet=config.quiet,
    )


def _plan(config: DemoConfig) -> str:
    """Return what the demo will do and how long it may take, estimated from a short measurement on this machine."""
    run, (trained, controls) = Run(config.run), _models(config)
    if config.pretrained:
        return (
            f"{' and '.join(trained)}, which come with cratelm: about two minutes on two cores. All files are written to"
            f" {config.run}"
        )
    all_stages = config.families is None
    cost = _REPLACED_COST if all_stages else _FAMILIES_REPLACED_COST
    training = harvesting = scoring = replacing = writing = autoencoders = 0.0
    layers = int(config.size.removesuffix("l"))
    for name in trained + controls:
        measured: list[StageName] = ["model", "activations", "scores"]
        if name in trained:
            measured.append("replacement")
        missing = [s for s in measured if config.force or name not in run.models(s)]
        step, forward = _measure(name.removesuffix("-init"), config) if missing else (0, 0)
        if name in trained and "model" in missing:
            training += step * config.steps
        if "activations" in missing:
            harvesting += 2 * config.tokens * forward * _HARVEST_COST
        if "scores" in missing:
            scoring += _SECONDS_PER_NEURON * layers * (config.neurons or 512)
            scoring += 2 * config.tokens * forward * _WHOLE_COST
        if name in trained and (config.force or name not in run.models("replacement")):
            replacing += (config.tokens + _REPLACED) * forward * cost
        effects_too = all_stages and name in trained
        if effects_too and (config.force or name not in run.models("steer")):
            writing += _SECONDS_PER_EFFECT * layers**2 * (config.neurons or 512)
        done = any(other.startswith(f"{name}+") for other in run.models("scores"))
        if config.sae and name in trained and (config.force or not done):
            autoencoders += _SAE_SECONDS * layers
    jobs = n_jobs(config)
    training, harvesting = (s * _SHARED if jobs > 1 else s for s in (training, harvesting))
    scoring, replacing, writing, autoencoders = (
        s / jobs for s in (scoring, replacing, writing, autoencoders)
    )
    minutes = [s / 60 for s in (training, harvesting, scoring, replacing, writing, autoencoders)]
    listed = " and ".join(filter(None, [", ".join(trained[:-1]), trained[-1]]))
    total = round(sum(minutes) + _FIXED_SECONDS / 60)
    return (
        f"expected: about {total} minute{'s' * (total != 1)} on this machine"
        f" ({os.cpu_count()} cores): training {minutes[0]:.1f}, harvest {minutes[1]:.1f},"
        f" explaining and scoring {minutes[2]:.1f}, running on explanations {minutes[3]:.1f}"
        f"{f', effects {minutes[4]:.1f}' if all_stages else ''}"
        f"{f', autoencoders {minutes[5]:.1f}' if config.sae else ''}; up to 4 GB of memory.\n"
        f"{listed} on the same {config.steps * 16 * _SEQUENCE:,} tokens,"
        f" controls {' and '.join(controls) if all_stages else 'the same untrained'}; all files are written to {config.run}"
    )


def _measure(name: str, config: DemoConfig) -> tuple[float, float]:
    """Return the seconds of a training step, and the seconds per token of a forward pass."""
    model = build(name, vocab_size=config.vocab_size, max_position_embeddings=_SEQUENCE)
    few = config.families is not None  # many models: a quarter of a batch, once
    ids = torch.randint(config.vocab_size, (4 if few else 16, _SEQUENCE))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)

    times = (
        (_seconds(step, 1), _seconds(forward, 1)) if few else (_seconds(step), _seconds(forward))
    )
    return times[0] * 16 / len(ids), times[1] / ids.numel()


def _seconds(work: Callable[[], None], repetitions: int = 3) -> float:
    work()  # warm-up
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    return (time.perf_counter() - start) / repetitions
