"""Allocators over the KV heads of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.policy.base import HeadAllocator


@dataclass(frozen=True)
class JointTopK(HeadAllocator):
    """The heads compete: the layer's entries go where the best scores are (Ada-KV, arXiv 2407.11550, section 4).

    Each head keeps its own best ``safeguard`` share of what a uniform split would give it beyond the protected entries;
    the rest is the joint top-k over all heads. Pinning the safeguard before the joint top-k keeps the total exact, and the
    retained score is never below that of a uniform split. ``normalize`` scales a head's scores by the share of them that
    the uniform budget would retain. Equal scores go round the heads, so that equal heads get equal budgets.
    """

    safeguard: float = 0.2
    normalize: bool = False

    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        heads, length = scores.shape
        total = min(total, int(valid.sum()))
        rank = torch.arange(length, device=scores.device)
        fixed = (protected & valid).sum(-1, keepdim=True)
        uniform = (total // heads - fixed).clamp_min(0)
        scores = scores.float().clamp_min(torch.finfo(torch.float32).min)
        if self.normalize:
            judged = scores.masked_fill(protected | ~valid, 0.0).sort(dim=-1, descending=True).values
            retained = (judged * (rank < uniform)).sum(-1, keepdim=True)
            scores = scores * retained / judged.sum(-1, keepdim=True).clamp_min(1e-30)
        scores = scores.masked_fill(protected, float("inf")).masked_fill(~valid, float("-inf"))
        ranked = scores.sort(dim=-1, descending=True).values
        sure = (rank < fixed + (uniform * self.safeguard).long()) & (ranked > float("-inf"))
        # By rank first, head by head: a stable sort then deals ties round the heads.
        best = ranked.masked_fill(sure, float("inf")).T.flatten().argsort(descending=True, stable=True)[:total]
        return torch.bincount(best % heads, minlength=heads).tolist()
