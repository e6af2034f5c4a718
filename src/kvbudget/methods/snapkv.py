"""SnapKV: the last prompt queries vote for the entries that generation will need."""

from dataclasses import dataclass
from typing import Any

from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.scoring import Pooling, Reduction


@dataclass(frozen=True)
class SnapKV(Recipe):
    """Keeps, per KV head, the last ``window`` entries and those that their queries attend to most, in pooled clusters.

    Paper: Li et al., arXiv 2404.14469, 2024, section 3. ``S = pool(sum over the last W queries of softmax(q k / sqrt(D)))``
    over all keys (the window's columns stay in the denominator), mean over the GQA group (the paper is MHA; kvpress takes
    the mean, the reference stores Hq heads). Claim: 3.6x generation speed and 8.2x memory efficiency at 16k tokens.
    Query-aware: it is only as good as the end of the prompt. Beyond the paper, the votes go on while decoding, so that
    the budget holds there too (``when="after_prefill"`` on the cache gives the paper's behavior).

    Attributes:
        window: queries that vote, and newest entries that always stay (reference: 32 or 64).
        kernel: pooling width over positions (5 or 7).
        pooling: ``avg`` or ``max``.
        reduction: over the GQA group, ``mean`` or ``max``.
    """

    name = "snapkv"
    role = "scorer"
    phase = "prefill, goes on in decode"
    paper = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469, 2024"
    needs = ("queries",)

    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    reduction: Reduction = "mean"

    def parts(self) -> dict[str, Any]:
        scorer = WindowAttention(self.window, self.kernel, self.pooling, self.reduction)
        return {"scorer": scorer, "protect": Protect(recent=self.window)}
