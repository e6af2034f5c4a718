"""Fair eviction: every instruction of a prompt keeps the same share of its entries."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.refinements.quotas import Quotas
from kvbudget.policy.scorers.spans import SpanVotes


@dataclass(frozen=True)
class Fair(Recipe):
    """Spends a head's budget on the spans of the prompt in proportion to their length, over any scorer (its own by default).

    Paper: Chen et al., The Pitfalls of KV Cache Compression, arXiv 2510.00231, 2025. Eviction hits the instructions of a
    prompt unevenly, and those that lose most are ignored (leaking system prompts); the same retention for all of them cures
    much of it. Its form over SnapKV, the default here: each span is scored by the last queries of the span itself, which
    share the window. ``knorm+fair(cuts=(120,))`` takes another scorer's scores. The reference has two spans; any number
    works here. Its other cure, the whitelist, is the cache's ``protect=[(start, end), ...]``, counted inside of the budget.

    Attributes:
        cuts: positions at which a new span begins, in tokens of the prompt; the last span goes on into what is generated.
        window: queries that vote, over all spans together (reference: 64).
        kernel: pooling width over positions (reference: 5).
    """

    name = "fair"
    aliases = ("fair_eviction",)
    role = "refinement over spans"
    phase = "wherever the scorer acts"
    paper = "The Pitfalls of KV Cache Compression, arXiv 2510.00231, 2025"
    prefix_reusable = True

    cuts: tuple[int, ...] = ()
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if list(self.cuts) != sorted({*self.cuts} - {0}):
            raise PolicyError(f"fair: cuts={self.cuts} must be positions above 0 that rise, such as (120, 300)")
        if self.window // (len(self.cuts) + 1) < 1:
            raise PolicyError(
                f"fair: window={self.window} gives {len(self.cuts) + 1} spans no query each; give at least that many"
            )

    def parts(self) -> dict[str, Any]:
        return {"refinement": Quotas(self.cuts)}

    def defaults(self) -> dict[str, Any]:
        own = self.window // (len(self.cuts) + 1)
        return {"scorer": SpanVotes(self.cuts, self.window, self.kernel), "protect": Protect(recent=own)}
