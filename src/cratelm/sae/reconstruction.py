"""Sums by document of what autoencoders rebuild, and of the loss with it in the place of activations.

Two passes over the tokens. The first, without the head, gives each layer's mean activation and its
autoencoder's L0; the second the rest. Only text is replaced: end marks keep their activations, which
no autoencoder has seen. Loss is counted at every token but the first of a sequence.

Memory: a few numbers a document and a latent, and the logits of one forward pass.

Shape legend: b sequences of a forward pass, T tokens of a sequence, n text tokens of a forward pass,
H inputs, S latents, C documents, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.errors import InputError
from cratelm.models.sites import Site, hooked
from cratelm.sae.activations import check_finite

KINDS = ("zero", "mean", "reconstruction", "own_top", "own")
"""what takes the place of the activations: 0, their mean, what the autoencoder makes of them, the
strongest of themselves, as many as the autoencoder has latents on, and all of themselves"""
_NONE = -100
"""a target that is not counted"""
MOST_LOGITS = 2**28
"""1 GiB at 32 bit"""
Float = NDArray[np.float64]
Replace = Callable[[torch.Tensor], torch.Tensor]
"""activations of text [n, H] -> what takes their place [n, H]"""
ReplaceKnown = Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor]
"""the same, told the documents [n] of the tokens"""


@dataclass(eq=False)
class Firing:
    """In which documents each latent fired: what a jackknife over documents needs to know."""

    documents: NDArray[np.int64]
    """[S] documents in which it fired"""
    last: NDArray[np.int64]
    """[S] the last of them, -1 for none"""

    @classmethod
    def of(cls, latents: int) -> "Firing":
        return cls(np.zeros(latents, np.int64), np.full(latents, -1, np.int64))

    def add(self, fired: NDArray[np.bool_], document: int) -> None:
        """Latents that fired [S] somewhere in a document; documents come in ascending order."""
        new = fired & (self.last != document)
        self.documents += new
        self.last[new] = document


@dataclass(eq=False)
class Sums:
    """Sums over the tokens of each document [C], by name."""

    documents: NDArray[np.int64]
    """[C] places in the split's list of documents, ascending"""
    by_name: dict[Any, Float] = field(default_factory=dict)

    def add(self, name: Any, documents: NDArray[np.int64], values: torch.Tensor | float) -> None:
        """Values [m], or one for all, of tokens whose documents are given [m]."""
        rows = np.searchsorted(self.documents, documents)
        weights = values.double().cpu().numpy() if isinstance(values, torch.Tensor) else values
        np.add.at(self.by_name.setdefault(name, np.zeros(len(self.documents))), rows, weights)

    def __getitem__(self, name: Any) -> Float:
        return self.by_name[name]


@dataclass(frozen=True, eq=False)
class Measured:
    """All sums. Names: `targets`, `text`, `loss`, (place, figure), (places, kind)."""

    sums: Sums
    firing: list[Firing]
    """by place"""
    kept: list[int]
    """own activations kept at a token, by place: the autoencoder's L0, rounded, at least 1"""
    groups: tuple[tuple[int, ...], ...]
    """places that were replaced at once: each alone, then all together where there are several"""


