"""Entries of three levels per element, five of them in a byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbudget.kernels.operands import Operand

POWERS = (1, 3, 9, 27, 81)


@dataclass
class TritOperand(Operand):
    """Elements as -a, 0 or a with one a per channel and unit of entries: ``codes [N, bytes]`` uint8, ``magnitude [N, D]``.

    A unit's elements follow each other, entry after entry, five to a byte (`pack_trits`). Row r's units begin at
    ``starts[r]`` (counted in units) and its first ``skip[r]`` entries are passed over, as in `ChannelQuantOperand`.
    """

    codes: Tensor
    magnitude: Tensor
    unit: int
    starts: Sequence[int]
    skip: Sequence[int]

    def block(self, row: int, begin: int, end: int) -> Tensor:
        begin, end = begin + self.skip[row], end + self.skip[row]
        first, last = begin // self.unit, -(-end // self.unit)
        at = slice(self.starts[row] + first, self.starts[row] + last)
        dense = unpack_trits(self.codes[at], self.unit * self.magnitude.shape[-1]).unflatten(1, (self.unit, -1))
        dense = (dense * self.magnitude[at, None].float()).flatten(0, 1)
        return dense[begin - first * self.unit : end - first * self.unit]


def pack_trits(levels: Tensor) -> Tensor:
    """Packs ``levels [N, n]``, each -1, 0 or 1, five to a byte: uint8 ``[N, ceil(n / 5)]``.

    >>> pack_trits(torch.tensor([[-1, 0, 1, -1, -1, 1]])).tolist()
    [[21, 122]]
    """
    trits = pad((levels + 1).to(torch.uint8), (0, -levels.shape[1] % 5), value=1).unflatten(1, (-1, 5))
    return (trits * torch.tensor(POWERS, dtype=torch.uint8, device=levels.device)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_trits`: the first ``count`` levels of each row, float32 ``[N, count]``."""
    return _table().to(packed.device)[packed.long()].flatten(1)[:, :count]


@cache
def _table() -> Tensor:
    """The levels in each byte, ``[256, 5]``."""
    return (torch.arange(256)[:, None] // torch.tensor(POWERS) % 3 - 1).float()
