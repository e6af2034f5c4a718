"""Scores from the attention of the newest queries: the observation window."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import Pooling, Reduction, check_window, pool
from kvbudget.policy.view import View
from kvbudget.segments.lane import Sum


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Votes of the last ``window`` queries, pooled over positions (SnapKV, arXiv 2404.14469, section 3).

    A forward of at least ``window`` queries sets the votes to ``sum over its last W rows of softmax(q k)``, reduced over
    the GQA group, which is the paper's formula. Shorter forwards (decode steps, small chunks) keep a running vote instead,
    ``s <- (1 - n / W) * s + votes of the n new rows``, so that the policy can act at any time without storing queries.
    As in the paper, the newest ``window`` entries are in the softmax but not among those that are pooled and judged: they
    score 0 and have to be protected.
    """

    states: ClassVar[tuple[str, ...]] = ("votes",)

    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_window(self.window)

    def sums(self, new: int) -> tuple[Sum, ...]:
        return (Sum("votes", max(0.0, 1.0 - new / self.window), self.window, self.reduction),)

    def score(self, view: View) -> Tensor:
        newest = view.positions >= view.age - self.window
        return pool(view.state("votes").masked_fill(newest, 0.0), self.kernel, self.pooling)
