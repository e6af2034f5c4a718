"""H2O: heavy hitters by accumulated attention, and recent entries."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.scorers.received import AccumulatedAttention


@dataclass(frozen=True)
class H2O(Recipe):
    """Keeps, per KV head, the newest entries and those that have received the most attention from all queries so far.

    Paper: Zhang et al., arXiv 2306.14048, 2023 (NeurIPS), section 4 and algorithm 1: ``acc[t] = sum over all queries i of
    softmax(q_i k)[t]``, at every forward; an entry that leaves takes its sum with it. Every prompt query counts, in blocks,
    so the prefill pays for a second pass over the attention weights but never holds a T x T tensor. Mean over the GQA group
    (the paper is MHA). Sums favor old entries, as published. Claim: a fifth of the cache keeps quality, up to 29x
    throughput. The paper evicts at every step; here the sums are taken at every step and entries leave ``every`` steps.

    Attributes:
        recent_share: part of the budget that is spent on the newest entries (paper: as many as heavy hitters, 0.5).
        every: decode steps between two evictions (paper: 1).
    """

    name = "h2o"
    role = "scorer"
    phase = "prefill and decode"
    paper = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048, 2023"
    )
    needs = ("queries",)

    recent_share: float = 0.5
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise PolicyError(f"h2o: recent_share={self.recent_share} must be from 0 to 1 (1 is a sliding window)")
        if self.every < 1:
            raise PolicyError(f"h2o: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": AccumulatedAttention(),
            "protect": Protect(recent_share=self.recent_share),
            "trigger": Trigger(every=self.every),
        }
