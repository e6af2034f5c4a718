"""Window votes that all heads of a layer share, for selections in larger units."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.selection import best_of_units
from kvbudget.policy.view import View


@dataclass(frozen=True)
class LayerWindowAttention(WindowAttention):
    """`WindowAttention`, the mean over all heads of the layer."""

    aligned: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return by_layer(super().score(view))


@dataclass(frozen=True)
class WindowPeaks(WindowAttention):
    """The mean of the better half of a window's ``width`` positions in each head, then the mean over the layer's heads."""

    aligned: ClassVar[bool] = True

    width: int = 8

    def score(self, view: View) -> Tensor:
        units = view.positions.clamp_min(0).long() // self.width
        best = best_of_units(super().score(view).masked_fill(~view.valid, 0.0), units, max(1, self.width // 2))
        return by_layer(best)


@dataclass(frozen=True)
class LaterCountsMore(WindowAttention):
    """`WindowAttention` for all heads together, in which queries weigh from 1 to ``newest`` by their place in the window."""

    aligned: ClassVar[bool] = True

    kernel: int = 1
    newest: float = 1.2

    def observe(self, view: View) -> None:
        decay = [max(0.0, 1.0 - new / self.window) for new in view.new_tokens]
        weights = torch.linspace(1.0, self.newest, self.window, device=view.positions.device)
        view.add_mass("votes", self.window, decay, self.reduction, weights)

    def score(self, view: View) -> Tensor:
        return by_layer(super().score(view))
