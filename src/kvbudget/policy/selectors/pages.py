"""Selector of pages by bounds of their products with the query."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import LookingBack
from kvbudget.policy.selection import rank


@dataclass(frozen=True)
class Pages(LookingBack):
    """Reads the best pages of a KV head, ``share`` of them, and always the newest; the first ``dense`` layers read all.

    A page holds ``size`` positions and scores ``sum_d max(q_d kmin_d, q_d kmax_d)``, an upper bound of its products (Quest,
    arXiv 2406.10774), the largest over the GQA group. A query that reads every page is answered exactly.
    """

    states: ClassVar[tuple[str, ...]] = ("loaded",)

    size: int = 16
    share: float = 0.15
    dense: int = 2

    def read(self, layer_idx: int, query: Tensor, keys: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        if layer_idx < self.dense:
            return visible
        page = positions.clamp_min(0).long() // self.size
        number = int(page.max()) + 1
        shape = (*keys.shape[:2], number, keys.shape[-1])
        index, empty = page[..., None].expand_as(keys), (positions < 0)[..., None]
        low = keys.new_full(shape, math.inf).scatter_reduce(2, index, keys.masked_fill(empty, math.inf), "amin")
        high = keys.new_full(shape, -math.inf).scatter_reduce(2, index, keys.masked_fill(empty, -math.inf), "amax")
        low, high = low.nan_to_num(0.0, 0.0, 0.0), high.nan_to_num(0.0, 0.0, 0.0)
        bound = query.clamp_min(0) @ high.mT[:, :, None] + query.clamp_max(0) @ low.mT[:, :, None]
        spread = page[:, :, None].expand_as(visible)
        filled = torch.zeros(*visible.shape[:3], number, device=keys.device)
        filled = filled.scatter_reduce(-1, spread, visible.float(), "amax") > 0
        last = (filled * torch.arange(number, device=keys.device)).amax(-1, keepdim=True)
        newest = torch.arange(number, device=keys.device) == last
        scores = bound.amax(2).masked_fill(~filled, -math.inf).masked_fill(newest, math.inf)
        count = (self.share * filled.sum(-1, keepdim=True)).ceil().clamp_min(1)
        return ((rank(scores) < count) & filled).gather(-1, spread) & visible
