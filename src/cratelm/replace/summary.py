"""Losses of all variants as figures with intervals over documents, paired."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cratelm.records import Interval
from cratelm.replace.layers import ALL, LayerSet
from cratelm.replace.measure import Losses, Variant
from cratelm.replace.store import DocumentLoss, NGramLoss, ReplacementRow
from cratelm.stats.documents import DocumentResamples

Float64 = NDArray[np.float64]


class Figures:
    """Figures of the losses over the documents that have predicted tokens."""

    def __init__(self, losses: Losses, resamples: int, seed: int):
        self._used = losses.n_tokens > 0
        self._losses = losses
        self._documents = DocumentResamples(losses.n_tokens[self._used], resamples, seed)
        self.n_tokens = int(losses.n_tokens.sum())
        self.n_documents = int(self._used.sum())

    def of(self, variant: Variant) -> Float64:
        """Return the sums of a variant over the documents [C]."""
        return self._losses.sums[variant][self._used]

    def mean(self, variant: Variant) -> Interval:
        """Return the loss of a variant per token."""
        return self._documents.mean(self.of(variant))

    def ngrams(self) -> tuple[NGramLoss, ...]:
        """Return the losses of the n-gram models."""
        variants = [v for v in self._losses.sums if v.replaced_by == "ngram"]
        return tuple(NGramLoss(v.depth, self.mean(v)) for v in variants)

    def rows(
        self, explainers: Sequence[str], sets: Sequence[LayerSet]
    ) -> tuple[ReplacementRow, ...]:
        """Return a row for each explainer, set of layers and control that was run."""
        rows = []
        for explainer in explainers:
            for layer_set in sets:
                for control, by in (("none", "own"), ("shuffled", "shuffled")):
                    variant = Variant(by, explainer, layer_set.label)  # type: ignore[arg-type]
                    if variant in self._losses.sums:
                        rows.append(self._row(variant, control))
        return tuple(rows)

    def _row(self, variant: Variant, control: str) -> ReplacementRow:
        true, replaced = self.of(Variant("none")), self.of(variant)
        mean = self.of(Variant("mean", layers=variant.layers))
        zero = self.of(Variant("zero", layers=variant.layers))
        unigram = self.of(Variant("ngram", depth=0))
        figure = self._documents.figure

        def difference(a: Float64, b: Float64) -> Interval:
            found = figure(lambda x, y: x - y, a, b)
            assert found is not None
            return found

        def recovered(reference: Float64) -> Interval | None:
            def of(reference: Float64, replaced: Float64, true: Float64) -> Float64:
                below = reference - true
                return np.where(below > 0, (reference - replaced) / below, np.nan)

            return figure(of, reference, replaced, true)

        return ReplacementRow(
            variant.explainer,
            variant.layers,
            control,
            loss_true=self._documents.mean(true),
            loss_mean=self._documents.mean(mean),
            loss_zero=self._documents.mean(zero),
            loss_replaced=self._documents.mean(replaced),
            nats_lost=difference(replaced, true),
            carried=difference(mean, true),
            carried_zero=difference(zero, true),
            given_back=difference(mean, replaced),
            recovered_mean=recovered(mean),
            recovered_unigram=recovered(unigram),
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
        )

    def documents(self) -> list[DocumentLoss]:
        """Return the loss of each document and variant."""
        losses = self._losses
        return [
            DocumentLoss(
                int(losses.ordinals[column]),
                variant.layers,
                variant.explainer,
                variant.replaced_by,
                variant.depth,
                int(losses.n_tokens[column]),
                float(sums[column]),
            )
            for variant, sums in losses.sums.items()
            for column in np.flatnonzero(self._used)
        ]

    def reconstructed(self) -> Interval | None:
        """Return the loss with true latents and without the error of the autoencoders; None for neurons."""
        variant = Variant("none", layers=ALL)
        return self.mean(variant) if variant in self._losses.sums else None
