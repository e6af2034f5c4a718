"""Outliers kept beside the codes, and what they leave behind coded by another codec."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place, Stage
from kvbudget.kernels.corrected import CorrectedOperand
from kvbudget.kernels.encode import HALF_MAX
from kvbudget.kernels.operands import Operand


def index_type(size: int) -> torch.dtype:
    """The smallest type that numbers ``size`` elements."""
    return torch.uint8 if size <= 256 else torch.int16


@dataclass(frozen=True)
class Outliers(Stage):
    """Keeps the largest and the smallest elements of each vector; the mean takes their place before coding.

    What is kept, in half precision, is the difference from what the codes give, so that the two can be added up. Vectors
    are the entries (``axis="entry"``), or the channels of a unit of entries (``axis="unit"``). Half of ``share`` of their
    elements are kept at each end, at least one.
    """

    share: float = 0.02
    axis: Literal["entry", "unit"] = "entry"

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        return self.base.start(self._taken(x)[0], row, asked)

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        rest, index, values = self._taken(x)
        size = self.unit if self.axis == "unit" else x.shape[-1]
        columns = self.base.encode(rest, place)
        missed = values - self._vectors(self.base.decode(columns, place)).gather(self._dim, index)
        own = {"outlier_index": index.to(index_type(size)), "outliers": missed.clamp(-HALF_MAX, HALF_MAX).half()}
        return columns | own

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        dense = self._vectors(self.base.decode(columns, place))
        index, values = columns["outlier_index"].long(), columns["outliers"].float()
        return dense.scatter_add(self._dim, index, values).reshape(-1, dense.shape[-1])

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        found = corrected(self.base, columns, starts, skip)
        if found is None or (self.axis == "entry" and self.unit > 1):
            return None
        index, values = columns["outlier_index"], columns["outliers"]
        return replace(found, index=index, delta=values, by_entry=self.axis == "entry")

    def bytes_per_entry(self, width: int) -> float:
        size, vectors = (self.unit, width / self.unit) if self.axis == "unit" else (width, 1)
        return self.base.bytes_per_entry(width) + vectors * 2 * self._count(size) * (2 + index_type(size).itemsize)

    @property
    def _dim(self) -> int:
        """The dimension of `_vectors` that a vector runs along."""
        return 1 if self.axis == "unit" else -1

    def _count(self, size: int) -> int:
        return max(1, round(self.share / 2 * size))

    def _vectors(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.unit)) if self.axis == "unit" else x

    def _taken(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left to code in the shape of x, and indices and values of the outliers."""
        vectors = self._vectors(x.float())
        dim = self._dim
        count = self._count(vectors.shape[dim])
        order = vectors.argsort(dim=dim, stable=True)
        size = order.shape[dim]
        index = torch.cat([order.narrow(dim, 0, count), order.narrow(dim, size - count, count)], dim=dim)
        values = vectors.gather(dim, index)
        mean = vectors.mean(dim, keepdim=True).expand_as(values)
        return vectors.scatter(dim, index, mean).reshape(x.shape), index, values


def corrected(
    base: Codec, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]
) -> CorrectedOperand | None:
    """The operand of a codec, ready for additions; None where it has none, or one in a turned basis."""
    found = base.operand(columns, starts, skip)
    if found is None or found.basis is not None:
        return None
    return found if isinstance(found, CorrectedOperand) else CorrectedOperand(found, base.unit, starts, skip)
