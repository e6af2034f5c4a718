"""Quotas: a head's entries are shared out over spans of the text in proportion to their length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.policy.base import CHOSEN, Refinement
from kvbudget.policy.selection import rank_in_group
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Quotas(Refinement):
    """Each span of the text keeps the part of its head's entries that it is of the text; ``cuts`` are where spans begin."""

    cuts: tuple[int, ...] = ()

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        seen = torch.tensor(view.seen, device=scores.device)
        ends = torch.tensor([*self.cuts, 2**31 - 1], device=scores.device)
        # Rounding down the running totals leaves what is over to the later span, as the reference does.
        totals = counts[..., None] * ends.minimum(seen[:, None])[:, None] // seen.clamp_min(1)[:, None, None]
        quotas = totals.diff(dim=-1, prepend=torch.zeros_like(totals[..., :1]))
        span = torch.bucketize(view.positions, ends, right=True).clamp_max(len(ends) - 1)
        span = span.masked_fill(~view.valid, len(ends) - 1)
        ranked = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
        place = rank_in_group(ranked, span)
        inside = (place < quotas.gather(-1, span)) & view.valid
        # Where protected entries exceed a quota, the others' last places give way.
        return torch.where(inside, CHOSEN - place, scores)
