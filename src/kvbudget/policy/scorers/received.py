"""Scores from the attention that entries have received: running sums, the newest query alone, and the highest of the last."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View
from kvbudget.segments.lane import Sum


@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """Sum over all queries so far of the attention weight that the entry received (H2O, arXiv 2306.14048).

    The mean over the GQA group is taken, so that the scores of a head sum to the queries seen while nothing is evicted.
    """

    states: ClassVar[tuple[str, ...]] = ("received",)

    def sums(self, new: int) -> tuple[Sum, ...]:
        return (Sum("received"),)

    def score(self, view: View) -> Tensor:
        return view.state("received")


@dataclass(frozen=True)
class HeadNewestAttention(Scorer):
    """Attention weight from the newest query, mean over the GQA group, per KV head."""

    states: ClassVar[tuple[str, ...]] = ("newest",)

    def sums(self, new: int) -> tuple[Sum, ...]:
        return (Sum("newest", 0.0 if new else 1.0, 1),)

    def score(self, view: View) -> Tensor:
        return view.state("newest")


@dataclass(frozen=True)
class NewestAttention(HeadNewestAttention):
    """Attention weight from the newest query, mean over all query heads of the layer (TOVA, arXiv 2401.06104)."""

    aligned: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return by_layer(super().score(view))


@dataclass(frozen=True)
class LatestMaximum(Scorer):
    """Highest weight, mean over all heads of the layer, that any of the last ``share`` of a forward's queries paid.

    In decoding all queries count, however many a forward brings. Source: MPCache, arXiv 2501.06807; without a threshold.
    """

    states: ClassVar[tuple[str, ...]] = ("highest",)
    aligned: ClassVar[bool] = True

    share: float = 0.2

    def observe(self, view: View) -> None:
        highest = view.state("highest").clone()
        counts = [new if new <= view.layer.most_decoded else math.ceil(self.share * new) for new in view.new_tokens]
        fresh = torch.tensor(counts, device=highest.device)
        begin = torch.tensor(view.seen, device=highest.device) - fresh
        for weights, steps in view.attention_rows(max(1, int(fresh.max()))):
            counted = (steps >= begin[:, None])[:, None, None, :, None]
            paid = (weights * counted).mean((1, 2), keepdim=True)[:, :, 0]
            torch.maximum(highest, paid.amax(2), out=highest)
        view.set_state("highest", highest)

    def score(self, view: View) -> Tensor:
        return view.state("highest")
