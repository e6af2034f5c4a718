"""D2O: layers with even attention keep more, and evicted entries join the kept one that they resemble."""

from dataclasses import dataclass, replace
from typing import Any

from kvbudget.methods.h2o import H2O
from kvbudget.policy.allocators.variance import AttentionVariance
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.merge import MergeNearest


@dataclass(frozen=True)
class D2O(Recipe):
    """Accumulated attention selects; layers share by its variance; evicted entries near a kept key are merged into it.

    Paper: Wan et al., arXiv 2406.13035, 2024 (ICLR 2025), sections 3.2 and 3.3. Layer shares follow ``softmax(-F)``, with F
    the variance of a layer's accumulated attention over entries; inside a layer half of the entries are heavy hitters and
    half recent, after ``sinks``. An evicted key whose best cosine to a kept one reaches an exponentially averaged threshold
    per head is merged with weights ``exp(cosine)`` that sum to one, else dropped. The reference compares the thresholds of
    different heads' entries, uses weights that do not sum to one, and leaves layers 0, 1 and the last uncompressed outside
    of the budget; here ``keep_ends`` fills those first and charges them. F is scaled by the mean and brought to [0, 1] over
    layers, where raw variances of thousands would let the softmax pick one layer. With another scorer (``snapkv+d2o``) there
    is no accumulated attention, so layers share equally, or by another allocator, and only the merging is D2O's. Claim:
    more than 3x throughput, better long texts than H2O at the same budget.

    Attributes:
        sinks: first entries that always stay.
        alpha, beta: the threshold's average, ``alpha * threshold + beta * mean cosine`` (reference: 0.5 each).
        keep_ends: layers 0, 1 and the last keep all that the budget holds before the others get theirs.
    """

    name = "d2o"
    role = "destination, brings a scorer and layer shares"
    phase = "prefill and decode"
    paper = (
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of LLMs, arXiv 2406.13035, 2024"
    )
    needs = ("queries",)

    sinks: int = 4
    alpha: float = 0.5
    beta: float = 0.5
    keep_ends: bool = False

    def parts(self) -> dict[str, Any]:
        return {"destination": MergeNearest(self.alpha, self.beta)}

    def defaults(self) -> dict[str, Any]:
        parts = H2O().parts()
        return parts | {
            "layers": AttentionVariance(parts["scorer"].states[0], self.keep_ends),
            "protect": replace(parts.get("protect", Protect()), sinks=self.sinks),
        }
