"""Outliers kept beside the codes, and what they leave behind coded by another codec."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Place, Stage
from kvbudget.kernels.encode import HALF_MAX


def index_type(size: int) -> torch.dtype:
    """The smallest type that numbers ``size`` elements."""
    return torch.uint8 if size <= 256 else torch.int16


@dataclass(frozen=True)
class Outliers(Stage):
    """Keeps the largest and the smallest elements of each vector in half precision; the mean takes their place before coding.

    Vectors are the entries (``axis="entry"``), or the channels of a unit of entries (``axis="unit"``). Half of ``share`` of
    their elements are kept at each end, at least one.
    """

    share: float = 0.02
    axis: Literal["entry", "unit"] = "entry"

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        return self.base.start(self._taken(x)[0], row, asked)

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        rest, index, values = self._taken(x)
        size = self.unit if self.axis == "unit" else x.shape[-1]
        own = {"outlier_index": index.to(index_type(size)), "outliers": values.clamp(-HALF_MAX, HALF_MAX).half()}
        return self.base.encode(rest, place) | own

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        dense = self._vectors(self.base.decode(columns, place))
        index, values = columns["outlier_index"].long(), columns["outliers"].float()
        return dense.scatter(1 if self.axis == "unit" else -1, index, values).reshape(-1, dense.shape[-1])

    def bytes_per_entry(self, width: int) -> float:
        size, vectors = (self.unit, width / self.unit) if self.axis == "unit" else (width, 1)
        return self.base.bytes_per_entry(width) + vectors * 2 * self._count(size) * (2 + index_type(size).itemsize)

    def _count(self, size: int) -> int:
        return max(1, round(self.share / 2 * size))

    def _vectors(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.unit)) if self.axis == "unit" else x

    def _taken(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left to code in the shape of x, and indices and values of the outliers."""
        vectors = self._vectors(x.float())
        dim = 1 if self.axis == "unit" else -1
        count = self._count(vectors.shape[dim])
        order = vectors.argsort(dim=dim, stable=True)
        size = order.shape[dim]
        index = torch.cat([order.narrow(dim, 0, count), order.narrow(dim, size - count, count)], dim=dim)
        values = vectors.gather(dim, index)
        mean = vectors.mean(dim, keepdim=True).expand_as(values)
        return vectors.scatter(dim, index, mean).reshape(x.shape), index, values
