"""Codes with low-rank and sparse additions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbudget.kernels.operands import Operand


@dataclass
class CorrectedOperand(Operand):
    """Entries of ``base`` in units of ``unit`` (starts and skip as in `ChannelQuantOperand`), and what is added to them.

    Low rank: ``projected [N, unit, r]`` float16 times ``directions [R, r, D]`` float32. Single elements: ``delta`` at
    ``index``, which are ``[N, c, D]`` places in the unit per channel, or (``by_entry``) ``[N, c]`` channels per entry of
    units of one. GEAR, arXiv 2403.05527.
    """

    base: Operand
    unit: int
    starts: Sequence[int]
    skip: Sequence[int]
    projected: Tensor | None = None
    directions: Tensor | None = None
    index: Tensor | None = None
    delta: Tensor | None = None
    by_entry: bool = False

    def block(self, row: int, begin: int, end: int) -> Tensor:
        dense = self.base.block(row, begin, end).float()
        at, offset = self._units(row, begin, end)
        added = dense.new_zeros((at.stop - at.start) * self.unit, dense.shape[-1])
        if self.index is not None and self.delta is not None:
            delta, index = self.delta[at].float(), self.index[at].long()
            if self.by_entry:
                added.scatter_add_(1, index, delta)
            else:
                added.unflatten(0, (-1, self.unit)).scatter_add_(1, index, delta)
        if self.projected is not None and self.directions is not None:
            added += self.projected[at].flatten(0, 1).float() @ self.directions[row]
        return dense + added[offset : offset + end - begin]

    def _units(self, row: int, begin: int, end: int) -> tuple[slice, int]:
        """Units that hold entries ``begin:end`` of a row, and where in them the first one is."""
        begin, end = begin + self.skip[row], end + self.skip[row]
        first = begin // self.unit
        return slice(self.starts[row] + first, self.starts[row] - (-end // self.unit)), begin - first * self.unit
