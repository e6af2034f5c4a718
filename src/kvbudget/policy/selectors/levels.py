"""Clusters of consecutive entries at two levels, of which a query reads those whose extremes resemble it most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Selector
from kvbudget.policy.selection import rank
from kvbudget.segments.selective import Chosen, Reading


@dataclass(frozen=True)
class Levels:
    """Clusters and how many of them are read; `MPCache` says what each number means."""

    alpha: float = 0.6
    size: int = 32
    coarse: float = 0.5
    fine: float = 0.2


@dataclass(frozen=True)
class Clusters(Levels, Selector):
    """Reads the entries of the best clusters at two levels, for forwards of few tokens.

    A cluster of consecutive entries is represented by ``alpha * max + (1 - alpha) * min`` of its keys, channel by channel; its
    similarity to a KV head's queries is the largest product over the GQA group. The best ``coarse`` of the clusters of
    ``size`` stay, with the first and the last one, and inside of them the best ``fine`` of all clusters of half that size,
    with the first and the last.
    """

    prefill: ClassVar[bool] = False

    def select(self, reading: Reading) -> Chosen:
        visible = reading.visible
        inside = self._best(reading, visible, self.size, self.coarse)
        read = self._best(reading, inside & visible, max(1, self.size // 2), self.fine) & visible
        logits = reading.logits.masked_fill(~read[:, :, None], float("-inf"))
        return Chosen(logits.softmax(-1).nan_to_num(0.0))

    def _best(self, reading: Reading, among: Tensor, size: int, share: float) -> Tensor:
        """Entries ``[B, Hkv, n, T]`` of the best ``share`` of all clusters, of those with an entry ``among`` them."""
        held = reading.visible.any(2)
        # Cells are counted without gaps, so that clusters hold what follows each other in the text.
        cluster = (held.long().cumsum(-1) - 1).clamp_min(0) // size
        number = int(cluster.max()) + 1
        index = cluster[..., None].expand_as(reading.keys)
        empty = reading.keys.new_zeros(*reading.keys.shape[:2], number, reading.keys.shape[-1])
        representative = torch.zeros_like(empty)
        for part, how, fill in ((self.alpha, "amax", -torch.inf), (1 - self.alpha, "amin", torch.inf)):
            source = reading.keys.masked_fill(~held[..., None], fill)
            extreme = empty.scatter_reduce(2, index, source, how, include_self=False)
            representative += part * extreme.nan_to_num(0.0, 0.0, 0.0)
        similarity = torch.einsum("bhgnd,bhcd->bhgnc", reading.query, representative).amax(2)
        spread = cluster[:, :, None].expand_as(among)
        present = torch.zeros_like(similarity).scatter_reduce(-1, spread, among.float(), "amax") > 0
        filled = torch.zeros_like(similarity).scatter_reduce(-1, spread, reading.visible.float(), "amax") > 0
        count = (filled.sum(-1, keepdim=True) * share).ceil()
        chosen = (rank(similarity.masked_fill(~present, float("-inf"))) < count) & present
        last = filled.sum(-1, keepdim=True) - 1
        ends = torch.arange(number, device=last.device)
        chosen |= (ends == 0) | (ends == last)
        return chosen.gather(-1, spread) & reading.visible
