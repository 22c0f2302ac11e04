"""What `cratelm replace` opens before it measures: the model, the fit text, and the samples of tokens.

Shape legend: H neurons of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.replace.config import ReplaceConfig, parts_of
from cratelm.replace.fit import FitText
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.measure import HeldOut
from cratelm.runs import Run, check_memory
from cratelm.runs.devices import available_on
from cratelm.runs.ranks import n_ranks_here

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A harvested model, ready to be explained and to run on explanations."""

    config: ReplaceConfig
    opened: HarvestContext
    model: ExplainedModel
    means: Sequence[Float32]
    """[H] by place: mean activations over the fit tokens"""
    largest: Sequence[float]
    """by place: highest activation on the fit split"""
    text: FitText

    @classmethod
    def of(cls, config: ReplaceConfig, run: Run) -> "Prepared":
        """Open the model of a harvest and read the fit text.

        Raises `InputError` if that is impossible, or if the explanations do not fit into memory.
        """
        opened = open_harvested(run, config.model, config)
        model = ExplainedModel(opened.subject.model, opened.site, opened.beginning)
        summaries = [
            [s for s in read_summaries(opened.folder, "fit") if s.neuron.layer == layer]
            for layer in opened.site.layer_numbers
        ]
        plan = planned(config, opened, "fit", config.fit_tokens)
        text = FitText.of(plan, config.batch_tokens, config.depth, opened.store.vocab_size)
        _check_memory(config, opened, text)
        means = [np.array([s.mean for s in of], np.float32) for of in summaries]
        largest = [max((abs(s.maximum) for s in of), default=1.0) for of in summaries]
        return cls(config, opened, model, means, largest, text)

    def held_out(self, plan: SearchPlan) -> HeldOut:
        """Return the measurement of the model on the held-out tokens of a plan."""
        c = self.config
        return HeldOut(self.model, plan, c.batch_tokens, self.opened.store.vocab_size, c.quiet)


def planned(config: ReplaceConfig, opened: HarvestContext, split: Split, tokens: int) -> SearchPlan:
    """Return which sequences of a split are read: a random sample of at most `tokens` tokens.

    Sequences are as long as those of the harvest, or have all of the `tokens` if these are fewer. Raises `InputError`
    if the split has no tokens.
    """
    if opened.store.split(split).n_tokens == 0:
        raise InputError(f"split {split} has no tokens: tokenize more text or raise its fraction")
    length = min(opened.sequence_length, tokens + opened.beginning.extra)
    return opened.plan(split, tokens, config.seed, length)


def _check_memory(config: ReplaceConfig, opened: HarvestContext, text: FitText) -> None:
    """Raise `InputError` if sums over the contexts, or tables without a limit, do not fit into memory."""
    widths, n_contexts = opened.site.n_neurons, len(text.contexts)
    parts = [part for name in config.explainers for part in parts_of(name)]
    unlimited = sum(p.kind == "trie" and not (p.most or p.of_excerpts) for p in parts)
    needed: dict[str | tuple[str, ...], float] = {
        ("fit_tokens", "depth"): 8 * max(widths) * n_contexts,
        ("explainers", "fit_tokens"): 4 * sum(widths) * n_contexts * unlimited,
    }
    free = available_on(opened.subject.model.device)
    check_memory(
        config,
        needed,
        f"the means of {sum(widths):,} neurons at {n_contexts:,} contexts",
        available=free and free // n_ranks_here(),
    )
