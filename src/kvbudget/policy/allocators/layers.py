"""Allocators over layers: weights for the budget solver, one entry of the table per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbudget.policy.base import LayerAllocator


@dataclass(frozen=True)
class Uniform(LayerAllocator):
    """Every layer gets the same."""

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0] * len(measured)
