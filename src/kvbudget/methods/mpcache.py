"""MPCache: one eviction after the prompt, then every query reads the clusters that resemble it most."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.received import LatestMaximum
from kvbudget.policy.selectors.levels import Clusters, Levels


@dataclass(frozen=True)
class MPCache(Levels, Recipe):
    """Keeps what the end of the prompt looked at, and lets each generated token read the clusters nearest to its query.

    Paper: Zeng et al., arXiv 2501.06807, 2025 (NeurIPS), made for secure multi-party computation: similarities are linear.
    Static part: an entry's score is the highest weight (mean over all heads) that any of the last ``static_share`` of the
    prompt's queries pays it; the paper keeps what exceeds a threshold tuned per data set, here the budget decides, and
    ``when="after_prefill"`` evicts once, as published. Dynamic part: see `Clusters`; nothing is evicted by it, it saves
    reads. The representative is not a bound on the products (Quest's is). The paper is MHA, here clusters serve a GQA group
    by its largest similarity; its sharing of indices between layers is not active in its code either. Claim: 1.8 to 2
    times faster decoding and 3 to 8 times less communication under multi-party computation.

    Attributes:
        static_share: last part of the prompt's queries that judges (paper: 0.2).
        alpha: weight of the maximum in a cluster's representative (paper: 0.6).
        size: entries per cluster (paper: 32, then 16).
        coarse, fine: shares of clusters that are read at the two levels (paper: 0.5 and 0.2; 1 and 1 read everything).
    """

    name = "mpcache"
    role = "scorer and selector"
    phase = "prefill, reads less in decode"
    paper = (
        "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private Large Language Model Inference, "
        "arXiv 2501.06807, 2025"
    )
    needs = ("queries",)
    lossless_when_fits = False

    static_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("static_share", "alpha", "coarse", "fine"):
            if not 0 <= getattr(self, name) <= 1:
                raise PolicyError(f"mpcache: {name}={getattr(self, name)} must be a share, from 0 to 1")
        if self.size < 2 or not self.static_share:
            raise PolicyError(
                f"mpcache: size={self.size} must be at least 2 and static_share={self.static_share} above 0"
            )

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": LatestMaximum(self.static_share),
            "selector": Clusters(self.alpha, self.size, self.coarse, self.fine),
            "protect": Protect(recent=1),
        }
