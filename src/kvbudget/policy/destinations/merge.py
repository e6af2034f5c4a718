"""Merge: evicted entries join the kept entry that they resemble most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbudget.policy.base import Destination, Evicted

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache

BLOCK = 2**20
"""Similarities that are held at a time."""
THRESHOLD = "merge threshold"


@dataclass(frozen=True)
class MergeNearest(Destination):
    """Merges an evicted entry into the kept one with the nearest key where it is near enough, else drops it.

    D2O (arXiv 2406.13035, section 3.3): ``u_i`` is the best cosine of an evicted key to the kept keys of its KV head; the
    threshold of a head is ``mean(u)`` at first and ``alpha * threshold + beta * mean(u)`` afterwards; entries with
    ``u_i >= threshold`` join their anchor, ``e / (e + sum exp(u))`` of it and ``exp(u_i) / (e + sum exp(u))`` of each member,
    keys and values alike. Entries that a codec holds are never coded again, so they are no anchors.
    """

    alpha: float = 0.5
    beta: float = 0.5

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return 4.0

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        thresholds = layer.statistics.get(THRESHOLD)
        if thresholds is None:
            thresholds = torch.full((layer.num_rows,), math.nan, device=evicted.key.device)
        thresholds = thresholds.clone()
        keys, values = evicted.key.split(evicted.counts), evicted.value.split(evicted.counts)
        for row, count in enumerate(evicted.counts):
            anchors = [segment.writable(row) for segment in layer.main if segment.lengths[row]]
            sizes = [len(key) for key, _ in anchors]
            if not count or not sum(sizes):
                continue
            similarity, nearest = _nearest(keys[row], torch.cat([key for key, _ in anchors]))
            mean = similarity.mean()
            last = thresholds[row]
            thresholds[row] = torch.where(last.isnan(), mean, self.alpha * last + self.beta * mean)
            near = similarity >= thresholds[row]
            begin = 0
            for (key, value), size in zip(anchors, sizes, strict=True):
                here = near & (nearest >= begin) & (nearest < begin + size)
                if bool(here.any()):
                    joined = (nearest[here] - begin, similarity[here])
                    _join(key, keys[row][here], *joined)
                    _join(value, values[row][here], *joined)
                begin += size
        layer.statistics[THRESHOLD] = thresholds


def _nearest(keys: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine of each key ``[E, D]`` to the anchors ``[A, D]``, and which anchor it is: ``[E]`` each, in blocks."""
    directions = normalize(anchors.float(), dim=-1)
    size = max(1, BLOCK // len(anchors))
    best = [(normalize(block.float(), dim=-1) @ directions.T).max(dim=-1) for block in keys.split(size)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _join(anchors: Tensor, members: Tensor, nearest: Tensor, similarity: Tensor) -> None:
    """Merges ``members [M, D]`` into ``anchors [A, D]`` in place."""
    which, slot = nearest.unique(return_inverse=True)
    weight = similarity.exp()
    total = anchors[which].float() * math.e
    total.index_add_(0, slot, members.float() * weight[:, None])
    norm = torch.full((len(which),), math.e, device=weight.device).index_add_(0, slot, weight)
    anchors[which] = (total / norm[:, None]).to(anchors.dtype)
