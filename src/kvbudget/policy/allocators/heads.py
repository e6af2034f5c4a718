"""Allocators over the KV heads of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class JointTopK(HeadAllocator):
    """The heads compete: the layer's entries go where the best scores are (Ada-KV, arXiv 2407.11550, section 4).

    Each head keeps its own best ``safeguard`` share of the uniform budget for sure; the rest is the joint top-k over all
    heads. Pinning the safeguard before the joint top-k keeps the total exact, and the retained score is never below that
    of a uniform split. ``normalize`` scales a head's scores by the share of them that its uniform budget would retain.
    Equal scores go to the head that has fewer entries so far, so that equal heads get equal budgets.
    """

    safeguard: float = 0.2
    normalize: bool = False

    def split(self, scores: Tensor, protected: Tensor, valid: Tensor, total: int) -> list[int]:
        heads, length = scores.shape
        total = min(total, int(valid.sum()))
        mean = total // heads
        scores = scores.float().clamp_min(torch.finfo(torch.float32).min)
        if self.normalize:
            free = scores.masked_fill(protected | ~valid, 0.0)
            best = free.topk(min(mean, length), dim=-1).values.sum(-1) / free.sum(-1).clamp_min(1e-30)
            scores = scores * best[:, None]
        scores = scores.masked_fill(protected, float("inf")).masked_fill(~valid, float("-inf"))
        ranked = scores.sort(dim=-1, descending=True).values
        own = ranked[:, : int(mean * self.safeguard)]
        own[own > float("-inf")] = float("inf")
        # By rank first: ties then go round the heads.
        best = ranked.T.flatten().argsort(descending=True, stable=True)[:total]
        return torch.bincount(best % heads, minlength=heads).tolist()
