"""Merge: evicted entries join kept ones, by the rules that the published mergers share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbudget.policy.base import Destination, Evicted

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache

BLOCK = 2**20
"""Similarities that are held at a time."""
THRESHOLD = "merge threshold"
Weights = Literal["mean", "pivot", "cosine", "softmax", "score", "count"]


@dataclass(frozen=True)
class Group:
    """Entries of one KV head: ``key, value [n, D]``, ``position, score, count [n]``."""

    key: Tensor
    value: Tensor
    position: Tensor
    score: Tensor
    count: Tensor


@dataclass(frozen=True)
class Joined:
    """Which ``members`` join which ``anchors``, by index ``[M]``, and the cosines of their keys (where they count)."""

    members: Tensor
    anchors: Tensor
    cosine: Tensor | None = None


@dataclass(frozen=True)
class Merge(Destination):
    """Evicted entries join anchors among the kept ones; `assign` says which, and ``weights`` how keys and values add up.

    An anchor a and its m members i become ``(w_a x_a + sum w_i x_i) / (w_a + sum w_i)``, with weights

    - ``mean``: 1 each; ``count``: the number of entries that each stands for; ``score``: the scorer's, from 0 on;
    - ``pivot`` (LOOK-M): ``1 + m / 2`` and 1/2, so that a member counts as its mean with the anchor;
    - ``cosine``: 1 and ``(1 + cos) / 2``; ``softmax`` (D2O): e and ``exp(cos)``.

    With ``counts`` an anchor stands for as many entries as have joined it, which adds the logarithm of their number to its
    logit; then merging equal keys is exact where values are weighted by count. The first ``sinks`` and newest ``recent``
    entries are no anchors, and neither are those that a codec holds, since they are never coded again.
    """

    weights: Weights = field(default="softmax", kw_only=True)
    counts: bool = field(default=False, kw_only=True)
    sinks: int = field(default=0, kw_only=True)
    recent: int = field(default=0, kw_only=True)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("count",) if self.counts else ()

    @abstractmethod
    def assign(self, layer: LayerCache, row: int, anchors: Group, members: Group) -> Joined:
        """Which evicted entries of a row join which anchor."""

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        key, value, position, score = (
            column.split(evicted.counts) for column in (evicted.key, evicted.value, evicted.position, evicted.score)
        )
        lengths = [sum(rows) for rows in zip(*(segment.lengths for segment in layer.main), strict=True)]
        kept = None if evicted.kept_score is None else evicted.kept_score.split(lengths)
        for row, number in enumerate(evicted.counts):
            if not number:
                continue
            ones = torch.ones(number, device=evicted.key.device)
            count = ones if evicted.count is None else evicted.count.split(evicted.counts)[row]
            members = Group(key[row], value[row], position[row], score[row], count)
            self._join_row(layer, row, members, None if kept is None else kept[row])

    def _join_row(self, layer: LayerCache, row: int, members: Group, kept_score: Tensor | None) -> None:
        segments = [segment for segment in layer.main if segment.lengths[row]]
        written = [segment.writable(row) for segment in segments]
        sizes = [len(key) for key, _ in written]
        if not sum(sizes):
            return
        position = torch.cat([s.meta.row("position", row)[-n:] for s, n in zip(segments, sizes, strict=True) if n])
        held = [s.meta.row("count", row)[-n:] for s, n in zip(segments, sizes, strict=True) if n and self.counts]
        score = torch.zeros_like(position).float()
        if kept_score is not None:
            cuts = zip(kept_score.split([s.lengths[row] for s in segments]), sizes, strict=True)
            score = torch.cat([part[len(part) - n :] for part, n in cuts])
        anchors = Group(
            torch.cat([key for key, _ in written]),
            torch.cat([value for _, value in written]),
            position,
            score,
            torch.cat(held) if held else torch.ones_like(score),
        )
        seen = layer.seen[row // layer.num_kv_heads]
        free = ((position >= self.sinks) & (position < seen - self.recent)).nonzero().flatten()
        if not len(free):
            return
        some = Group(*(column[free] for column in vars(anchors).values()))
        joined = self.assign(layer, row, some, members)
        if not len(joined.members):
            return
        where, change = self._sums(some, members, joined)
        for column, new in zip((anchors.key, anchors.value, anchors.count), change, strict=True):
            column[free[where]] = new.to(column.dtype)
        begin = 0
        for segment, (key, value), size in zip(segments, written, sizes, strict=True):
            key.copy_(anchors.key[begin : begin + size])
            value.copy_(anchors.value[begin : begin + size])
            if self.counts and size:
                segment.meta.own("count")
                segment.meta.row("count", row)[-size:] = anchors.count[begin : begin + size]
            begin += size

    def _sums(self, anchors: Group, members: Group, joined: Joined) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Anchors that change, and their new keys, values and counts."""
        which, slot = joined.anchors.unique(return_inverse=True)
        own, other = self._weigh(anchors, members, joined, which, slot)
        total = own.index_add(0, slot, other).clamp_min(1e-30)

        def mean(kept: Tensor, gone: Tensor) -> Tensor:
            summed = kept[which].float() * own[:, None]
            return summed.index_add_(0, slot, gone[joined.members].float() * other[:, None]) / total[:, None]

        count = anchors.count[which].index_add(0, slot, members.count[joined.members])
        return which, (mean(anchors.key, members.key), mean(anchors.value, members.value), count)

    def _weigh(
        self, anchors: Group, members: Group, joined: Joined, which: Tensor, slot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights of the anchors ``which``, and of the joined members, of which the i-th goes to ``which[slot[i]]``."""
        ones, each = (torch.ones(n, device=slot.device) for n in (len(which), len(slot)))
        number = torch.zeros_like(ones).index_add(0, slot, each)
        if self.weights == "count":
            return anchors.count[which], members.count[joined.members]
        if self.weights == "score":
            # An anchor that the scorer ranks below its members, such as a protected one, counts as much as they do.
            score = members.score[joined.members].clamp_min(0.0) + 1e-12
            mean = torch.zeros_like(ones).index_add(0, slot, score) / number
            return anchors.score[which].maximum(mean).clamp_max(1e30), score
        if self.weights == "pivot":
            return 1 + number / 2, each / 2
        if self.weights == "mean":
            return ones, each
        assert joined.cosine is not None, "these weights need cosines"
        return (ones, (1 + joined.cosine) / 2) if self.weights == "cosine" else (ones * math.e, joined.cosine.exp())


@dataclass(frozen=True)
class MergeNearest(Merge):
    """Merges an evicted entry into the kept one with the nearest key where it is near enough, else drops it.

    Nearest by the cosine u of the keys inside of a KV head. Without ``least`` the threshold is D2O's (arXiv 2406.13035,
    section 3.3): ``mean(u)`` of a head's evicted entries at first and ``alpha * threshold + beta * mean(u)`` afterwards; with
    it, entries join where ``u >= least``. With ``candidates`` above 1, only the evicted entries with the highest scores may
    join, as many as bring the head to ``candidates`` times what it keeps.
    """

    alpha: float = 0.5
    beta: float = 0.5
    least: float | None = None
    candidates: float = 0.0

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return 4.0 if self.least is None else 0.0

    def assign(self, layer: LayerCache, row: int, anchors: Group, members: Group) -> Joined:
        similarity, nearest = nearest_key(members.key, anchors.key)
        near = similarity >= (self._threshold(layer, row, similarity.mean()) if self.least is None else self.least)
        if self.candidates > 1:
            held = sum(segment.lengths[row] for segment in layer.main)
            most = min(len(near), int((self.candidates - 1) * held))
            chosen = torch.zeros_like(near)
            chosen[members.score.topk(most).indices] = True
            near &= chosen
        return Joined(near.nonzero().flatten(), nearest[near], similarity[near])

    def _threshold(self, layer: LayerCache, row: int, mean: Tensor) -> Tensor:
        thresholds = layer.statistics.get(THRESHOLD)
        if thresholds is None:
            thresholds = torch.full((layer.num_rows,), math.nan, device=mean.device)
        thresholds = thresholds.clone()
        last = thresholds[row]
        thresholds[row] = torch.where(last.isnan(), mean, self.alpha * last + self.beta * mean)
        layer.statistics[THRESHOLD] = thresholds
        return thresholds[row]


@dataclass(frozen=True)
class MergeNearby(Merge):
    """Merges an evicted entry into the anchor at the nearest position (Elastic Cache, arXiv 2407.18121).

    Ties go to the older anchor. Rows in which the statistic ``unless`` is above 0 drop what leaves.
    """

    unless: str = ""

    def assign(self, layer: LayerCache, row: int, anchors: Group, members: Group) -> Joined:
        every = torch.arange(len(members.position), device=members.position.device)
        if self.unless in layer.statistics and float(layer.statistics[self.unless][row]) > 0:
            every = every[:0]
        at, place = anchors.position, members.position[every]
        after = torch.searchsorted(at, place).clamp(max=len(at) - 1)
        before = (after - 1).clamp_min(0)
        return Joined(every, torch.where((place - at[before]).abs() <= (at[after] - place).abs(), before, after))


def nearest_key(keys: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine of each key ``[E, D]`` to the anchors ``[A, D]``, and which anchor it is: ``[E]`` each, in blocks."""
    directions = normalize(anchors.float(), dim=-1)
    size = max(1, BLOCK // len(anchors))
    best = [(normalize(block.float(), dim=-1) @ directions.T).max(dim=-1) for block in keys.split(size)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
