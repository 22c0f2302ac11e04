"""What a study will cost: models, tokens, operations, hours and calls to language models.

The factors are measured on the demo's twins (docs/benchmarks.md), and hold to within a factor of two elsewhere.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cratelm.models import build
from cratelm.models.flops import forward_flops
from cratelm.pipelines.study_recipe import (
    FOLDERS,
    Cell,
    Recipe,
    configs_of,
    tokenize_config,
    train_config,
    tune_config,
)
from cratelm.records import ANTHROPIC_BINS
from cratelm.runs import Run
from cratelm.text.table import Column, Table

_TRAIN = 3.0
"""operations of a training step over those of its forward pass: the backward pass takes twice as many"""
_HARVEST = 2.0
"""duration of a harvest over that of its forward passes (benchmarks/harvest.py)"""
_WHOLE = 2.0
"""duration of scoring over all tokens over that of its forward passes (benchmarks/measures.py)"""
_REPLACE = 29.0
"""duration of `replace`, explanations included, over that of the forward passes over both kinds of tokens"""
_ANALYZE = 10.0
"""duration of `analyze` over that of its forward passes"""
_MATCH = 3.0
"""duration of `seeds` over that of the forward passes of each of its models"""
_CALLS = {
    "top_and_random": 10,
    "random_only": 0,  # its calls are among those of top-and-random
    "anthropic": 10 + 2 * ANTHROPIC_BINS + 5 + 10,
    "all_tokens_estimate": 50,
}
"""calls to a simulator per neuron and explanation, by metric; other metrics: 10"""


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage of all models."""

    stage: str
    models: int
    finished: int
    """of these, models whose stage is finished in the run; they cost nothing more"""
    tokens: int
    """that models read or are trained on"""
    flops: float
    """operations in which the stage would take as long, at the rate of training"""
    calls: int = 0
    """to language models"""


def flops_of(recipe: Recipe) -> dict[str, float]:
    """Return the operations per token of a forward pass, by the name of each model, and of each plain family.

    Raises `InputError` for options that a model refuses: before anything is trained.
    """
    vocab = tokenize_config(recipe, Path()).vocab_size
    found: dict[str, float] = {}
    for cell in recipe.cells:
        plain = [Cell(f, cell.size) for f in {cell.family, cell.budget} - {""}]
        for of in (cell, *plain):
            config = train_config(recipe, of, Path())
            length = config.resolved().sequence_length
            overrides = tuple(sorted(config.overrides().items()))
            if of.name not in found:
                found[of.name] = forward_flops(of.architecture, vocab, length, overrides)
    return found


def costs(recipe: Recipe, run: Run, flops: Mapping[str, float]) -> list[StageCost]:
    """Return the cost of each stage, in order."""
    found = [_tune_cost(recipe, run, flops)] if recipe.tuned() else []
    for stage, folder in FOLDERS.items():
        cells = [cell for cell in recipe.cells if stage in recipe.stages_of(cell)]
        if not cells:
            continue
        finished = set(run.models(folder))
        pending = [cell for cell in cells if cell.name not in finished]
        tokens, operations, calls = 0, 0.0, 0
        for cell in pending:
            read, factor = _tokens_and_factor(recipe, cell, stage, flops)
            tokens += read
            operations += read * factor * flops[cell.name]
            calls += sum(
                _calls(recipe, cell, stage, config)
                for config in configs_of(recipe, cell, stage, run.path)
            )
        found.append(
            StageCost(stage, len(cells), len(cells) - len(pending), tokens, operations, calls)
        )
    if "seeds" in recipe.stages:
        found.append(_seeds_cost(recipe, run, flops))
    return found


def _tune_cost(recipe: Recipe, run: Run, flops: Mapping[str, float]) -> StageCost:
    cells, finished = recipe.tuned(), set(run.models("tuning"))
    pending = [cell for cell in cells if cell.architecture not in finished]
    tokens, operations = 0, 0.0
    for cell in pending:
        config = tune_config(recipe, cell, run.path)
        per_rate = config.steps * config.training(None).resolved().tokens_per_step
        tokens += per_rate * len(config.all_rates())
        operations += per_rate * len(config.all_rates()) * _TRAIN * flops[cell.name]
    return StageCost("tune", len(cells), len(cells) - len(pending), tokens, operations)


