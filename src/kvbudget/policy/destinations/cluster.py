"""Cluster: evicted entries join what resembles them most among their neighbors, and are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.policy.destinations.merge import Group, Joined, Merge, Weights
from kvbudget.policy.matching import ALONE, centroids, match

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache


@dataclass(frozen=True)
class Cluster(Merge):
    """Soft matching of what leaves with its neighbors, in rounds (Chelsea, arXiv 2506.11418).

    In a round the evicted entries at even places of a chunk join the most similar one at an odd place, kept or not; where
    there is none of them, the sides are exchanged. The next round cuts what is left into chunks anew, so that chains end in
    a kept entry. Anchors become the centroids of their clusters, weighted by counts.
    """

    weights: Weights = field(default="count", kw_only=True)
    counts: bool = field(default=True, kw_only=True)

    chunk: int = 128

    def assign(self, layer: LayerCache, row: int, anchors: Group, members: Group) -> Joined:
        order = torch.cat([anchors.position, members.position]).argsort(stable=True)
        keys = torch.cat([anchors.key, members.key]).float()[order]
        count = torch.cat([anchors.count, members.count])[order]
        gone = order >= len(anchors.position)
        goal = torch.arange(len(order), device=order.device)  # whom each entry has joined so far
        left, chunk = goal.clone(), self.chunk
        while bool(gone[left].any()):
            joins, partner = self._round(keys, gone[left], chunk)
            if not len(joins):
                if chunk >= len(left):
                    break  # a single entry, or nobody but evicted ones
                chunk *= 2
                continue
            keys = centroids(keys, count, joins, partner)
            count = count.index_add(0, partner, count[joins])
            target = goal.clone()
            target[left[joins]] = left[partner]
            goal = target[goal]
            stays = torch.ones_like(left, dtype=torch.bool)
            stays[joins] = False
            keys, count, left = keys[stays], count[stays], left[stays]
        ended = (gone & ~gone[goal]).nonzero().flatten()
        return Joined(order[ended] - len(anchors.position), order[goal[ended]])

    def _round(self, keys: Tensor, gone: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Places of entries that join now, and of whom."""
        for odd in (False, True):
            similarity, partner = match(keys, chunk, odd)
            joins = (gone & (similarity > ALONE)).nonzero().flatten()
            if len(joins):
                return joins, partner[joins]
        return joins, partner[joins]
