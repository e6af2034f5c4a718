"""Orthogonal transforms of entries before they are coded, and scalar codes that are best for normal data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place, Stage
from kvbudget.codecs.codebook import codewords, nearest
from kvbudget.codecs.integer import divisor
from kvbudget.kernels.apart import JoinedOperand
from kvbudget.kernels.operands import Operand, pack, packed_width, unpack
from kvbudget.kernels.scalar import ScalarOperand

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

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        found = self.base.operand(columns, starts, skip)
        if found is not None:
            matrix = self._matrix(found.block(0, 0, 0))
            found.basis = matrix if found.basis is None else matrix @ found.basis
        return found

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
    matrix = cosines(width // (width & -width)).double()
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(matrix) < width:
        matrix = torch.kron(pair, matrix)
    return matrix.float()


@cache
def cosines(width: int) -> Tensor:
    """Orthonormal cosine basis (DCT-II), float32 ``[D, D]``, one frequency per row."""
    step = torch.arange(width, dtype=torch.float64)
    matrix = torch.cos(math.pi / width * (step + 0.5) * step[:, None]) * math.sqrt(2 / width)
    matrix[0] /= math.sqrt(2)
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

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        codes = columns["codes"]
        width = codes.shape[-1] * 8 // self.bits
        table = lloyd_max(self.bits).to(codes.device) / math.sqrt(width)
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        return ScalarOperand(codes, self.bits, width, first, table, scale=columns["norm"])

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

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        """The base's codes beside the signs, which ask for ``S q``."""
        found = self.base.operand(columns, starts, skip)
        if found is None or self.unit > 1:
            return None
        width, device = columns["signs"].shape[-1] * 8, columns["signs"].device
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        table = torch.tensor([-1.0, 1.0], device=device) * (math.sqrt(math.pi / 2) / width)
        signs = ScalarOperand(columns["signs"], 1, width, first, table, scale=columns["residual_norm"])
        basis = torch.eye(width, device=device) if found.basis is None else found.basis
        both = JoinedOperand([found, signs], [width, width])
        both.basis, found.basis = torch.cat([basis, self._sketch(width, device).T], -1), None
        return both

    def bytes_per_entry(self, width: int) -> float:
        return self.base.bytes_per_entry(width) + packed_width(width, 1) + 2

    def _sketch(self, width: int, device: torch.device) -> Tensor:
        return torch.randn(width, width, generator=torch.Generator().manual_seed(self.seed)).to(device)


@dataclass(frozen=True)
class GridCodes(Codec):
    """Pairs of rotated channels as points of a grid that is good for two normal numbers (HIGGS, arXiv 2411.17525).

    Each ``group`` of channels (the largest divisor of them up to it) keeps its norm in half precision and is turned by a
    randomized Hadamard matrix; a pair takes ``2 bits`` bits, the nearest of ``4^bits`` points. Decodes to the norm times
    the points, turned back.
    """

    placed: ClassVar[bool] = False

    bits: int = 2
    group: int = 1024

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        group = divisor(x.shape[-1], self.group)
        turned = x.float().unflatten(-1, (-1, group)) @ randomized(group).to(x.device)
        norm = turned.norm(dim=-1, keepdim=True).clamp_max(torch.finfo(torch.float16).max).half()
        pairs = (turned * (math.sqrt(group) / norm.float().clamp_min(1e-20))).reshape(1, -1, 2)
        codes = nearest(pairs, normal_grid(self.bits).to(x.device)[None])[0]
        halves = torch.stack([codes >> self.bits, codes & (2**self.bits - 1)], -1)
        return {"codes": pack(halves.view(len(x), -1), self.bits), "norm": norm[..., 0]}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        packed, norm = columns["codes"], columns["norm"].float()
        width = packed.shape[-1] * 8 // self.bits
        halves = unpack(packed, self.bits, width).long().unflatten(-1, (-1, 2))
        points = normal_grid(self.bits).to(packed.device)[(halves[..., 0] << self.bits) + halves[..., 1]]
        turned = points.flatten(1).unflatten(1, (norm.shape[1], -1))
        group = turned.shape[-1]
        return (turned * (norm[..., None] / math.sqrt(group)) @ randomized(group).to(packed.device).T).flatten(1)

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.bits) + 2 * width / divisor(width, self.group)


@cache
def randomized(width: int) -> Tensor:
    """`hadamard` after random signs with a fixed seed, so that a constant vector is spread too."""
    signs = torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return signs * hadamard(width)


@cache
def normal_grid(bits: int) -> Tensor:
    """``4^bits`` points ``[n, 2]`` for two independent N(0, 1) numbers, by k-means over 2^15 draws with a fixed seed."""
    draws = torch.randn(1, 2**15, 2, generator=torch.Generator().manual_seed(0))
    return codewords(draws, 4**bits, steps=25)[0]
