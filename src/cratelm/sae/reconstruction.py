"""Sums by document for the reconstructions of autoencoders, and for the loss with activations replaced.

`evaluate.py` turns these sums into figures, and reads them by the names in `figures` and `REPLACEMENTS`;
`fidelity.py` shares `spliced` and `text_of`.

There are two passes over the tokens. The first, without the head, computes each layer's mean activation and its
autoencoder's L0; the second computes everything else, which needs these two. Only the activations of text are
replaced: end-of-text tokens keep theirs, on which no autoencoder was trained. The loss is summed over every token
but the first of a sequence.

Layers are numbered here as in the site, from 0 in `site_layer`, whichever layers of the model they are. A *group*
is a set of layers of the site that are replaced together.

Memory: a few numbers per document and per latent, and the logits of one forward pass.

Shape legend: b sequences of a forward pass, T tokens of a sequence, n text tokens of a forward pass,
H inputs, S latents, C documents, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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

Replacement = Literal["zero", "mean", "reconstruction", "own_top", "own"]
REPLACEMENTS: tuple[Replacement, ...] = ("zero", "mean", "reconstruction", "own_top", "own")
"""replacements of the activations: 0, their mean, the autoencoder's reconstruction, the strongest of the
activations themselves (as many as the autoencoder has active latents), and all of them, unchanged"""
_NOT_COUNTED = -100
"""target that cross_entropy ignores"""
MOST_LOGITS = 2**28
"""maximum number of logits in memory at a time: 1 GiB at 32 bit"""
Float = NDArray[np.float64]
Group = tuple[int, ...]
"""layers of the site, numbered from 0"""
Replace = Callable[[torch.Tensor], torch.Tensor]
"""activations of text [n, H] -> their replacement [n, H]"""
ReplaceInDocuments = Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor]
"""the same, with the documents [n] of the tokens as second argument"""


@dataclass(eq=False)
class Firing:
    """Documents in which each latent fired, as far as a jackknife over documents needs them."""

    documents: NDArray[np.int64]
    """[S] number of documents in which the latent fired"""
    last: NDArray[np.int64]
    """[S] the last of these documents, -1 for none"""

    @classmethod
    def of(cls, latents: int) -> "Firing":
        """Return the counts of S latents that have not fired."""
        return cls(np.zeros(latents, np.int64), np.full(latents, -1, np.int64))

    def add(self, fired: NDArray[np.bool_], document: int) -> None:
        """Count the latents that fired, `fired` [S], somewhere in a document.

        Call this with documents in ascending order, several times for a document that spans several batches.
        """
        new = fired & (self.last != document)
        self.documents += new
        self.last[new] = document


@dataclass(eq=False)
class DocumentSums:
    """Sums over the tokens of each document [C], by name."""

    documents: NDArray[np.int64]
    """[C] indices into the split's list of documents, ascending"""
    by_name: dict[Any, Float] = field(default_factory=dict)

    def add(self, name: Any, documents: NDArray[np.int64], values: torch.Tensor | float) -> None:
        """Add values [m], or one value for all, to the sums `name` of the tokens' documents [m]."""
        rows = np.searchsorted(self.documents, documents)
        weights = values.double().cpu().numpy() if isinstance(values, torch.Tensor) else values
        np.add.at(self.by_name.setdefault(name, np.zeros(len(self.documents))), rows, weights)

    def __getitem__(self, name: Any) -> Float:
        return self.by_name[name]


@dataclass(frozen=True, eq=False)
class ReconstructionSums:
    """All sums for the autoencoders of a site.

    Names of the sums: `text`, number of text tokens; `targets`, number of predicted tokens; `loss`, loss of the
    unedited model; (site_layer, figure), figures of the reconstructions; (group, replacement), losses.
    """

    sums: DocumentSums
    firing: list[Firing]
    """by site_layer"""
    kept: list[int]
    """activations per token that `own_top` keeps, by site_layer: the autoencoder's L0, rounded, at least 1"""
    groups: tuple[Group, ...]
    """layers that were replaced together: each alone, then all of them if there are several"""


