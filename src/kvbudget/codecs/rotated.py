"""Orthogonal transforms of entries before they are coded, and scalar codes that are best for normal data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place, Stage
from kvbudget.kernels.reference import pack, packed_width, unpack

Kind = Literal["hadamard", "random"]


@dataclass(frozen=True)
class Rotated(Stage):
    """Codes ``x M`` instead of ``x [N, D]`` with an orthogonal matrix M, the same everywhere, that spreads outlier channels.

    ``hadamard``: see `hadamard`; ``random``: from the QR decomposition of a normal matrix of this ``seed``.
    """

    kind: Kind = "hadamard"
    seed: int = 0

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        return self.base.start(self._turn(x), row, asked)

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        return self.base.encode(self._turn(x), place)

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        turned = self.base.decode(columns, place)
        return turned @ self._matrix(turned).T

    def bytes_per_entry(self, width: int) -> float:
        return self.base.bytes_per_entry(width)

    def _turn(self, x: Tensor) -> Tensor:
        return x.float() @ self._matrix(x)

    def _matrix(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        matrix = hadamard(width) if self.kind == "hadamard" else random_rotation(width, self.seed)
        return matrix.to(x.device)


@cache
def hadamard(width: int) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix ``[D, D]``; where D is ``m 2^k`` with an odd m, times the cosine basis of order m.

    >>> (hadamard(4) * 2).tolist()[1]
    [1.0, -1.0, 1.0, -1.0]
    """
    odd = width // (width & -width)
    step = torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi / odd * (step + 0.5) * step[:, None]) * math.sqrt(2 / odd)
    matrix[0] /= math.sqrt(2)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(matrix) < width:
        matrix = torch.kron(pair, matrix)
    return matrix.float()


@cache
def random_rotation(width: int, seed: int) -> Tensor:
    """Random orthogonal matrix ``[D, D]``, uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


@dataclass(frozen=True)
class NormalCodes(Codec):
    """The norm of an entry in half precision, and each element in the nearest of the 2^b best values for normal data.

    ``y = x sqrt(D) / |x|`` has elements near N(0, 1) where x has been rotated at random; decodes to ``|x| y^ / sqrt(D)``.
    """

    bits: int = 4

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        x = x.float()
        largest = torch.finfo(torch.float16).max
        norm = x.norm(dim=-1, keepdim=True).clamp_max(largest)
        values = lloyd_max(self.bits).to(x.device)
        unit = x * (math.sqrt(x.shape[-1]) / norm.clamp_min(1e-20))
        codes = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
        return {"codes": pack(codes, self.bits), "norm": norm.half()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        packed, values = columns["codes"], lloyd_max(self.bits).to(columns["codes"].device)
        width = packed.shape[-1] * 8 // self.bits
        return values[unpack(packed, self.bits, width).long()] * columns["norm"].float() / math.sqrt(width)

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits) + 2


@cache
def lloyd_max(bits: int) -> Tensor:
    """The 2^b values with the least mean squared error for N(0, 1), ascending, float32 (Max 1960, Lloyd 1982).

    >>> [round(x, 4) for x in lloyd_max(2).tolist()]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    count = 2**bits
    values = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.full((1,), math.inf, dtype=torch.float64)
    for _ in range(20000 if bits < 8 else 2000):
        edges = torch.cat([-infinite, (values[1:] + values[:-1]) / 2, infinite])
        density, below = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), normal.cdf(edges)
        new = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        if bool((new - values).abs().max() < 1e-9):
            break
        values = new
    return values.float()


@dataclass(frozen=True)
class SignSketch(Stage):
    """Adds the residual of ``base`` as signs of a random projection S and its norm (QJL, arXiv 2406.03482).

    ``r^ = |r| sqrt(pi / 2) / D S^T sign(S r)`` with a normal S ``[D, D]`` makes inner products unbiased over S, with more
    variance than a bit more in the base.
    """

    base: Codec = field(kw_only=True)
    seed: int = 1

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        columns = self.base.encode(x, place)
        residual = x.float() - self.base.decode(columns, place)
        signs = residual @ self._sketch(x.shape[-1], x.device).T > 0
        return columns | {"signs": pack(signs, 1), "residual_norm": residual.norm(dim=-1, keepdim=True).half()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        base = self.base.decode(columns, place)
        width = base.shape[-1]
        signs = unpack(columns["signs"], 1, width).float() * 2 - 1
        scale = columns["residual_norm"].float() * (math.sqrt(math.pi / 2) / width)
        return base + scale * (signs @ self._sketch(width, base.device))

    def bytes_per_entry(self, width: int) -> float:
        return self.base.bytes_per_entry(width) + packed_width(width, 1) + 2

    def _sketch(self, width: int, device: torch.device) -> Tensor:
        return torch.randn(width, width, generator=torch.Generator().manual_seed(self.seed)).to(device)
