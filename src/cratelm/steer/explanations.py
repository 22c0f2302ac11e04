"""Which explanations `cratelm intervene` has judged, and of which neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cratelm.errors import InputError
from cratelm.explain.store import (
    SampledNeuron,
    read_explanations,
    read_selected,
    read_unexplained,
)
from cratelm.records import NeuronId, NeuronKey, parse_neuron_ids
from cratelm.runs import Run, Stage
from cratelm.runs.names import set_name, sets_of
from cratelm.steer.config import NO_LLM, PROMOTED, InterveneConfig
from cratelm.steer.store import effects_stage, read_ablations, read_logit_effects

_PROMOTED_SHOWN = 6
"""tokens that an explanation by promoted tokens names"""


@dataclass(frozen=True, eq=False)
class JudgedExplanations:
    """The explanations of one explainer."""

    explainer: str
    selected: list[SampledNeuron]
    """neurons that were to be explained"""
    texts: dict[NeuronId, str]
    reasons: dict[NeuronId, str]
    """why a neuron has no explanation"""


def explanation_source(run: Run, config: InterveneConfig) -> Stage:
    """Return the stage that holds the explanations that `--explanations` names.

    Raises `InputError` that lists the sets of the model where that one is not finished.
    """
    if config.explanations == PROMOTED:
        stage = effects_stage(run, config.model)
        stage.require("effects")
        return stage
    name = "" if config.explanations == NO_LLM else config.explanations
    stage = run.stage("explanations", set_name(config.model, name))
    if stage.completion() is None:
        sets = sets_of(run.models("explanations"), config.model)
        if run.stage("explanations", config.model).completion():
            sets.append(NO_LLM)
        raise InputError(
            f"{run.path} has no explanations of {config.model} called {config.explanations}, it has"
            f" {', '.join(sets) or 'none'}: type `cratelm explain --run {run.path} --model"
            f" {config.model}` first, or name one of these with --explanations"
        )
    return stage


def read_judged_explanations(config: InterveneConfig, folder: Path) -> JudgedExplanations:
    """Return the explanations of one explainer, from the folder of `explanation_source`.

    The explainer is `--explainer`, or the first by name. Raises `InputError` if the set has none of that
    name.
    """
    if config.explanations == PROMOTED:
        return _promoted_tokens(folder)
    # of a language model's two kinds of evidence, the explanations from the strongest excerpts
    explanations = [
        e for e in read_explanations(folder) if e.payload.get("evidence", "top") == "top"
    ]
    names = sorted({e.explainer for e in explanations})
    explainer = config.explainer or (names[0] if names else "")
    if explainer not in names:
        raise InputError(
            f"--explainer {explainer or '(none)'}: {folder} has {', '.join(names) or 'no explanation'}"
        )
    return JudgedExplanations(
        explainer,
        read_selected(folder),
        {e.neuron: e.text for e in explanations if e.explainer == explainer},
        {f.neuron: f.reason for f in read_unexplained(folder)},
    )


def _promoted_tokens(folder: Path) -> JudgedExplanations:
    """The tokens that each neuron promotes most, from a folder of `cratelm effects`, as explanations."""
    texts = {
        effect.neuron: ", ".join(f"`{token}`" for token in effect.promoted[:_PROMOTED_SHOWN])
        for effect in read_logit_effects(folder)
    }
    selected = [SampledNeuron(row.neuron, row.dead) for row in read_ablations(folder)]
    return JudgedExplanations(PROMOTED, selected, texts, {})


def choose_neurons(
    config: InterveneConfig, selected: Sequence[SampledNeuron]
) -> list[SampledNeuron]:
    """Return the neurons of `--only`, or `--neurons` of each layer, drawn by seed and layer.

    Raises `InputError` for a neuron of `--only` that was not to be explained.
    """
    by_key = {s.neuron.key: s for s in selected}
    if config.only:
        keys = parse_neuron_ids("--only", config.only)
        missing = [key for key in keys if key not in by_key]
        if missing:
            raise InputError(
                f"--only {missing[0]}: this neuron is not among those that were to be explained"
            )
        return [by_key[key] for key in keys]
    chosen = []
    for layer in sorted({key.layer for key in by_key}):
        indices = sorted(key.index for key in by_key if key.layer == layer)
        if config.neurons:
            order = np.random.default_rng([config.seed, layer]).permutation(len(indices))
            indices = sorted(indices[i] for i in order[: config.neurons])
        chosen += [by_key[NeuronKey(layer, index)] for index in indices]
    return chosen
