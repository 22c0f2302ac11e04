"""Which contexts should a trie of limited size keep, if the model shall lose few nats when it runs on it?

    python benchmarks/trie_growth.py --run runs/demo --models crate-2l gpt2-2l

Tries of the same total size are grown in four ways: by the squared error that a context removes (`trie:200`), with the
limit shared by the neurons of a layer (`trie:200@shared`), and both weighted by the curvature of the loss: the square of
the gradient of the loss with respect to the activation, where next tokens are drawn from the model itself (the diagonal
of the Fisher information), which makes the gain of a context a second-order estimate of the nats that it saves.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import figures
from torch.nn import functional as F

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.models.sites import hooked
from cratelm.records import Split
from cratelm.replace.exact import quantum_of
from cratelm.replace.fit import FitText
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.measure import HeldOut
from cratelm.replace.tables import ContextSums, Tables, Tries
from cratelm.replace.text import BatchText, predicted
from cratelm.runs import Run
from cratelm.runs.model_options import HarvestedModelOptions
from cratelm.runs.ranks import Share


def sums_of(
    opened: HarvestContext, text: FitText, seed: int
) -> tuple[list[ContextSums], list[ContextSums]]:
    """Return the sums of activations and of squared gradients at all contexts, by layer."""
    model, site = opened.subject.model, opened.site
    quantum = quantum_of(text.n_tokens, 1e3)
    of_codes, of_curvature = (
        [ContextSums(text.contexts, width, quantum) for width in site.n_neurons] for _ in range(2)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    codes: dict[int, torch.Tensor] = {}

    def watch(place: int, activations: torch.Tensor) -> torch.Tensor:
        if not activations.requires_grad:
            activations.requires_grad_(True)
        activations.retain_grad()
        codes[place] = activations
        return activations

    generator = torch.Generator().manual_seed(seed)
    for batch in text.plan.batches(text.batch_tokens, torch.device("cpu")):
        with hooked(model, site, watch):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
        of_batch = BatchText.of(batch)
        counted = torch.from_numpy(predicted(of_batch))
        rows = logits[counted]
        drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)
        F.cross_entropy(rows, drawn.flatten(), reduction="sum").backward()
        matched = of_batch.matched(text.contexts)
        for place, activations in codes.items():
            assert activations.grad is not None
            gradient = activations.grad.flatten(0, 1).numpy()
            of_codes[place].add(activations.detach().flatten(0, 1).numpy(), matched)
            of_curvature[place].add(gradient**2, matched)
    return of_codes, of_curvature


def loss_on(held_out: HeldOut, text: FitText, tries: Sequence[Tables | Tries]) -> float:
    """Return the loss of the model with all layers replaced, nats per held-out token."""
    total, n = 0.0, 0
    for batch, of_batch in held_out.batches(Share(), "run"):
        matched = of_batch.matched(text.contexts)
        codes = {place: of.predict(matched) for place, of in enumerate(tries)}
        losses = held_out.token_losses(held_out.model.trace(batch.input_ids), of_batch, codes)
        total, n = total + losses.sum(), n + len(losses)
    return total / n


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--fit-tokens", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--entries", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for model in options.models:
        opened = open_harvested(Run(options.run), model, HarvestedModelOptions(device="cpu"))

        def plan(split: Split, tokens: int, opened: HarvestContext = opened) -> SearchPlan:
            store = opened.store
            return SearchPlan.of(
                store.split(split),
                split,
                store.eot_id,
                opened.sequence_length,
                tokens,
                options.seed,
            )

        vocabulary = opened.store.vocab_size
        text = FitText.of(plan("fit", options.fit_tokens), 4096, 4, vocabulary)
        held_out = HeldOut(
            ExplainedModel(opened.subject.model, opened.site),
            plan("held_out", options.tokens), 4096, vocabulary, quiet=True,
        )  # fmt: skip
        of_codes, of_curvature = sums_of(opened, text, options.seed)
        fitted = [sums.tables() for sums in of_codes]
        curvature = [sums.tables().totals[:-1].astype(np.float32) for sums in of_curvature]
        whole = loss_on(held_out, text, [of.tables for of in fitted])
        print(f"{model}: loss {whole:.3f} on all {len(text.contexts):,} contexts")
        for most in options.entries:
            losses = {
                f"{by}{', shared' if shared else ''}": loss_on(
                    held_out,
                    text,
                    [
                        of.pruned(most, weights if by == "curvature" else None, shared=shared)
                        for of, weights in zip(fitted, curvature, strict=True)
                    ],
                )
                for by in ("squared error", "curvature")
                for shared in (False, True)
            }
            shown = "; ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"  {most} entries per neuron: {shown}", flush=True)
            figures(model=model, entries=most, losses=losses, whole=whole)


if __name__ == "__main__":
    main()
