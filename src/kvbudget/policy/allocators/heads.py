"""Allocators over the KV heads of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.budget import solve
from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class JointTopK(HeadAllocator):
    """The heads compete: the layer's entries go where the best scores are (Ada-KV, arXiv 2407.11550, section 4).

    Each head keeps its own best ``safeguard`` share of the uniform budget for sure; the rest is the joint top-k over all
    heads. Pinning the safeguard before the joint top-k keeps the total exact, and the retained score is never below that
    of a uniform split. ``normalize`` scales a head's scores by the share of them that its uniform budget would retain.
    """

    safeguard: float = 0.2
    normalize: bool = False

    def split(self, scores: Tensor, protected: Tensor, valid: Tensor, total: int) -> list[int]:
        heads, length = scores.shape
        held = valid.sum(-1)
        total = min(total, int(held.sum()))
        mean = total // heads
        scores = scores.float().masked_fill(~valid, float("-inf"))
        if self.normalize:
            free = scores.masked_fill(protected | ~valid, 0.0)
            best = free.topk(min(mean, length), dim=-1).values.sum(-1) / free.sum(-1).clamp_min(1e-30)
            scores = scores * best[:, None]
        scores = scores.masked_fill(protected & valid, float("inf"))
        own = scores.argsort(dim=-1, descending=True, stable=True)[:, : int(mean * self.safeguard)]
        pinned = torch.zeros_like(valid).scatter_(1, own, True) & valid
        flat = scores.masked_fill(pinned, float("inf")).flatten()
        best = flat.argsort(descending=True, stable=True)[:total]
        counts = torch.bincount(best // length, minlength=heads)
        if bool((counts > held).any()):
            return solve(total, counts.tolist(), 0, held.tolist())
        return counts.tolist()
