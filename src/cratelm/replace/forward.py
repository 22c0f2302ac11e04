"""Run a model in which explanations take the place of the codes of some layers, and measure its loss.

The hook of a replaced layer ignores the activations that the model computed: it returns what the explanations predict
from the tokens. For latents of autoencoders, their decoded predictions take the place of the activations below them, and
what the autoencoder cannot reconstruct is dropped, because it would carry activations past the explanations.

In some models nothing passes round the codes of a layer: what its block returns is a function of them alone, as in CRATE
without a residual. Then no block up to that one need run, and whatever is replaced below it does not matter. This is
measured on each layer, not assumed. In other models the blocks before the first replaced layer return what one plain
pass stored (`cratelm.models.partial_forward`), and so do the modules before its site; modules that only compute activations
which are replaced do not run (`cratelm.replace.prefix`). The plain pass stores the output of each block, and of each of these
modules, which are three in CRATE and GPT-2: 16 D bytes per token and layer.

Half of the time of such a pass is the head. So logits are computed for a few rows at a time, and where the hidden states
are a function of the last replaced codes, for each different row of codes once: the last token decides the row of a
look-up table, and one row serves all tokens whose codes are at their means.

Shape legend: B sequences of T tokens, n = B * T, G different rows of codes, H neurons of a layer, D width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.models.partial_forward import PartialForward, Trace, next_logits, plain_head
from cratelm.models.sites import Site, hooked
from cratelm.replace.prefix import Prefix
from cratelm.steer.ablation import token_losses
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.train.head_loss import row_losses, rows_per_chunk

Codes = Mapping[int, NDArray[np.float32]]
"""predicted activations [n, H] by place of the site"""
_STORED_SCALES = ("layer_norm", "constant_norm_rescale")
"""normalisations of SAELens whose decoding depends on the activations that were encoded last"""


class ExplainedModel:
    """A model that can run with some of its codes replaced.

    Raises `InputError` for autoencoders that scale what they decode by the activations that they encoded.
    """

    def __init__(self, model: Any, site: Site, beginning: Beginning = PLAIN):
        """`beginning`: how sequences begin; begin tokens and first tokens that are left out keep their own codes."""
        self.model, self.site, self.beginning = model, site, beginning
        self._below = replace(site, autoencoders=())
        _check_scales(site)
        self._partial: PartialForward | None = None
        with contextlib.suppress(InputError):  # a site outside numbered blocks: whole passes
            self._partial = PartialForward(model, self._below)
        self._head = plain_head(model)
        self.passes_nothing = [self._passes_nothing(p) for p in range(site.n_layers)]
        """by place: whether its block returns a function of the codes alone"""
        self._prefixes: list[Prefix] = []
        self._prefixes = self._checked_prefixes()

    @torch.no_grad()
    def trace(self, ids: torch.Tensor) -> Trace:
        """Run one plain pass over ids [B, T], and return the block outputs and codes [B, T, H] of each place."""
        if self._partial is not None:
            before: dict[int, list[Any]] = {place: [] for place in range(len(self._prefixes))}
            with contextlib.ExitStack() as stack:
                for prefix, outputs in zip(self._prefixes, before.values(), strict=True):
                    stack.enter_context(prefix.recorded(outputs))
                trace = self._partial.trace(ids)
            codes = [self._encoded(place, a) for place, a in enumerate(trace.activations)]
            return Trace(ids, trace.outputs, codes, before)
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
        self,
        trace: Trace,
        codes: Codes,
        mixed: Mapping[int, torch.Tensor] | None = None,
        only: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss [B, T - 1] of every next token in nats, with `codes` in place of those of the model.

        `mixed` has by place the neurons [H] that are replaced (default: all); the others keep what the model computes.
        Without codes it is the loss of the model. `only` [B, T - 1] are the tokens that are wanted (default: all); the
        losses of others may be NaN.
        """
        ids = trace.ids
        if not mixed and self._is_function_of_codes(codes):
            return self._losses_of_rows(ids, *codes.items())  # of one place
        with self._running(trace, _shaped(codes, ids), mixed or {}):
            if self._head is None:
                logits = next_logits(self.model, ids, ids.shape[1])
                return token_losses(logits[:, :-1].float(), ids[:, 1:])
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)
        if only is None or only.all():
            return self._head_losses(hidden, ids)
        assert self._head is not None
        wanted, losses = (
            only.flatten(),
            hidden.new_full(only.shape, float("nan"), dtype=torch.float),
        )
        losses[only] = row_losses(hidden[wanted].float(), self._head, ids[:, 1:].flatten()[wanted])
        return losses

    @torch.no_grad()
    def log_probabilities(self, trace: Trace, codes: Codes) -> Iterator[torch.Tensor]:
        """Yield the log-probabilities [rows, V] of every next token with `codes` in place of those of the model.

        The rows are the B * T tokens of the trace in order, as many at a time whatever the codes are.
        """
        ids, head = trace.ids, self._head
        with self._running(trace, _shaped(codes, ids), {}):
            if head is None:
                rows = next_logits(self.model, ids, ids.shape[1]).flatten(0, 1)
            else:
                output = self.model.base_model(input_ids=ids, use_cache=False)
                rows = output.last_hidden_state.flatten(0, 1)
        step = len(rows)
        if head is not None:
            step = rows_per_chunk(len(rows), *reversed(head.shape), device=rows.device.type)
        for part in rows.float().split(step):
            yield (part if head is None else part @ head.T).log_softmax(-1)

    def last_log_probabilities(
        self, trace: Trace, codes: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Return the log-probabilities [B, V] after the last token, with codes [B, T, H] by place; they have gradients."""
        with self._running(trace, codes, {}):
            return next_logits(self.model, trace.ids, 1)[:, 0].float().log_softmax(-1)

    def _is_function_of_codes(self, codes: Codes) -> bool:
        """Return whether the hidden states after the last block are functions of these codes alone."""
        if self._head is None or self._partial is None or len(codes) != 1:
            return False
        if not self.beginning.is_plain:
            return False
        (place,) = codes
        return self.passes_nothing[place] and self._partial.is_last(place)

    def _losses_of_rows(
        self, ids: torch.Tensor, item: tuple[int, NDArray[np.float32]]
    ) -> torch.Tensor:
        """Return the losses [B, T - 1] if the codes [n, H] of the last place decide the hidden states."""
        assert self._partial is not None
        place, codes = item
        first, which = _different_rows(codes)
        rows = torch.from_numpy(np.ascontiguousarray(codes[first])).to(ids.device)
        writes = self._partial.writes[place]
        assert writes is not None
        decoded = self._decoded(place, rows.to(writes.dtype)) @ writes  # [G, D]
        # after the last block the model treats each token separately: rows are sequences of one token
        block = self._partial.block_numbers[place]
        alone = torch.zeros(len(rows), 1, dtype=torch.long, device=ids.device)
        with self._partial.replayed(block, decoded[:, None]):
            hidden = self.model.base_model(input_ids=alone, use_cache=False).last_hidden_state
        row_of = torch.from_numpy(which).to(ids.device).view(ids.shape)[:, :-1].flatten()
        return self._head_losses(hidden[:, 0], ids, row_of)

    def _head_losses(
        self, hidden: torch.Tensor, ids: torch.Tensor, row_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the losses [B, T - 1], from the hidden states [rows, D] and the row of each token (default: its own)."""
        head, targets = self._head, ids[:, 1:].flatten()
        assert head is not None
        return row_losses(hidden.float(), head, targets, row_of).view(ids.shape[0], -1)

    @contextlib.contextmanager
    def _running(
        self,
        trace: Trace,
        codes: Mapping[int, torch.Tensor],
        mixed: Mapping[int, torch.Tensor],
    ) -> Iterator[None]:
        """Replace codes [B, T, H] by place while open."""

        kept = self._kept(trace.ids)  # [B, T, 1]

        def whole(place: int, activations: torch.Tensor) -> torch.Tensor | None:
            if place not in codes:
                return None
            decoded = self._decoded(place, codes[place].to(activations.dtype))
            return decoded if kept is None else torch.where(kept, activations, decoded)

        def partly(place: int, activations: torch.Tensor) -> torch.Tensor | None:
            if place not in codes:
                return None
            own = self._encoded(place, activations)
            values = torch.where(mixed[place], codes[place].to(own.dtype), own)
            decoded = self._decoded(place, values)
            return decoded if kept is None else torch.where(kept, activations, decoded)

        with contextlib.ExitStack() as stack:
            stack.enter_context(hooked(self.model, self._below, partly if mixed else whole))
            if self._partial is not None and trace.outputs:
                is_whole = not mixed and kept is None
                block, hidden = self._begin(trace, codes, is_whole=is_whole)
                stack.enter_context(self._partial.replayed(block, hidden))
                for place in codes if self._prefixes else ():
                    prefix, of = self._prefixes[place], self._partial.block_numbers[place]
                    if of == block + 1:
                        stack.enter_context(prefix.replayed(trace.before[place]))
                    if of > block and is_whole:
                        stack.enter_context(prefix.skipped(trace.outputs[of]))
            yield

    def _kept(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Return which tokens of ids [B, T] keep their own codes, [B, T, 1] bool; None for none.

        What the model does at a begin token holds its attention, and no explanation is about it.
        """
        begin = self.beginning
        if begin.is_plain:
            return None
        kept = torch.zeros_like(ids, dtype=torch.bool)
        kept[:, : begin.extra + begin.skip] = True
        return kept[..., None]

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
    def _checked_prefixes(self) -> list[Prefix]:
        """Return the prefix of each place, or none if the losses with and without them differ on random tokens."""
        partial = self._partial
        if partial is None:
            return []
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(vocabulary, (1, 6), generator=generator).to(self.model.device)
        ids = ids.repeat(2, 1)  # two rows of the same tokens, with codes of their own
        prefixes = [
            Prefix.of(self.model, self._below, p, partial.blocks[partial.block_numbers[p]], ids[:1])
            for p in range(self.site.n_layers)
        ]
        trace = self.trace(ids)
        codes = {
            p: torch.cat([0.5 * a[0], 0.3 * a[1]]).float().cpu().numpy()
            for p, a in enumerate(trace.activations)
        }
        sets = [codes, *({p: of} for p, of in codes.items())]
        expected = [self.losses(trace, of) for of in sets]
        self._prefixes = prefixes
        try:
            trace = self.trace(ids)
            found = [self.losses(trace, of) for of in sets]
        except (RuntimeError, TypeError, ValueError):  # of a module that is called in another way
            return []
        near = (
            torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(expected, found, strict=True)
        )
        return prefixes if all(near) else []

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


def _shaped(codes: Codes, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return codes [n, H] as tensors [B, T, H] on the device of ids [B, T]."""
    return {
        place: torch.from_numpy(np.ascontiguousarray(of)).to(ids.device).view(*ids.shape, -1)
        for place, of in codes.items()
    }


def _different_rows(codes: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one row [G] for each different row of codes [n, H], and which of them each row is, [n].

    Rows are compared by a random projection, and then once as they are: sorting whole rows takes a hundred times as long.
    """
    projected = codes @ np.random.default_rng(0).normal(size=codes.shape[1])
    _, first, which = np.unique(projected, return_index=True, return_inverse=True)
    if (codes[first[which]] == codes).all():
        return first, which
    return np.arange(len(codes)), np.arange(len(codes))


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
