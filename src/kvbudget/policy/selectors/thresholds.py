"""Calibrated thresholds of weights or logits, above which values are read, and what stands in for the others."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvbudget.policy.base import Selector
from kvbudget.segments.selective import Chosen, Reading

Compensation = Literal["exact", "threshold", "none"]


@dataclass(frozen=True)
class Thresholds(Selector):
    """Reads what lies above ``thresholds [L, Hq, N]`` of the nearest of the row ``lengths [N]``; rows up to ``k`` are dense.

    On weights (``logits`` False) the denominator of the full softmax stays. On logits the softmax runs over what is read;
    ``denominator`` adds what is missing: exactly, or ``dropped * exp(threshold)``, or not at all.
    """

    k: int = 64
    first: int = 512
    logits: bool = False
    denominator: Compensation = "exact"
    mean_value: bool = True
    lengths: Tensor | None = field(default=None, repr=False, compare=False)
    thresholds: Tensor | None = field(default=None, repr=False, compare=False)

    def select(self, reading: Reading) -> Chosen:
        assert self.lengths is not None and self.thresholds is not None
        device, heads = reading.logits.device, reading.logits.shape[1]
        length = reading.visible.sum(-1)
        nearest = (length[..., None] - self.lengths.to(device)).abs().argmin(-1)
        table = self.thresholds[reading.layer_idx].to(device).unflatten(0, (heads, -1))
        # [Hkv, G, N] at [B, Hkv, n] gives [B, Hkv, G, n].
        least = table[None].expand(len(nearest), -1, -1, -1).gather(
            3, nearest[:, :, None].expand(-1, -1, table.shape[1], -1)
        )  # fmt: skip
        weights = reading.probabilities
        judged = reading.logits if self.logits else weights
        dense = length <= (self.first if reading.layer_idx < 2 else self.k)
        read = ((judged > least[..., None]) | dense[:, :, None, :, None]) & reading.visible[:, :, None]
        kept = weights * read
        if self.logits and self.denominator != "exact":
            total = kept.sum(-1)
            if self.denominator == "threshold":
                dropped = (reading.visible[:, :, None] & ~read).sum(-1)
                total = total + dropped * torch.exp(least - reading.lse.nan_to_num(neginf=0.0))
            kept = kept / total.clamp_min(1e-30)[..., None]
        missing = (1 - kept.sum(-1)).clamp_min(0.0) * (length > 0)[:, :, None]
        return Chosen(kept, missing if self.mean_value else None)