def measure(
    model: PreTrainedModel, latents: Site, plan: SearchPlan, batch_tokens: int, *, quiet: bool
) -> ReconstructionSums:
    """Return all sums for the autoencoders of a site of latents, on the tokens of a plan.

    Raises `InputError` if an activation or a loss is not a finite number.
    """
    saes = latents.autoencoders
    site = replace(latents, autoencoders=())  # the activations below
    vocabulary = model.config.get_text_config().vocab_size
    batch_tokens = min(batch_tokens, max(1, MOST_LOGITS // vocabulary))
    every = tuple(range(len(saes)))
    groups = (*((site_layer,) for site_layer in every), *((every,) if len(every) > 1 else ()))
    sums = DocumentSums(_documents(plan))
    total = plan.n_tokens() * (2 + len(groups) * len(REPLACEMENTS))
    bar = tqdm(total=total, desc="sae evaluate", unit="tok", unit_scale=True, disable=quiet)
    with torch.no_grad(), bar:
        first = _FirstPass(site, saes)
        for batch in plan.batches(batch_tokens, model.device):
            first.add(model, batch)
            bar.update(batch.input_ids.numel())
        kept = [max(1, round(on / first.n_text)) for on in first.on]
        means = [(first.total[site_layer] / first.n_text).float() for site_layer in every]
        layers = [_Reconstruction(saes[i], i, means[i], sums) for i in every]
        for batch in plan.batches(batch_tokens, model.device):
            documents = _document_of(plan, batch)
            sums.add("text", documents[text_of(batch).cpu().numpy().ravel()], 1.0)
            for variant in _variants(groups, layers, kept):
                _add_losses(model, site, batch, documents, variant, sums)
                bar.update(batch.input_ids.numel())
    return ReconstructionSums(sums, [layer.firing for layer in layers], kept, groups)


class _FirstPass:
    """Total activation [H] and number of active latents, for each layer of the site."""

    def __init__(self, site: Site, saes: Sequence[Any]):
        self.site, self.saes, self.n_text = site, saes, 0
        self.total: dict[int, torch.Tensor] = {}
        self.on = [0] * len(saes)

    def add(self, model: PreTrainedModel, batch: Batch) -> None:
        """Run the model without its head on a batch, and add to the totals."""
        text = text_of(batch)
        self.n_text += int(text.sum())

        def on_activation(site_layer: int, activations: torch.Tensor) -> None:
            check_finite(activations, self.site, self.site.layer_numbers[site_layer])
            x = activations.float()[text]  # [n, H]
            self.total[site_layer] = self.total.get(site_layer, 0) + x.sum(0)
            self.on[site_layer] += int((self.saes[site_layer].encode(x) != 0).sum())

        with hooked(model, self.site, on_activation):
            model.base_model(input_ids=batch.input_ids, use_cache=False)


class _Reconstruction:
    """Reconstructions in one layer of the site, and their sums."""

    def __init__(self, sae: Any, site_layer: int, mean: torch.Tensor, sums: DocumentSums):
        self.sae, self.site_layer, self.mean, self.sums = sae, site_layer, mean, sums
        self.firing = Firing.of(sae.config.d_sae)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction [n, H] of activations [n, H]."""
        return self.sae.decode(self.sae.encode(x))

    def reconstruct_and_count(self, x: torch.Tensor, documents: NDArray[np.int64]) -> torch.Tensor:
        """Return the reconstruction [n, H] and add its figures to the sums of the tokens' documents [n]."""
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
            self.sums.add((self.site_layer, name), documents, values)
        for document in np.unique(documents):
            rows = torch.from_numpy(documents == document).to(on.device)
            self.firing.add(on[rows].any(0).cpu().numpy(), int(document))
        return y


def keep_strongest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Return x [n, H] with all but the k largest activations (by absolute value) of each token set to 0."""
    indices = x.abs().topk(min(k, x.shape[1]), dim=1).indices
    return torch.zeros_like(x).scatter(1, indices, x.gather(1, indices))


@dataclass(frozen=True, eq=False)
class _Variant:
    """A way to run the model."""

    name: Any
    """name of its losses in the sums"""
    replace: Mapping[int, ReplaceInDocuments]
    """replacement of the activations, by site_layer"""


def _variants(
    groups: tuple[Group, ...], layers: Sequence[_Reconstruction], kept: Sequence[int]
) -> Iterator[_Variant]:
    """Yield the unedited model, then each replacement in each group."""
    yield _Variant("loss", {})
    for group in groups:
        for kind in REPLACEMENTS:
            # reconstructions are measured only on activations that no other layer's replacement has changed
            counted = kind == "reconstruction" and len(group) == 1
            yield _Variant(
                (group, kind), {i: _replacement(kind, layers[i], kept[i], counted) for i in group}
            )


def _replacement(
    kind: Replacement, layer: _Reconstruction, k: int, counted: bool
) -> ReplaceInDocuments:
    """Return the function that replaces the activations of one layer."""
    if counted:
        return layer.reconstruct_and_count
    plain: dict[Replacement, Replace] = {
        "zero": torch.zeros_like,
        "mean": lambda x: layer.mean.expand_as(x),
        "reconstruction": layer.reconstruct,
        "own_top": lambda x: keep_strongest(x, k),
        "own": lambda x: x,
    }
    return lambda x, documents: plain[kind](x)


@contextmanager
def spliced(
    model: PreTrainedModel, site: Site, text: torch.Tensor, replacements: Mapping[int, Replace]
) -> Iterator[None]:
    """Replace the activations of some layers of a site at the tokens `text` [b, T] while the context is open.

    `replacements` are functions by site_layer.
    """

    def on_activation(site_layer: int, activations: torch.Tensor) -> torch.Tensor | None:
        if site_layer not in replacements:
            return None
        changed = activations.clone()
        changed[text] = replacements[site_layer](activations[text].float()).to(activations.dtype)
        return changed

    with hooked(model, site, on_activation):
        yield


def _add_losses(
    model: PreTrainedModel,
    site: Site,
    batch: Batch,
    documents: NDArray[np.int64],
    variant: _Variant,
    sums: DocumentSums,
) -> None:
    """Add the loss of every token but the first of a sequence to the sum of its document."""
    text = text_of(batch)
    of_text = documents[text.cpu().numpy().ravel()]
    replacements = {
        site_layer: (lambda x, f=function: f(x, of_text))
        for site_layer, function in variant.replace.items()
    }
    with spliced(model, site, text, replacements):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits  # [b, T, V]
    # The last token of a sequence has no next one. Its logits are ignored rather than sliced off, which would
    # copy all of them, up to 1 GiB.
    targets = F.pad(batch.input_ids[:, 1:], (0, 1), value=_NOT_COUNTED)  # [b, T]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=_NOT_COUNTED,
        reduction="none",
    ).view_as(targets)[:, :-1]  # [b, T - 1]
    if not losses.isfinite().all():
        edit = "without an edit"
        if variant.name != "loss":
            group, kind = variant.name
            layers = ", ".join(str(site.layer_numbers[site_layer]) for site_layer in group)
            edit = f"with {kind} in layers {layers}"
        raise InputError(
            f"the loss of the model {edit} is not a number: the model or the autoencoder is damaged,"
            " or its training diverged"
        )
    of_target = documents.reshape(batch.input_ids.shape)[:, 1:].ravel()
    sums.add(variant.name, of_target, losses.flatten())
    if variant.name == "loss":
        sums.add("targets", of_target, 1.0)


def text_of(batch: Batch) -> torch.Tensor:
    """Return which tokens [b, T] are text: True for text, False for end-of-text tokens."""
    return batch.is_text.reshape(batch.input_ids.shape) > 0


def _document_of(plan: SearchPlan, batch: Batch) -> NDArray[np.int64]:
    """Return the index [b * T] of each token's document in the split; end-of-text tokens belong to theirs."""
    return np.searchsorted(plan.split.starts, batch.position.cpu().numpy(), side="right") - 1


def _documents(plan: SearchPlan) -> NDArray[np.int64]:
    """Return the indices [C] in the split of all documents that overlap a plan, ascending."""
    indices = set()
    for sequence in plan.sequences:
        start, stop = plan.bounds(sequence)
        low, high = np.searchsorted(plan.split.starts, [start, stop - 1], side="right") - 1
        indices.update(range(low, high + 1))
    return np.array(sorted(indices), np.int64)
