"""Allocator over layers in which the entries of all layers compete."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import LayerAllocator


@dataclass(frozen=True)
class GlobalTopK(LayerAllocator):
    """One threshold over all layers and heads: a layer keeps as many entries as it has among the best of all."""

    joint: ClassVar[bool] = True

    def rank(self, scores: Sequence[Tensor], total: int) -> list[float]:
        sizes = torch.tensor([score.numel() for score in scores])
        flat = torch.cat([score.flatten() for score in scores])
        best = flat.topk(total, sorted=False).indices.cpu()
        layer = torch.bucketize(best, sizes.cumsum(0), right=True)
        return torch.bincount(layer, minlength=len(scores)).tolist()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0 if count is None else count for count in measured]
