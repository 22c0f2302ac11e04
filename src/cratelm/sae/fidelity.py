"""Faithfulness of steering a latent when the activations are replaced by their reconstruction.

A latent i is set to its largest value, at every text token. There are four runs of the model:

    plain     unedited
    edit      x + decode(z') - decode(z): the latent is set, and the reconstruction error is kept
    rebuilt   decode(z): the reconstruction in place of x, with no latent set
    steered   decode(z'): the latent is set in a reconstruction

z are the latents of x, and z' are the same with z_i set. Let d be the change of the logits relative to plain,
minus its mean over the vocabulary at each token (so that it is the same for log-probabilities). Then

    fidelity = sum d_edit . d_steered / sqrt(sum |d_edit|^2  sum |d_steered|^2)

over tokens and vocabulary, which is 1 if steering has the effect of the edit and no other. Also measured are the
effect of the edit on the predictions, KL(plain | edit), and that of the reconstruction alone,
KL(plain | rebuilt), in nats per token. A neuron of the site is steered in the same way, with the identity as
autoencoder: then rebuilt equals plain, and steered equals edit.

Memory: four sets of logits of one forward pass, at most 1 GiB.

Shape legend: b sequences of a forward pass, T tokens of a sequence, n text tokens of a forward pass,
H inputs, S latents, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.models.sites import Autoencoder, Site, hooked
from cratelm.records import Estimate
from cratelm.sae.reconstruction import MOST_LOGITS, Replace, spliced, text_of
from cratelm.sae.store import SteeringFidelity


class Identity:
    """The identity as autoencoder: its latents are the neurons of the site."""

    def encode(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return x unchanged."""
        return x

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        """Return the latents unchanged."""
        return latents


@dataclass(eq=False)
class _LayerSums:
    """Sums for the steered latents, or neurons, of one layer."""

    site_layer: int
    """index into the layers of the site"""
    autoencoder: Autoencoder
    indices: list[int]
    values: list[float]
    """activation that each is set to"""
    products: np.ndarray
    """[steered, 3] sums of d_edit . d_steered, |d_edit|^2, |d_steered|^2"""
    edit: np.ndarray
    """[steered] sum of KL(plain | edit)"""
    rebuilt: float = 0.0
    """sum of KL(plain | rebuilt)"""
    tokens: int = 0

    def figures(self, layer: int) -> SteeringFidelity:
        """Return the means over tokens, and over the steered latents or neurons."""
        crossed, edits, steered = self.products.T
        # an edit that changes nothing has no direction to compare
        moved = (edits > 0) & (steered > 0)
        fidelity = crossed[moved] / np.sqrt(edits[moved] * steered[moved])
        return SteeringFidelity(
            layer=layer,
            steered=tuple(self.indices),
            tokens=self.tokens,
            fidelity=_mean(fidelity) if moved.any() else None,
            edit=_mean(self.edit / max(1, self.tokens)),
            rebuilt=self.rebuilt / max(1, self.tokens),
        )


