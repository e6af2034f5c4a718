"""KVCompose: layers compete for composite tokens, each made of every head's own j-th best entry."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.base import Recipe
from kvbudget.policy.plans import Reread
from kvbudget.policy.scorers.repeated import HighestAttention


@dataclass(frozen=True)
class CompositeAttention(HighestAttention):
    """`HighestAttention` plus its mean over the heads of the layer at the same position, which steadies single heads."""

    def combined(self, found: list[Tensor]) -> list[Tensor]:
        mean = torch.stack(found).mean(0)
        return [scores + mean for scores in found]


@dataclass(frozen=True)
class CompositeSlots(GlobalTopK):
    """Slot j of a layer scores the mean over its heads of their j-th best entries; the best slots of all layers stay.

    The first layer's slots score as the best of any layer, so that no layer keeps more than the first.
    """

    def rank(self, scores: Sequence[Tensor], total: int) -> list[float]:
        slots = [score.sort(dim=-1, descending=True).values.mean(0) for score in scores]
        longest = max(len(slot) for slot in slots)
        padded = [torch.nn.functional.pad(slot, (0, longest - len(slot)), value=float("-inf")) for slot in slots]
        slots[0] = torch.stack(padded).amax(0)[: len(slots[0])]
        heads = len(scores[0])
        return [heads * n for n in super().rank([slot[None] for slot in slots], total // heads)]


@dataclass(frozen=True)
class KVCompose(Recipe):
    """Keeps the same number of entries in all heads of a layer, each head its own best, and more in layers that need them.

    Paper: Akulov et al., arXiv 2509.05165, 2025, section 3. The model reads the prompt a second time on top of the cache;
    an entry's score is the highest attention from any of these queries (softmax over everything visible), the mean over the
    GQA group, plus the mean over the heads of its layer. Per layer each head's scores are sorted, and slot j, a composite of
    the heads' j-th best entries, scores their mean; layer 0 takes the maximum over layers; the best slots of all layers stay.
    So every layer remains a rectangle. Generated entries leave last. The optional weighting by value norms (off in the paper)
    is left out. Claim: ahead of other structured methods on RULER at equal memory. The prompt is read twice and held whole.
    """

    name = "kvcompose"
    role = "scorer, plan and allocator over layers"
    phase = "after the prefill, by an extra pass"
    paper = "KVCompose: Efficient Structured KV Cache Compression with Composite Tokens, arXiv 2509.05165, 2025"
    needs = ("plan", "queries")
    prefill_peak = "full_prompt"
    prefix_reusable = True

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": CompositeAttention("all", 0, "mean"),
            "plan": Reread(),
            "layers": CompositeSlots(),
        }
