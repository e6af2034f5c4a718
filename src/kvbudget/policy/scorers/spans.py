"""Scores from queries of a span's own: every span of a text is judged by its last queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import check_window, pool
from kvbudget.policy.view import View


@dataclass(frozen=True)
class SpanVotes(Scorer):
    """Each span is judged by the queries at its own end, ``window / number of spans`` of them, as SnapKV judges a prompt.

    Votes are the mean weights (softmax over everything held), reduced by the mean over the GQA group and pooled inside the
    span; the entries of a span's own window get the span's highest score. At the end of the text the votes run on as in
    `WindowAttention`.
    """

    states: ClassVar[tuple[str, ...]] = ("votes",)

    cuts: tuple[int, ...] = ()
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        check_window(self.window // (len(self.cuts) + 1))

    def observe(self, view: View) -> None:
        width = self.window // (len(self.cuts) + 1)
        votes, fresh = view.state("votes").clone(), torch.tensor(view.new_tokens, device=view.positions.device)
        last = self.cuts[-1] if self.cuts else 0
        fade = (1 - fresh / width).clamp_min(0.0)[:, None, None]
        votes = torch.where(view.positions >= last, votes * fade, votes)
        for weights, steps in view.attention_rows():
            for begin, end, entries in self._spans(view):
                if not bool(
                    (part := (steps >= end[:, None] - width) & (steps >= begin) & (steps < end[:, None])).any()
                ):
                    continue
                paid = (weights.mean(2) * part[:, None, :, None]).sum(2) / width
                votes += paid * entries
        view.set_state("votes", votes)

    def score(self, view: View) -> Tensor:
        width = self.window // (len(self.cuts) + 1)
        votes, scores = view.state("votes"), torch.zeros_like(view.state("votes"))
        for _, end, entries in self._spans(view):
            judged = entries & (view.positions < end[:, None, None] - width)
            pooled = pool(votes.masked_fill(~judged, 0.0), self.kernel).masked_fill(~judged, 0.0)
            best = pooled.amax(-1, keepdim=True) if pooled.shape[-1] else pooled
            scores = torch.where(judged, pooled, torch.where(entries, best, scores))
        return scores

    def _spans(self, view: View) -> list[tuple[int, Tensor, Tensor]]:
        """Begin, end per sequence ``[B]`` and entries ``[B, Hkv, T]`` of every span; the last one ends with the text."""
        seen = torch.tensor(view.seen, device=view.positions.device)
        edges = [0, *self.cuts]
        ends = [torch.full_like(seen, end) for end in self.cuts] + [seen]
        return [
            (begin, end, (view.positions >= begin) & (view.positions < end[:, None, None]) & view.valid)
            for begin, end in zip(edges, ends, strict=True)
        ]
