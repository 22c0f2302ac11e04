"""`cratelm replace`: how much of a model can run on the explanations of its neurons.

Writes the folder `replacement/MODEL/` of the run; `cratelm.replace.store` documents its files and reads them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields

import numpy as np

from cratelm.llm.client import DryRun, WorkerResult
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.fit import Fit
from cratelm.replace.layers import ALL, layer_sets
from cratelm.replace.measure import Errors, Losses, Variant, measure
from cratelm.replace.neurons import (
    best_explained,
    curve,
    neuron_rows,
    ranking,
    replaced_alone,
    runnable,
)
from cratelm.replace.predictors import Predictor
from cratelm.replace.prepared import Prepared, planned
from cratelm.replace.result import ReplaceResult, result_of
from cratelm.replace.simulators import write_simulators
from cratelm.replace.store import write_curve, write_documents, write_neurons, write_summary
from cratelm.replace.summary import Figures, summarized
from cratelm.replace.with_llm import replace_with_llm
from cratelm.runs import Draft, Run
from cratelm.runs.ranks import Ranks, joined
from cratelm.steer.ablation import Ablations


def replace(config: ReplaceConfig) -> ReplaceResult | DryRun | WorkerResult:
    """Run a model on its explanations, write `replacement/MODEL/`, and return the summary.

    With `--simulator`, the folder is `replacement/MODEL@NAME/` (`cratelm.replace.with_llm`). If the stage is finished,
    its summary is read back. Processes that `torchrun` started each take a share of the tokens and neurons, and write
    what one would have written.

    Raises `InputError` if the run has no harvest of the model, or what must be held does not fit into memory.
    """
    if config.simulator:
        return replace_with_llm(config)
    with joined() as ranks:
        return _replaced(config, ranks)


def _replaced(config: ReplaceConfig, ranks: Ranks) -> ReplaceResult:
    run = Run(config.run)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize"),
        "activations": run.stage("activations", config.model).require("harvest"),
    }
    stage = run.stage("replacement", config.model)
    if ranks.by_first(lambda: stage.is_finished(config, inputs, force=config.force)):
        return result_of(stage.path)
    prepared = Prepared.of(config, run)
    with ranks.write(stage, config, inputs) as draft:
        _measure(prepared, draft, ranks)
    return result_of(stage.path)


def _measure(prepared: Prepared, draft: Draft | None, ranks: Ranks) -> None:
    """Explain, run and measure; write the files into the draft, which rank 0 has."""
    config, opened = prepared.config, prepared.opened
    text, largest = prepared.text, prepared.largest
    explained = Fit(config, opened, text, largest, ranks).explain()
    held_out = prepared.held_out(planned(config, opened, "held_out", config.tokens))
    sets = layer_sets(opened.site.layer_numbers, config.layers)
    ngrams = text.contexts, text.ngrams
    losses, errors = measure(
        held_out, explained, prepared.means, sets, ngrams, largest, config.seed, ranks
    )
    chosen = ranks.by_first(lambda: _fewest_lost(losses, explained))
    partly = None
    if config.curve_tokens:
        points = ranks.by_first(lambda: ranking(errors, chosen))
        best = chosen, explained[chosen]
        partly = best_explained(held_out, best, points, config.curve_tokens, ranks)
    alone = replaced_alone(config, opened, explained[chosen], ranks)
    if draft is not None:
        _write(draft, prepared, explained, _Outcome(losses, errors, partly, chosen, alone))


@dataclass(frozen=True, eq=False)
class _Outcome:
    """Everything that was measured on held-out text."""

    losses: Losses
    errors: list[Errors]
    """by place"""
    partly: Losses | None
    """with only the best-explained neurons replaced"""
    chosen: str
    """explainer of `partly` and `alone`"""
    alone: Ablations | None
    """one neuron at a time"""


def _fewest_lost(losses: Losses, explainers: Iterable[str]) -> str:
    """Return the explainer on which the model loses the fewest nats if all layers are replaced; else the first one."""
    total = {name: losses.sums.get(Variant("own", name, ALL)) for name in explainers}
    return min(total, key=lambda name: np.inf if (of := total[name]) is None else of.sum())


def _write(
    draft: Draft,
    prepared: Prepared,
    explained: Mapping[str, Sequence[Predictor]],
    outcome: _Outcome,
) -> None:
    config, site, partly = prepared.config, prepared.opened.site, outcome.partly
    figures = Figures(outcome.losses, config.resamples, config.seed)
    sets = layer_sets(site.layer_numbers, config.layers)
    points = curve(partly, sum(site.n_neurons), config.resamples, config.seed) if partly else []
    simulators = write_simulators(draft.path, explained)
    write_documents(draft.path, figures.documents())
    write_curve(draft.path, points)
    rows = []
    for explainer in explained:
        alone = outcome.alone if explainer == outcome.chosen else None
        rows += neuron_rows(config.model, site, outcome.errors, explainer, alone=alone)
    write_neurons(draft.path, rows)
    summary = with_fields(
        summarized(prepared, figures, sets, explained),
        runnable=tuple(runnable(points)),
        simulators=tuple(simulators),
        alone=outcome.chosen if outcome.alone is not None else "",
    )
    draft.results.update(write_summary(draft.path, summary))
