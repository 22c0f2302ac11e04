"""Windows of activations around tokens of a batch.

Shape legend: N tokens of a batch, H neurons, W tokens of a window, m windows.
"""

import torch

from cratelm.activations.batches import Batch

_WORTH_COPYING = 8
"""a copy of the batch, neuron after neuron, is made when 1 / 8 as many numbers as it has were gathered"""


class BatchWindows:
    """Cuts windows out of the activations [N, H] of a batch.

    A window is one neuron on neighbouring tokens, whose activations lie H numbers apart: each is in another line of
    the cache. From a copy with the tokens of a neuron next to each other, windows of 64 tokens are cut in a fifteenth
    of the time; the copy takes as long as 8,000 windows (N = 8,192, H = 512, one core). So it is made only in batches
    that fill many buffers: the first ones, which are all that a small corpus has.
    """

    def __init__(self, flat: torch.Tensor, batch: Batch, context: int):
        """`context` is the largest that will be asked for."""
        self.flat, self.batch, self.context = flat, batch, context
        self._n_gathered = 0
        self._by_neuron: torch.Tensor | None = None
        """[H, context + N + context] with the first and last activation repeated at the ends"""

    def around(self, row: torch.Tensor, neuron: torch.Tensor, context: int) -> torch.Tensor:
        """Return activations [m, 2 * context] of neuron [m] around row [m], 0 outside the segment.

        The width is fixed, with the chosen token in column `context`, so that all windows of a buffer are one
        tensor; the tables later cut off the columns outside the excerpt.
        """
        offsets = torch.arange(-context, context, device=row.device)
        copied = self._copy(2 * context * len(row))
        if copied is None:
            rows = (row[:, None] + offsets).clamp(0, len(self.flat) - 1)
            values = self.flat[rows, neuron[:, None]]
        else:
            windows = copied[:, self.context - context :].unfold(1, 2 * context, 1)  # [H, >= N, W]
            values = windows[neuron, row]
        return torch.where(self._inside(row, offsets), values, 0.0)

    def at(self, rows: torch.Tensor, neuron: torch.Tensor) -> torch.Tensor:
        """Return activations [m, W] of neuron [m] at rows [m, W]."""
        copied = self._copy(rows.numel())
        if copied is None:
            return self.flat[rows, neuron[:, None]]
        return copied.take(neuron[:, None] * copied.shape[1] + self.context + rows)

    def _inside(self, row: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return whether the token at each offset [W] from row [m] is in its segment, [m, W].

        Beyond the ends of the batch, the first and last token count.
        """
        segment, position = self.batch.segment_of[row], self.batch.position[row]
        before = position - self.batch.start[segment]
        after = self.batch.stop[segment] - position
        before = torch.where(before == row, row.new_tensor(self.context), before)
        after = torch.where(after == len(self.flat) - row, row.new_tensor(self.context), after)
        return (offsets >= -before[:, None]) & (offsets < after[:, None])

    def _copy(self, n_wanted: int) -> torch.Tensor | None:
        """Return the copy, or None where it would take longer than it saves."""
        self._n_gathered += n_wanted
        is_worth = self._n_gathered * _WORTH_COPYING >= self.flat.numel() and self.flat.is_cpu
        if self._by_neuron is None and is_worth:
            n, edge = len(self.flat), self.context
            copy = self.flat.new_empty(self.flat.shape[1], n + 2 * edge)
            # contiguous first: torch transposes a matrix in blocks, but not into a part of another
            copy[:, edge : edge + n] = self.flat.T.contiguous()
            copy[:, :edge] = self.flat[0][:, None]
            copy[:, edge + n :] = self.flat[-1][:, None]
            self._by_neuron = copy
        return self._by_neuron
