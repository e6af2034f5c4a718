"""Blocks inside of phrases: entries stay in runs as long as the scores allow, never across a delimiter."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import CHOSEN, Refinement
from kvbudget.policy.marks import DELIMITER
from kvbudget.policy.selection import rank
from kvbudget.policy.view import View


@dataclass(frozen=True)
class SemanticBlocks(Refinement):
    """Segments end at delimiters; each keeps blocks of the largest size that retains ``fidelity`` of its best entries' score.

    Scores are first raised by their segment's importance, ``a (1 + weight * g)``, with g the segment's mean score over the
    largest one, times the entropy of its scores over its maximum. The best entries by that tell how many each segment may
    keep. Sizes ``block, block / 2, ..., 1`` are tried in turn.
    """

    uses_marks: ClassVar[bool] = True

    block: int = 16
    fidelity: float = 0.9
    weight: float = 1.0

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        out = scores.clone()
        room = (counts - protected.sum(-1)).clamp_min(0).tolist()
        for b in range(view.batch_size):
            segments = self._segments(view, b)
            for h in range(view.num_kv_heads):
                cells = (view.valid[b, h] & ~protected[b, h]).nonzero()[:, 0]
                if len(cells) and room[b][h]:
                    segment = segments[view.positions[b, h, cells].long()]
                    raised = self.raised(scores[b, h, cells], segment)
                    kept = self.blocks(raised, segment, room[b][h])
                    out[b, h, cells] = torch.where(kept, CHOSEN + raised, raised)
        return out

    def raised(self, score: Tensor, segment: Tensor) -> Tensor:
        """Scores ``[n]`` raised by the importance of their segments ``[n]`` (numbers in rising order)."""
        _, where, size = segment.unique_consecutive(return_inverse=True, return_counts=True)
        score = score.clamp_min(0.0)
        total = torch.zeros(len(size), device=score.device).index_add_(0, where, score)
        share = score / total[where].clamp_min(1e-30)
        entropy = torch.zeros_like(total).index_add_(0, where, -share * share.clamp_min(1e-30).log())
        entropy = torch.where(size > 1, entropy / size.clamp_min(2).log(), 1.0)
        mean = total / size
        importance = mean / mean.max().clamp_min(1e-30) * entropy
        return score * (1 + self.weight * importance[where])

    def blocks(self, score: Tensor, segment: Tensor, room: int) -> Tensor:
        """Which of the entries ``[n]`` stay, at most ``room``: whole blocks of one size per segment."""
        _, where, size = segment.unique_consecutive(return_inverse=True, return_counts=True)
        best = rank(score) < room
        quota = torch.zeros_like(size).index_add_(0, where, best.long())
        target = torch.zeros(len(size), device=score.device).index_add_(0, where, score * best)
        inside = torch.arange(len(score), device=score.device) - (size.cumsum(0) - size)[where]
        kept, decided = best, torch.zeros(len(size), dtype=torch.bool, device=score.device)
        width = self.block
        while width > 1:
            tried = _best_blocks(score, where, inside, quota, width)
            mass = torch.zeros_like(target).index_add_(0, where, score * tried)
            accepted = (mass >= self.fidelity * target) & ~decided
            kept = torch.where(accepted[where], tried, kept)
            decided |= accepted
            width //= 2
        return kept

    @staticmethod
    def _segments(view: View, b: int) -> Tensor:
        """Segment of every position of sequence b; what is generated belongs to the last one."""
        ends = torch.zeros(view.seen[b], dtype=torch.long, device=view.positions.device)
        if b < len(view.layer.marks):
            marks = view.layer.marks[b][: view.seen[b]].to(ends.device)
            ends[: len(marks)] = ((marks & DELIMITER) > 0).long()
        return ends.cumsum(0) - ends


def _best_blocks(score: Tensor, where: Tensor, inside: Tensor, quota: Tensor, width: int) -> Tensor:
    """The blocks of ``width`` entries with the best means of each segment, as long as they fit its ``quota``."""
    block = (inside % width == 0).long().cumsum(0) - 1
    size = torch.bincount(block)
    mean = torch.zeros(len(size), device=score.device).index_add_(0, block, score) / size
    segment = torch.zeros_like(size).index_copy_(0, block, where)
    order = mean.argsort(descending=True, stable=True)
    order = order[segment[order].argsort(stable=True)]
    taken = size[order].cumsum(0)
    first = torch.searchsorted(segment[order].contiguous(), segment[order].contiguous())
    fits = taken - (taken - size[order])[first] <= quota[segment[order]]
    return torch.zeros(len(size), dtype=torch.bool, device=score.device).index_copy_(0, order, fits)[block]
