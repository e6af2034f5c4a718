"""Nested codes: four bits that are a code by themselves, and four more that refine them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kvbudget.codecs.base import Asked, Place, Stage
from kvbudget.kernels.apart import SummedOperand
from kvbudget.kernels.operands import ChannelQuantOperand, Operand, TokenQuantOperand, pack, packed_width, unpack

LOW_BITS = 4


@dataclass(frozen=True)
class Refined(Stage):
    """Adds four bits per element to a min-max integer codec: ``x^ = x^_base + c_low S / 16`` with its scale S.

    ``c_low = clamp(round(e / (S / 16)), -8, 7)`` of what the base leaves, e in [-S/2, S/2], so that both together are nearly a
    code of eight bits (QuantSpec, arXiv 2502.10424). A ``draft`` reads the base alone.
    """

    draft: bool = False

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        return self.base.start(x, row, asked)

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        columns = self.base.encode(x, place)
        left = (x.float() - self.base.decode(columns, place)) / self._step(columns, x.shape[-1]).clamp_min(1e-20)
        low = left.round().clamp(-8, 7).int() + 8
        return columns | {"low": pack(low.unflatten(0, (-1, self.unit)), LOW_BITS)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        base = self.base.decode(columns, place)
        if self.draft:
            return base
        low = unpack(columns["low"], LOW_BITS, base.shape[-1]).flatten(0, 1).float() - 8
        return base + low * self._step(columns, base.shape[-1])

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        """Both halves are affine codes: ``c S + Z`` and ``c_low S / 16 - S / 2``."""
        high = self.base.operand(columns, starts, skip)
        if self.draft or not isinstance(high, (ChannelQuantOperand, TokenQuantOperand)):
            return high if self.draft else None
        step = columns["scale"].float() / 2**LOW_BITS
        codes = columns["low"].view(*high.codes.shape[:-1], columns["low"].shape[-1])
        return SummedOperand([high, replace(high, codes=codes, scale=step, zero=-8 * step, bits=LOW_BITS)])

    def bytes_per_entry(self, width: int) -> float:
        return self.base.bytes_per_entry(width) + packed_width(width, LOW_BITS)

    def _step(self, columns: Mapping[str, Tensor], width: int) -> Tensor:
        """A sixteenth of the base's scale at every element ``[N * unit, D]``."""
        scale = columns["scale"].float() / 2**LOW_BITS
        return scale.repeat_interleave(width // scale.shape[-1], 1).repeat_interleave(self.unit, 0)
