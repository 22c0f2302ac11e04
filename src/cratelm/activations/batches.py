"""The plan of a harvest over one split, and its batches, which say where each token is.

Shape legend: B sequences, T positions of a sequence, N = B * T tokens of a batch, S segments of a
batch (a segment is the text of one document inside one sequence, without its end mark, which is the
end-of-text token). Begin tokens and the first tokens that are left out (`cratelm.tokens.beginning`) are in a batch,
but in no segment, like end marks: whatever reads the text of a batch leaves out all three.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.activations.config import PARTS
from cratelm.records import Split
from cratelm.tokens.beginning import PLAIN, Beginning

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit

Int64 = NDArray[np.int64]
BLOCKS = PARTS
"""most blocks that the batches of a plan are divided into: divisible by most numbers of processes up to 60"""
PIECE = 64
"""most tokens of a segment whose maximum is kept; as many are read again to locate one that becomes an excerpt"""
NEVER = np.iinfo(np.int64).max
"""sampling key of tokens that are not text, which no text token has"""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens, with what a `LayerHarvest` needs about them. Tensors are on the device."""

    input_ids: torch.Tensor
    """[B, T]"""
    position: torch.Tensor
    """[N] position in the split of each token, ascending; a begin token has that of the token after it"""
    key: torch.Tensor
    """[N] int64 sampling key of each token, `NEVER` for those that are not text; a low key is sampled first"""
    is_text: torch.Tensor
    """[N] float32, 1 for text and 0 for end marks, begin tokens and first tokens that are left out"""
    segment_of: torch.Tensor
    """[N] index of the token's segment, -1 for those that are not text"""
    segments: list[tuple[int, int]]
    """[S] first token and one past the last, as offsets in the batch"""
    start: torch.Tensor
    """[S] first position in the split of each segment"""
    stop: torch.Tensor
    """[S] one past its last position"""
    document: torch.Tensor
    """[S] ordinal of the document"""
    is_left_out: torch.Tensor | None = None
    """[N] bool, which tokens are begin tokens, or first tokens that are left out; None if none is"""

    @property
    def n_text(self) -> int:
        """Return the number of tokens that are text."""
        return sum(stop - start for start, stop in self.segments)

    def rows_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the rows [n] of the tokens at positions [n] of the split, which must be in the batch."""
        # from the right, because a begin token stands before the token with the same position
        return torch.searchsorted(self.position, positions, right=True) - 1

    @cached_property
    def by_key(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampling keys in ascending order [N], and the tokens that they belong to [N]."""
        ordered, tokens = torch.sort(self.key)
        return ordered, tokens

    @cached_property
    def pieces(self) -> "Pieces":
        """Return the segments in pieces of at most `PIECE` tokens."""
        return Pieces.of(self)

    def document_spans(self) -> list[tuple[int, int]]:
        """Return, for each document in the batch, its first segment and one past its last."""
        document = self.document.tolist()
        firsts = [i for i, d in enumerate(document) if i == 0 or d != document[i - 1]]
        return list(zip(firsts, [*firsts[1:], len(document)], strict=True))


@dataclass(frozen=True, eq=False)
class Pieces:
    """The segments of a batch in P pieces, whose maxima are found one by one; D documents."""

    first_token: Int64
    """[P] first token of each piece, as offset in the batch"""
    end_token: Int64
    """[P] one past its last token"""
    first_piece: Int64
    """[D + 1] first piece of each document, and P"""

    @classmethod
    def of(cls, batch: Batch) -> "Pieces":
        """Return the pieces of a batch."""
        first_token, end_token, before = [], [], [0]
        for low, high in batch.segments:
            for first in range(low, high, PIECE):
                first_token.append(first)
                end_token.append(min(first + PIECE, high))
            before.append(len(first_token))
        spans = batch.document_spans() if batch.segments else []
        first_piece = [*(before[first] for first, _ in spans), len(first_token)]
        return cls(*(np.array(part, np.int64) for part in (first_token, end_token, first_piece)))


