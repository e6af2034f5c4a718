"""Asymmetric min-max integer codes (round to nearest), grouped along channels or along tokens.

``m = min(x)``, ``s = (max(x) - m) / (2^b - 1)``, ``c = round((x - m) / s)``, ``x^ = c * s + m`` over each group (KIVI, arXiv
2402.02750, section 3). Scale and zero are stored in half precision and the codes are computed against the stored values;
a constant group gets scale 1 and codes 0, so it decodes to its constant instead of NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbudget import kernels
from kvbudget.codecs.base import Codec, Place
from kvbudget.errors import PolicyError
from kvbudget.kernels.operands import ChannelQuantOperand, Operand, TokenQuantOperand, packed_width, unpack

BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class TokenQuant(Codec):
    """One scale and zero per entry and ``group`` consecutive channels: appendable and evictable entry by entry.

    Codes span the middle ``clip`` of a group's range; what lies outside is clamped.
    """

    placed: ClassVar[bool] = False

    bits: int = 4
    group: int = 32
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise PolicyError(f"a group of {self.group} channels holds nothing to quantize; give at least 1")

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        group = divisor(x.shape[-1], self.group)
        if self.clip < 1:
            x = _clipped(x.float(), group, self.clip)
        codes, scale, zero = kernels.encode_tokens(x, self.bits, group)
        return {"codes": codes, "scale": scale, "zero": zero}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        operand = self.operand(columns, [0], [0])
        return operand.block(0, 0, columns["codes"].shape[0])

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        group = _width(columns["codes"], self.bits) // columns["scale"].shape[-1]
        return TokenQuantOperand(columns["codes"], columns["scale"], columns["zero"], self.bits, group, first)

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits) + 4 * (width // divisor(width, self.group))


@dataclass(frozen=True)
class ChannelQuant(Codec):
    """One scale and zero per channel and ``unit`` consecutive entries: stored and evicted in units of that many."""

    placed: ClassVar[bool] = False

    bits: int = 4
    unit: int = 32
    residual: int = 128
    cyclic: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.unit < 1:
            raise PolicyError(f"a group of {self.unit} entries holds nothing to quantize; give at least 1")
        if self.residual % self.unit:
            raise PolicyError(
                f"residual {self.residual} is not a multiple of the group of {self.unit} entries; "
                f"give residual={-(-self.residual // self.unit) * self.unit}"
            )

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        codes, scale, zero = kernels.encode_units(x, self.bits, self.unit)
        return {"codes": codes, "scale": scale, "zero": zero}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        width = columns["scale"].shape[-1]
        codes = unpack(columns["codes"], self.bits, width).float()
        return (codes * columns["scale"][:, None].float() + columns["zero"][:, None].float()).flatten(0, 1)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        return ChannelQuantOperand(
            columns["codes"], columns["scale"], columns["zero"], self.bits, self.unit, starts, skip
        )

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits) + 4 * width / self.unit


def check_bits(bits: int) -> None:
    """Raises PolicyError unless codes of this many bits can be packed."""
    if bits not in BITS:
        raise PolicyError(f"bits={bits} cannot be packed; give one of {', '.join(map(str, BITS))}")


def _clipped(x: Tensor, group: int, clip: float) -> Tensor:
    """Entries ``[N, D]`` clamped into the middle ``clip`` of the range of their group."""
    grouped = x.unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    cut = (high - low) * ((1 - clip) / 2)
    return grouped.clamp(low + cut, high - cut).flatten(-2)


def divisor(width: int, group: int) -> int:
    """The largest group size of at most ``group`` channels that divides ``width`` (head_dim 80 takes 20 for 32)."""
    return next(g for g in range(min(group, width), 0, -1) if width % g == 0)


def _width(codes: Tensor, bits: int) -> int:
    return codes.shape[-1] * 8 // bits