def _seeds_cost(recipe: Recipe, run: Run, flops: Mapping[str, float]) -> StageCost:
    groups, finished = recipe.seeded(), set(run.models("seeds"))
    per_model = int(recipe.options("seeds").get("tokens", 50_000))
    pending = [cell for base, cells in groups.items() if base not in finished for cell in cells]
    operations = sum(per_model * _MATCH * flops[cell.name] for cell in pending)
    done = sum(base in finished for base in groups)
    return StageCost("seeds", len(groups), done, per_model * len(pending), operations)


def _tokens_and_factor(
    recipe: Recipe, cell: Cell, stage: str, flops: Mapping[str, float]
) -> tuple[int, float]:
    """Return the tokens that a stage of one model reads, and what each costs in forward passes."""
    if stage == "train":
        resolved = train_config(recipe, cell, Path()).resolved()
        if cell.control:
            return 0, 0.0
        return recipe.steps(cell, flops) * resolved.tokens_per_step, _TRAIN
    options = recipe.options(stage)
    harvested = int(recipe.options("harvest").get("tokens", 8_192_000))
    if stage == "harvest":
        return 2 * harvested, _HARVEST
    if stage == "score":
        whole = options.get("all_tokens", True) and not options.get("simulator")
        return (2 * harvested, _WHOLE) if whole else (0, 0.0)
    if stage == "replace":
        config = next(configs_of(recipe, cell, stage, Path()))
        return config.fit_tokens + config.tokens, _REPLACE
    if stage == "analyze":
        return next(configs_of(recipe, cell, stage, Path())).tokens, _ANALYZE
    return 0, 0.0


def _calls(recipe: Recipe, cell: Cell, stage: str, config: Any) -> int:
    """Return about how many calls to a language model one stage of one model makes."""
    neurons = _n_neurons(recipe, cell)
    if stage == "explain" and config.explainer:
        return neurons * len(config.evidence)
    if stage == "score" and config.simulator:
        # once for the neuron's own explanation, once for another's
        return 2 * neurons * sum(_CALLS.get(metric, 10) for metric in config.metrics)
    if stage == "replace" and config.simulator:
        return neurons * -(-2 * config.simulated_tokens // 64)
    return 0


def _n_neurons(recipe: Recipe, cell: Cell) -> int:
    """Return the number of neurons that are explained in one model."""
    from cratelm.models import SIZES

    shape = SIZES[cell.architecture]
    explain = [of for of in recipe.stages.get("explain", ()) if of.get("explainer")] or [
        recipe.options("explain")
    ]
    per_layer = explain[0].get("neurons") or 4 * shape.hidden_size
    return per_layer * shape.num_hidden_layers


def measured_rate(recipe: Recipe, flops: Mapping[str, float]) -> float:
    """Return the operations per second that this machine reaches in training steps of the first model."""
    cell = recipe.cells[0]
    config = train_config(recipe, cell, Path())
    resolved, vocab = config.resolved(), tokenize_config(recipe, Path()).vocab_size
    model: Any = build(
        cell.architecture,
        vocab_size=vocab,
        max_position_embeddings=resolved.sequence_length,
        **config.overrides(),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    rows = min(resolved.micro_batch_size, 16)
    ids = torch.randint(vocab, (rows, resolved.sequence_length), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step()  # warm-up
    start, repetitions = time.perf_counter(), 3
    for _ in range(repetitions):
        step()
    seconds = (time.perf_counter() - start) / repetitions
    return _TRAIN * flops[cell.name] * ids.numel() / seconds


def cost_table(of: Iterable[StageCost], rate: float) -> Table:
    """Return the costs as a table; `rate` is in operations per second."""
    rows = [
        (c.stage, c.models, c.finished, c.tokens, c.flops, c.flops / rate / 3600, c.calls)
        for c in of
    ]
    total = (
        "in all",
        None,
        None,
        sum(r[3] for r in rows),
        sum(r[4] for r in rows),
        sum(r[5] for r in rows),
        sum(r[6] for r in rows),
    )
    columns = (
        Column("stage", "stage"),
        Column("models", "models", ",d"),
        Column("finished", "finished", ",d"),
        Column("tokens", "tokens to read", ",d"),
        Column("flops", "FLOPs", ".2g"),
        Column("hours", "hours", ".2g"),
        Column("calls", "LLM calls", ",d"),
    )
    return Table("cost", "Cost", columns, (*rows, total))
