"""Build SAELens' trainable autoencoders under cratelm's names, and revive their dead latents.

SAELens sums squared errors over the H inputs. cratelm's coefficients are relative to the mean squared error, so
that they mean the same at every width; they are multiplied by H here.

Dead latents are revived by SAELens' auxiliary loss in `topk` and `batchtopk` (Gao et al. 2024, appendix A.2),
by its loss on the pre-activations of dead latents in `jumprelu`, and by resampling in `l1` and `gated`
(Bricken et al. 2023, "Towards Monosemanticity", appendix).

Shape legend: B tokens of a batch, H inputs, S latents, n dead latents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cratelm.errors import InputError
from cratelm.models.sae_lens import import_sae_lens
from cratelm.runs import check_memory
from cratelm.runs.devices import available_on
from cratelm.sae.train_config import L0_COEFFICIENT, L1, K, SaeTrainConfig

RESAMPLED = ("l1", "gated")
"""architectures whose dead latents are reinitialised during training"""
_RESAMPLE_AT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""fractions of the steps after which dead latents are reinitialised, as in Bricken et al.: every 25,000 of
200,000 steps, in the first half"""
_RESAMPLED_NORM = 0.2
"""norm of a new encoder column, relative to the mean norm of those that are not dead (Bricken et al.)"""
SOFT_COSINE = 0.8
"""least cosine of a soft-frozen decoder's row to its start (Korznikov et al. 2026)"""
_WARM_UP = 20
"""the sparsity coefficient rises from 0 over 1 / `_WARM_UP` of the steps"""
_PRE_ACTIVATION_LOSS = 3e-6
"""coefficient of the loss on dead latents in jumprelu, as in SAELens' version of Anthropic's setup"""


