"""Enforcer: the budget path, which brings each layer back to its share whenever a forward leaves it above."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from kvbudget.budget import solve
from kvbudget.kernels import count_kept
from kvbudget.layer import LayerCache
from kvbudget.policy.base import Destination, Evicted, LayerAllocator, Scorer
from kvbudget.policy.selection import protected_entries
from kvbudget.policy.view import View
from kvbudget.segments.lane import Sum
from kvbudget.verdicts import Verdicts


@dataclass
class Enforcer(Verdicts):
    """Keeps the layers inside their shares.

    While ``suspended`` (a plan that judges the whole prompt) nothing is evicted or coded; ``filled`` says that a prompt has
    been taken in, and ``evictions`` counts them, layer by layer.
    """

    suspended: bool = False
    filled: bool = False
    evictions: int = 0
    _chosen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def watches(self) -> bool:
        """Whether something looks at the queries of a forward."""
        return self.parts.scorer is not None or self._asks

    @cached_property
    def _asks(self) -> bool:
        return any(codec.asks for codec in self.parts.codec or ())

    def after_attention(self, index: int, view: View) -> None:
        """Ends the attention of layer ``self.layers[index]``: statistics first, then evictions, then codecs."""
        if not view.layer.summed:
            self.observe(index, view)
        self.act(index, view)

    def observe(self, index: int, view: View) -> None:
        """The statistics that a layer's scorer and destination keep, which no budget changes."""
        parts = self.parts
        if parts.scorer is not None:
            if parts.layers is None or parts.layers.leader(index) == index:
                parts.scorer.observe(view)
            if parts.destination is not None:
                parts.destination.observe(view)

    def sums(self, index: int) -> tuple[Sum, ...] | None:
        """What `observe` comes to for layer ``self.layers[index]`` where a forward brings one token; None: it has to look."""
        scorer, destination, layers = self.parts.scorer, self.parts.destination, self.parts.layers
        if scorer is None:
            return ()
        if destination is not None and type(destination).observe is not Destination.observe:
            return None
        if layers is not None and layers.leader(index) != index:
            return ()
        return scorer.sums(1) if type(scorer).observe is Scorer.observe else None

    def act(self, index: int, view: View) -> None:
        """What follows the statistics: the allocator's measurement, evictions and codecs."""
        layer, parts = self.layers[index], self.parts
        if layer.rests:
            return
        if parts.scorer is not None:
            acts = not (self.suspended or (parts.trigger.after_prefill and self.filled))
            if parts.layers is not None:
                self._allocate(index, view, parts.layers, acts)
            elif acts and not parts.jury:
                self.settle(layer, view)
            if acts and parts.jury and layer is self.layers[-1]:
                self.settle_all(view.new_tokens)
            if not acts and parts.trigger.after_prefill:
                layer.set_capacity(None)
        if not self.suspended and not (parts.jury and layer is not self.layers[-1]):
            for each in self._group(layer):
                each.finish_forward(view.asked() if self._asks else None)
        layer.rest = min(layer.rest, self._rest(layer))

    def _rest(self, layer: LayerCache) -> int:
        """How many more tokens of one step each leave a layer with nothing to be evicted, whatever is measured of it."""
        parts, trigger = self.parts, self.parts.trigger
        if self.suspended or self.declared or self.granted:
            return 0
        if parts.scorer is None or (trigger.after_prefill and self.filled):
            return sys.maxsize
        if not self._steady or trigger.after_prefill:
            return 0
        if self.budget.kind == "none":
            return sys.maxsize
        return min(layer.capacity or [0]) // layer.num_kv_heads - layer.longest - 1

    @cached_property
    def _steady(self) -> bool:
        """Whether all heads of all layers have the same share, which shrinks with nothing."""
        parts, heads = self.parts, {layer.num_kv_heads for layer in self.layers}
        return self._rests and not (parts.layers or parts.heads or parts.stages or len(heads) > 1)

    def _allocate(self, index: int, view: View, allocator: LayerAllocator, acts: bool) -> None:
        """The measurement of a layer and, where it ``acts``, the evictions that follow from it."""
        layer = self.layers[index]
        if not self.measured:
            self.measured = [[] for _ in self.layers]
        last = self.measured[index] or [None] * layer.batch_size
        if allocator.measures:
            self.measured[index] = list(allocator.preference(view, last))
        if self.parts.jury:  # which decides when the last of its layers has been measured
            return
        if acts and allocator.joint:
            if layer is self.layers[-1] or allocator.ends_round(index):
                self.settle_all(view.new_tokens)
        elif acts:
            self.settle(layer, view)
            if allocator.measures and self.measured[index] != last:
                for earlier in self.layers[:index]:
                    self.settle(earlier, View(earlier))

    def fork(self, layers: list[LayerCache]) -> Enforcer:
        """A copy that governs the layers of a forked cache."""
        return replace(
            self, layers=layers, measured=[list(row) for row in self.measured], _solved={}, _found={}, _chosen={}
        )

    def reset(self) -> None:
        """Forgets what was measured."""
        self.measured, self.filled, self.evictions, self._chosen = [], False, 0, {}
        self._solved.clear()
        self._found.clear()

    def select_sequences(self, index: Sequence[int]) -> None:
        """Sequence i goes on from the former sequence ``index[i]``."""
        self.measured = [[row[b] for b in index] if row else [] for row in self.measured]
        self._solved.clear()
        self._found.clear()

    def settle_all(self, new_tokens: Sequence[int] | None = None) -> None:
        """Brings all layers back to their shares, after a forward of ``new_tokens[b]`` tokens (None: without slack)."""
        allocator = self.parts.layers
        layers = [layer for layer in self.layers if layer.seen]
        among = self._rank(allocator, layers) if allocator is not None and allocator.joint else None
        inside = among is not None and not any(among)
        if not inside or self.parts.threshold is not None:
            for layer in layers:
                self.settle(layer, View(layer), new_tokens, among)
        if inside and self.budget.kind != "none":
            self._level_room(layers)

    def settle(
        self,
        layer: LayerCache,
        view: View,
        new_tokens: Sequence[int] | None = None,
        among: Sequence[bool] | None = None,
    ) -> None:
        """Evicts from a layer that holds more than its share, down to the share (less the trigger's slack).

        ``among[b]`` says which sequences may lose entries (None: all).
        """
        group = self._group(layer)
        if layer is not group[0]:
            return
        index, heads, batch = self.layers.index(layer), layer.num_kv_heads, range(len(layer.seen))
        fresh, held = new_tokens or view.new_tokens, layer.evictable()
        limits, bounds = zip(*(self._bounds(layer, index, b, fresh[b], min(held[b])) for b in batch), strict=True)
        if self._rests and layer.capacity == list(limits) and layer.longest * heads <= min(bounds):
            return
        for each in group:
            room = None if self.budget.kind == "none" else [self._room(b, n, heads) for b, n in enumerate(limits)]
            each.set_capacity(room)
        if not self._apart:
            over = [max(held[b]) * heads > bounds[b] for b in batch]
        else:
            free, pinned = self._free[index], self._pinned[index]
            over = [sum(held[b][h] for h in free) > bounds[b] - pinned * self._until(b) for b in batch]
        if among is not None:
            over = [o and may for o, may in zip(over, among, strict=True)]
        due = self._due(layer, view, new_tokens)
        if any(over) or any(due):
            targets = [self._target(layer, b, limits[b], fresh[b]) for b in batch]
            self._evict(layer, view, over, due, targets, limits)
        for each in group if self.cost.aside and self.budget.kind == "bytes" else ():
            self._limit_aside(each)

    @cached_property
    def _rests(self) -> bool:
        """Whether a layer whose rows are all inside an even share of its limit has nothing to be done."""
        return self.parts.threshold is None and not self.cost.aside and not sum(self._pinned)

    def _room(self, b: int, limit: int, heads: int) -> int:
        """Entries of a layer that sequence b may have memory for: its limit, or as long as the whole text fits, its share."""
        mean = self._mean(b)
        return limit if self._grows or mean < self.layers[0].seen[b] else max(limit, int(mean) * heads)

    def _level_room(self, layers: Sequence[LayerCache]) -> None:
        """Gives all layers the same part of what is left, where shares are those of an earlier ranking."""
        held = [[sum(rows) for rows in layer.evictable()] for layer in layers]
        heads = sum(layer.num_kv_heads for layer in self.layers)
        batch = range(self._batch_size())
        left = [int(self._mean(b) * heads) - sum(rows[b] for rows in held) for b in batch]
        for layer, rows in zip(layers, held, strict=True):
            layer.set_capacity([rows[b] + left[b] * layer.num_kv_heads // heads for b in batch])

    def _target(self, layer: LayerCache, b: int, limit: int, new_tokens: int) -> int:
        """Entries to evict down to: the limit, less those that come until the next eviction."""
        heads = layer.num_kv_heads
        free = len(self._free[self.layers.index(layer)])
        seen, until = layer.seen[b], self._until(b)
        if self._grows:
            slack = (until - seen) * heads
        else:
            stretch = self.parts.trigger.stretch(self._each(layer, b, limit))
            slack = stretch * free if self._small(stretch, new_tokens) else 0
        return min(limit, max(limit - slack, (heads - free) * seen + self.floor * free))

    def _limit_aside(self, layer: LayerCache) -> None:
        """Drops what the destination holds beyond its share, the same from all heads of a sequence that hold enough."""
        assert self.parts.destination is not None
        index, heads = self.layers.index(layer), layer.num_kv_heads
        held = [sum(rows) for rows in zip(*(segment.lengths for segment in layer.front), strict=True)]
        counts = []
        for b in range(layer.batch_size if held else 0):
            own = held[b * heads : (b + 1) * heads]
            counts += solve(self.aside(b)[index], [1.0] * heads, 0, own)
        if counts != held:
            self.parts.destination.limit(layer, counts)

    def _rank(self, allocator: LayerAllocator, layers: Sequence[LayerCache]) -> list[bool]:
        """Measures the shares of ``layers`` by ranking their entries together.

        Returns which sequences hold more than the budget; the others keep the shares that they had.
        """
        batch = range(self._batch_size())
        means = [self._mean(b) for b in batch]
        held = [sum(sum(layer.evictable()[b]) for layer in layers) for b in batch]
        every = sum(layer.num_kv_heads for layer in self.layers)
        over = [n > mean * every for n, mean in zip(held, means, strict=True)]
        if not any(over):
            return over
        scores = []
        for layer in layers:
            view = View(layer)
            protected = protected_entries(view.positions, view.seen, self.parts.protect, self.spans, means)
            judged = self._scores(view).masked_fill(protected, float("inf"))
            scores.append(judged.masked_fill(~view.valid, float("-inf")))
        heads = sum(layer.num_kv_heads for layer in layers)
        last = [row or [None] * len(batch) for row in self.measured or [[]] * len(self.layers)]
        at = [i for i, layer in enumerate(self.layers) if layer.seen]
        self.measured = [list(row) for row in last]
        for b in batch:
            if over[b]:
                counts = allocator.rank([score[b] for score in scores], int(min(means[b] * heads, held[b])))
                for i, count in zip(at, counts, strict=True):
                    self.measured[i][b] = count
        return over

    def _due(self, layer: LayerCache, view: View, new_tokens: Sequence[int] | None) -> list[bool]:
        """Sequences in which entries below the policy's threshold leave now: after every ``every``-th of their tokens."""
        if self.parts.threshold is None:
            return [False] * layer.batch_size
        if new_tokens is None and view.queries is None:  # outside of a forward
            return [True] * layer.batch_size
        every, fresh = self.parts.trigger.small, new_tokens or view.new_tokens
        return [seen // every > (seen - new) // every for seen, new in zip(layer.seen, fresh, strict=True)]

    def _evict(
        self,
        layer: LayerCache,
        view: View,
        over: list[bool],
        due: list[bool],
        targets: list[int],
        limits: Sequence[int],
    ) -> None:
        heads, valid, index = layer.num_kv_heads, view.valid, self.layers.index(layer)
        leader = self._leader(index)
        scores, keep = self._chosen[leader] if leader < index else self._choose(layer, view, over, due, targets)
        if leader == index:
            self._chosen[index] = (scores, keep)
        last = self.parts.jury or index + 1 == len(self.layers)
        if last or self._leader(index + 1) == index + 1:  # nobody else follows the leader
            del self._chosen[leader]
        if self.parts.threshold is not None and bool((keep | ~valid.flatten(0, 1)).all()):
            return
        # Room for the steps until the next eviction, the same in all rows and inside the smallest share.
        rows = count_kept(keep, [keep.shape[1]] * len(keep))
        kept = [sum(rows[b * heads : (b + 1) * heads]) for b in range(layer.batch_size)]
        spare = max(0, min((limit - k) // heads for limit, k in zip(limits, kept, strict=True)))
        if self.parts.threshold is not None:  # which leaves the share far from full
            spare = min(spare, self.parts.trigger.small)
        group, destination, evicted = self._group(layer), self.parts.destination, []
        if destination is not None:
            gone = ~keep & valid.flatten(0, 1)
            for each in group:
                judge = self.layers[self._leader(self.layers.index(each))]  # with the same cells, where all layers vote
                own = scores if layer in (each, judge) else self._scores(View(judge))
                evicted.append(self._gather(each, gone, keep, own.flatten(0, 1)))
        for each in group:
            each.evict(keep, spare)
        self.evictions += 1
        if destination is not None:
            for each, left in zip(group, evicted, strict=True):
                if left.position.numel():
                    destination.receive(each, left)

    def _gather(self, layer: LayerCache, gone: Tensor, keep: Tensor, scores: Tensor) -> Evicted:
        begin = 0
        pieces = []
        for segment in layer.main:
            part = gone[:, begin : begin + segment.longest]
            key, value, meta, counts = segment.gather(part)
            columns = [key, value, meta["position"], scores[:, begin : begin + segment.longest][part]]
            pieces.append((columns + ([meta["count"]] if "count" in meta else []), counts))
            begin += segment.longest
        return Evicted.join(pieces, scores[keep])

    def _each(self, layer: LayerCache, b: int, limit: int) -> int:
        """Entries that a limit buys each head that does not keep everything."""
        free = len(self._free[self.layers.index(layer)])
        return (limit - (layer.num_kv_heads - free) * self._until(b)) // max(free, 1)

    def _bounds(self, layer: LayerCache, index: int, b: int, new_tokens: int, least: int) -> tuple[int, int]:
        """What sequence b, whose heads hold ``least`` or more, may hold of a layer, and beyond what it loses entries.

        A text that fits stays whole. Where it has lost entries, small steps find room: some leave when the rows are full; and
        what a share that widens with the text has gained counts by whole stretches, since its rows are laid out anew for it.
        """
        limit = self._limit(index, b)
        if self._grows or least >= layer.seen[b]:
            return limit, limit
        entries, free = self._each(layer, b, limit), len(self._free[index])
        stretch = self.parts.trigger.stretch(entries)
        if not self._small(stretch, new_tokens):
            return limit, limit
        if self.budget.kind == "fraction" and self.max_length is None:
            limit -= min(entries % stretch, max(0, entries - self.floor)) * free
        return limit, limit - free

    def _small(self, stretch: int, new_tokens: int) -> bool:
        """Whether so few tokens came that room is made for a stretch of them."""
        return stretch > 1 and 0 < new_tokens <= min(stretch, self.parts.trigger.small)
