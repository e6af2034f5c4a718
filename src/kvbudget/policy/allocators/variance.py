"""Allocator over layers by how uneven their attention is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvbudget.policy.allocators.prompt import PromptMeasured
from kvbudget.policy.view import View

ENDS = (0, 1, -1)


@dataclass(frozen=True)
class AttentionVariance(PromptMeasured):
    """Layers whose attention is spread evenly keep more: shares in proportion to ``exp(-F)`` (D2O, arXiv 2406.13035, 3.2).

    F is the variance over entries of the attention accumulated in the state column ``state``, over the square of its mean
    so that its scale does not matter, averaged over KV heads and brought to [0, 1] over the layers. ``keep_ends`` gives
    layers 0, 1 and the last one all that the budget holds before the others get theirs (the reference leaves them
    uncompressed outside of the budget).
    """

    state: str = "acc"
    keep_ends: bool = False

    def measure(self, view: View) -> list[float]:
        valid = view.valid
        number = valid.sum(-1).clamp_min(1)
        mass = view.state(self.state).masked_fill(~valid, 0.0)
        mean = mass.sum(-1) / number
        variance = ((mass - mean[..., None]) ** 2).masked_fill(~valid, 0.0).sum(-1) / number
        return (variance / (mean**2).clamp_min(1e-30)).mean(-1).tolist()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        known = [m for m in measured if m is not None]
        low, high = min(known, default=0.0), max(known, default=0.0)
        width = (high - low) or 1.0
        weights = [1.0 if m is None else math.exp(-(m - low) / width) for m in measured]
        if self.keep_ends:
            for index in {i % len(weights) for i in ENDS}:
                weights[index] = 1e6
        return weights
