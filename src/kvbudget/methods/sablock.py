"""SABlock: entries stay in blocks that never cross a phrase, as large as the scores allow."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.base import CHOSEN, Recipe, Refinement
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


@dataclass(frozen=True)
class SABlock(Recipe):
    """Evicts in blocks inside of phrases, over any scorer (SnapKV where none is named).

    Paper: Chen et al., arXiv 2510.22556, 2025, without code. The steps are the paper's (segments at punctuation, scores
    guided by their segments, the largest block size per segment that keeps enough of the score); the formulas of the
    segment's importance and the candidates of the sizes are not verified, so this is in SABlock's style. What whole blocks
    leave of the budget goes to the best single entries. Claim: 99.9% of needles with 96 entries, 9.5x faster decoding at
    128k. Delimiters are known where `KVCache.prefill` gets a tokenizer (``kvbudget run`` does that); otherwise the text is
    one segment.

    Attributes:
        block: largest block, a power of two (paper: unverified).
        fidelity: share of a segment's score that its blocks must retain (unverified; 0 takes the largest block).
        weight: of the segment's importance in the scores (unverified; 0 leaves them as they are).
    """

    name = "sablock"
    role = "refinement"
    phase = "wherever the scorer acts"
    paper = "SABlock: Semantic-Aware KV Cache Eviction with Adaptive Compression Block Size, arXiv 2510.22556, 2025"
    needs = ("tokens",)
    prefix_reusable = True

    block: int = 16
    fidelity: float = 0.9
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise PolicyError(f"sablock: block={self.block} must be a power of two, such as 16")

    def parts(self) -> dict[str, Any]:
        return {"refinement": SemanticBlocks(self.block, self.fidelity, self.weight)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()
