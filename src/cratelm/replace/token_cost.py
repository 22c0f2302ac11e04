"""What explanations cost at one token, by neuron: integrated gradients of the token's loss.

Let F(c) be the loss of the token if the codes of all replaced layers are set to c, a that the model computes and p
that the explanations predict. The share of neuron i is, summed over the tokens s of the text before,

    (p_si - a_si) * integral over x from 0 to 1 of dF/dc_si at c = a + x (p - a)

(Sundararajan, Taly and Yan 2017, equation 1, with the true codes as baseline). So the shares of all neurons add up to
F(p) - F(a), which is what the explanations cost at that token. What a neuron would cost if its explanation alone were
used is something else: such costs do not add up, because the rest of the model saturates.

With the codes of all MLPs or ISTA blocks set, what lies between them and the loss is smooth (norms, attention, the head),
so that Gauss-Legendre quadrature needs few points. At other sites ReLUs may lie between, and the sum is less exact.

Shape legend: T tokens of a text, H neurons of a layer, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.replace.forward import Codes, ExplainedModel

POINTS = 8
"""points of the quadrature, each one pass forward and back. With them the shares of small twins of one layer add up to
within 1e-4 nats at 51 tokens, those of latents of a poor autoencoder to within 2e-3; with 4 points to .03 and .1"""


@dataclass(frozen=True, eq=False)
class TokenCost:
    """What the explanations cost at one token, by neuron."""

    target: int
    """id of the token whose loss is measured"""
    plain: torch.Tensor
    """[V] log-probabilities of the token by the model"""
    explained: torch.Tensor
    """[V] log-probabilities of the token by the model on its explanations"""
    shares: Mapping[int, NDArray[np.float32]]
    """[T, H] nats by place, of the replaced layers that decide what the model computes"""
    true: Mapping[int, NDArray[np.float32]]
    """[T, H] the model's own codes, of the same places"""
    dropped: float
    """nats lost because autoencoders do not reconstruct everything, which no explanation can change; 0 for neurons"""

    @property
    def cost(self) -> float:
        """Return the loss on explanations minus the loss of the model, nats."""
        return float(self.plain[self.target] - self.explained[self.target])


def token_cost(
    model: ExplainedModel,
    ids: torch.Tensor,
    predicted: Codes,
    target: int | None = None,
    points: int = POINTS,
) -> TokenCost:
    """Return what explanations cost at the token after ids [1, T], by neuron.

    `predicted` are the codes [T, H] of all places that are replaced. `target` is the token that follows; None stands
    for the one that the model finds most likely.
    """
    trace = model.trace(ids)
    places = model.needed(tuple(sorted(predicted)))
    true = {p: trace.activations[p].detach().float() for p in places}
    change = {p: torch.from_numpy(predicted[p]).to(true[p])[None] - true[p] for p in places}

    def run(codes: Mapping[int, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return model.last_log_probabilities(trace, codes)[0].cpu()

    plain, explained = run({}), run({p: true[p] + change[p] for p in places})
    target = int(plain.argmax()) if target is None else target
    shares = {p: torch.zeros_like(true[p]) for p in places}
    at, weights = np.polynomial.legendre.leggauss(points)
    for x, weight in zip((at + 1) / 2, weights / 2, strict=True):
        codes = {p: (true[p] + float(x) * change[p]).requires_grad_() for p in places}
        loss = -model.last_log_probabilities(trace, codes)[0, target]
        for p, gradient in zip(
            places, torch.autograd.grad(loss, list(codes.values())), strict=True
        ):
            shares[p] += float(weight) * gradient * change[p]
    loses = bool(model.site.autoencoders) and not model.site.has_both_ends
    dropped = float(plain[target] - run(true)[target]) if loses else 0.0
    return TokenCost(
        target, plain, explained, {p: of[0].cpu().numpy() for p, of in shares.items()},
        {p: of[0].cpu().numpy() for p, of in true.items()}, dropped,
    )  # fmt: skip