@dataclass(frozen=True, eq=False)
class SearchPlan:
    """Which sequences of a split are searched: all of them, or a seeded sample in ascending order."""

    split: "TokenSplit"
    name: Split
    eot_id: int
    sequence_length: int
    """T, tokens, with the begin token"""
    sequences: Int64
    """numbers of the sequences searched, ascending; sequence i begins at token i * `room` of the split"""
    seed: int
    beginning: Beginning = PLAIN
    """what is set before each sequence, and which first tokens are left out"""

    @classmethod
    def of(
        cls,
        split: "TokenSplit",
        name: Split,
        eot_id: int,
        sequence_length: int,
        tokens: int,
        seed: int,
        beginning: Beginning = PLAIN,
    ) -> "SearchPlan":
        """Return a plan that searches at most `tokens` tokens of `split`, but at least one sequence.

        Begin tokens are no tokens of the split, and are not among those `tokens`. Raises `InputError` if a sequence
        has no token that counts.
        """
        room = beginning.room(sequence_length)
        n_sequences = -(-split.n_tokens // room)
        wanted = max(1, tokens // room)
        sequences = np.arange(n_sequences)
        if tokens < split.n_tokens:
            chosen = np.random.default_rng(seed).choice(n_sequences, wanted, replace=False)
            sequences = np.sort(chosen)
        return cls(split, name, eot_id, sequence_length, sequences, seed, beginning)

    @cached_property
    def room(self) -> int:
        """Return the number of tokens of the split in a sequence: T, or T - 1 with a begin token."""
        return self.beginning.room(self.sequence_length)

    def bounds(self, sequence: int) -> tuple[int, int]:
        """Return the first token of a sequence and one past its last; the last sequence may be shorter."""
        start = int(sequence) * self.room
        return start, min(start + self.room, self.split.n_tokens)

    def n_tokens(self) -> int:
        """Return the number of tokens searched, including end marks, without the begin tokens that are set."""
        return sum(stop - start for start, stop in map(self.bounds, self.sequences))

    def text_spans(self) -> tuple[Int64, Int64]:
        """Return the starts and stops of the spans of text searched, ascending, without what is not text.

        A span has the positions start <= position < stop.
        """
        starts, stops = [], []
        for sequence in self.sequences:
            for start, stop, _ in self._segments(*self.bounds(sequence)):
                starts.append(start)
                stops.append(stop)
        return np.array(starts, np.int64), np.array(stops, np.int64)

    def _segments(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the text of each document in the sequence [start, stop) as start, stop and ordinal.

        It is without its end mark, a begin token of its own, and the tokens that the plan leaves out.
        """
        edges = self.split.starts
        begin = self.beginning
        left_out = start
        if not begin.is_plain:
            left_out += begin.skip + int(begin.is_set(self.split.read(start, start + 1)))
        index = int(np.searchsorted(edges, start, side="right")) - 1
        while index < self.split.n_documents and edges[index] < stop:
            low, high = max(int(edges[index]), start), min(int(edges[index + 1]) - 1, stop)
            if not begin.is_plain and low < high:
                low = max(low + int(begin.is_set(self.split.read(low, low + 1))), left_out)
            if low < high:
                yield low, high, int(self.split.ordinals[index])
            index += 1

    def batches(
        self, batch_tokens: int, device: torch.device, numbers: Iterable[int] | None = None
    ) -> Iterator[Batch]:
        """Yield all sequences in ascending order, in batches of equal length.

        The last sequence may be shorter, and one that begins with a begin token of its own gets no second one.

        `numbers` restricts them to some batches. Each batch has the same sequences whoever reads it: products of
        matrices of another size round differently.
        """
        of_batch = self._sequences_by_batch(batch_tokens)
        for number in range(len(of_batch)) if numbers is None else numbers:
            yield self.batch(of_batch[number], device)

    def _sequences_by_batch(self, batch_tokens: int) -> list[list[int]]:
        size = max(1, batch_tokens // self.sequence_length)
        stops = np.minimum((self.sequences + 1) * self.room, self.split.n_tokens)
        lengths = stops - self.sequences * self.room
        if self.beginning.token is not None:
            first = self.split.read_at(self.sequences * self.room)
            lengths += first != self.beginning.token
        edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
        sequences = self.sequences.tolist()
        return [
            sequences[first : min(first + size, stop)]
            for start, stop in pairwise(edges.tolist())
            for first in range(start, stop, size)
        ]

    def blocks(self, batch_tokens: int) -> list[range]:
        """Return the numbers of the batches of each block, at most `BLOCKS` blocks in ascending order.

        Sums over tokens depend on their order in the last digits. They are computed block by block, and the blocks
        are added in their order; so processes that take whole blocks get the sums of one process.
        """
        n_batches = len(self._sequences_by_batch(batch_tokens))
        n_blocks = min(BLOCKS, n_batches)
        edges = [i * n_batches // n_blocks for i in range(n_blocks + 1)]
        return [range(low, high) for low, high in pairwise(edges)]

    def batch(self, sequences: list[int], device: torch.device) -> Batch:
        """Return the batch of sequences of equal length."""
        rows, positions, segments, spans, documents = [], [], [], [], []
        offset, begin = 0, self.beginning
        for sequence in sequences:
            start, stop = self.bounds(sequence)
            rows.append(begin.before(self.split.read(start, stop)))
            n_set = len(rows[-1]) - (stop - start)
            positions.append(np.maximum(np.arange(start - n_set, stop), start))
            offset += n_set
            for low, high, ordinal in self._segments(start, stop):
                segments.append((low - start + offset, high - start + offset))
                spans.append((low, high))
                documents.append(ordinal)
            offset += stop - start
        position = np.concatenate(positions)
        segment_of = np.full(len(position), -1, np.int64)
        for index, (low, high) in enumerate(segments):
            segment_of[low:high] = index
        is_left_out = None if begin.is_plain else np.concatenate([begin.left_out(r) for r in rows])
        if is_left_out is not None and begin.token is not None:
            starts = self.split.starts
            begins_document = starts[np.searchsorted(starts, position)] == position
            of_documents = (np.concatenate(rows) == begin.token) & begins_document
            is_left_out |= of_documents & (segment_of < 0)
        key = np.where(segment_of >= 0, sampling_keys(position, self.seed), NEVER)
        span = np.array(spans, np.int64).reshape(-1, 2)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return Batch(
            input_ids=put(np.stack(rows).astype(np.int64)),
            position=put(position),
            key=put(key),
            is_text=put((segment_of >= 0).astype(np.float32)),
            segment_of=put(segment_of),
            segments=segments,
            start=put(span[:, 0]),
            stop=put(span[:, 1]),
            document=put(np.array(documents, np.int64)),
            is_left_out=None if is_left_out is None else put(is_left_out),
        )


def sampling_keys(position: Int64, seed: int) -> Int64:
    """Return one pseudo-random non-negative int64 per position (splitmix64, Steele et al. 2014).

    The members of a bin with the lowest keys are a uniform sample of it. Reservoir sampling would also
    give one, but a different one for each order of the tokens and each number of processes. A key that
    depends only on the position always gives the same sample, so shards can be searched separately and
    merged exactly.
    """
    with np.errstate(over="ignore"):
        x = position.astype(np.uint64) + np.uint64(1)  # as the generator counts its states
        x *= np.uint64(0x9E3779B97F4A7C15)
        x ^= np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x632BE59BD9B4E019)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(1)).astype(np.int64)  # torch has no ordered uint64


def random_positions(
    spans: tuple[Int64, Int64], layer: int, n_neurons: int, count: int, seed: int
) -> Int64:
    """Return positions [H, count] of random text tokens, distinct within a neuron; -1 if too few.

    They depend only on seed, layer and index of the neuron: neurons of the same layer and index in
    twins get the same tokens, so that their scores can be paired.
    """
    starts, stops = spans
    ends = np.cumsum(stops - starts)
    n_text = int(ends[-1]) if len(ends) else 0
    drawn = np.full((n_neurons, count), -1, np.int64)
    taken = min(count, n_text)
    for index in range(n_neurons):
        generator = np.random.default_rng((seed, layer, index))
        drawn[index, :taken] = generator.choice(n_text, taken, replace=False, shuffle=True)
    # Convert the number of a text token to the span that it is in, and then to its position in the split.
    span = np.searchsorted(ends, drawn, side="right").clip(0, max(0, len(ends) - 1))
    before = ends[span] - (stops - starts)[span] if n_text else drawn
    return np.where(drawn >= 0, starts[span] + drawn - before, -1) if n_text else drawn
