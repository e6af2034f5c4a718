"""A whole span in one or two bits, with one range per channel that its first entries decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.codecs.integer import check_bits
from kvbudget.codecs.rotated import byte_codes, byte_order
from kvbudget.kernels.codebook import CodebookOperand
from kvbudget.kernels.encode import HALF_MAX
from kvbudget.kernels.operands import Operand, pack, packed_width, unpack


@dataclass(frozen=True)
class SpanQuant(Codec):
    """Integer codes over ``shrink`` times the range that a channel has in a row's first coded entries (CalibQuant).

    Shrunk toward ``zero`` as in arXiv 2502.14882 (``[shrink min, shrink max]``) or toward the ``middle`` of the range, which
    suits channels that are far from zero. No scale is kept per entry or group. A channel without a range decodes to its value.
    """

    bits: int = 1
    shrink: float = 0.5
    toward: Literal["zero", "middle"] = "zero"

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        low, high = x.float().aminmax(dim=0)
        still = (high + low) / 2 if self.toward == "middle" else torch.zeros_like(low)
        edges = (torch.where(high > low, still + self.shrink * (edge - still), edge) for edge in (low, high))
        low, high = (edge.clamp(-HALF_MAX, HALF_MAX).half() for edge in edges)
        return {"lowest": low, "highest": high}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        low, scale = self._grid(place)
        codes = ((x.float() - low) / scale.clamp_min(1e-20)).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack(codes, self.bits)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        low, scale = self._grid(place)
        return unpack(columns["codes"], self.bits, low.shape[-1]).float() * scale + low

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        """Packed codes are bytes, and name words of the row's own; channels are in the order of the packing."""
        packed, low, high = columns["codes"], columns["lowest"].float(), columns["highest"].float()
        if self.bits == 3:
            return None
        order = byte_order(self.bits, low.shape[-1], packed.device)
        low, high = (x[:, order].view(len(x), 1, -1, 1, 8 // self.bits) for x in (low, high))
        words = low + (high - low) / (2**self.bits - 1) * byte_codes(self.bits).to(packed.device)
        found = CodebookOperand(packed[:, None], words, starts, skip)
        found.basis = torch.eye(len(order), device=packed.device)[:, order]
        return found

    def state_bytes(self, width: int) -> float:
        return 4 * width

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits)

    def _grid(self, place: Place) -> tuple[Tensor, Tensor]:
        low, high = place.of("lowest").float(), place.of("highest").float()
        return low, (high - low) / (2**self.bits - 1)
