"""Scores from the votes of a few query heads of each layer, the same for all of its KV heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import check_window, pool
from kvbudget.policy.view import View


@dataclass(frozen=True)
class SelectedHeads(Scorer):
    """`WindowAttention` of the query heads ``heads[layer_idx]`` alone, pooled by the average, mean over these heads.

    The votes run on in short forwards as there. CompressKV (arXiv 2508.02401).
    """

    states: ClassVar[tuple[str, ...]] = ("votes",)
    aligned: ClassVar[bool] = True

    heads: tuple[tuple[int, ...], ...] = ()
    window: int = 8
    kernel: int = 5

    def __post_init__(self) -> None:
        check_window(self.window)

    def observe(self, view: View) -> None:
        weights = view.window_attention(self.window).flatten(1, 2)[:, list(self.heads[view.layer_idx])]
        fresh = torch.tensor(view.new_tokens, device=weights.device)
        fade = (1 - fresh / self.window).clamp_min(0.0)[:, None, None]
        view.set_state("votes", fade * view.state("votes") + weights.sum(2).mean(1, keepdim=True))

    def score(self, view: View) -> Tensor:
        seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
        judged = view.positions < seen - self.window
        return pool(view.state("votes").masked_fill(~judged, 0.0), self.kernel)
