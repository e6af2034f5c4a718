"""Element-wise number formats: bfloat16, 8-bit floats and posits, decoded right before they are used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.kernels.operands import DenseOperand, Operand
from kvbudget.kernels.scalar import ScalarOperand

FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
HEADROOM = 2.0
"""Later entries may exceed the first ones' largest value by this; a format with exponents loses nothing by it."""


@dataclass(frozen=True)
class BFloat16(Codec):
    """The upper half of a float32, rounded to nearest even; attended as it is stored."""

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        return {"codes": x.bfloat16()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        return columns["codes"].float()

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        return DenseOperand(columns["codes"], [start + s for start, s in zip(starts, skip, strict=True)])

    def bytes_per_entry(self, width: int) -> float:
        return 2 * width


@dataclass(frozen=True)
class Float8(Codec):
    """8-bit floats with one scale per row, such that its first entries reach half of the format's range.

    The scale is found once and stays (as in vLLM and transformers, there per layer); what exceeds the range is clamped.
    """

    kind: str = "fp8_e4m3"

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        most = HEADROOM * x.float().abs().amax() / torch.finfo(FLOATS[self.kind]).max
        return {"scale": torch.where(most > 0, most, torch.ones_like(most))[None]}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        largest = torch.finfo(FLOATS[self.kind]).max
        scaled = (x.float() / place.of("scale")).clamp(-largest, largest)
        return {"codes": scaled.to(FLOATS[self.kind]).view(torch.uint8)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        return columns["codes"].view(FLOATS[self.kind]).float() * place.of("scale")

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        return _scaled(columns["codes"], float8_values(self.kind), columns["scale"], starts, skip)

    def state_bytes(self, width: int) -> float:
        return 4

    def bytes_per_entry(self, width: int) -> float:
        return width


@dataclass(frozen=True)
class Posit(Codec):
    """Posits of 8 or 16 bits with ``es`` exponent bits, scaled by a power of two per row that brings its median to one.

    Precision is best near one. Rounds to the nearest posit, never to zero or NaR; ties go to the smaller magnitude.
    """

    bits: int = 8
    es: int = 0

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        median = x.float().abs().median()
        exponent = torch.where(median > 0, median.log2().round().clamp(-60, 60), torch.zeros_like(median))
        return {"scale": torch.exp2(exponent)[None]}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        return {"codes": to_posit(x.float() / place.of("scale"), self.bits, self.es)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        return from_posit(columns["codes"], self.bits, self.es) * place.of("scale")

    def operand(
        self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]
    ) -> ScalarOperand | None:
        if self.bits != 8:
            return None
        codes = columns["codes"].view(torch.uint8)
        return _scaled(codes, signed_posit_values(8, self.es), columns["scale"], starts, skip)

    def state_bytes(self, width: int) -> float:
        return 4

    def bytes_per_entry(self, width: int) -> float:
        return width * self.bits / 8


def _scaled(codes: Tensor, table: Tensor, scale: Tensor, starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
    """Bytes that a table gives a meaning, with a scale per row ``[R, 1]``."""
    first = [start + s for start, s in zip(starts, skip, strict=True)]
    width = codes.shape[-1]
    found = ScalarOperand(codes, 8, width, first, table.to(codes.device))
    found.spread = scale[:, None].float().expand(-1, 1, width).contiguous()
    return found


@cache
def float8_values(kind: str) -> Tensor:
    """Values of all 8-bit floats of a kind by their code, float32 ``[256]``."""
    return torch.arange(256, dtype=torch.uint8).view(FLOATS[kind]).float()


@cache
def posit_values(bits: int, es: int) -> Tensor:
    """Values of the positive posits by their code from 1 on: float32 ``[2^(bits - 1) - 1]``, ascending.

    After the sign, a run of m equal bits gives ``k = m - 1`` (ones) or ``-m`` (zeros), ended by the opposite bit; then es
    exponent bits e and the fraction f: ``(1 + f) 2^(k 2^es + e)``. Exponent bits that are cut off are zeros.

    >>> posit_values(8, 0)[[0, 63, 126]].tolist()
    [0.015625, 1.0, 64.0]
    """
    values = []
    for code in range(1, 2 ** (bits - 1)):
        text = f"{code:0{bits - 1}b}"
        run = len(text) - len(text.lstrip(text[0]))
        rest = text[run + 1 :]
        exponent = int((rest[:es] + "0" * es)[:es] or "0", 2)
        fraction = rest[es:]
        part = int(fraction, 2) / 2 ** len(fraction) if fraction else 0.0
        scale = (run - 1 if text[0] == "1" else -run) * 2**es + exponent
        values.append((1 + part) * 2.0**scale)
    return torch.tensor(values)


def to_posit(x: Tensor, bits: int, es: int) -> Tensor:
    """Codes of the nearest posits in two's complement: int8 or int16 in the shape of ``x``."""
    values = posit_values(bits, es).to(x.device)
    nearest = torch.bucketize(x.abs(), (values[1:] + values[:-1]) / 2) + 1
    return (nearest * x.sign().long()).to(torch.int8 if bits == 8 else torch.int16)


def from_posit(codes: Tensor, bits: int, es: int) -> Tensor:
    """Float32 values of codes; NaR, which is never written, counts as zero."""
    return signed_posit_values(bits, es).to(codes.device)[codes.long() & (2**bits - 1)]


@cache
def signed_posit_values(bits: int, es: int) -> Tensor:
    """Values of all posits by their code in two's complement, float32 ``[2^bits]``."""
    values = posit_values(bits, es)
    return torch.cat([values.new_zeros(1), values, values.new_zeros(1), -values.flip(0)])
