"""How faithful steering is where the activations are rebuilt on the way.

A latent i is set to the largest value that it takes, at every text token. Four runs of the model:

    plain     as it is
    edit      x + decode(z') - decode(z): the latent moved, what cannot be rebuilt stays as it is
    rebuilt   decode(z): the reconstruction in the place of x, nothing moved
    steered   decode(z'): the latent moved in a reconstruction

z are the latents of x, z' the same with z_i set. With d the change of the logits against plain,
centred over the vocabulary at each token (so that it is that of the log-probabilities, too),

    fidelity = sum d_edit . d_steered / sqrt(sum |d_edit|^2  sum |d_steered|^2)

over tokens and vocabulary: 1 where steering does what the edit does and nothing else. Beside it how far
the edit moves the predictions, KL(plain | edit), and how far the reconstruction does by itself,
KL(plain | rebuilt), nats a token. A neuron of the site is steered in the same way with the identity
for an autoencoder: rebuilt is plain, steered is edit.

Memory: four sets of logits of one forward pass, 1 GiB at most.

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
    """The neurons of a site themselves."""

    def encode(self, x: torch.Tensor, /) -> torch.Tensor:
        return x

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        return latents


@dataclass(eq=False)
class _Steered:
    """Sums about one layer's latents, or its neurons."""

    place: int
    autoencoder: Autoencoder
    indices: list[int]
    values: list[float]
    """raw activation that each is set to"""
    products: np.ndarray
    """[steered, 3]: sums of d_edit.d_steered, |d_edit|^2, |d_steered|^2"""
    edit: np.ndarray
    """[steered] sum of KL(plain | edit)"""
    rebuilt: float = 0.0
    tokens: int = 0

    def figures(self, layer: int) -> SteeringFidelity:
        crossed, edits, steered = self.products.T
        # an edit that changes nothing has no direction that could be kept
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
    """Figures of `count` latents of each layer, and of as many neurons of the site below.

    Layers where nothing fires on the tokens of the plan are left out.
    """
    site = replace(latents, autoencoders=())
    vocabulary = model.config.get_text_config().vocab_size
    batch_tokens = min(batch_tokens, max(1, MOST_LOGITS // (4 * vocabulary)))
    places = range(site.n_layers)
    own: Sequence[Autoencoder] = [Identity()] * site.n_layers
    with torch.no_grad():
        drawn = []
        for autoencoders in (latents.autoencoders, own):
            maxima = _maxima(model, site, autoencoders, plan, batch_tokens)
            drawn.append([_draw(p, autoencoders[p], maxima[p], count, seed) for p in places])
        work = [one for kind in drawn for one in kind if one.indices]
        passes = 1 + sum(1 + 2 * len(one.indices) for one in work)
        total = plan.n_tokens() * passes
        with tqdm(total=total, desc="steering", unit="tok", unit_scale=True, disable=quiet) as bar:
            for batch in plan.batches(batch_tokens, model.device):
                plain = _logits(model, site, batch, {})
                for one in work:
                    _add(model, site, batch, plain, one)
                bar.update(batch.input_ids.numel() * passes)
    numbers = site.layer_numbers
    told = [tuple(s.figures(numbers[s.place]) for s in kind if s.indices) for kind in drawn]
    return told[0], told[1]


def _maxima(
    model: PreTrainedModel,
    site: Site,
    autoencoders: Sequence[Autoencoder],
    plan: SearchPlan,
    batch_tokens: int,
) -> list[torch.Tensor]:
    """Largest value of each latent [S] over the text tokens of the plan, by place."""
    found: list[Any] = [None] * site.n_layers
    for batch in plan.batches(batch_tokens, model.device):
        text = text_of(batch)

        def see(place: int, activations: torch.Tensor, text: torch.Tensor = text) -> None:
            if text.any():
                top = autoencoders[place].encode(activations[text].float()).amax(0)
                found[place] = top if found[place] is None else torch.maximum(found[place], top)

        with hooked(model, site, see):
            model.base_model(input_ids=batch.input_ids, use_cache=False)
    return [torch.zeros(0) if top is None else top for top in found]


def _draw(
    place: int, autoencoder: Autoencoder, maxima: torch.Tensor, count: int, seed: int
) -> _Steered:
    """Which of those with a maximum [S] above 0 are steered."""
    firing = np.flatnonzero(maxima.cpu().numpy() > 0)
    rng = np.random.default_rng((seed, place))
    indices = np.sort(rng.choice(firing, min(count, len(firing)), replace=False)).tolist()
    values = [float(maxima[i]) for i in indices]
    return _Steered(
        place, autoencoder, indices, values, np.zeros((len(indices), 3)), np.zeros(len(indices))
    )


def _add(
    model: PreTrainedModel, site: Site, batch: Batch, plain: torch.Tensor, one: _Steered
) -> None:
    """One batch, added to the sums; plain logits [n, V]."""
    sae, place = one.autoencoder, one.place
    rebuilt = _logits(model, site, batch, {place: lambda x: sae.decode(sae.encode(x))})
    one.rebuilt += _kl(plain, rebuilt)
    one.tokens += len(plain)
    del rebuilt
    for row, (index, value) in enumerate(zip(one.indices, one.values, strict=True)):

        def steered(x: torch.Tensor, index: int = index, value: float = value) -> torch.Tensor:
            latents = sae.encode(x).clone()
            latents[:, index] = value
            return sae.decode(latents)

        def edit(x: torch.Tensor, steered: Replace = steered) -> torch.Tensor:
            return x + (steered(x) - sae.decode(sae.encode(x)))

        edited = _logits(model, site, batch, {place: edit})
        one.edit[row] += _kl(plain, edited)
        asked = _centred(edited - plain)
        done = _centred(_logits(model, site, batch, {place: steered}) - plain)
        pairs = ((asked, done), (asked, asked), (done, done))
        one.products[row] += [float((a * b).sum(1).double().sum()) for a, b in pairs]


def _logits(
    model: PreTrainedModel, site: Site, batch: Batch, replacements: dict[int, Replace]
) -> torch.Tensor:
    """[n, V] of the text tokens."""
    text = text_of(batch)
    with spliced(model, site, text, replacements):
        return model(input_ids=batch.input_ids, use_cache=False).logits[text].float()


def _centred(change: torch.Tensor) -> torch.Tensor:
    """[n, V] less its mean over the vocabulary."""
    return change - change.mean(1, keepdim=True)


def _kl(plain: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over tokens of KL(plain | other), from logits [n, V]."""
    log_p, log_q = plain.log_softmax(1), other.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).double().sum())


def _mean(values: np.ndarray) -> Estimate:
    """Mean of [m] and its standard error."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)
