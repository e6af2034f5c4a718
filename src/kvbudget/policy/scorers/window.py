"""Scores from the attention of the newest queries: the observation window."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import Pooling, Reduction, pool, reduce_group
from kvbudget.policy.view import View


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Votes of the last ``window`` queries, pooled over positions (SnapKV, arXiv 2404.14469, section 3).

    A forward of at least ``window`` queries sets the votes to ``sum over its last W rows of softmax(q k)``, reduced over
    the GQA group and pooled, which is the paper's formula. Shorter forwards (decode steps, small chunks) keep a running
    vote instead, ``s <- (1 - n / W) * s + votes of the n new rows``, so that the policy can act at any time without
    storing queries.
    """

    states: ClassVar[tuple[str, ...]] = ("votes",)

    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    reduction: Reduction = "mean"

    def observe(self, view: View) -> None:
        fresh = view.new_queries
        if fresh >= self.window and self.reduction != "sum":
            votes = view.window_attention(self.window).sum(3)
            view.set_state("votes", reduce_group(votes, self.reduction))
        else:
            view.add_mass("votes", self.window, decay=max(0.0, 1.0 - fresh / self.window))

    def score(self, view: View) -> Tensor:
        return pool(view.state("votes"), self.kernel, self.pooling)
