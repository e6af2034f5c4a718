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
        held = reading.keys.shape[2]
        size = min(size, held)
        number = -(-held // size)

        def cut(cells: Tensor, dim: int) -> Tensor:
            fill = (0, 0) * (cells.dim() - 1 - dim) + (0, number * size - held)
            return torch.nn.functional.pad(cells, fill).unflatten(dim, (number, size))

        # A query knows the clusters as they are up to its own token, whatever came with it: their running extremes.
        begin = size * torch.arange(number, device=among.device)
        seen = reading.visible.sum(-1, keepdim=True)
        newest = (seen - 1 - begin).clamp(0, size - 1).mT[..., None].expand(*[-1] * 4, reading.keys.shape[-1])
        keys = cut(reading.keys, 2)
        high, low = (running.values.gather(3, newest) for running in (keys.cummax(3), keys.cummin(3)))
        representative = self.alpha * high + (1 - self.alpha) * low
        similarity = torch.einsum("bhgnd,bhcnd->bhgnc", reading.query, representative).amax(2)
        filled, present = begin < seen, cut(among, 3).any(-1)
        count = (filled.sum(-1, keepdim=True) * share).ceil()
        chosen = (rank(similarity.masked_fill(~present, float("-inf"))) < count) & present
        chosen |= (begin == 0) | (begin + size >= seen)
        return chosen.repeat_interleave(size, -1)[..., :held] & reading.visible
