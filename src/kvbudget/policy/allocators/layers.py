"""Allocators over layers: weights for the budget solver, one entry of the table per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbudget.policy.base import LayerAllocator


@dataclass(frozen=True)
class Uniform(LayerAllocator):
    """Every layer gets the same."""

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0] * len(measured)


@dataclass(frozen=True)
class Pyramid(LayerAllocator):
    """A linear ramp over layers: selected entries fall from ``2 b - b / beta`` to ``b / beta`` around their mean b.

    Source: PyramidKV, arXiv 2406.02069, section 3.
    """

    beta: float = 20.0

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        last = max(len(measured) - 1, 1)
        low = 1 / self.beta
        high = 2 - low
        return [high - index * (high - low) / last for index in range(len(measured))]
