"""Allocators over layers by a fixed importance of each, from a calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbudget.budget import solve
from kvbudget.policy.base import LayerAllocator


@dataclass(frozen=True)
class ByImportance(LayerAllocator):
    """``least + importance (C L - least L)`` entries for a layer, at most ``most C`` (CompressKV, arXiv 2508.02401).

    C is the mean over the L layers, and ``importance`` sums to one over the layers that a budget governs; what the limits
    cut off is shared out in proportion.
    """

    importance: tuple[float, ...] = ()
    least: int = 32
    most: float = 3.0

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        number = len(measured)
        spare = max(0.0, mean - self.least) * number
        importance = self.importance or [1 / number] * number
        entries = [min(self.least + share * spare, self.most * mean) for share in importance]
        # The weights share out what no layer protects.
        return [max(n - (floor - 1), 1e-3) for n in entries]


@dataclass(frozen=True)
class ByShift(LayerAllocator):
    """``(1 - x)^alpha`` of the budget for a layer, at least ``least`` of the mean (EpiCache, arXiv 2509.17396).

    x is ``similarity``, one for each layer that a budget governs, brought to [0, 1] over them; layers that are all alike
    share equally.
    """

    similarity: tuple[float, ...] = ()
    alpha: float = 1.1
    least: float = 0.25

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        similarity = self.similarity or (1.0,) * len(measured)
        low, high = min(similarity), max(similarity)
        shares = [((high - x) / (high - low)) ** self.alpha if high > low else 1.0 for x in similarity]
        entries = solve(
            int(mean * len(shares)), shares, int(mean * self.least), [int(mean * len(shares))] * len(shares)
        )
        # The weights share out what no layer protects.
        return [max(n - (floor - 1), 1e-3) for n in entries]
