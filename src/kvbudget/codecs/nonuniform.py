"""Non-uniform codes with outliers apart: one codebook per layer, normalized keys per channel and values per entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Codec, Place
from kvbudget.codecs.sparse import index_type
from kvbudget.kernels.encode import HALF_MAX
from kvbudget.kernels.operands import pack, packed_width, unpack
from kvbudget.kernels.scalar import ScalarOperand

SMALLEST = 1e-6
"""Ranges below this count as this, so that constant channels decode to their constant."""


@dataclass(frozen=True)
class NonUniform(Codec):
    """Elements in [-1, 1] as the nearest of 2^b values of the layer (KVQuant, arXiv 2401.18079, section 3).

    ``keys`` are normalized per channel with ``offset`` and ``spread [L, Hkv, D]`` that a calibration found, ``values`` per
    entry with the middle and half of its range without outliers. The ``share`` of an entry's elements that lie farthest out
    (at least one, unless the share is 0) are kept in half precision beside the codes. ``book [L, 2, 2^b]`` holds the values
    that codes are chosen by, ascending, and those that they decode to. `at` takes one layer of each.
    """

    calibrated: ClassVar[str] = "kvquant"

    bits: int = 3
    share: float = 0.01
    side: Literal["keys", "values"] = "keys"
    book: Tensor | None = field(default=None, repr=False, compare=False)
    offset: Tensor | None = field(default=None, repr=False, compare=False)
    spread: Tensor | None = field(default=None, repr=False, compare=False)

    def at(self, layer_idx: int) -> NonUniform:
        if self.book is None:
            return self
        if self.side == "values":
            return replace(self, book=self.book[layer_idx])
        assert self.offset is not None and self.spread is not None
        return replace(self, book=self.book[layer_idx], offset=self.offset[layer_idx], spread=self.spread[layer_idx])

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None and self.book is not None
        x = x.float()
        columns: dict[str, Tensor] = {}
        if self.side == "keys":
            offset, spread = self._of_head(place)
            normal = (x - offset) / spread
            index = farthest(normal, self.share)
        else:
            index = farthest(x - x.median(dim=-1, keepdim=True).values, self.share)
            offset, spread = middle(x, index)
            columns |= {"offset": offset, "spread": spread}
            normal = (x - offset.float()) / spread.float().clamp_min(SMALLEST)
        assign = self.book[0].to(x.device)
        codes = torch.bucketize(normal, (assign[1:] + assign[:-1]) / 2)
        if index.shape[-1]:
            columns["outliers"] = x.gather(-1, index).clamp(-HALF_MAX, HALF_MAX).half()
            columns["outlier_index"] = index.to(index_type(x.shape[-1]))
        return columns | {"codes": pack(codes, self.bits)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None and self.book is not None
        width = columns["codes"].shape[-1] * 8 // self.bits
        if self.side == "keys":
            offset, spread = self._of_head(place)
        else:
            offset, spread = columns["offset"].float(), columns["spread"].float().clamp_min(SMALLEST)
        values = self.book[1].to(columns["codes"].device)
        dense = values[unpack(columns["codes"], self.bits, width).long()] * spread + offset
        if "outliers" in columns:
            dense = dense.scatter(-1, columns["outlier_index"].long(), columns["outliers"].float())
        return dense

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        assert self.book is not None
        codes = columns["codes"]
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        table = self.book[1].float().contiguous().to(codes.device)
        found = ScalarOperand(codes, self.bits, codes.shape[-1] * 8 // self.bits, first, table)
        if self.side == "keys":
            assert self.offset is not None and self.spread is not None
            channels = (x.to(codes.device)[:, None].float() for x in (self.spread.clamp_min(SMALLEST), self.offset))
            found.spread, found.offset = channels
        else:
            found.scale, found.zero = columns["spread"], columns["offset"]
        if "outliers" in columns:
            found.outliers, found.places = columns["outliers"], columns["outlier_index"]
        return found

    def bytes_per_entry(self, width: int) -> float:
        outliers = count_of(width, self.share) * (2 + index_type(width).itemsize)
        return packed_width(width, self.bits) + outliers + (4 if self.side == "values" else 0)

    def _of_head(self, place: Place) -> tuple[Tensor, Tensor]:
        """Offset and spread of the channels of each entry's KV head ``[N, D]``."""
        assert self.offset is not None and self.spread is not None
        heads = place.rows % len(self.offset)
        return self.offset.to(heads.device)[heads], self.spread.to(heads.device)[heads].clamp_min(SMALLEST)


def count_of(width: int, share: float) -> int:
    """Outliers of an entry."""
    return max(1, round(share * width)) if share else 0


def farthest(x: Tensor, share: float) -> Tensor:
    """Indices ``[N, k]`` of the elements of each entry that are farthest from zero."""
    return x.abs().topk(count_of(x.shape[-1], share), dim=-1).indices


def middle(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half of the range of each entry without the elements of ``index``, half precision ``[N, 1]`` each."""
    rest = torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False)
    low = x.masked_fill(~rest, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~rest, -torch.inf).amax(-1, keepdim=True)
    edges = ((high + low) / 2, (high - low) / 2)
    offset, spread = (edge.clamp(-HALF_MAX, HALF_MAX).half() for edge in edges)
    return offset, spread


def codebook(x: Tensor, weight: Tensor, bits: int, rounds: int = 50) -> Tensor:
    """Weighted k-means of numbers ``x, weight [N]``: the ``2^bits`` values, ascending (Lloyd's iteration over sorted sums)."""
    x, order = x.double().sort()
    weight = weight.double()[order]
    count = 2**bits
    zero = x.new_zeros(1)
    mass, moment = (torch.cat([zero, column.cumsum(0)]) for column in (weight, weight * x))
    values = x[((torch.arange(count) + 0.5) / count * len(x)).long()].clone()
    for _ in range(rounds):
        cuts = torch.searchsorted(x, (values[1:] + values[:-1]) / 2)
        edges = torch.cat([torch.zeros_like(cuts[:1]), cuts, torch.full_like(cuts[:1], len(x))])
        total = mass[edges].diff()
        new = torch.where(total > 0, moment[edges].diff() / total.clamp_min(1e-30), values).sort().values
        if torch.equal(new, values):
            break
        values = new
    return values.float()


def q_norm(x: Tensor, values: Tensor) -> Tensor:
    """Values to decode to such that mean and deviation of the decoded data are those of ``x [N]`` (Q-Norm)."""
    decoded = values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)]
    factor = x.std() / decoded.std().clamp_min(1e-12)
    return values * factor + (x.mean() - decoded.mean() * factor)
