"""Allocators over heads in which some heads keep everything and the others the same number of entries."""

import sys
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.budget import solve
from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class PinnedHeads(HeadAllocator):
    """Heads ``heads[layer_idx]`` keep every entry; the budget is solved for what all others keep (RazorAttention).

    With a ``window``, those keep no more than ``sinks + max(window, seen / compression)``, whatever the budget allows.
    """

    heads: tuple[tuple[int, ...], ...] = ()
    sinks: int = 0
    window: int = 0
    compression: float = 5.0

    @property
    def bounded(self) -> bool:
        return self.window > 0

    def pinned(self, layer_idx: int) -> Container[int]:
        return self.heads[layer_idx] if self.heads else ()

    def most(self, seen: int) -> int:
        return min(seen, self.sinks + max(self.window, int(seen / self.compression))) if self.window else seen

    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        return solve(total, [1.0] * len(valid), 0, valid.sum(-1))


@dataclass(frozen=True)
class PinnedLayers(PinnedHeads):
    """All heads of the model's first ``layers`` layers keep every entry."""

    layers: int = 0

    def pinned(self, layer_idx: int) -> Container[int]:
        return range(sys.maxsize) if layer_idx < self.layers else ()


def strongest(scores: Tensor, share: float) -> Tensor:
    """The ``share`` of all heads with the highest ``scores [L, Hkv]`` (at least one unless 0): bool ``[L, Hkv]``.

    Cells without a head have a negative score.
    """
    number = max(1, round(share * int((scores >= 0).sum()))) if share else 0
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(number).indices] = True
    return chosen.view(scores.shape)
