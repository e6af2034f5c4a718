"""Scores by how far entries stand out from the ranges of the partition that follows theirs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class LagRank(Scorer):
    """Rank inside the partition of ``lag`` positions, from 1 / lag to 1; entries not judged yet are above all others.

    A partition is judged once, when the next one is complete, and keeps its ranks: evictions by them take equally from all
    partitions. Ranks are 0 in the state until then.
    """

    states: ClassVar[tuple[str, ...]] = ("rank",)

    sinks: int = 4
    lag: int = 128
    value_weight: float = 1.0

    def observe(self, view: View) -> None:
        complete = [max(0, (seen - self.sinks) // self.lag - 1) for seen in view.seen]
        new = zip(view.seen, view.new_tokens, strict=True)
        before = [max(0, (seen - tokens - self.sinks) // self.lag - 1) for seen, tokens in new]
        if complete == before:
            return
        keys, values, ranks = view.keys, view.values, view.state("rank").clone()
        for b, (begin, end) in enumerate(zip(before, complete, strict=True)):
            for h in range(view.num_kv_heads):
                positions = view.positions[b, h, view.valid[b, h]]
                edges = self.sinks + self.lag * torch.arange(begin, end + 2, device=positions.device)
                cuts = torch.searchsorted(positions, edges.to(positions.dtype)).tolist()
                for i, j, k in zip(cuts, cuts[1:], cuts[2:], strict=False):
                    if i < j < k:
                        score = self._score(keys[b, h, i:j], keys[b, h, j:k])
                        score = score + self.value_weight * self._score(values[b, h, i:j], values[b, h, j:k])
                        # Entries of the partition that are gone already were worth less than those that are left.
                        order = score.argsort(stable=True)
                        ranks[b, h, i + order] = torch.arange(1 + self.lag - (j - i), self.lag + 1).to(ranks) / self.lag
        view.set_state("rank", ranks)

    def score(self, view: View) -> Tensor:
        ranks = view.state("rank")
        return torch.where(ranks > 0, ranks, 1.0 + view.positions.float())

    @staticmethod
    def _score(x: Tensor, lag: Tensor) -> Tensor:
        """Softmax over the entries of the deviation, over channels, of ``x [n, D]`` scaled to the ranges of ``lag [m, D]``."""
        low, high = lag.float().amin(0), lag.float().amax(0)
        return ((x.float() - low) / (high - low).clamp_min(1e-8)).std(-1).softmax(-1)
