"""Agreement of `all_tokens_estimate` with the correlation over all held-out tokens, without a language model.

    python benchmarks/estimate.py --run runs/demo --model crate-2l --per-bin 4 5 20

Needs a run in which look-up and trie are scored over all held-out tokens. They are scored here by the estimate, with
some excerpts per quantile bin, at most those that the harvest kept. Printed for each explainer and number of excerpts,
over its neurons: how many have an estimate, the means of both figures, the error of a neuron's estimate, in how many the
95% interval contains the figure over all tokens, and the time that a neuron takes (own and shuffled explanation).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import figures, timed_result

from cratelm.explain.concepts.stored import concept_reader
from cratelm.explain.selection import read_selected_records
from cratelm.explain.store import ExplanationFile, read_selected
from cratelm.records import NeuronId, NeuronScore
from cratelm.runs import Run
from cratelm.score.controls import ExplanationSet
from cratelm.score.pipeline import Scoring, score_records
from cratelm.score.store import read_whole_scores
from cratelm.tokens.shards import TokenStore


def estimates(run: Run, model: str, explainers: Sequence[str], per_bin: int) -> list[NeuronScore]:
    """Return the estimates of all explained neurons and controls."""
    explained = run.stage("explanations", model).path
    scoring = Scoring(
        metrics=("all_tokens_estimate",),
        explainers=explainers,
        explanations=ExplanationSet(ExplanationFile(explained), None, 0),
        dead_on_fit={s.neuron for s in read_selected(explained) if s.dead},
        find_duplicates=lambda excerpts: np.zeros(len(excerpts), bool),
        per_bin=per_bin,
        concepts=concept_reader(explained, TokenStore(run.stage("tokens").path).token_strings),
    )
    harvest = run.stage("activations", model).path
    records = read_selected_records(harvest, "held_out", read_selected(explained))
    return list(score_records(records, scoring))


def agreement(scores: Sequence[NeuronScore], exact: dict[NeuronId, float]) -> dict[str, float]:
    """Return how the estimates of some neurons agree with the figures over all tokens."""
    both = [s for s in scores if s.score.value is not None and s.neuron in exact]
    value = np.array([s.score.value for s in both], float)
    low, high = (
        np.array([getattr(s.score, name) for s in both], float) for name in ("low", "high")
    )
    true = np.array([exact[s.neuron] for s in both])
    has_bounds = np.isfinite(low)
    covered = ((low <= true) & (true <= high))[has_bounds]
    return {
        "neurons": len(scores),
        "estimated": len(both),
        "mean": float(value.mean()),
        "mean_of_all_tokens": float(true.mean()),
        "standard_error": float((value - true).std() / len(both) ** 0.5),
        "error_of_a_neuron": float(np.sqrt(np.mean((value - true) ** 2))),
        "with_interval": int(has_bounds.sum()),
        "covered": float(covered.mean()) if len(covered) else float("nan"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="crate-2l")
    parser.add_argument("--per-bin", type=int, nargs="+", default=[4, 5, 20])
    options = parser.parse_args(arguments)
    run = Run(options.run)
    whole = [
        s
        for s in read_whole_scores(run.stage("scores", options.model).path)
        if s.control == "none" and s.correlation is not None
    ]
    for per_bin in options.per_bin:
        explainers = sorted({s.explainer for s in whole})
        seconds, scores = timed_result(lambda: estimates(run, options.model, explainers, per_bin))  # noqa: B023
        for explainer in explainers:
            own = [s for s in scores if (s.explainer, s.control) == (explainer, "none")]
            exact = {s.neuron: s.correlation for s in whole if s.explainer == explainer}
            found = agreement(own, {n: r for n, r in exact.items() if r is not None})
            print(
                f"{options.model} {explainer}, {per_bin} per bin: {found['estimated']} of {found['neurons']} neurons"
                f" estimated; mean {found['mean']:.3f}, over all tokens {found['mean_of_all_tokens']:.3f}"
                f" (standard error {found['standard_error']:.3f}); error of a neuron {found['error_of_a_neuron']:.3f};"
                f" interval covers {found['covered']:.1%} of {found['with_interval']}"
            )
            milliseconds = 1000 * seconds / len(own) / len(explainers)
            figures(explainer=explainer, per_bin=per_bin, ms_per_neuron=milliseconds, **found)


if __name__ == "__main__":
    main()
