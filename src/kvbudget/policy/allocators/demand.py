"""Allocator over heads in proportion to what each of them asks for."""

from dataclasses import dataclass

from torch import Tensor

from kvbudget.budget import solve
from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class ByDemand(HeadAllocator):
    """A head asks for its entries that score at least ``threshold``; all get what they ask for, or the same share of it.

    Where they ask for less than there is, the rest is left unused.
    """

    threshold: float = 0.0

    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        wanted = (((scores >= self.threshold) | protected) & valid).sum(-1)
        least = (protected & valid).sum(-1).tolist()
        return solve(max(total, sum(least)), wanted.clamp_min(1).tolist(), least, wanted.tolist())
