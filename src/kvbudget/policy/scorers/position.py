"""Scores from positions alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Recency(Scorer):
    """``score = position``: the newest entries are the best."""

    by_position: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return view.positions.float()


@dataclass(frozen=True)
class Ladder(Scorer):
    """When an entry leaves: first those that the first pass of the ladder takes, from old to new, then the second's.

    Behind the sinks a pass cuts the text into rungs of ``before`` tokens, of which layer i keeps the ``after`` ones from
    place ``i mod (before - after + 1)`` on; the next pass does the same with what is left. A position's fate depends on
    nothing but itself and the layer, so it does not matter when the policy acts (LaCache, arXiv 2507.14204).
    """

    aligned: ClassVar[bool] = True

    sinks: int = 4
    before: int = 2
    after: int = 1

    def score(self, view: View) -> Tensor:
        index = view.positions.long() - self.sinks
        first = view.layer_idx % (self.before - self.after + 1)
        passes = torch.zeros_like(index)
        alive = torch.ones_like(index, dtype=torch.bool)
        longest = max(view.seen)
        while longest > 1:  # by then every pass that could take anything has been counted
            place = index % self.before - first
            alive &= (place >= 0) & (place < self.after)
            index = index // self.before * self.after + place
            passes += alive
            longest = min(longest - 1, -(-longest // self.before) * self.after)
        order = passes.masked_fill(~view.valid, longest + len(view.seen) * 10**6).argsort(dim=-1, stable=True)
        cells = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, cells).float()
