"""Fair eviction: every instruction of a prompt keeps the same share of its entries."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import CHOSEN, Protect, Recipe, Refinement, Scorer
from kvbudget.policy.scoring import check_window, pool
from kvbudget.policy.selection import rank_in_group
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Quotas(Refinement):
    """Each span of the text keeps the part of its head's entries that it is of the text; ``cuts`` are where spans begin."""

    cuts: tuple[int, ...] = ()

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        seen = torch.tensor(view.seen, device=scores.device)
        ends = torch.tensor([*self.cuts, 2**31 - 1], device=scores.device)
        # Rounding down the running totals leaves what is over to the later span, as the reference does.
        totals = counts[..., None] * ends.minimum(seen[:, None])[:, None] // seen.clamp_min(1)[:, None, None]
        quotas = totals.diff(dim=-1, prepend=torch.zeros_like(totals[..., :1]))
        span = torch.bucketize(view.positions, ends, right=True).clamp_max(len(ends) - 1)
        span = span.masked_fill(~view.valid, len(ends) - 1)
        ranked = scores.masked_fill(protected, float("inf")).masked_fill(~view.valid, float("-inf"))
        place = rank_in_group(ranked, span)
        inside = (place < quotas.gather(-1, span)) & view.valid
        # Where protected entries exceed a quota, the others' last places give way.
        return torch.where(inside, CHOSEN - place, scores)


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


@dataclass(frozen=True)
class Fair(Recipe):
    """Spends a head's budget on the spans of the prompt in proportion to their length, over any scorer (its own by default).

    Paper: Chen et al., The Pitfalls of KV Cache Compression, arXiv 2510.00231, 2025. Eviction hits the instructions of a
    prompt unevenly, and those that lose most are ignored (leaking system prompts); the same retention for all of them cures
    much of it. Its form over SnapKV, the default here: each span is scored by the last queries of the span itself, which
    share the window. ``knorm+fair(cuts=(120,))`` takes another scorer's scores. The reference has two spans; any number
    works here. Its other cure, the whitelist, is the cache's ``protect=[(start, end), ...]``, counted inside of the budget.

    Attributes:
        cuts: positions at which a new span begins, in tokens of the prompt; the last span goes on into what is generated.
        window: queries that vote, over all spans together (reference: 64).
        kernel: pooling width over positions (reference: 5).
    """

    name = "fair"
    aliases = ("fair_eviction",)
    role = "refinement over spans"
    phase = "wherever the scorer acts"
    paper = "The Pitfalls of KV Cache Compression, arXiv 2510.00231, 2025"
    prefix_reusable = True

    cuts: tuple[int, ...] = ()
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if list(self.cuts) != sorted({*self.cuts} - {0}):
            raise PolicyError(f"fair: cuts={self.cuts} must be positions above 0 that rise, such as (120, 300)")
        if self.window // (len(self.cuts) + 1) < 1:
            raise PolicyError(
                f"fair: window={self.window} gives {len(self.cuts) + 1} spans no query each; give at least that many"
            )

    def parts(self) -> dict[str, Any]:
        return {"refinement": Quotas(self.cuts)}

    def defaults(self) -> dict[str, Any]:
        own = self.window // (len(self.cuts) + 1)
        return {"scorer": SpanVotes(self.cuts, self.window, self.kernel), "protect": Protect(recent=own)}
