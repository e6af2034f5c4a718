"""Expected Attention: entries stay that future queries, modeled as a Gaussian, are expected to attend to."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.expected import ExpectedAttention

MOST_POSITIONS = 2**16
"""Positions whose rotations are averaged at most: their angles are held at once."""


@dataclass(frozen=True)
class ExpectedAttentionRecipe(Recipe):
    """Keeps, per KV head, the entries to which queries at the next positions are expected to pay the most attention.

    Paper: Devoto et al., arXiv 2510.00636, 2025. The queries before RoPE have the mean mu and the covariance S; with the mean
    rotation R over the next ``future`` positions, ``z = (R mu) k / sqrt(D) + k (R S R^T) k / (2 D)`` is the logarithm of the
    expected ``exp(q k / sqrt(D))``; ``score = (softmax(z) + epsilon) * ||v||``, mean over the GQA group. Claim: better than
    methods that look at past attention, in prefill and decode; the question need not be known. The moments run over all
    queries so far (the reference takes the prompt's, and while decoding those of the last 128 steps). They cost
    ``4 G (D + D (D + 1) / 2)`` bytes per KV head and layer, which byte budgets count; `expected_attention_stats` has none.

    Attributes:
        sinks: first entries that always stay, and queries that are not counted (kvpress: 4).
        future: positions that R averages over (kvpress: 512).
        covariance: whether S counts (False: the mean alone, and little memory).
        value_norm: whether the values' norm counts.
        epsilon: added to the expected attention before that (kvpress: 0).
    """

    name = "expected_attention"
    role = "scorer"
    phase = "prefill and decode"
    paper = (
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution, "
        "arXiv 2510.00636, 2025"
    )
    needs: ClassVar[tuple[str, ...]] = ("queries",)
    prefix_reusable = True

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.future <= MOST_POSITIONS:
            raise PolicyError(f"{self.name}: future={self.future} must be from 1 to {MOST_POSITIONS} positions")

    def parts(self) -> dict[str, Any]:
        scorer = ExpectedAttention(self.sinks, self.future, self.covariance, self.value_norm, self.epsilon)
        return {"scorer": scorer, "protect": Protect(sinks=self.sinks)}