def build_sae(config: SaeTrainConfig, d_in: int, layer: int, device: torch.device) -> Any:
    """Return SAELens' `TrainingSAE` for H = `d_in`, with initial weights that depend on seed and layer only."""
    lens = import_sae_lens()
    name, kind = _KINDS[config.architecture]
    common = {
        "d_in": d_in,
        "d_sae": n_latents(config, d_in),
        "device": str(device),
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in" if config.normalize else "none",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence((config.seed, layer)).generate_state(1)[0]))
        settings = getattr(lens, f"{name}Config")(**common, **kind(config, d_in))
        return getattr(lens, name)(settings).to(device)


def check_training_memory(
    config: SaeTrainConfig, widths: Sequence[int], device: torch.device
) -> None:
    """Raise `InputError` if the autoencoders of layers with `widths` inputs, or their batches, do not fit into memory.

    Each weight has a gradient and two moments of Adam, and the encoder and the decoder have one each.
    """
    sizes = "expansion" if config.d_sae is None else "d_sae"
    rows = max(config.batch_tokens, 2 * min(config.batch_size, config.steps * config.batch_size))
    buffered = min(config.buffer_mib * 2**20, 4 * config.tokens * sum(widths))
    check_memory(
        config,
        {
            sizes: sum(4 * 4 * 2 * width * n_latents(config, width) for width in widths),
            ("batch_size", "batch_tokens"): 4 * rows * sum(widths),
            "buffer_mib": buffered,
        },
        f"{len(widths)} autoencoders",
        available=available_on(device),
    )


def n_latents(config: SaeTrainConfig, d_in: int) -> int:
    """Return the number of latents S for `d_in` inputs; raise `InputError` if `--k` exceeds it."""
    latents = config.d_sae if config.d_sae is not None else config.expansion * d_in
    if config.architecture in ("topk", "batchtopk") and (config.k or K) > latents:
        raise InputError(
            f"--k is {config.k or K}, but the autoencoder has only {latents} latents: lower --k, or raise"
            " --expansion"
        )
    return latents


def _l1(config: SaeTrainConfig, d_in: int) -> dict[str, Any]:
    return {**_gated(config, d_in), "decoder_init_norm": 1.0}


def _gated(config: SaeTrainConfig, d_in: int) -> dict[str, Any]:
    weight = L1 if config.l1 is None else config.l1
    return {"l1_coefficient": weight * d_in, "l1_warm_up_steps": config.steps // _WARM_UP}


def _topk(config: SaeTrainConfig, d_in: int) -> dict[str, Any]:
    return {"k": config.k or K}


def _jumprelu(config: SaeTrainConfig, d_in: int) -> dict[str, Any]:
    weight = L0_COEFFICIENT if config.l0_coefficient is None else config.l0_coefficient
    return {
        "l0_coefficient": weight * d_in,
        "l0_warm_up_steps": config.steps // _WARM_UP,
        "pre_act_loss_coefficient": _PRE_ACTIVATION_LOSS,
    }


_KINDS = {
    "l1": ("StandardTrainingSAE", _l1),
    "topk": ("TopKTrainingSAE", _topk),
    "batchtopk": ("BatchTopKTrainingSAE", _topk),
    "jumprelu": ("JumpReLUTrainingSAE", _jumprelu),
    "gated": ("GatedTrainingSAE", _gated),
}
"""by architecture: SAELens' class, and the function that returns its settings other than the shape"""


def keep_rows_at_norm_one(sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Normalise the decoder's rows to norm 1 after every further step of the optimizer.

    The component of the gradient along a row is removed before the step, so that Adam's moments do not
    accumulate a component that the projection removes (Bricken et al. 2023).
    """

    def before(*_: Any) -> None:
        rows, gradient = sae.W_dec.detach(), sae.W_dec.grad  # [S, H] each
        gradient -= (gradient * rows).sum(1, keepdim=True) * rows

    def after(*_: Any) -> None:
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def freeze_matrix(config: SaeTrainConfig, sae: Any) -> None:
    """Exclude the matrix that `config.freeze` names from training, before the optimizer is made."""
    if config.freeze == "decoder":
        sae.W_dec.requires_grad_(False)
    if config.freeze == "encoder":
        sae.W_enc.requires_grad_(False)


def keep_rows_near_start(sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Keep the cosine of each decoder row to its present direction at `SOFT_COSINE` or above, in every further step.

    After a step of the optimizer, a row w that has left the cone around its start u, |u| = 1, is projected on
    it: with c = `SOFT_COSINE` and the part of w across u, r = w - (w.u) u,

        w <- |w| (c u + sqrt(1 - c^2) r / |r|)    if w.u < c |w|

    which is the nearest direction on the cone, at the same norm. The bound is that of the soft-frozen decoder of
    Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders" (arXiv 2602.14111).
    """
    start = sae.W_dec.detach().clone()  # [S, H]
    start /= start.norm(dim=1, keepdim=True)

    def after(*_: Any) -> None:
        with torch.no_grad():
            project_to_cone(sae.W_dec, start)

    optimizer.register_step_post_hook(after)


def project_to_cone(rows: torch.Tensor, start: torch.Tensor) -> None:
    """Project rows [S, H] on the cones around the unit vectors start [S, H], in place (`keep_rows_near_start`)."""
    norms = rows.norm(dim=1, keepdim=True)  # [S, 1]
    along = (rows * start).sum(1, keepdim=True)
    across = rows - along * start
    across /= across.norm(dim=1, keepdim=True).clamp_min(1e-12)
    edge = norms * (SOFT_COSINE * start + (1 - SOFT_COSINE**2) ** 0.5 * across)
    rows.copy_(torch.where(along < SOFT_COSINE * norms, edge, rows))


def revived_by(config: SaeTrainConfig) -> str:
    """Return the method that revives dead latents, as `sae.json` names it."""
    if config.architecture not in RESAMPLED:
        return "auxiliary loss"
    return "nothing" if config.freeze else "resampling"


def resampling_steps(config: SaeTrainConfig) -> set[int]:
    """Return the steps after which dead latents are reinitialised.

    None for architectures with a loss instead, nor for a random control, whose weights it would replace by
    directions of the data.
    """
    if config.architecture not in RESAMPLED or config.freeze:
        return set()
    return {int(fraction * config.steps) for fraction in _RESAMPLE_AT}


@torch.no_grad()
def resample(trainer: Any, batch: torch.Tensor, generator: torch.Generator) -> int:
    """Reinitialise the dead latents of SAELens' trainer from badly reconstructed inputs; return their number.

    Inputs are drawn from a batch [B, H] with probability proportional to the square of their squared error.
    The decoder row and encoder column are set to the direction from `b_dec` to the input; biases and Adam's
    moments are set to 0.
    """
    sae, dead = trainer.sae, trainer.dead_neurons.nonzero()[:, 0]  # [n]
    if not len(dead):
        return 0
    x = trainer.activation_scaler(batch)
    errors = (sae(x) - x).pow(2).sum(-1).double().cpu()  # [B]
    drawn = torch.multinomial(errors.square(), len(dead), replacement=True, generator=generator)
    away = x[drawn.to(x.device)] - sae.b_dec  # [n, H]
    directions = away / away.norm(dim=1, keepdim=True).clamp_min(1e-8)
    alive = ~trainer.dead_neurons
    columns = sae.W_enc[
        :, alive if alive.any() else ~alive
    ]  # [H, alive]; all columns if none is alive
    row_norm = sae.W_dec.norm(dim=1).mean()
    sae.W_dec[dead] = directions * row_norm
    sae.W_enc[:, dead] = directions.T * columns.norm(dim=0).mean() * _RESAMPLED_NORM
    for name, parameter in sae.named_parameters():
        if (
            parameter.dim() == 1 and name != "b_dec"
        ):  # one entry per latent; b_dec has one per input
            parameter[dead] = 0
        if name != "b_dec":
            # latents are along axis 1 of W_enc [H, S], along axis 0 of W_dec [S, H] and of biases [S]
            _clear_moments(trainer.optimizer.state[parameter], dead, int(name == "W_enc"))
    trainer.n_forward_passes_since_fired[dead] = 0
    return len(dead)


def _clear_moments(state: dict[str, torch.Tensor], dead: torch.Tensor, axis: int) -> None:
    """Set Adam's two moments to 0 for the latents `dead` along an axis."""
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].index_fill_(axis, dead, 0)
