"""CAKE: layers whose attention is dispersed and shifting get more entries, dealt out while the layers arrive."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.dispersion import Dispersion, MeanVariance


@dataclass(frozen=True)
class Cake(Recipe):
    """Shares the budget over layers by their attention's dispersion, and keeps entries of high mean or varying attention.

    Paper: Qin et al., ICLR 2025 (arXiv 2503.12491), sections 4.1 to 4.3. A are the softmax rows of the last W queries on the
    entries before the window. Layer preference ``P = H^(1/tau1) * V^(1/tau2)`` with the entropy ``H = -sum A log A`` and
    ``V = sum of the variances over the queries``; entry score ``pool(mean A + gamma * var A)``, mean over the GQA group.
    Beyond the W newest entries that each layer keeps, layer l gets ``total * P_l / sum P``. Cascade: when a layer has been
    prefilled, it and all earlier ones are cut to their shares among the layers so far, by their stored scores; shares only
    shrink, so the result is that of one allocation at the end, without its peak. In decode the score is the newest query's
    attention. Claim: quality holds at 3.2% of the cache. The published integer shares can miss the total; these are exact.
    Another scorer (``h2o+cake``) may judge the entries; the window then only measures the layers.

    Attributes:
        window: queries that judge, and newest entries that always stay (paper: 32).
        gamma: weight of the variance in the score (paper: 200; 0 gives SnapKV's order).
        kernel: pooling width over positions.
        tau1, tau2: temperatures of entropy and variance, tuned per model in the paper (0.2 to 2.3; large is uniform).
    """

    name = "cake"
    role = "allocator over layers, brings a scorer"
    phase = "prefill and decode"
    paper = "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, arXiv 2503.12491, 2025"
    needs = ("queries",)

    window: int = 32
    gamma: float = 200.0
    kernel: int = 5
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if min(self.tau1, self.tau2) <= 0:
            raise PolicyError(f"cake: tau1={self.tau1} and tau2={self.tau2} must be above 0 (large values are uniform)")

    def parts(self) -> dict[str, Any]:
        return {"layers": Dispersion(self.window, self.tau1, self.tau2)}

    def defaults(self) -> dict[str, Any]:
        scorer = MeanVariance(self.window, self.gamma, self.kernel)
        return {"scorer": scorer, "protect": Protect(recent=self.window)}
