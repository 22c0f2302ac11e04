"""The loss on held-out text without each neuron, one at a time.

A neuron is put to 0 (or to its mean) at every token, and the loss of every next token is measured
again, paired with the loss of the same token in the plain model. What comes before the neuron is
computed once (`cratelm.models.partial_forward`); a sequence in which the edit changes nothing is left out, for its
change is 0, and after the last block a token is, for the same reason.

Memory: the activations and block outputs of `batch_tokens` tokens, `MOST_LOGITS` logits (or those of one
sequence) three times over, and three numbers for each neuron and document.

Shape legend: B sequences, T positions, H neurons, k neurons measured in a layer, C documents, n rows,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models.partial_forward import PartialForward, Trace
from cratelm.records import Estimate
from cratelm.stats.ratio import ratio
from cratelm.steer.store import Ablation
from cratelm.tokens.shards import TokenSplit

MOST_LOGITS = 2**24
"""logits held at a time: 64 MiB at 32 bit"""
GROUP = 32
"""neurons whose changes are held at a time"""
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """Held-out sequences on which the loss is measured."""

    split: TokenSplit
    length: int
    """T, tokens"""
    sequences: NDArray[np.int64]
    """numbers of the sequences, ascending"""

    @classmethod
    def of(cls, split: TokenSplit, length: int, tokens: int, seed: int) -> "Text":
        """At most `tokens` tokens in whole sequences, at least one. Raises `InputError` for none."""
        there = split.n_sequences(length)
        if not there:
            raise InputError(
                f"the {split.name} split has {split.n_tokens:,} tokens, not one sequence of {length}:"
                " give a lower --sequence-length"
            )
        wanted = min(there, max(1, tokens // length))
        chosen = np.random.default_rng(seed).choice(there, wanted, replace=False)
        return cls(split, length, np.sort(chosen))

    @property
    def n_tokens(self) -> int:
        return len(self.sequences) * self.length

    def batches(self, batch_tokens: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Tokens [B, T + 1], and for each target the ordinal of its document [B, T]."""
        size = max(1, batch_tokens // self.length)
        for first in range(0, len(self.sequences), size):
            some = self.sequences[first : first + size]
            tokens = np.stack([self.split.sequence(i, self.length) for i in some])
            positions = some[:, None] * self.length + np.arange(1, self.length + 1)
            documents = self.split.documents_at(positions.ravel()).reshape(positions.shape)
            yield tokens, documents


@dataclass(frozen=True)
class Ablations:
    base: Estimate
    """loss of the plain model, nats a token"""
    neurons: list[list[Ablation]]
    """[L][k], in the order asked for"""


def ablate(
    rest: PartialForward,
    text: Text,
    neurons: Sequence[NDArray[np.int64]],
    means: Sequence[NDArray[np.float64]] | None,
    batch_tokens: int,
    bar: tqdm,
) -> Ablations:
    """Measures the neurons [L][k] of each place, put to `means` [L][k], or to 0 where None."""
    numbers: dict[int, int] = {}
    """place of each document in the sums"""
    sums = [_Sums(len(some)) for some in neurons]
    base = _Sums(1)
    device = rest.model.device
    for tokens, documents in text.batches(batch_tokens):
        for document in documents.ravel().tolist():
            numbers.setdefault(document, len(numbers))
        column = np.vectorize(numbers.__getitem__)(documents)  # [B, T]
        ids = torch.from_numpy(tokens).to(device)
        places = torch.from_numpy(column).to(device)
        trace = rest.trace(ids[:, :-1])
        losses = _plain_losses(rest, trace, ids[:, 1:])  # [B, T]
        base.grow(len(numbers))
        for name, values in (("all", losses), ("n", torch.ones_like(losses))):
            base.add(name, torch.zeros_like(places), places, values)
        for place, some in enumerate(neurons):
            sums[place].grow(len(numbers))
            batch = _Batch(rest, trace, place, ids[:, 1:], losses, places)
            for first in range(0, len(some), GROUP):
                group = slice(first, first + GROUP)
                put = None if means is None else torch.from_numpy(means[place][group]).to(losses)
                wanted = torch.from_numpy(some[group]).to(device)
                _measure(batch, wanted, first, put, sums[place])
                bar.update(len(wanted))
    of_document = base.tables["n"][0].numpy()
    return Ablations(
        ratio(base.tables["all"][0].numpy(), of_document),
        [[_ablation(s, j, of_document) for j in range(s.k)] for s in sums],
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """What is the same for all neurons of a place in a batch of sequences."""

    rest: PartialForward
    trace: Trace
    place: int
    targets: torch.Tensor
    """[B, T]"""
    losses: torch.Tensor
    """[B, T] of the plain model"""
    columns: torch.Tensor
    """[B, T] place of the target's document"""


class _Sums:
    """Sums over tokens for each of k neurons and each document."""

    def __init__(self, k: int):
        self.k = k
        self.tables = {n: torch.zeros(k, 0, dtype=torch.double) for n in ("all", "firing", "n")}
        """[k, C]: changes of the loss, those where the neuron fires, and how many tokens these are"""

    def grow(self, n_documents: int) -> None:
        more = n_documents - self.tables["n"].shape[1]
        self.tables = {name: F.pad(table, (0, more)) for name, table in self.tables.items()}

    def add(
        self, name: str, neuron: torch.Tensor, column: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Values of tokens whose neuron (0..k-1) and document are given; the three have one shape."""
        table = self.tables[name]
        place = (neuron * table.shape[1] + column).flatten().cpu()
        table.view(-1).index_add_(0, place, values.flatten().double().cpu())


def _plain_losses(rest: PartialForward, trace: Trace, targets: torch.Tensor) -> torch.Tensor:
    """[B, T], as many sequences at a time as fit."""
    step = rows_at_a_time(rest, trace.ids.shape[1])
    parts = []
    for first in range(0, len(targets), step):
        some = slice(first, first + step)
        part = Trace(trace.ids[some], {k: v[some] for k, v in trace.outputs.items()}, [])
        parts.append(token_losses(rest.plain(part), targets[some]))
    return torch.cat(parts)


def rows_at_a_time(rest: PartialForward, length: int) -> int:
    """Rows of `length` positions whose logits fit."""
    vocabulary = rest.model.config.get_text_config().vocab_size
    return max(1, MOST_LOGITS // (length * vocabulary))


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n, T] nats, from logits [n, T, V] and targets [n, T]."""
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def _measure(
    batch: _Batch, neurons: torch.Tensor, first: int, put: torch.Tensor | None, sums: _Sums
) -> None:
    """Adds the changes of some neurons [g] of a place, the first of which is row `first` of `sums`."""
    own = batch.trace.activations[batch.place][..., neurons]  # [B, T, g]
    delta = (0 if put is None else put) - own
    firing = (own > 0).double()
    rows = torch.arange(first, first + len(neurons), device=own.device)
    columns = batch.columns[..., None].expand(own.shape)
    sums.add("n", rows.expand(own.shape), columns, firing)
    if batch.rest.is_last(batch.place) and batch.rest.writes[batch.place] is not None:
        batch = _by_token(batch)
        delta, firing = (x.flatten(0, 1)[:, None] for x in (delta, firing))  # [B * T, 1, g]
    pairs = (delta != 0).any(1).T.nonzero()  # [n, 2] which neuron, which sequence
    step = rows_at_a_time(batch.rest, batch.targets.shape[1])
    for at in range(0, len(pairs), step):
        some = pairs[at : at + step]
        j, row = some.unbind(1)
        logits = batch.rest.edited(batch.trace, batch.place, row, neurons[j], delta[row, :, j])
        change = token_losses(logits, batch.targets[row]) - batch.losses[row]  # [n, T]
        which = rows[j][:, None].expand(change.shape)
        sums.add("all", which, batch.columns[row], change)
        sums.add("firing", which, batch.columns[row], change * firing[row, :, j])


def _by_token(batch: _Batch) -> _Batch:
    block = batch.rest.block_numbers[batch.place]
    flat = (x.reshape(-1, 1) for x in (batch.targets, batch.losses, batch.columns))
    return _Batch(batch.rest, batch.trace.by_token(block), batch.place, *flat)


def _ablation(sums: _Sums, j: int, tokens: Float64) -> Ablation:
    """From the sums of one neuron, and the tokens [C] of each document."""
    change, where, firing = (sums.tables[name][j].numpy() for name in ("all", "firing", "n"))
    fired = firing > 0
    return Ablation(
        change=ratio(change, tokens),
        where_firing=ratio(where[fired], firing[fired]) if fired.any() else None,
        n_tokens=int(tokens.sum()),
        n_firing=int(firing.sum()),
        n_documents=len(tokens),
    )
