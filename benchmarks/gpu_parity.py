"""Part of `gpu.sh`: the device computes what the CPU computes.

Losses and gradients of small models, every way through ISTA, and the chunked loss. The reference is fp32 on the CPU
with the same weights and tokens. An error is ||device - reference|| / ||reference||, for gradients over all weights
together. The limits leave room for another order of summation (fp32), and for 8 bits of precision (bf16).

Shape legend: B sequences, T tokens of a sequence, V vocabulary.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu_part import Figures, PartOptions
from torch.nn import functional as F
from train_step import PlainIsta

from cratelm.models import build, capture, site_of
from cratelm.train.losses import NextTokenLoss


@dataclass(frozen=True)
class Limits:
    """Largest errors that count as agreement."""

    loss: float
    gradients: float


FP32 = Limits(1e-5, 1e-4)
"""on a CPU, the chunked loss and the five products differ from the plain forms by up to 5e-7"""
BF16 = Limits(1e-3, 6e-2)
"""on a CPU, bf16 differs from fp32 by up to 8e-5 in these losses and 3.2e-2 in the gradients"""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "crate-2l": ("crate-2l", {}),
    "gpt2-2l": ("gpt2-2l", {}),
    "crate-1l, one ISTA step": ("crate-1l", {"ista_steps": 1}),
    "crate-1l, three ISTA steps": ("crate-1l", {"ista_steps": 3}),
    "crate-1l, ISTA with residual": ("crate-1l", {"ista_residual": True}),
    "crate-1l, second dictionary": ("crate-1l", {"decoupled_dictionary": True}),
}


def measure(options: PartOptions, figures: Figures) -> None:
    """Record for each comparison its errors, its limits, and whether it agrees."""
    vocab, shape = (300, (2, 16)) if options.tiny else (4096, (4, 256))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    for name, (size, fields) in MODELS.items():
        model: Any = build(size, vocab_size=vocab, max_position_embeddings=shape[1], **fields)
        on_device = copy.deepcopy(model).to(options.device)
        reference = loss_and_gradients(model, tokens, bf16=False)
        for precision, limits in (("fp32", FP32), ("bf16", BF16)):
            found = loss_and_gradients(on_device, tokens, bf16=precision == "bf16")
            figures.record(f"{name}, {precision}", compared(found, reference, limits))
    figures.record("neurons of crate-2l", neurons(vocab, tokens, options.device))
    figures.record("five products against four", products(tokens, options.device))
    figures.record("chunked loss against plain", chunked_loss(options))


def loss_and_gradients(
    model: Any, tokens: torch.Tensor, *, bf16: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of tokens [B, T + 1], and the gradient of each weight, on the CPU in fp32."""
    tokens = tokens.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = NextTokenLoss(model)(tokens[:, :-1], tokens[:, 1:])
    return _gradients(model, loss)


def _gradients(model: Any, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    named = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), named


def compared(
    found: tuple[float, dict[str, torch.Tensor]],
    reference: tuple[float, dict[str, torch.Tensor]],
    limits: Limits,
) -> dict[str, Any]:
    """Return the errors of a loss and its gradients as a record, with the weight that has the largest."""
    loss_error = abs(found[0] - reference[0]) / abs(reference[0])
    assert found[1].keys() == reference[1].keys(), "the two have gradients of other weights"
    errors = {n: relative_error(found[1][n], g) for n, g in reference[1].items()}
    difference = sum(
        float((found[1][n] - g).double().square().sum()) for n, g in reference[1].items()
    )
    size = sum(float(g.double().square().sum()) for g in reference[1].values())
    gradients = math.sqrt(difference / size)
    worst = max(errors, key=lambda n: errors[n])
    return {
        "loss": found[0],
        "reference_loss": reference[0],
        "loss_error": loss_error,
        "gradient_error": gradients,
        "worst_weight": worst,
        "worst_weight_error": errors[worst],
        "limits": asdict(limits),
        "agrees": loss_error <= limits.loss and gradients <= limits.gradients,  # not if it is NaN
    }


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||found - reference|| / ||reference||, infinity if only the reference is 0."""
    found, reference = found.double().cpu(), reference.double().cpu()
    difference, size = float((found - reference).norm()), float(reference.norm())
    return difference / size if size else math.inf * difference if difference else 0.0


def neurons(vocab: int, tokens: torch.Tensor, device: str) -> dict[str, Any]:
    """Return how the activations of every layer, as the harvest reads them, agree with the CPU's."""
    model: Any = build("crate-2l", vocab_size=vocab, max_position_embeddings=tokens.shape[1]).eval()
    site = site_of(model)
    reference = capture(model, site, tokens)
    on_device = capture(model.to(device), site, tokens.to(device))
    errors = [relative_error(a, b) for a, b in zip(on_device, reference, strict=True)]
    alike = [
        float(((a.cpu() > 0) == (b > 0)).float().mean())
        for a, b in zip(on_device, reference, strict=True)
    ]
    return {
        "error": max(errors),
        "same_neurons_fire": min(alike),
        "limits": {"error": FP32.gradients},
        "agrees": max(errors) <= FP32.gradients,
    }


def products(tokens: torch.Tensor, device: str) -> dict[str, Any]:
    """Return how cratelm's ISTA agrees with the five-product form, on the device."""
    model: Any = build("crate-1l", vocab_size=64)
    ista = model.model.layers[0].ista.to(device)
    plain = PlainIsta(model.config).to(device)
    plain.load_state_dict(ista.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*tokens.shape, model.config.hidden_size, generator=generator).to(device)
    with torch.no_grad():
        error = relative_error(ista.encode(x), plain.encode(x))
    limit = FP32.gradients
    return {"error": error, "limits": {"error": limit}, "agrees": error <= limit}


def chunked_loss(options: PartOptions) -> dict[str, Any]:
    """Return how the loss in fp32, chunked where torch has that, agrees with the plain one on the device."""
    vocab, shape = (1000, (2, 17)) if options.tiny else (50304, (4, 513))
    model: Any = build("crate-1l", vocab_size=vocab, max_position_embeddings=shape[1])
    model = model.to(options.device)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocab, shape, generator=generator).to(options.device)
    found = loss_and_gradients(model, tokens, bf16=False)
    logits = model(tokens[:, :-1], use_cache=False).logits  # [B, T, V]
    plain = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    record = compared(found, _gradients(model, plain), FP32)
    return {**record, "torch_has_the_chunked_form": hasattr(torch.nn, "LinearCrossEntropyOptions")}
