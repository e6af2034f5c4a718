"""ZigZagKV: layers whose attention needs many entries for most of its mass keep more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.prompt import PromptMeasured
from kvbudget.policy.base import Recipe
from kvbudget.policy.scoring import check_window
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Uncertainty(PromptMeasured):
    """Shares ``least + (1 - least) L u_l`` of the mean, where ``u_l = LMBA_l / sum LMBA`` (equation 6).

    LMBA is the smallest number of entries that hold ``theta`` of what the last ``window`` queries pay to the entries before
    the window, averaged over KV heads.
    """

    window: int = 32
    theta: float = 0.9
    least: float = 0.2

    def measure(self, view: View) -> list[float]:
        seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
        judged = view.valid & (view.positions < seen - self.window)
        mass = view.mass(self.window).double().masked_fill(~judged, 0.0)
        reached = mass.sort(-1, descending=True).values.cumsum(-1)
        # Sums round: what misses the last digits of theta reaches it.
        short = reached < self.theta * reached[..., -1:] * (1 - 1e-6)
        return (1.0 + short.sum(-1)).double().mean(-1).tolist()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        known = [m for m in measured if m is not None]
        rate = (1 - self.least) * len(known) / (sum(known) or 1.0)
        return [1.0 if m is None else self.least + rate * m for m in measured]


@dataclass(frozen=True)
class ZigZagKV(Recipe):
    """Gives layers entries by how many their attention needs, and selects inside them by any scorer (SnapKV by default).

    Paper: Zhong et al., arXiv 2412.09036, 2024 (COLING 2025). The minimum budget of a head is the number of entries that
    reach ``theta`` of its attention, ``LMBA_l`` its mean over the heads of a layer, and a layer gets
    ``B_bound + (B_avg - B_bound) L LMBA_l / sum LMBA``, with ``B_bound = least B_avg`` (0.2 is the value of a third party's
    implementation, *unverified*). Attention is that of the last ``window`` queries, not pooled, which would inflate the
    number. The formula shares out what no layer protects, the total is exact, and what a capped layer cannot hold goes to
    the others. Layers are cut in a cascade as they arrive, so the peak stays near the budget. Claim: a fifth of the cache
    is nearly lossless.

    Attributes:
        window: queries whose attention is measured.
        theta: share of the attention that a head has to reach (paper: 0.9).
        least: part of the mean that every layer gets (1 is uniform).
    """

    name = "zigzagkv"
    aliases = ("zigzag",)
    role = "allocator over layers"
    phase = "prefill"
    paper = (
        "ZigZagkv: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty, "
        "arXiv 2412.09036, 2024"
    )
    needs = ("queries",)

    window: int = 32
    theta: float = 0.9
    least: float = 0.2

    def __post_init__(self) -> None:
        check_window(self.window)
        if not (0 < self.theta <= 1 and 0 <= self.least <= 1):
            raise PolicyError(f"zigzagkv: theta={self.theta} and least={self.least} must be shares, from 0 to 1")

    def parts(self) -> dict[str, Any]:
        return {"layers": Uncertainty(self.window, self.theta, self.least)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV(window=self.window).parts()
