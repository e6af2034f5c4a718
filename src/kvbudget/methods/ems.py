"""EMS: what matters overall or lately stays, what is redundant joins it, and the rest is dropped."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.merge import MergeNearest
from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.scoring import pool
from kvbudget.policy.view import View
from kvbudget.segments.lane import Sum


@dataclass(frozen=True)
class GlobalLocal(WindowAttention):
    """``pool(local + global * sum local / sum global)``: votes of the window, and attention per query that could see the entry."""

    states: ClassVar[tuple[str, ...]] = ("votes", "received")

    def sums(self, new: int) -> tuple[Sum, ...]:
        return (*super().sums(new), Sum("received", group=self.reduction))

    def score(self, view: View) -> Tensor:
        seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
        judged = (view.positions < seen - self.window) & view.valid
        local = view.state("votes").masked_fill(~judged, 0.0)
        overall = (view.state("received") / (seen - view.positions)).masked_fill(~judged, 0.0)
        scale = local.sum(-1, keepdim=True) / overall.sum(-1, keepdim=True).clamp_min(1e-30)
        return pool(local + overall * scale, self.kernel, self.pooling)


@dataclass(frozen=True)
class EMS(Recipe):
    """Evicts what no query cares for, then merges into each head's kept entries what resembles them; any scorer can rank.

    Paper: Li et al., arXiv 2412.08521, 2024, from whose abstract this is an implementable reading; constants and formulas
    are *unverified*. The score of an entry is the attention of the last ``window`` queries plus, brought to the same sum,
    the mean attention of all queries that could see it, pooled. Of what a head cannot keep, the best entries up to
    ``candidates`` times its share are compared with those kept: each joins the one with the nearest key, unless the cosine
    is below ``threshold`` (the paper's zero class), weighted by scores. Claim: 95% needle accuracy below 2% of the context.

    Attributes:
        window: queries of the local score, and newest entries that always stay.
        kernel: pooling width over positions.
        candidates: entries that are kept or compared, as a multiple of those kept (1 and below: all).
        threshold: least cosine for a merge.
        counts: weigh merged entries by their number in the attention.
    """

    name = "ems"
    role = "scorer and destination"
    phase = "prefill and decode"
    paper = (
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance, "
        "arXiv 2412.08521, 2024"
    )
    needs = ("queries", "keys")

    window: int = 32
    kernel: int = 7
    candidates: float = 2.0
    threshold: float = 0.6
    counts: bool = False

    def __post_init__(self) -> None:
        if self.candidates < 0:
            raise PolicyError(f"ems: candidates={self.candidates} must be at least 0")

    def parts(self) -> dict[str, Any]:
        part = MergeNearest(least=self.threshold, candidates=self.candidates, weights="score", counts=self.counts)
        return {"destination": part}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": GlobalLocal(self.window, self.kernel), "protect": Protect(recent=self.window)}
