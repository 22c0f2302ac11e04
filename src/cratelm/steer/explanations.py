"""Choose the explanations and neurons that `cratelm intervene` judges."""

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
from cratelm.records import NeuronId, NeuronKey, has_both_ends, neuron_name, parse_neuron_ids
from cratelm.runs import Run, Stage
from cratelm.runs.names import set_name, sets_of
from cratelm.steer.config import NO_LLM, PROMOTED, InterveneConfig
from cratelm.steer.store import effects_stage, read_ablations, read_logit_effects

_PROMOTED_SHOWN = 6
"""number of tokens in an explanation made of promoted tokens"""


@dataclass(frozen=True, eq=False)
class JudgedExplanations:
    """The explanations by one explainer."""

    explainer: str
    selected: list[SampledNeuron]
    """neurons selected to be explained"""
    texts: dict[NeuronId, str]
    reasons: dict[NeuronId, str]
    """why a neuron has no explanation, for those that failed"""


def explanation_source(run: Run, config: InterveneConfig) -> Stage:
    """Return the stage with the explanations that `--explanations` names.

    If it is not finished, raises `InputError` with a list of the model's sets.
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
            f"{run.path} has no explanations of {config.model} called {config.explanations} (it has"
            f" {', '.join(sets) or 'none'}): name another set with --explanations, or type `cratelm explain"
            f" --run {run.path} --model {config.model}` first"
        )
    return stage


def read_judged_explanations(config: InterveneConfig, folder: Path) -> JudgedExplanations:
    """Return the explanations by one explainer, from the folder of `explanation_source`.

    The explainer is `--explainer`, or the first by name. Raises `InputError` if the set has no explainer of
    that name.
    """
    if config.explanations == PROMOTED:
        return _promoted_tokens(folder)
    # a language model explains from two kinds of evidence: use the explanations from the top excerpts
    explanations = [e for e in read_explanations(folder) if e.evidence in ("", "top")]
    names = sorted({e.explainer for e in explanations})
    explainer = config.explainer or (names[0] if names else "")
    if explainer not in names:
        raise InputError(
            f"--explainer {explainer or '(none)'}: {folder} has explanations by"
            f" {', '.join(names) or 'no explainer'}; name an explainer of that folder"
        )
    return JudgedExplanations(
        explainer,
        read_selected(folder),
        {e.neuron: e.text for e in explanations if e.explainer == explainer},
        {f.neuron: f.reason for f in read_unexplained(folder)},
    )


def _promoted_tokens(folder: Path) -> JudgedExplanations:
    """Return the tokens that each neuron promotes most, from a folder of `cratelm effects`, as explanations."""
    texts = {
        effect.neuron: ", ".join(f"`{token}`" for token in effect.promoted[:_PROMOTED_SHOWN])
        for effect in read_logit_effects(folder)
    }
    selected = [SampledNeuron(row.neuron, row.dead) for row in read_ablations(folder)]
    return JudgedExplanations(PROMOTED, selected, texts, {})


def choose_neurons(
    config: InterveneConfig, selected: Sequence[SampledNeuron]
) -> list[SampledNeuron]:
    """Return the neurons of `--only`, or `--neurons` neurons of each layer, drawn by seed and layer.

    Raises `InputError` for a neuron of `--only` that was not selected to be explained.
    """
    by_key = {s.neuron.key: s for s in selected}
    if config.only:
        site = selected[0].neuron.site if selected else ""
        keys = parse_neuron_ids("--only", config.only, site)
        missing = [key for key in keys if key not in by_key]
        # of a neuron named without an end, one end may be silent
        missing = [key for key in missing if not (has_both_ends(site) and _opposite(key) in by_key)]
        if missing:
            name = f"{missing[0].layer}:{neuron_name(missing[0].index, site)}"
            raise InputError(
                f"--only {name}: this neuron was not selected to be explained; name one that was"
            )
        return [by_key[key] for key in keys if key in by_key]
    chosen = []
    for layer in sorted({key.layer for key in by_key}):
        ends: dict[int, list[SampledNeuron]] = {}  # by neuron
        for s in sorted(selected, key=lambda s: s.neuron.index):
            if s.neuron.layer == layer:
                ends.setdefault(s.neuron.index // s.neuron.n_ends, []).append(s)
        numbers = sorted(ends)
        if config.neurons:
            order = np.random.default_rng([config.seed, layer]).permutation(len(numbers))
            numbers = sorted(numbers[i] for i in order[: config.neurons])
        chosen += [s for number in numbers for s in ends[number]]
    return chosen


def _opposite(key: NeuronKey) -> NeuronKey:
    """Return the other end of a neuron at a site with both."""
    return NeuronKey(key.layer, key.index ^ 1)
