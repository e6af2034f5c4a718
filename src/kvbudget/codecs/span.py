"""A whole span in one or two bits, with one range per channel that its first entries decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.codecs.integer import check_bits
from kvbudget.kernels.encode import HALF_MAX
from kvbudget.kernels.operands import pack, packed_width, unpack
from kvbudget.kernels.scalar import ScalarOperand


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

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        low, high = columns["lowest"].float(), columns["highest"].float()
        scale = (high - low) / (2**self.bits - 1)
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        found = ScalarOperand(columns["codes"], self.bits, low.shape[-1], first)
        found.spread, found.offset = scale[:, None], low[:, None]
        return found

    def state_bytes(self, width: int) -> float:
        return 4 * width

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits)

    def _grid(self, place: Place) -> tuple[Tensor, Tensor]:
        low, high = place.of("lowest").float(), place.of("highest").float()
        return low, (high - low) / (2**self.bits - 1)
