"""Run a model in which explanations take the place of the codes of some layers, and measure its loss.

The hook of a replaced layer ignores the activations that the model computed: it returns what the explanations predict
from the tokens. For latents of autoencoders, their decoded predictions take the place of the activations below them, and
what the autoencoder cannot reconstruct is dropped, because it would carry activations past the explanations.

In some models nothing passes round the codes of a layer: what its block returns is a function of them alone, as in CRATE
without a residual. Then no block up to that one need run, and whatever is replaced below it does not matter. This is
measured on each layer, not assumed. In other models the blocks before the first replaced layer return what one plain
pass stored (`cratelm.models.partial_forward`).

Shape legend: B sequences of T tokens, n = B * T, H neurons of a layer, D width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.models.partial_forward import PartialForward, Trace, next_logits
from cratelm.models.sites import Site, hooked
from cratelm.steer.ablation import token_losses

Codes = Mapping[int, NDArray[np.float32]]
"""predicted activations [n, H] by place of the site"""
_STORED_SCALES = ("layer_norm", "constant_norm_rescale")
"""normalisations of SAELens whose decoding depends on the activations that were encoded last"""


class ExplainedModel:
    """A model that can run with some of its codes replaced.

    Raises `InputError` for autoencoders that scale what they decode by the activations that they encoded.
    """

    def __init__(self, model: Any, site: Site):
        self.model, self.site = model, site
        self._below = replace(site, autoencoders=())
        _check_scales(site)
        self._partial: PartialForward | None = None
        with contextlib.suppress(InputError):  # a site outside numbered blocks: whole passes
            self._partial = PartialForward(model, self._below)
        self.passes_nothing = [self._passes_nothing(p) for p in range(site.n_layers)]
        """by place: whether its block returns a function of the codes alone"""

    @torch.no_grad()
    def trace(self, ids: torch.Tensor) -> Trace:
        """Run one plain pass over ids [B, T], and return the block outputs and codes [B, T, H] of each place."""
        if self._partial is not None:
            trace = self._partial.trace(ids)
            codes = [self._encoded(place, a) for place, a in enumerate(trace.activations)]
            return Trace(ids, trace.outputs, codes)
        codes: list[torch.Tensor] = []
        with hooked(self.model, self.site, lambda _, a: codes.append(a)):
            self.model.base_model(input_ids=ids, use_cache=False)
        return Trace(ids, {}, codes)

    def needed(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Return the places whose replacement decides what the model computes, of those that are replaced."""
        cut = max((p for p in places if self.passes_nothing[p]), default=0)
        return tuple(p for p in places if p >= cut)

    @torch.no_grad()
    def losses(
        self, trace: Trace, codes: Codes, mixed: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the loss [B, T - 1] of every next token in nats, with `codes` in place of those of the model.

        `mixed` has by place the neurons [H] that are replaced (default: all); the others keep what the model computes.
        Without codes it is the loss of the model.
        """
        ids, length = trace.ids, trace.ids.shape[1]
        shaped = {
            place: torch.from_numpy(np.ascontiguousarray(of)).to(ids.device).view(*ids.shape, -1)
            for place, of in codes.items()
        }
        with self._running(trace, shaped, mixed or {}):
            logits = next_logits(self.model, ids, length)
        return token_losses(logits[:, :-1].float(), ids[:, 1:])

    @contextlib.contextmanager
    def _running(
        self,
        trace: Trace,
        codes: Mapping[int, torch.Tensor],
        mixed: Mapping[int, torch.Tensor],
    ) -> Iterator[None]:
        """Replace codes [B, T, H] by place while open."""

        def whole(place: int, activations: torch.Tensor) -> torch.Tensor | None:
            if place not in codes:
                return None
            return self._decoded(place, codes[place].to(activations.dtype))

        def partly(place: int, activations: torch.Tensor) -> torch.Tensor | None:
            if place not in codes:
                return None
            own = self._encoded(place, activations)
            return self._decoded(place, torch.where(mixed[place], codes[place].to(own.dtype), own))

        with contextlib.ExitStack() as stack:
            stack.enter_context(hooked(self.model, self._below, partly if mixed else whole))
            if self._partial is not None and trace.outputs:
                block, hidden = self._begin(trace, codes, is_whole=not mixed)
                stack.enter_context(self._partial.replayed(block, hidden))
            yield

    def _begin(
        self, trace: Trace, codes: Mapping[int, torch.Tensor], *, is_whole: bool
    ) -> tuple[int, torch.Tensor | None]:
        """Return the last block that need not run, and what it returns; block -1 if all must run."""
        assert self._partial is not None
        if not codes:
            last = max(trace.outputs)
            return last, trace.outputs[last]
        first, writes = min(codes), self._partial.writes[min(codes)]
        block = self._partial.block_numbers[first]
        if is_whole and self.passes_nothing[first] and writes is not None:
            decoded = self._decoded(first, codes[first].to(writes.dtype))
            return block, decoded @ writes
        return block - 1, trace.outputs[block - 1] if block else None

    def _encoded(self, place: int, activations: torch.Tensor) -> torch.Tensor:
        saes = self.site.autoencoders
        return saes[place].encode(activations) if saes else activations

    def _decoded(self, place: int, codes: torch.Tensor) -> torch.Tensor:
        saes = self.site.autoencoders
        return saes[place].decode(codes) if saes else codes

    @torch.no_grad()
    def _passes_nothing(self, place: int) -> bool:
        """Return whether the block of a place returns a constant linear function of the activations at the site alone.

        This is checked on 6 random tokens, with the activations that the site has on them.
        """
        partial = self._partial
        writes = partial.writes[place] if partial is not None else None
        if partial is None or writes is None:
            return False
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(place)
        ids = torch.randint(vocabulary, (1, 6), generator=generator).to(writes.device)
        trace = partial.trace(ids)
        output = trace.outputs[partial.block_numbers[place]]
        expected = trace.activations[place] @ writes
        return bool(torch.allclose(output, expected, rtol=1e-4, atol=1e-5))


def _check_scales(site: Site) -> None:
    for autoencoder in site.autoencoders:
        cfg = getattr(autoencoder, "cfg", None)
        scale = getattr(cfg, "normalize_activations", "none")
        if scale in _STORED_SCALES:
            raise InputError(
                f"these autoencoders scale what they decode by the activations that they read"
                f" (normalize_activations is {scale!r}), so that no explanation can take the place of their"
                " latents: name autoencoders without that, or the neurons of the model"
            )
