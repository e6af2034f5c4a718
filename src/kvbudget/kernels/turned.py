"""Entries that are coded in another basis or before RoPE, and turned when they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand


@dataclass
class TurnedOperand(Operand):
    """Entries of ``base`` times ``matrix [D, D]``, then turned by RoPE at their positions.

    ``cos, sin [P, n]`` float32 are those of every position for each of the n pairs of channels that are turned: channels i
    and i + n, or 2 i and 2 i + 1 (``interleaved``). Entry t of row r is at ``position[entries[r] + t]``, int32 below P.
    """

    base: Operand
    cos: Tensor
    sin: Tensor
    interleaved: bool
    position: Tensor
    entries: Sequence[int]
    matrix: Tensor | None = None
    most: int = 512

    def __post_init__(self) -> None:
        self.starts = self.base.starts

    def block(self, row: int, begin: int, end: int) -> Tensor:
        dense = self.base.block(row, begin, end).float()
        if self.matrix is not None:
            dense = dense @ self.matrix
        pairs = self.cos.shape[1]
        at = self.position[self.entries[row] + begin : self.entries[row] + end].long()
        cos, sin = self.cos[at], self.sin[at]
        turning, rest = dense[:, : 2 * pairs], dense[:, 2 * pairs :]
        first, second = turning.unflatten(1, (-1, 2)).unbind(2) if self.interleaved else turning.chunk(2, 1)
        both = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(both, 2).flatten(1) if self.interleaved else torch.cat(both, 1)
        return torch.cat([turned, rest], 1)
