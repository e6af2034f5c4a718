"""Search over old entries: upper layers read a window and what lies nearest to the token's own state."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kvbudget.policy.base import Selector
from kvbudget.policy.selection import rank
from kvbudget.segments.selective import Chosen, Reading

DISTANCE_STEP = 2**-8
"""Least difference of two distances that counts, in standard deviations of a state's channels."""


@dataclass(frozen=True)
class Search:
    """What is searched and read; `Neurocache` says what each number means."""

    top: int = 16
    followers: int = 2
    context: int = 2
    window: int = 128
    sinks: int = 4
    start: float = 0.75
    cache: int = 16384


@dataclass(frozen=True)
class Neighbors(Search, Selector):
    """Upper layers read the first ``sinks``, the newest ``window`` and the neighbors of the token among the older entries.

    Of the ``cache`` entries before the window, the ``top`` whose values, normalized as by a layer norm, lie nearest to the
    value of the query's own token are taken, with the ``followers - 1`` entries behind each, and those of the
    ``context - 1`` tokens before. The softmax runs over what is read. Layers below the share ``start`` of the depth read all.
    """

    prefill: ClassVar[bool] = False

    def select(self, reading: Reading) -> Chosen:
        weights = reading.probabilities
        if reading.depth < self.start:
            return Chosen(weights)
        visible = reading.visible
        number = visible.cumsum(-1)
        age = number[..., -1:] - number  # 0: the query's own entry
        old = visible & (age >= self.window) & (age < self.window + self.cache) & (number > self.sinks)
        states = layer_norm(reading.values, reading.values.shape[-1:])
        own = (visible & (age == 0)).float().argmax(-1)
        found, held = torch.zeros_like(visible), visible.shape[-1]
        for back in range(min(self.context, held)):
            asked = states.gather(2, (own - back).clamp_min(0)[..., None].expand(-1, -1, -1, states.shape[-1]))
            found |= self._nearest(asked, states, old)
        follower = found
        for _ in range(min(self.followers, held) - 1):
            follower = torch.nn.functional.pad(follower[..., :-1], (1, 0))
            found = found | follower
        read = visible & (found | (age < self.window) | (number <= self.sinks))
        weights = weights * read[:, :, None]
        return Chosen(weights / weights.sum(-1, keepdim=True).clamp_min(1e-30))

    def _nearest(self, asked: Tensor, states: Tensor, old: Tensor) -> Tensor:
        """The ``top`` of the ``old [B, Hkv, n, T]`` entries that lie nearest to the states ``asked [B, Hkv, n, D]``.

        Equal tokens have equal values in low layers: rounding, which forwards of other sizes do differently, must not decide
        between them, so distances count in steps of `DISTANCE_STEP`, and of equal ones the older entry is taken.
        """
        distance = torch.cdist(asked, states, compute_mode="donot_use_mm_for_euclid_dist").div(DISTANCE_STEP).round()
        return (rank(distance.neg().masked_fill(~old, float("-inf"))) < self.top) & old
