"""Representatives: part of a head's room goes to rejected entries that differ in which heads want them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbudget.policy.base import CHOSEN, Refinement
from kvbudget.policy.selection import rank
from kvbudget.policy.view import View

Anchor = Literal["alternating", "random", "mean", "inverse", "zeros", "ones"]


@dataclass(frozen=True)
class Representatives(Refinement):
    """Spends ``share`` of what is not protected on rejected entries, spread over their Hamming distances to one anchor.

    The signature of a position has a bit per KV head of the layer: whether it is in the better half of that head's entries.
    A head's rejected entries are sorted by the distance of their signature to the ``anchor`` (ties by position), and as many
    as are due are taken at even distances in that order, the first and the last among them.
    """

    share: float = 0.25
    anchor: Anchor = "alternating"
    seed: int = 0

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        candidates = view.valid & ~protected
        room = (counts - protected.sum(-1)).clamp_min(0)
        due = (room * self.share).long()
        if self.share > 0:  # one representative at least, beside one important entry
            due = due.maximum((room > 1).long())
        order = rank(scores.masked_fill(~candidates, float("-inf")))
        important = candidates & (order < (room - due)[..., None])
        better = candidates & (order < candidates.sum(-1, keepdim=True) / 2)
        chosen = important.clone()
        for b in range(view.batch_size):
            distance = self._distances(view.positions[b], candidates[b], better[b], view.seen[b])
            for h in range(view.num_kv_heads):
                rejected = (candidates[b, h] & ~important[b, h]).nonzero()[:, 0]
                if len(rejected) and (number := min(int(due[b, h]), len(rejected))):
                    by_distance = rejected[distance[view.positions[b, h, rejected].long()].argsort(stable=True)]
                    even = torch.linspace(0, len(rejected) - 1, number).round().long()
                    chosen[b, h, by_distance[even.to(by_distance.device)]] = True
        return torch.where(chosen, CHOSEN + scores.clamp(0, CHOSEN), scores)

    def _distances(self, positions: Tensor, candidates: Tensor, better: Tensor, seen: int) -> Tensor:
        """Hamming distance of every position's signature to the anchor: ``[seen]``."""
        heads = len(positions)
        bits = torch.zeros(heads, seen, dtype=torch.bool, device=positions.device)
        present = torch.zeros(seen, dtype=torch.bool, device=positions.device)
        for h in range(heads):
            bits[h, positions[h, better[h]].long()] = True
            present[positions[h, candidates[h]].long()] = True
        return (bits != self._anchor(bits[:, present])[:, None]).sum(0)

    def _anchor(self, bits: Tensor) -> Tensor:
        heads = len(bits)
        if self.anchor in ("mean", "inverse"):
            majority = bits.float().mean(-1) > 0.5
            return majority if self.anchor == "mean" else ~majority
        if self.anchor == "random":
            drawn = torch.rand(heads, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        elif self.anchor == "alternating":
            drawn = torch.arange(heads) % 2 == 1
        else:
            drawn = torch.full((heads,), self.anchor == "ones")
        return drawn.to(bits.device)
