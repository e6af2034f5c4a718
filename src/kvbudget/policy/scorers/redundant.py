"""Scores by how much an entry's key resembles one next to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Scorer
from kvbudget.policy.matching import ALONE, centroids, match
from kvbudget.policy.view import View


def check_chunk(chunk: int) -> None:
    """Raises PolicyError for chunks without two sides."""
    if chunk < 2 or chunk % 2:
        raise PolicyError(f"chunk={chunk} cannot be halved for a matching; give an even number of entries")


@dataclass(frozen=True)
class Distinct(Scorer):
    """Entries leave in the order in which soft matching joins them: rounds, and in a round the most similar pairs first.

    In a round the entries at even places of each chunk are matched with those at odd places; the next round matches what is
    left when all of them have joined their partner as a centroid weighted by counts. The first ``sinks`` and the newest
    ``recent`` entries take no part.
    """

    chunk: int = 128
    sinks: int = 4
    recent: int = 32

    def score(self, view: View) -> Tensor:
        scores = torch.full(view.positions.shape, 1e3, device=view.positions.device)
        counted = all("count" in segment.meta.columns for segment in view.layer.main)
        counts = view.state("count") if counted else torch.ones_like(scores)
        keys = view.keys
        for b, seen in enumerate(view.seen):
            for h in range(view.num_kv_heads):
                position = view.positions[b, h]
                at = ((position >= self.sinks) & (position < seen - self.recent)).nonzero().flatten()
                scores[b, h, at] = self._order(keys[b, h, at], counts[b, h, at])
        return scores

    def _order(self, keys: Tensor, count: Tensor) -> Tensor:
        """When each of ``keys [n, D]`` leaves: its round, and in it later the less it resembles its partner."""
        order = torch.full((len(keys),), 1e2, device=keys.device)
        left, turn = torch.arange(len(keys), device=keys.device), 0
        while len(left) > 1:
            similarity, partner = match(keys, self.chunk)
            members = (similarity > ALONE).nonzero().flatten()
            order[left[members]] = turn + (1 - similarity[members]) / 2
            keys = centroids(keys, count, members, partner[members])
            count = count.index_add(0, partner[members], count[members])
            stays = similarity == ALONE
            keys, count, left, turn = keys[stays], count[stays], left[stays], turn + 1
        return order
