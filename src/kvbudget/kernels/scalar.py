"""Entries as scalar codes: levels out of a table or of even steps, whose number may change from entry to entry."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand, packed_width, unpack


@dataclass
class ScalarOperand(Operand):
    """Element d of entry t of row r is ``(v * scale[t] + zero[t]) * spread[h, k, d] + offset[h, k, d]``, or an outlier.

    v is the element's code c, ``c - 2^b / 2`` where codes are ``centered``, or ``table[c]``; h is ``r % H``, and k the
    second of two classes for entries with the most bits. What is None is left out. Entry t of row r is cell ``starts[r] + t``.

    Attributes:
        codes: uint8 ``[C, packed_width(D, bits)]``; with ``levels`` flat bytes, in which cell i begins at ``at[i]``.
        bits: of a code; with ``levels`` the most that a cell may have.
        width: channels D of an entry.
        table: float32 ``[2^bits]``.
        scale, zero: ``[C, 1]`` of one float type.
        spread, offset: float32 ``[H, K, D]``, K 1 or 2.
        levels: uint8 ``[C]``, bits of each cell (0: no codes); ``at``: int64 ``[C]``.
        outliers, places: float16 and int ``[C, c]``, elements set apart and their channels.
    """

    codes: Tensor
    bits: int
    width: int
    starts: Sequence[int]
    table: Tensor | None = None
    centered: bool = False
    scale: Tensor | None = None
    zero: Tensor | None = None
    spread: Tensor | None = None
    offset: Tensor | None = None
    levels: Tensor | None = None
    at: Tensor | None = None
    outliers: Tensor | None = None
    places: Tensor | None = None
    most: int = 512

    def block(self, row: int, begin: int, end: int) -> Tensor:
        cells = slice(self.starts[row] + begin, self.starts[row] + end)
        dense, levels = self._codes(cells)
        if self.table is not None:
            dense = self.table[dense.long()]
        elif self.centered:
            dense = dense - (2.0 ** (levels.float() - 1)).floor()[:, None]
        if self.scale is not None:
            dense = dense * self.scale[cells].float()
        if self.zero is not None:
            dense = dense + self.zero[cells].float()
        for factor, channels in ((True, self.spread), (False, self.offset)):
            if channels is not None:
                own = channels[row % len(channels)]
                own = own[(levels == self.bits).long() if len(own) > 1 else torch.zeros_like(levels, dtype=torch.long)]
                dense = dense * own if factor else dense + own
        if self.outliers is not None and self.places is not None:
            dense = dense.scatter(-1, self.places[cells].long(), self.outliers[cells].float())
        return dense

    def _codes(self, cells: slice) -> tuple[Tensor, Tensor]:
        """Codes ``[n, D]`` float32 of some cells, and their bits ``[n]``."""
        if self.levels is None or self.at is None:
            codes = unpack(self.codes[cells], self.bits, self.width).float()
            return codes, torch.full((len(codes),), self.bits, device=codes.device)
        levels, at = self.levels[cells], self.at[cells]
        codes = torch.zeros(len(levels), self.width, device=levels.device)
        for bits in levels.unique().tolist():
            if bits:
                own = levels == bits
                bytes_of = at[own][:, None] + torch.arange(packed_width(self.width, bits), device=at.device)
                codes[own] = unpack(self.codes[bytes_of], bits, self.width).float()
        return codes, levels
