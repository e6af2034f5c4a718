"""Codes with low-rank and sparse additions, never written out for few queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand


@dataclass
class CorrectedOperand(Operand):
    """Entries of ``base`` in units of ``unit`` (starts and skip as in `ChannelQuantOperand`), and what is added to them.

    Low rank: ``projected [N, unit, r]`` times the transpose of ``directions [R, D, r]``. Single elements: ``delta`` at
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
            added += self.projected[at].flatten(0, 1).float() @ self.directions[row].float().T
        return dense + added[offset : offset + end - begin]

    def added_logits(self, row: int, query: Tensor, length: int) -> Tensor:
        """What the additions to a row's first ``length`` entries give with ``query [M, D]``: ``[M, length]``."""
        at, offset = self._units(row, 0, length)
        total = query.new_zeros(len(query), (at.stop - at.start) * self.unit)
        if self.projected is not None and self.directions is not None:
            total += (query @ self.directions[row].float()) @ self.projected[at].flatten(0, 1).float().T
        if self.index is not None and self.delta is not None:
            if self.by_entry:
                total += (query[:, self.index[at].long()] * self.delta[at].float()).sum(-1)
            else:
                terms = query[:, None, None] * self.delta[at].float()
                total.index_add_(1, self._places(at), terms.flatten(1))
        return total[:, offset : offset + length]

    def added_values(self, row: int, weights: Tensor) -> Tensor:
        """The additions to a row's first entries, weighted by ``weights [M, length]``: ``[M, D]``."""
        at, offset = self._units(row, 0, weights.shape[1])
        padding = (offset, (at.stop - at.start) * self.unit - offset - weights.shape[1])
        spread = torch.nn.functional.pad(weights.float(), padding)
        out = torch.zeros((), device=weights.device)
        if self.projected is not None and self.directions is not None:
            out = (spread @ self.projected[at].flatten(0, 1).float()) @ self.directions[row].float().T
        if self.index is not None and self.delta is not None:
            delta = self.delta[at].float()
            if self.by_entry:
                width = self.base.block(row, 0, 0).shape[-1]
                terms = (spread[:, :, None] * delta).flatten(1)
                out = out + weights.new_zeros(len(weights), width).index_add_(1, self.index[at].flatten().long(), terms)
            else:
                picked = spread[:, self._places(at)].unflatten(1, delta.shape)
                out = out + (picked * delta).sum((1, 2))
        return out

    def _units(self, row: int, begin: int, end: int) -> tuple[slice, int]:
        """Units that hold entries ``begin:end`` of a row, and where in them the first one is."""
        begin, end = begin + self.skip[row], end + self.skip[row]
        first = begin // self.unit
        return slice(self.starts[row] + first, self.starts[row] - (-end // self.unit)), begin - first * self.unit

    def _places(self, at: slice) -> Tensor:
        """Which of the entries of some units the single elements belong to, flat."""
        assert self.index is not None
        index = self.index[at].long()
        return (index + torch.arange(len(index), device=index.device)[:, None, None] * self.unit).flatten()
