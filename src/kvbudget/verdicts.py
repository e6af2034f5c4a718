"""Verdicts: which entries of a layer stay, by its own scores or by a vote of what is coded together."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbudget.layer import LayerCache
from kvbudget.policy.selection import newest, protected_entries, select, votes
from kvbudget.policy.view import View
from kvbudget.shares import Shares


class Verdicts(Shares):
    """Chooses entries of layers that are over their shares, or hold entries below the policy's threshold.

    ``over[b]`` says that sequence b has to lose entries, ``due[b]`` that those below the threshold leave it, and
    ``targets[b]`` is how many may stay, over all KV heads.
    """

    def _choose(
        self, layer: LayerCache, view: View, over: list[bool], due: list[bool], targets: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Scores ``[B, Hkv, T]``, and which entries stay ``[R, T]``."""
        heads, valid = layer.num_kv_heads, view.valid
        decide = self._elect if self.parts.votes else self._judge
        scores, judged, protected, counts = decide(layer, view, over, due, targets, self._protected(layer, view, over))
        stored = layer.page > 1 or any(segment.unit > 1 for segment in layer.main)
        if stored:
            units = layer.sealed_units().to(scores.device).unflatten(0, (-1, heads))
        elif (units := self.parts.granularity.units(view)) is not None:
            alone = torch.arange(units.shape[-1], device=units.device) + units.max() + 1
            units = torch.where(protected, alone, units)
        return scores, select(judged, protected, valid, counts, units, fill=not stored).flatten(0, 1)

    def _judge(
        self, layer: LayerCache, view: View, over: list[bool], due: list[bool], targets: list[int], protected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, those after a second look, what is protected, and how many entries ``[B, Hkv]`` each head keeps."""
        heads, scores = layer.num_kv_heads, self._scores(view)
        valid, held = view.valid, layer.evictable()
        asked = scores
        if self.parts.threshold is not None:  # no threshold judges the window, not even where a budget shrinks it
            inside = protected_entries(view.positions, view.seen, self.parts.protect, self.spans)
            asked = torch.where(inside, scores.clamp_min(self.parts.threshold), scores)
        splits = []
        for b, target in enumerate(targets):
            if not over[b]:
                split = held[b]
            elif self.parts.heads is not None:
                split = list(held[b])
                free = self._free[self.layers.index(layer)]
                rest = target - sum(held[b]) + sum(held[b][h] for h in free)
                hint = None if (name := self.parts.heads.statistic) is None else view.statistic(name)
                hint = None if hint is None else hint[b, free]
                allocator = self.parts.heads.of_layer(layer.layer_idx)
                shared = allocator.split(asked[b, free], protected[b, free], valid[b, free], rest, hint)
                for h, entries in zip(free, shared, strict=True):
                    split[h] = entries
            else:
                split = [target // heads] * heads
            splits.append(split)
        counts = torch.tensor(splits, device=scores.device)
        if not self.parts.votes:
            protected = self._with_newest(view, protected, counts)
        if self.parts.threshold is not None:
            passing = ((asked >= self.parts.threshold) & valid).sum(-1)
            acts = torch.tensor([o or d for o, d in zip(over, due, strict=True)], device=scores.device)
            counts = torch.where(acts[:, None], counts.minimum(passing), counts)
        judged = scores
        if self.parts.refinement is not None:
            judged = self.parts.refinement.refine(view, scores, protected, counts)
        return scores, judged, protected, counts

    def _elect(
        self, layer: LayerCache, view: View, over: list[bool], due: list[bool], targets: list[int], protected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_judge`, for heads that hold the same entries: how much they want each, and how many of them stay."""
        heads, held = layer.num_kv_heads, layer.evictable()
        entries = torch.tensor([t // heads if o else h[0] for o, t, h in zip(over, targets, held, strict=True)])
        most = entries[:, None].expand(-1, heads).to(protected.device)
        protected = self._with_newest(view, protected, most)
        found = []
        for each in self._group(layer):
            at, own = self.layers.index(each), targets
            if self._leader(at) != at:
                continue
            if self.parts.jury:  # each layer asks for its own share, less what is evicted ahead
                shares = [self.shares(b)[at] - self._limit(at, b) + target for b, target in enumerate(targets)]
                own = [max(share, self.floor * heads) for share in shares]
            seat = view if each is layer else View(each)
            found.append(self._judge(each, seat, over, due, own, protected))
        wanted = torch.stack([votes(judged, protected, view.valid, counts) for _, judged, _, counts in found]).amax(0)
        asked = (((wanted >= 1) | protected) & view.valid).sum(-1)
        return found[0][0], wanted, protected, asked.minimum(most)

    def _protected(self, layer: LayerCache, view: View, over: list[bool]) -> Tensor:
        """Entries ``[B, Hkv, T]`` that stay whatever they score."""
        # Where all layers compete, the ranking has counted as protected what a uniform share protects.
        joint, index = self.parts.layers is not None and self.parts.layers.joint, self.layers.index(layer)
        shares = [self._mean(b) if joint else self._limit(index, b) / view.num_kv_heads for b in range(len(over))]
        means = [share if o else float("inf") for o, share in zip(over, shares, strict=True)]
        return protected_entries(view.positions, view.seen, self.parts.protect, self.spans, means)

    def _with_newest(self, view: View, protected: Tensor, counts: Tensor) -> Tensor:
        """The protected entries, and the share of ``counts [B, Hkv]`` that is the newest ones'."""
        if not self.parts.protect.recent_share:
            return protected
        recent = (counts * self.parts.protect.recent_share).long().minimum((counts - protected.sum(-1)).clamp_min(0))
        return protected | (newest(view.positions, recent) & view.valid)

    def _scores(self, view: View) -> Tensor:
        assert self.parts.scorer is not None
        return self.parts.scorer.score(view).float()

    def _group(self, layer: LayerCache) -> list[LayerCache]:
        """The layers that hold the same entries as this one, by a vote of all."""
        return self.layers if self.parts.jury else [layer]

    def _leader(self, index: int) -> int:
        return index if self.parts.layers is None else self.parts.layers.leader(index)
