"""Allocator over heads: some keep everything, the others share the rest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbudget.budget import solve
from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class WholeHeads(HeadAllocator):
    """Heads keep all their entries in the order that the scorer's ``statistic`` gives (1 first, 0: not at all).

    As many do as leave the others what is protected; those share the rest equally.
    """

    statistic: ClassVar[str | None] = "whole"

    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        held, least = valid.sum(-1).tolist(), (protected & valid).sum(-1).tolist()
        wished = [] if hint is None else sorted(hint.nonzero()[:, 0].tolist(), key=hint.tolist().__getitem__)
        floors = list(least)
        for head in wished:
            if sum(floors) - floors[head] + held[head] > total:
                break
            floors[head] = held[head]
        whole = [floor == most for floor, most in zip(floors, held, strict=True)]
        return solve(max(total, sum(floors)), [float(not w) + 1e-9 for w in whole], floors, held)
