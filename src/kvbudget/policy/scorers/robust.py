"""Scores from the mean and the spread over time of the attention that entries receive."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import CHOSEN, Refinement, Scorer
from kvbudget.policy.selection import rank
from kvbudget.policy.view import View


def deviation(view: View) -> Tensor:
    """Standard deviation ``[B, Hkv, T]`` of the weights that entries received from the queries that saw them."""
    number = _seen_by(view)
    mean = view.state("received") / number
    return (view.state("received squared") / number - mean.square()).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class MeanAttention(Scorer):
    """Mean weight over all queries that saw the entry, mean over the GQA group before anything else (RoCo, arXiv 2402.06262)."""

    states: ClassVar[tuple[str, ...]] = ("received", "received squared")

    def observe(self, view: View) -> None:
        received, squared = view.state("received").clone(), view.state("received squared").clone()
        for weights, _ in view.attention_rows():
            weights = weights.mean(2)
            received += weights.sum(2)
            squared += weights.square().sum(2)
        view.set_state("received", received)
        view.set_state("received squared", squared)

    def score(self, view: View) -> Tensor:
        return view.state("received") / _seen_by(view)


@dataclass(frozen=True)
class KeepUnstable(Refinement):
    """The ``share`` of the entries to keep goes to those whose attention varied most (RoCo, arXiv 2402.06262)."""

    share: float = 0.3

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        spread = deviation(view).masked_fill(~view.valid, -1.0).masked_fill(protected, float("inf"))
        return scores.masked_fill(rank(spread) < (counts * self.share).long()[..., None], CHOSEN)


def _seen_by(view: View) -> Tensor:
    """How many queries saw each entry."""
    seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
    return (seen - view.positions.clamp_min(0)).float()