def steering_fidelity(
    model: PreTrainedModel,
    latents: Site,
    plan: SearchPlan,
    batch_tokens: int,
    *,
    count: int,
    seed: int,
    quiet: bool,
) -> tuple[tuple[SteeringFidelity, ...], tuple[SteeringFidelity, ...]]:
    """Return the figures of `count` latents per layer, and of `count` neurons per layer of the underlying site.

    A layer in which nothing fires on the tokens of the plan is omitted.
    """
    site = replace(latents, autoencoders=())
    vocabulary = model.config.get_text_config().vocab_size
    batch_tokens = min(batch_tokens, max(1, MOST_LOGITS // (4 * vocabulary)))
    identities: Sequence[Autoencoder] = [Identity()] * site.n_layers
    with torch.no_grad():
        drawn = []
        for autoencoders in (latents.autoencoders, identities):
            maxima = _maxima(model, site, autoencoders, plan, batch_tokens)
            drawn.append(
                [_draw(i, autoencoders[i], maxima[i], count, seed) for i in range(site.n_layers)]
            )
        layers = [layer for side in drawn for layer in side if layer.indices]
        # plain once; rebuilt once per layer; edit and steered once for each latent or neuron
        passes = 1 + sum(1 + 2 * len(layer.indices) for layer in layers)
        total = plan.n_tokens() * passes
        with tqdm(total=total, desc="steering", unit="tok", unit_scale=True, disable=quiet) as bar:
            for batch in plan.batches(batch_tokens, model.device):
                plain = _logits(model, site, batch, {})
                for layer in layers:
                    _add(model, site, batch, plain, layer)
                bar.update(batch.input_ids.numel() * passes)
    numbers = site.layer_numbers
    of_latents, of_neurons = (
        tuple(layer.figures(numbers[layer.site_layer]) for layer in side if layer.indices)
        for side in drawn
    )
    return of_latents, of_neurons


def _maxima(
    model: PreTrainedModel,
    site: Site,
    autoencoders: Sequence[Autoencoder],
    plan: SearchPlan,
    batch_tokens: int,
) -> list[torch.Tensor]:
    """Return the largest value of each latent [S] over the text tokens of the plan, by layer of the site."""
    maxima: list[Any] = [None] * site.n_layers
    for batch in plan.batches(batch_tokens, model.device):
        text = text_of(batch)

        def on_activation(i: int, activations: torch.Tensor, text: torch.Tensor = text) -> None:
            if text.any():
                top = autoencoders[i].encode(activations[text].float()).amax(0)
                maxima[i] = top if maxima[i] is None else torch.maximum(maxima[i], top)

        with hooked(model, site, on_activation):
            model.base_model(input_ids=batch.input_ids, use_cache=False)
    return [torch.zeros(0) if top is None else top for top in maxima]


def _draw(
    site_layer: int, autoencoder: Autoencoder, maxima: torch.Tensor, count: int, seed: int
) -> _LayerSums:
    """Return empty sums for up to `count` latents, drawn from those with a maximum [S] above 0."""
    firing = np.flatnonzero(maxima.cpu().numpy() > 0)
    rng = np.random.default_rng((seed, site_layer))
    indices = np.sort(rng.choice(firing, min(count, len(firing)), replace=False)).tolist()
    values = [float(maxima[i]) for i in indices]
    n = len(indices)
    return _LayerSums(site_layer, autoencoder, indices, values, np.zeros((n, 3)), np.zeros(n))


def _add(
    model: PreTrainedModel, site: Site, batch: Batch, plain: torch.Tensor, layer: _LayerSums
) -> None:
    """Add one batch to the sums of a layer; `plain` are the logits [n, V] of the unedited model."""
    sae, site_layer = layer.autoencoder, layer.site_layer
    rebuilt = _logits(model, site, batch, {site_layer: lambda x: sae.decode(sae.encode(x))})
    layer.rebuilt += _kl(plain, rebuilt)
    layer.tokens += len(plain)
    del rebuilt  # so that at most four sets of logits are in memory
    for row, (index, value) in enumerate(zip(layer.indices, layer.values, strict=True)):

        def steered(x: torch.Tensor, index: int = index, value: float = value) -> torch.Tensor:
            latents = sae.encode(x).clone()
            latents[:, index] = value
            return sae.decode(latents)

        def edit(x: torch.Tensor, steered: Replace = steered) -> torch.Tensor:
            return x + (steered(x) - sae.decode(sae.encode(x)))

        edited = _logits(model, site, batch, {site_layer: edit})
        layer.edit[row] += _kl(plain, edited)
        d_edit = _centred(edited - plain)
        d_steered = _centred(_logits(model, site, batch, {site_layer: steered}) - plain)
        pairs = ((d_edit, d_steered), (d_edit, d_edit), (d_steered, d_steered))
        layer.products[row] += [float((a * b).sum(1).double().sum()) for a, b in pairs]


def _logits(
    model: PreTrainedModel, site: Site, batch: Batch, replacements: dict[int, Replace]
) -> torch.Tensor:
    """Return the logits [n, V] at the text tokens, with replacements in layers of the site."""
    text = text_of(batch)
    with spliced(model, site, text, replacements):
        return model(input_ids=batch.input_ids, use_cache=False).logits[text].float()


def _centred(change: torch.Tensor) -> torch.Tensor:
    """Return the change [n, V] minus its mean over the vocabulary."""
    return change - change.mean(1, keepdim=True)


def _kl(plain: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sum over tokens of KL(plain | other), from logits [n, V]."""
    log_p, log_q = plain.log_softmax(1), other.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).double().sum())


def _mean(values: np.ndarray) -> Estimate:
    """Return the mean of values [m] and its standard error."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)
