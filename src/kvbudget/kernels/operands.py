"""What kernels read keys and values from: rows of a column in some storage format, and how codes are packed into bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Operand:
    """What a kernel reads keys or values from: rows of a column in some storage format.

    ``most`` bounds the entries of one `block`, where they have to be decoded into memory first. Where there is a ``basis
    [D, E]`` (``[R, D, E]``: one for each row), entries are the rows times its transpose: whoever calls a kernel turns
    queries for keys by it, and answers of values back.
    """

    starts: Sequence[int]
    most: int = 2**62
    basis: Tensor | None = None

    def block(self, row: int, begin: int, end: int) -> Tensor:
        """Returns entries ``begin:end`` of a row as dense ``[end - begin, D]``."""
        raise NotImplementedError

    def products(self, row: int, begin: int, end: int, query: Tensor) -> Tensor:
        """Products of queries ``[M, D]`` with entries of a row, float32 ``[M, end - begin]``; formats may know a shorter way."""
        return query.float() @ self.block(row, begin, end).float().T

    def weighted(self, row: int, begin: int, end: int, weights: Tensor) -> Tensor:
        """Entries of a row summed with ``weights [M, end - begin]``, float32 ``[M, D]``."""
        return weights @ self.block(row, begin, end).float()


@dataclass
class DenseOperand(Operand):
    """Entries in full precision: ``data [C, D]``."""

    data: Tensor
    starts: Sequence[int]

    def block(self, row: int, begin: int, end: int) -> Tensor:
        start = self.starts[row]
        return self.data[start + begin : start + end]


@dataclass
class TokenQuantOperand(Operand):
    """Integer codes with one scale and zero per entry and group of channels (per-token grouping).

    ``codes [C, packed_width(D, bits)]`` uint8, ``scale, zero [C, D / group]``; an element is ``code * scale + zero``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    starts: Sequence[int]

    def block(self, row: int, begin: int, end: int) -> Tensor:
        at = slice(self.starts[row] + begin, self.starts[row] + end)
        width = self.scale.shape[-1] * self.group
        codes = unpack(self.codes[at], self.bits, width).float().unflatten(-1, (-1, self.group))
        return (codes * self.scale[at, :, None].float() + self.zero[at, :, None].float()).flatten(-2)


@dataclass
class ChannelQuantOperand(Operand):
    """Integer codes with one scale and zero per channel and group of consecutive entries (per-channel grouping).

    ``codes [N, group, packed_width(D, bits)]`` uint8, ``scale, zero [N, D]``; row r's groups begin at ``starts[r]``
    (counted in groups) and its first ``skip[r]`` entries are passed over: entry t of a row is
    ``codes[starts[r] + u // group, u % group]`` with ``u = t + skip[r]``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    starts: Sequence[int]
    skip: Sequence[int] | None = None

    def block(self, row: int, begin: int, end: int) -> Tensor:
        skip = 0 if self.skip is None else self.skip[row]
        begin, end = begin + skip, end + skip
        first, last = begin // self.group, -(-end // self.group)
        at = slice(self.starts[row] + first, self.starts[row] + last)
        codes = unpack(self.codes[at], self.bits, self.scale.shape[-1]).float()
        dense = (codes * self.scale[at, None].float() + self.zero[at, None].float()).flatten(0, 1)
        return dense[begin - first * self.group : end - first * self.group]


@dataclass
class DecodedOperand(Operand):
    """Entries of any format, decoded block by block: ``read(row, begin, end)`` gives entries ``[end - begin, D]``."""

    read: Callable[[int, int, int], Tensor]
    most: int = 512

    def block(self, row: int, begin: int, end: int) -> Tensor:
        return self.read(row, begin, end)


def packed_width(width: int, bits: int) -> int:
    """Bytes that hold ``width`` codes of ``bits`` bits (1, 2, 3, 4 or 8); ``width`` must be a multiple of 8.

    >>> packed_width(64, 4), packed_width(64, 3)
    (32, 24)
    """
    return width * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes ``[..., D]`` (0 .. 2^bits - 1) into uint8 ``[..., D * bits / 8]``.

    Planes of a power-of-two width are packed in slabs: with ``s = 8 / bits`` slabs of ``D / s`` channels, byte i holds
    channel ``i + j * D / s`` at bit ``j * bits``, so that one shift and mask of a byte vector yields consecutive channels.
    Three bits are a 2-bit plane (low bits) followed by a 1-bit plane (high bit).

    >>> pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), 4).tolist()
    [81, 98, 115, 132]
    """
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    slabs = codes.unflatten(-1, (8 // bits, -1))
    packed = slabs[..., 0, :].clone()
    for j in range(1, 8 // bits):
        packed |= slabs[..., j, :] << (j * bits)
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack`: uint8 ``[..., width * bits / 8]`` to uint8 codes ``[..., width]``."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split([width // 4, width // 8], dim=-1)
        return unpack(low, 2, width) | (unpack(high, 1, width) << 2)
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