def measure(
    model: PreTrainedModel, latents: Site, plan: SearchPlan, batch_tokens: int, *, quiet: bool
) -> Measured:
    """Everything about the autoencoders of a site of latents, on the tokens of a plan.

    Raises `InputError` where an activation or a loss is not a finite number.
    """
    saes = latents.autoencoders
    site = replace(latents, autoencoders=())  # the activations below
    vocabulary = model.config.get_text_config().vocab_size
    batch_tokens = min(batch_tokens, max(1, MOST_LOGITS // vocabulary))
    places = tuple(range(len(saes)))
    groups = (*((place,) for place in places), *((places,) if len(places) > 1 else ()))
    sums = Sums(_documents(plan))
    total = plan.n_tokens() * (2 + len(groups) * len(KINDS))
    bar = tqdm(total=total, desc="sae evaluate", unit="tok", unit_scale=True, disable=quiet)
    with torch.no_grad(), bar:
        first = _First(site, saes)
        for batch in plan.batches(batch_tokens, model.device):
            first.add(model, batch)
            bar.update(batch.input_ids.numel())
        kept = [max(1, round(on / first.n_text)) for on in first.on]
        means = [(first.total[place] / first.n_text).float() for place in places]
        rebuilding = [Rebuilding(saes[place], place, means[place], sums) for place in places]
        for batch in plan.batches(batch_tokens, model.device):
            documents = _document_of(plan, batch)
            sums.add("text", documents[text_of(batch).cpu().numpy().ravel()], 1.0)
            for variant in _variants(groups, rebuilding, kept):
                _add_losses(model, site, batch, documents, variant, sums)
                bar.update(batch.input_ids.numel())
    return Measured(sums, [found.firing for found in rebuilding], kept, groups)


class _First:
    """The first pass: total activation [H] and latents on, of each place."""

    def __init__(self, site: Site, saes: Sequence[Any]):
        self.site, self.saes, self.n_text = site, saes, 0
        self.total: dict[int, torch.Tensor] = {}
        self.on = [0] * len(saes)

    def add(self, model: PreTrainedModel, batch: Batch) -> None:
        text = text_of(batch)
        self.n_text += int(text.sum())

        def see(place: int, activations: torch.Tensor) -> None:
            check_finite(activations, self.site, self.site.layer_numbers[place])
            x = activations.float()[text]  # [n, H]
            self.total[place] = self.total.get(place, 0) + x.sum(0)
            self.on[place] += int((self.saes[place].encode(x) != 0).sum())

        with hooked(model, self.site, see):
            model.base_model(input_ids=batch.input_ids, use_cache=False)


class Rebuilding:
    """Reconstructions at one place, and sums about them."""

    def __init__(self, sae: Any, place: int, mean: torch.Tensor, sums: Sums):
        self.sae, self.place, self.mean, self.sums = sae, place, mean, sums
        self.firing = Firing.of(sae.cfg.d_sae)

    def rebuild(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, H]"""
        return self.sae.decode(self.sae.encode(x))

    def rebuild_and_count(self, x: torch.Tensor, documents: NDArray[np.int64]) -> torch.Tensor:
        """The same, counted: documents [n] of the tokens."""
        latents = self.sae.encode(x)  # [n, S]
        y = self.sae.decode(latents)
        on = latents != 0
        figures = {
            "error": (x - y).pow(2).sum(1),
            "spread": (x - self.mean).pow(2).sum(1),
            "on": on.sum(1),
            "own_on": (x != 0).sum(1),
            "norm": x.norm(dim=1),
            "rebuilt_norm": y.norm(dim=1),
            "rebuilt_square": y.pow(2).sum(1),
            "product": (x * y).sum(1),
        }
        for name, values in figures.items():
            self.sums.add((self.place, name), documents, values)
        for document in np.unique(documents):
            here = torch.from_numpy(documents == document).to(on.device)
            self.firing.add(on[here].any(0).cpu().numpy(), int(document))
        return y


def keep_strongest(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [n, H] with all but the k activations of largest size of each token set to 0."""
    places = x.abs().topk(min(k, x.shape[1]), dim=1).indices
    return torch.zeros_like(x).scatter(1, places, x.gather(1, places))


@dataclass(frozen=True, eq=False)
class _Variant:
    """A way to run the model: its name among the sums, and what replaces which place's activations."""

    name: Any
    replace: Mapping[int, ReplaceKnown]


def _variants(
    groups: tuple[tuple[int, ...], ...], rebuilding: Sequence[Rebuilding], kept: Sequence[int]
) -> Iterator[_Variant]:
    """The model as it is, then each kind of replacement in each group of places."""
    yield _Variant("loss", {})
    for group in groups:
        for kind in KINDS:
            counted = kind == "reconstruction" and len(group) == 1
            yield _Variant(
                (group, kind),
                {p: _replacement(kind, rebuilding[p], kept[p], counted) for p in group},
            )


def _replacement(kind: str, rebuilding: Rebuilding, k: int, counted: bool) -> ReplaceKnown:
    """What a kind puts into a place."""
    if counted:
        return rebuilding.rebuild_and_count
    plain: dict[str, Replace] = {
        "zero": torch.zeros_like,
        "mean": lambda x: rebuilding.mean.expand_as(x),
        "reconstruction": rebuilding.rebuild,
        "own_top": lambda x: keep_strongest(x, k),
        "own": lambda x: x,
    }
    return lambda x, documents: plain[kind](x)


@contextmanager
def spliced(
    model: PreTrainedModel, site: Site, text: torch.Tensor, replacements: Mapping[int, Replace]
) -> Iterator[None]:
    """While open, activations of the tokens `text` [b, T] are replaced at some places of a site."""

    def see(place: int, activations: torch.Tensor) -> torch.Tensor | None:
        if place not in replacements:
            return None
        changed = activations.clone()
        changed[text] = replacements[place](activations[text].float()).to(activations.dtype)
        return changed

    with hooked(model, site, see):
        yield


def _add_losses(
    model: PreTrainedModel,
    site: Site,
    batch: Batch,
    documents: NDArray[np.int64],
    variant: _Variant,
    sums: Sums,
) -> None:
    """Loss at every token but the first of a sequence, added to its document's."""
    text = text_of(batch)
    of_text = documents[text.cpu().numpy().ravel()]
    replacements = {
        place: (lambda x, f=function: f(x, of_text)) for place, function in variant.replace.items()
    }
    with spliced(model, site, text, replacements):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits  # [b, T, V]
    # the last token has no next one here; its logits stay where they are, for no copy to be made
    targets = F.pad(batch.input_ids[:, 1:], (0, 1), value=_NONE)  # [b, T]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=_NONE, reduction="none"
    ).view_as(targets)[:, :-1]  # [b, T - 1]
    if not losses.isfinite().all():
        where = "as it is"
        if variant.name != "loss":
            places, kind = variant.name
            layers = ", ".join(str(site.layer_numbers[place]) for place in places)
            where = f"with {kind} in layers {layers}"
        raise InputError(
            f"the loss of the model {where} is not a number: the model or the autoencoder is damaged,"
            " or its training diverged"
        )
    of_target = documents.reshape(batch.input_ids.shape)[:, 1:].ravel()
    sums.add(variant.name, of_target, losses.flatten())
    if variant.name == "loss":
        sums.add("targets", of_target, 1.0)


def text_of(batch: Batch) -> torch.Tensor:
    """[b, T] True for text, False for end marks."""
    return batch.is_text.reshape(batch.input_ids.shape) > 0


def _document_of(plan: SearchPlan, batch: Batch) -> NDArray[np.int64]:
    """[b * T] place in the split's list of the document of each token, end marks counted to theirs."""
    return np.searchsorted(plan.split.starts, batch.position.cpu().numpy(), side="right") - 1


def _documents(plan: SearchPlan) -> NDArray[np.int64]:
    """[C] places in the split's list of all documents that a plan touches, ascending."""
    found = set()
    for sequence in plan.sequences:
        start, stop = plan.bounds(sequence)
        low, high = np.searchsorted(plan.split.starts, [start, stop - 1], side="right") - 1
        found.update(range(low, high + 1))
    return np.array(sorted(found), np.int64)
