"""Neurons beside latents of sparse autoencoders: scores, loss, what is rebuilt, how faithful steering is.

Reads what `cratelm sae evaluate` kept in the run: `sae/MODEL@NAME/evaluation.json`, or `sae/MODEL@FOLDER.json`
for autoencoders from elsewhere. Latents are models like any other, harvested as `MODEL+NAME`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.records import Estimate
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.runs import Completion, Run, hash_file
from cratelm.runs.names import set_name
from cratelm.stats.ratio import ratio
from cratelm.text.table import Cell


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of one model's autoencoders, beside the neurons of the model."""

    results: ModelResults
    base: str
    """the model that they are of"""
    told: dict[str, Any] | None
    """what `cratelm sae evaluate` measured of these very autoencoders; None where it did not"""

    @cached_property
    def all_layers(self) -> dict[str, Any] | None:
        """Loss with all layers rebuilt at once, of the only one where there is one."""
        return self.told["places"][-1] if self.told else None


def evaluation_path(run: Run, harvest: Completion) -> Path | None:
    """Where the figures of a harvest's autoencoders are kept; None where it is of neurons."""
    sae = harvest.config.get("sae")
    if not sae:
        return None
    name = set_name(Path(harvest.config["model"]).name, Path(sae).name)
    own = run.path / "sae" / name
    return own / "evaluation.json" if own.is_dir() else own.with_name(f"{name}.json")


def evaluation_inputs(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Hash of every evaluation that the report reads."""
    found = {}
    for name in names:
        harvest = run.stage("activations", name).completion()
        path = evaluation_path(run, harvest) if harvest else None
        if path is not None and path.is_file():
            found[f"evaluation/{name}"] = hash_file(path)
    return found


def latents(results: RunResults) -> list[Latents]:
    """All models of the report that are latents, those of untrained models left out."""
    found = []
    for m in results.principal:
        harvest = m.completions.get("activations")
        path = evaluation_path(results.run, harvest) if harvest else None
        if harvest is None or path is None:
            continue
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        # figures of autoencoders, or a model, that have been trained again since say nothing of these
        read = {role: harvest.inputs.get(role) for role in ("sae", "model", "tokens")}
        if told and (told.get("identity"), told.get("model_identity")) != (
            read["sae"],
            read["model"],
        ):
            told = None
        # nor do figures of earlier text; version 0.1.0 did not keep of which
        if told and told.get("tokens_identity", read["tokens"]) != read["tokens"]:
            told = None
        found.append(Latents(m, Path(harvest.config["model"]).name, told))
    return found


def missing_evaluations(results: RunResults) -> list[str]:
    path = results.run.path
    lines = []
    for one in latents(results):
        if one.told is None:
            config = one.results.completions["activations"].config
            lines.append(
                f"what the autoencoders of {one.results.name} rebuild (`cratelm sae evaluate --run {path}"
                f" --model {config['model']} --sae {config['sae']}`)"
            )
    return lines


def reconstruction_costs(results: RunResults) -> dict[str, Cell]:
    """Loss that the latents of each model add, nats a token, by their name."""
    return {
        one.results.name: estimate(whole["reconstruction"]["added"])
        for one in latents(results)
        if (whole := one.all_layers) is not None
    }


def shown_models(results: RunResults, found: Sequence[Latents]) -> list[ModelResults]:
    """Each model, its latents behind it."""
    bases = {one.base for one in found}
    of = {one.results.name: one.base for one in found}
    order = [m for m in results.principal if m.name in bases or m.name in of]
    names = [m.name for m in results.principal]

    def place(m: ModelResults) -> tuple[int, bool, str]:
        base = of.get(m.name, m.name)
        return (names.index(base) if base in names else len(names), m.name in of, m.name)

    return sorted(order, key=place)


@dataclass(frozen=True, eq=False)
class LossPoint:
    """What reading a model in one way costs, and gives."""

    model: ModelResults
    loss: dict[str, Any]
    """nats a token: value and error"""
    added: Cell
    """by the reconstruction"""
    tokens: tuple[tuple[int, int], ...]
    """ordinal and tokens predicted of each document [C]"""
    totals: NDArray[np.float64]
    """[C] sum of the losses of each document"""


def loss_points(results: RunResults, found: Sequence[Latents]) -> list[LossPoint]:
    """Loss of each model as it is, and with its reconstruction in all layers, on the same tokens."""
    by_name = {m.name: m for m in results.models}
    points: dict[str, LossPoint] = {}
    for one in found:
        if one.told is None or one.all_layers is None:
            continue
        sums = one.told["by_document"]
        tokens = tuple(zip(sums["document"], sums["targets"], strict=True))
        spliced = one.all_layers["reconstruction"]
        added = estimate(spliced["added"])
        sides = [(one.results, spliced["loss"], added, sums["reconstruction"])]
        if one.base in by_name:
            sides.append((by_name[one.base], one.told["loss"], None, sums["loss"]))
        for m, loss, cost, totals in sides:
            points[m.name] = LossPoint(m, loss, cost, tokens, np.array(totals))
    return [points[m.name] for m in shown_models(results, found) if m.name in points]


def above_best(points: Sequence[LossPoint]) -> tuple[str, list[Estimate]] | None:
    """Name of the model of least loss, and how far the others lie above it on the same documents.

    None where they were not measured on the same tokens.
    """
    if not points or len({p.tokens for p in points}) > 1:
        return None
    targets = np.array([n for _, n in points[0].tokens], dtype=float)
    best = min(points, key=lambda p: p.loss["value"])
    return best.model.name, [ratio(p.totals - best.totals, targets) for p in points]


def estimate(told: dict[str, Any] | None, by: float = 1) -> Cell:
    """A figure with its standard error, times `by`."""
    if told is None or told["value"] is None:
        return None
    if told["error"] is None:
        return by * told["value"]
    return Estimate(by * told["value"], by * told["error"])
