"""Ada-KV: the heads of a layer share its entries by a joint top-k."""

from dataclasses import dataclass
from typing import Any

from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class AdaKV(Recipe):
    """Spends a layer's entries where the scores are, over any scorer (SnapKV where none is named).

    Paper: Feng et al., arXiv 2407.11550, 2024 (NeurIPS 2025), algorithm 1: a layer-wide top-k minimizes a bound of the
    loss. Of the two published safeguards this is the pinned one (each head's own best ``safeguard`` share stays), whose
    total is exact; the blend ``round((1 - f) * n_h + int(f * b))`` of the reference loses up to one entry per head. Heads
    become ragged and their memory is really freed. Claim: gains on RULER and LongBench, most when the question is unknown.

    Attributes:
        safeguard: share of the uniform budget that every head keeps for sure (paper: 0.2 for grouped-query models).
        normalize: scale a head's scores by the share of them that its uniform budget retains (off in the reference).
    """

    name = "adakv"
    role = "allocator over heads"
    phase = "wherever the scorer acts"
    paper = "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550, 2024"
    prefix_reusable = True

    safeguard: float = 0.2
    normalize: bool = False

    def parts(self) -> dict[str, Any]:
        return {"heads": JointTopK(self.safeguard, self.normalize)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV(kernel=7, pooling="max").parts()
