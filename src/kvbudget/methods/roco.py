"""RoCo: the lowest mean attention leaves, but only where attention has been steady."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.scorers.robust import KeepUnstable, MeanAttention


@dataclass(frozen=True)
class RoCo(Recipe):
    """Keeps, per KV head, the entries whose attention varies most over time, and then those with the highest mean.

    Paper: Ren and Zhu, arXiv 2402.06262, 2024, section 4, and EasyKV. Over the queries that saw an entry, ``mean = sum A /
    n`` and ``std = sqrt(sum A^2 / n - mean^2)``, with A the mean over the GQA group. Entries with the largest std are not
    evicted, of the others the lowest mean leaves. The newest ``recent`` entries and the ``sinks`` count as unstable. Of the
    budget ``unstable_share`` is kept by std, whatever the size of the step that evicts (EasyKV: the recent window's 0.3 in
    decode, 0.1 while it reads the prompt in strides; feed the prompt in chunks for that). Claim: ahead of H2O, TOVA and
    recency at equal cache in prefill and decode (no figure verified). Mean, not sum: old entries have no advantage.

    Attributes:
        unstable_share: part of the budget that is kept by the standard deviation (EasyKV: 0.3).
        sinks: first entries that always stay (EasyKV: 4).
        recent: newest entries that always stay (EasyKV: 10).
        every: decode steps between two evictions (EasyKV's stride: 8).
    """

    name = "roco"
    role = "scorer and refinement"
    phase = "prefill and decode"
    paper = (
        "On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model Inference, "
        "arXiv 2402.06262, 2024"
    )
    needs = ("queries",)

    unstable_share: float = 0.3
    sinks: int = 4
    recent: int = 10
    every: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.unstable_share <= 1:
            raise PolicyError(f"roco: unstable_share={self.unstable_share} must be from 0 to 1")
        if self.every < 1:
            raise PolicyError(f"roco: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": MeanAttention(),
            "refinement": KeepUnstable(self.unstable_share),
            "protect": Protect(sinks=self.sinks, recent=self.recent),
            "trigger": Trigger(every=self.every),
        }
