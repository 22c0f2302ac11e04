"""The loss on held-out text without each neuron, one at a time.

A neuron is set to 0 (or to its mean, or to what its explanation predicts) at every token but begin tokens and the first
tokens that the harvest leaves out, and the loss of every next token is measured again, paired
with the loss of the same token in the unedited model. The blocks before the neuron are computed once
(`cratelm.models.partial_forward`). A sequence in which the edit changes nothing is not run again, because its
change is 0; after the last block the same holds for single tokens. Running the whole model for each neuron takes
1.7 to 1.9 times as long on the demo's twins (`benchmarks/effects.py`) and agrees to 1e-7.

Memory: the activations and block outputs of `batch_tokens` tokens, three times `MOST_LOGITS` logits (or those of
one sequence), and three numbers for each neuron and document.

Shape legend: B sequences, T positions, H neurons, k neurons measured in a layer, g of them in a group, C documents,
n rows (a row is one sequence with one neuron edited), V vocabulary, L layers of the site.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models.partial_forward import PartialForward, Trace
from cratelm.records import Estimate
from cratelm.runs.ranks import Share
from cratelm.stats.ratio import ratio
from cratelm.steer.store import Ablation
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenSplit
from cratelm.train.head_loss import row_losses

MOST_LOGITS = 2**24
"""maximum number of logits in memory at a time: 64 MiB at 32 bit"""
GROUP = 32
"""number of neurons whose changes are in memory at a time"""
Float64 = NDArray[np.float64]
_ALL = Share()
Edits = Callable[[NDArray[np.int64], NDArray[np.int64]], Sequence[torch.Tensor]]
"""returns what the neurons of each layer [L] are set to at the tokens [B, T] of a batch, which are at these positions of
the split [B, T], -1 where none is edited: one value per neuron [k], or one per token and neuron [B, T, k]"""


@dataclass(frozen=True)
class HeldOutText:
    """Held-out sequences on which the loss is measured."""

    split: TokenSplit
    length: int
    """T, tokens"""
    sequences: NDArray[np.int64]
    """[n] numbers of the sequences in the split, ascending"""
    beginning: Beginning = PLAIN
    """how each of them begins"""

    @classmethod
    def of(
        cls, split: TokenSplit, length: int, tokens: int, seed: int, beginning: Beginning = PLAIN
    ) -> "HeldOutText":
        """Return a random sample of whole sequences with at most `tokens` tokens, but at least one sequence.

        `length` is with the begin token. Raises `InputError` if the split is shorter than one sequence.
        """
        room = beginning.room(length)
        n_sequences = split.n_sequences(room)
        if not n_sequences:
            raise InputError(
                f"the {split.name} split has {split.n_tokens:,} tokens, less than one sequence of"
                f" {length}: give a lower --sequence-length"
            )
        n_drawn = min(n_sequences, max(1, tokens // room))
        drawn = np.random.default_rng(seed).choice(n_sequences, n_drawn, replace=False)
        return cls(split, length, np.sort(drawn), beginning)

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens in all sequences."""
        return len(self.sequences) * self.length

    def batches(
        self, batch_tokens: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield tokens [B, T + 1], the ordinals [B, T] of the documents of the targets, and the positions [B, T] before them.

        A position is -1 where no neuron is edited: at begin tokens, and at the first tokens that are left out.
        """
        size, begin = max(1, batch_tokens // self.length), self.beginning
        room = begin.room(self.length)
        for low in range(0, len(self.sequences), size):
            numbers = self.sequences[low : low + size]
            # sequence i begins at token i * room of the split; its targets are the tokens after its first
            positions = numbers[:, None] * room + np.arange(self.length)
            if begin.token is None:
                tokens = np.stack([self.split.sequence(i, self.length) for i in numbers])
            else:
                tokens, positions = self._begun(positions, begin.token)
            documents = self.split.documents_at(positions.ravel() + 1).reshape(positions.shape)
            if not begin.is_plain:
                positions[:, : begin.extra + begin.skip] = -1
            yield tokens, documents, positions

    def _begun(
        self, positions: NDArray[np.int64], begin_token: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return tokens [B, T + 1] after the begin token, and the positions [B, T] of all but the last."""
        # The begin token takes the place before the sequence. One that has a begin token of its own, and is not the
        # last one of the split, has one token more at its end instead.
        own = self.split.read_at(positions[:, 0]) == begin_token
        own &= positions[:, -1] + 1 < self.split.n_tokens
        positions = positions - ~own[:, None]
        after = np.concatenate([positions, positions[:, -1:] + 1], axis=1)
        tokens = self.split.read_at(np.maximum(after, 0))
        tokens[:, 0] = begin_token
        return tokens, positions


@dataclass(frozen=True)
class Ablations:
    """The loss of the unedited model, and its change without each neuron."""

    base: Estimate
    """loss of the unedited model, nats per token"""
    neurons: list[dict[int, Ablation]]
    """[L] by the place in the arguments of `ablate`, for the neurons of its share"""

    def add(self, others: "Ablations") -> None:
        """Add the neurons of another share."""
        for of_layer, of_others in zip(self.neurons, others.neurons, strict=True):
            of_layer |= of_others


def ablate(
    partial: PartialForward,
    text: HeldOutText,
    neurons: Sequence[NDArray[np.int64]],
    edits: Edits | None,
    batch_tokens: int,
    bar: tqdm,
    share: Share = _ALL,
) -> Ablations:
    """Return the loss without each of `neurons` [L][k], indices of neurons by layer of the site.

    Neurons are set to what `edits` returns, or to 0 if that is None. With a `share`, only its groups of `GROUP`
    neurons are measured: groups are never divided, because products of matrices of another size round differently.
    `bar` advances by one for each neuron and batch.
    """
    column_of: dict[int, int] = {}  # ordinal of a document -> its column in the sums
    sums = [_Sums(len(of_layer)) for of_layer in neurons]
    base = _Sums(1)
    device = partial.model.device
    for tokens, documents, positions in text.batches(batch_tokens):
        for document in documents.ravel().tolist():
            column_of.setdefault(document, len(column_of))
        ids = torch.from_numpy(tokens).to(device)
        columns = torch.from_numpy(np.vectorize(column_of.__getitem__)(documents)).to(device)
        trace = partial.trace(ids[:, :-1])
        losses = _plain_losses(partial, trace, ids[:, 1:])  # [B, T]
        base.grow(len(column_of))
        for name, of_tokens in (("all", losses), ("n", torch.ones_like(losses))):
            base.add(name, torch.zeros_like(columns), columns, of_tokens)
        values = None if edits is None else edits(tokens[:, :-1], positions)
        fixed = None
        if not text.beginning.is_plain:
            fixed = torch.from_numpy(positions < 0).to(device)[..., None]  # [B, T, 1]
        for site_layer, of_layer in enumerate(neurons):
            sums[site_layer].grow(len(column_of))
            batch = _Batch(partial, trace, site_layer, ids[:, 1:], losses, columns, fixed)
            for first in _groups(site_layer, len(of_layer), share):
                group = slice(first, first + GROUP)
                value = None if values is None else values[site_layer][..., group].to(losses)
                indices = torch.from_numpy(of_layer[group]).to(device)
                _measure(batch, indices, first, value, sums[site_layer])
                bar.update(len(indices))
    of_document = base.tables["n"][0].numpy()
    measured = [
        {j: _ablation(s, j, of_document) for j in _places(site_layer, s.k, share)}
        for site_layer, s in enumerate(sums)
    ]
    return Ablations(ratio(base.tables["all"][0].numpy(), of_document), measured)


def _places(site_layer: int, k: int, share: Share) -> list[int]:
    """Return the places of the neurons of a share, among the `k` of a layer."""
    return [j for i in _groups(site_layer, k, share) for j in range(i, min(i + GROUP, k))]


def _groups(site_layer: int, k: int, share: Share) -> list[int]:
    """Return the places of the first neurons of the groups of a share; in the next layer, the next share begins."""
    firsts = range(0, k, GROUP)
    return [first for number, first in enumerate(firsts, site_layer) if share.takes(number)]


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch of sequences, and everything about it that is the same for all neurons of a layer."""

    partial: PartialForward
    trace: Trace
    site_layer: int
    """index into the layers of the site"""
    targets: torch.Tensor
    """[B, T]"""
    losses: torch.Tensor
    """[B, T] losses of the unedited model"""
    columns: torch.Tensor
    """[B, T] column of the target's document in the sums"""
    fixed: torch.Tensor | None = None
    """[B, T, 1] bool, where no neuron is edited; None for nowhere"""


class _Sums:
    """Sums over tokens for each of k neurons and each document.

    `tables` are [k, C]: `all`, changes of the loss; `firing`, changes at tokens where the neuron fires; `n`,
    the number of these tokens. Documents get their columns in the order in which batches contain them.
    """

    def __init__(self, k: int):
        self.k = k
        self.tables = {n: torch.zeros(k, 0, dtype=torch.double) for n in ("all", "firing", "n")}

    def grow(self, n_documents: int) -> None:
        """Widen the tables to `n_documents` columns, with zeros in the new ones."""
        added = n_documents - self.tables["n"].shape[1]
        self.tables = {name: F.pad(table, (0, added)) for name, table in self.tables.items()}

    def add(
        self, name: str, neuron: torch.Tensor, column: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Add `values` of tokens to a table, at rows `neuron` (0..k-1) and columns `column` of the same shape."""
        table = self.tables[name]
        # entry (i, c) of [k, C] is entry i C + c of the flat table: one index_add_ for all tokens
        flat = (neuron * table.shape[1] + column).flatten().cpu()
        table.view(-1).index_add_(0, flat, values.flatten().double().cpu())


def _plain_losses(partial: PartialForward, trace: Trace, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses [B, T] of the unedited model, computed for as many sequences at a time as fit."""
    step = rows_at_a_time(partial, trace.ids.shape[1])
    parts = []
    for first in range(0, len(targets), step):
        rows = slice(first, first + step)
        part = Trace(trace.ids[rows], {k: v[rows] for k, v in trace.outputs.items()}, [])
        if partial.head is None:
            parts.append(token_losses(partial.plain(part), targets[rows]))
        else:
            parts.append(_losses(partial.plain_hidden(part), partial.head, targets[rows]))
    return torch.cat(parts)


def rows_at_a_time(partial: PartialForward, length: int) -> int:
    """Return how many rows of `length` positions have no more than `MOST_LOGITS` logits; at least 1."""
    vocabulary = partial.model.config.get_text_config().vocab_size
    return max(1, MOST_LOGITS // (length * vocabulary))


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses [n, T] in nats, from logits [n, T, V] and targets [n, T]."""
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def _losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses [n, T] in nats, from the hidden states [n, T, D] that a plain head [V, D] reads."""
    return row_losses(hidden.flatten(0, 1), head, targets.flatten()).view(targets.shape)


def _measure(
    batch: _Batch, neurons: torch.Tensor, first: int, value: torch.Tensor | None, sums: _Sums
) -> None:
    """Add the changes of the loss with `neurons` [g] of a layer set to `value`, or to 0 if None, to `sums`.

    `value` is [g], or [B, T, g] if it differs by token.

    They belong to the rows `first` ... `first + g - 1` of `sums`.
    """
    activations = batch.trace.activations[batch.site_layer][..., neurons]  # [B, T, g]
    delta = (0 if value is None else value) - activations
    firing = (activations > 0).double()
    if batch.fixed is not None:
        delta, firing = delta.masked_fill(batch.fixed, 0), firing.masked_fill(batch.fixed, 0)
    table_rows = torch.arange(first, first + len(neurons), device=activations.device)
    columns = batch.columns[..., None].expand(activations.shape)
    sums.add("n", table_rows.expand(activations.shape), columns, firing)
    # After the last block, tokens do not depend on each other: each is treated as a sequence of one, so that
    # tokens where the neuron is silent need not be run. This needs an edit that adds to the block's output
    # (`writes`).
    if (
        batch.partial.is_last(batch.site_layer)
        and batch.partial.writes[batch.site_layer] is not None
    ):
        batch = _by_token(batch)
        delta, firing = (x.flatten(0, 1)[:, None] for x in (delta, firing))  # [B * T, 1, g]
    pairs = (delta != 0).any(1).T.nonzero()  # [n, 2]: which of the g neurons, which sequence
    step = rows_at_a_time(batch.partial, batch.targets.shape[1])
    for start in range(0, len(pairs), step):
        j, sequence = pairs[start : start + step].unbind(1)
        edit = batch.trace, batch.site_layer, sequence, neurons[j], delta[sequence, :, j]
        targets, head = batch.targets[sequence], batch.partial.head
        if head is None:
            edited = token_losses(batch.partial.edited(*edit), targets)
        else:
            edited = _losses(batch.partial.edited_hidden(*edit), head, targets)
        change = edited - batch.losses[sequence]  # [n, T]
        of_row = table_rows[j][:, None].expand(change.shape)
        sums.add("all", of_row, batch.columns[sequence], change)
        sums.add("firing", of_row, batch.columns[sequence], change * firing[sequence, :, j])


def _by_token(batch: _Batch) -> _Batch:
    """Return the batch as B * T sequences of one token."""
    block = batch.partial.block_numbers[batch.site_layer]
    flat = (x.reshape(-1, 1) for x in (batch.targets, batch.losses, batch.columns))
    return _Batch(batch.partial, batch.trace.by_token(block), batch.site_layer, *flat)


def _ablation(sums: _Sums, j: int, tokens: Float64) -> Ablation:
    """Return the figures of neuron `j` from its sums, and from the number of tokens [C] of each document."""
    change, where_firing, firing = (sums.tables[name][j].numpy() for name in ("all", "firing", "n"))
    fired = firing > 0  # documents without a firing have no tokens to divide by
    return Ablation(
        change=ratio(change, tokens),
        where_firing=ratio(where_firing[fired], firing[fired]) if fired.any() else None,
        n_tokens=int(tokens.sum()),
        n_firing=int(firing.sum()),
        n_documents=len(tokens),
    )
