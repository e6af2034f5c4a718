"""Enforcer: the budget path, which brings each layer back to its share whenever a forward leaves it above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kvbudget.budget import Budget, format_bytes, solve
from kvbudget.costs import EntryCost
from kvbudget.errors import BudgetError
from kvbudget.layer import LayerCache
from kvbudget.policy.allocators.layers import Uniform
from kvbudget.policy.base import Evicted, LayerAllocator, Parts, Span
from kvbudget.policy.selection import newest, protected_entries, select
from kvbudget.policy.view import View

FAR = 2**62
"""A length beyond every text."""


@dataclass
class Enforcer:
    """Keeps the budgeted ``layers`` inside ``budget`` by the ``parts`` of a policy.

    ``cost`` turns bytes into entries; ``overhead`` is what one sequence holds outside of the budgeted layers (sliding
    windows, convolution and recurrent states), in bytes. ``max_length`` is the declared length of the text in tokens,
    ``declared[b]`` that of sequence b while a prefill knows it; ``spans`` are the user's protected ranges of positions.
    ``text`` is the policy as the user wrote it, for messages. While ``suspended`` (a plan that judges the whole prompt)
    nothing is evicted or coded.
    """

    text: str
    parts: Parts
    budget: Budget
    layers: list[LayerCache]
    cost: EntryCost
    overhead: int = 0
    max_length: int | None = None
    spans: list[Span] = field(default_factory=list)
    declared: list[int] | None = None
    suspended: bool = False
    filled: bool = False
    evictions: int = 0
    measured: list[list[float | None]] = field(default_factory=list)
    _solved: dict[tuple, list[int]] = field(default_factory=dict)
    _found: dict[int, tuple[tuple, list[int]]] = field(default_factory=dict)

    @property
    def protected(self) -> int:
        """Entries per KV head and layer that protection may hold; in pages it holds every page that it touches."""
        protect, page = self.parts.protect, self.parts.granularity.size
        edges = (1 if protect.recent else 0) + 2 * len(self.spans)
        entries = -(-protect.sinks // page) * page + protect.recent + sum(end - start for start, end in self.spans)
        return entries + edges * (page - 1)

    @property
    def floor(self) -> int:
        """Entries per KV head and layer below which the policy's own protection does not fit."""
        return self.protected + 1

    def smallest_bytes(self, batch_size: int) -> int:
        """The smallest byte budget that holds the protected entries of every layer."""
        heads = sum(layer.num_kv_heads for layer in self.layers)
        rows = heads * (self.cost.fixed + self.floor * self.cost.per_entry)
        return batch_size * (-(-int(rows + 1) // 1) + self.overhead)

    def check(self, batch_size: int = 1) -> None:
        """Raises BudgetError when the budget cannot hold what the policy protects, naming the smallest that would do."""
        kind, amount = self.budget.kind, self.budget.amount
        if kind == "tokens" and self.parts.scorer is not None and amount < self.floor:
            raise BudgetError(self._too_small(f"give at least {self.floor} tokens"))
        least = self.parts.scorer is not None or not self.layers
        if kind == "bytes" and least and amount < self.smallest_bytes(batch_size):
            smallest = self.smallest_bytes(batch_size)
            rows = f" for {batch_size} sequences" if batch_size > 1 else ""
            raise BudgetError(self._too_small(f"give at least {smallest}B ({format_bytes(smallest)}){rows}"))
        pinned, heads = sum(self._pinned), sum(layer.num_kv_heads for layer in self.layers)
        if pinned and kind == "fraction" and amount * heads <= pinned:
            raise BudgetError(
                f"{self.text} keeps {pinned} of {heads} KV heads whole, which is more than {self.budget}; "
                f"give more than {100 * pinned / heads:.1f}%"
            )
        if pinned and self.max_length is not None:
            self._admit_pinned(self.max_length, batch_size)

    def admit(self, tokens: Sequence[int]) -> None:
        """Before a forward: refuses ``tokens[b]`` new tokens where a policy keeps more of them than the budget holds."""
        if self.budget.kind == "none" or not self.layers:
            return
        seen = self.layers[0].seen or [0] * len(tokens)
        longest = max(s + n for s, n in zip(seen, tokens, strict=True))
        if self.parts.scorer is not None:
            self._admit_pinned(longest, len(tokens))
            return
        room = self.mean_entries(longest, len(tokens))
        if self.budget.kind == "fraction" and self.max_length is None:
            raise BudgetError(
                f"{self.text} keeps every entry, so it cannot hold {self.budget} of what it sees; "
                f"add an evicting method (streaming_llm+{self.text}) or drop the budget"
            )
        if longest > room:
            remedy = f"{longest} tokens"
            if self.budget.kind == "bytes":
                heads = sum(layer.num_kv_heads for layer in self.layers)
                need = len(tokens) * (
                    int(heads * (self.cost.fixed + longest * self.cost.per_entry) + 1) + self.overhead
                )
                remedy = f"{need}B ({format_bytes(need)})"
            raise BudgetError(
                f"{self.text} keeps every entry, and {longest} tokens do not fit into {self.budget}; "
                f"give at least {remedy} or add an evicting method (streaming_llm+{self.text})"
            )
        for layer in self.layers:
            layer.set_capacity([int(room) * layer.num_kv_heads] * len(tokens))

    def mean_entries(self, seen: int, batch_size: int | None = None) -> float:
        """Entries per layer and KV head that the budget buys one sequence of which ``seen`` tokens have been seen.

        Bytes are shared by ``batch_size`` sequences (None: as many as the cache holds).
        """
        kind, amount = self.budget.kind, self.budget.amount
        if kind == "none":
            return float("inf")
        if kind == "tokens":
            return amount
        if kind == "fraction":
            return max(self.floor, int(amount * (self.max_length or seen)))
        heads = sum(layer.num_kv_heads for layer in self.layers)
        payload = amount // (batch_size or max(self._batch_size(), 1)) - self.overhead - heads * self.cost.fixed
        each = payload / heads
        if self.parts.destination is not None:
            return max(0.0, self.parts.destination.main_entries(each, self.cost, seen, self.floor))
        return max(0.0, each / self.cost.per_entry)

    def shares(self, b: int) -> list[int]:
        """Entries that each layer may hold in place of sequence b, over all its KV heads."""
        if self.parts.layers is not None and self.parts.layers.measures:
            return self._share_out(b)
        # Without measurements all layers of a forward would find the same.
        stamp = (self.layers[0].seen[b], self._batch_size(), self.declared and self.declared[b])
        if b not in self._found or self._found[b][0] != stamp:
            self._found[b] = (stamp, self._share_out(b))
        return self._found[b][1]

    def _share_out(self, b: int) -> list[int]:
        seen = self._until(b)
        mean = self._mean(b)
        heads = [layer.num_kv_heads for layer in self.layers]
        pinned = self._pinned
        free = [h - p for h, p in zip(heads, pinned, strict=True)]
        most = seen if self.parts.heads is None else self.parts.heads.most(seen)
        if mean == float("inf"):
            return [p * seen + f * most for p, f in zip(pinned, free, strict=True)]
        allocator = self.parts.layers or Uniform()
        measured = [row[b] if row else None for row in self.measured] or [None] * len(self.layers)
        known = [m is not None or not allocator.measures for m in measured]
        if not any(known):
            known = [True] * len(self.layers)
        # What a joint ranking counted are whole layers; all other weights share out what is not protected.
        fixed = 0 if allocator.joint else min(self.protected, most)
        whole = sum(pinned) * seen
        if whole:
            mean = (mean * sum(heads) - whole) / max(sum(free), 1)
        weights = allocator.weights(measured, mean, self.floor)
        if whole:
            weights = [w * f for w, f in zip(weights, free, strict=True)]
        # Without an allocator over heads every head of a layer keeps the same, so entries are dealt out head by head.
        unit = [1] * len(heads) if self.parts.heads is not None else heads
        total = int(mean * sum(free)) if self.parts.heads is not None else int(mean * sum(heads)) // heads[0]
        shown = [w for w, k in zip(weights, known, strict=True) if k]
        capped = most <= self.floor or bool(whole) or max(shown) * mean * len(heads) > (most - fixed) * sum(shown)
        key = (b, total, tuple(weights), tuple(known), seen if capped else None, self.floor)
        if key not in self._solved:
            index = [i for i, k in enumerate(known) if k]
            per = [free[i] // unit[i] for i in index]
            floors = [(min(self.floor, most) - fixed) * p for p in per]
            rest = max(total - fixed * sum(per), sum(floors))
            table = solve(rest, shown, floors, [(most - fixed) * p for p in per])
            shares = [0] * len(heads)
            for i, p, entries in zip(index, per, table, strict=True):
                shares[i] = pinned[i] * seen + (fixed * p + entries) * unit[i]
            if len(self._solved) > 256:
                self._solved.clear()
            self._solved[key] = shares
        return self._solved[key]

    def aside(self, b: int) -> list[int]:
        """Entries of sequence b that each layer's destination may hold in segments of its own, over all KV heads."""
        shares, seen = self.shares(b), self._until(b)
        heads = [layer.num_kv_heads for layer in self.layers]
        payload = self.budget.amount // self._batch_size() - self.overhead - sum(heads) * self.cost.fixed
        total = int((payload - sum(shares) * self.cost.per_entry) / self.cost.aside)
        key = (b, "aside", total, seen, *shares)
        if key not in self._solved:
            caps = [seen * h - share for h, share in zip(heads, shares, strict=True)]
            self._solved[key] = solve(max(total, 0), [1.0] * len(heads), 0, caps)
        return self._solved[key]

    def after_attention(self, index: int, view: View, *, finish: bool = True) -> None:
        """Ends the attention of layer ``self.layers[index]``: statistics first, then evictions, then codecs.

        Without ``finish`` (a speculation that may be taken back) it stops after the statistics.
        """
        layer = self.layers[index]
        if not self.measured:
            self.measured = [[] for _ in self.layers]
        if self.parts.scorer is not None:
            self.parts.scorer.observe(view)
            if self.parts.destination is not None:
                self.parts.destination.observe(view)
            allocator = self.parts.layers
            last = self.measured[index] or [None] * layer.batch_size
            if allocator is not None and allocator.measures:
                self.measured[index] = list(allocator.preference(view, last))
            if finish and self._acts() and allocator is not None and allocator.joint:
                if layer is self.layers[-1]:
                    self.settle_all(view.new_tokens)
            elif finish and self._acts():
                self.settle(layer, view)
                if allocator is not None and allocator.measures and self.measured[index] != last:
                    for earlier in self.layers[:index]:
                        self.settle(earlier, View(earlier))
            elif finish and self.parts.trigger.after_prefill:
                layer.set_capacity(None)
        if finish and not self.suspended:
            layer.finish_forward()

    def fork(self, layers: list[LayerCache]) -> Enforcer:
        """A copy that governs the layers of a forked cache."""
        return replace(self, layers=layers, measured=[list(row) for row in self.measured], _solved={}, _found={})

    def reset(self) -> None:
        """Forgets what was measured."""
        self.measured, self.filled, self.evictions = [], False, 0
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
        if allocator is not None and allocator.joint and not self._rank(allocator):
            return
        for layer in self.layers:
            self.settle(layer, View(layer), new_tokens)

    def settle(self, layer: LayerCache, view: View, new_tokens: Sequence[int] | None = None) -> None:
        """Evicts from a layer that holds more than its share, down to the share (less the trigger's slack)."""
        index = self.layers.index(layer)
        heads = layer.num_kv_heads
        held = layer.evictable()
        limits = [self.shares(b)[index] for b in range(layer.batch_size)]
        layer.set_capacity(
            None if self.budget.kind == "none" else [self._room(b, n, heads) for b, n in enumerate(limits)]
        )
        if self.parts.heads is None:
            over = [max(held[b]) * heads > limits[b] for b in range(layer.batch_size)]
        else:
            free, pinned = self._free[index], self._pinned[index]
            over = [
                sum(held[b][h] for h in free) > limits[b] - pinned * self._until(b) for b in range(layer.batch_size)
            ]
        if any(over):
            fresh = new_tokens or view.new_tokens
            targets = [self._target(layer, b, limits[b], fresh[b]) for b in range(layer.batch_size)]
            self._evict(layer, view, over, targets, limits)
        if self.cost.aside and self.budget.kind == "bytes":
            self._limit_aside(layer)

    def _room(self, b: int, limit: int, heads: int) -> int:
        """Entries of a layer that sequence b may have memory for: its limit, or as long as the whole text fits, its share."""
        mean = self._mean(b)
        return limit if self._grows or mean < self.layers[0].seen[b] else max(limit, int(mean) * heads)

    def _target(self, layer: LayerCache, b: int, limit: int, new_tokens: int) -> int:
        """Entries to evict down to: the limit, less those that come until the next eviction."""
        heads = layer.num_kv_heads
        free = len(self._free[self.layers.index(layer)])
        seen, until = layer.seen[b], self._until(b)
        entries = (limit - (heads - free) * until) // max(free, 1)
        slack = until - seen if self._grows else self._slack(entries, new_tokens)
        least = (heads - free) * seen + self.floor * free
        return min(limit, max(limit - slack * heads, least))

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

    def _rank(self, allocator: LayerAllocator) -> bool:
        """Measures all layers' shares by ranking their entries together; False when nothing has to leave."""
        assert self.parts.scorer is not None
        heads = sum(layer.num_kv_heads for layer in self.layers)
        batch = range(self._batch_size())
        totals = [self._mean(b) * heads for b in batch]
        held = [sum(sum(layer.evictable()[b]) for layer in self.layers) for b in batch]
        if all(n <= total for n, total in zip(held, totals, strict=True)):
            return False
        scores = []
        for layer in self.layers:
            view = View(layer)
            protected = protected_entries(view.positions, view.seen, self.parts.protect, self.spans)
            judged = self.parts.scorer.score(view).float().masked_fill(protected, float("inf"))
            scores.append(judged.masked_fill(~view.valid, float("-inf")))
        shares = [
            allocator.rank([score[b] for score in scores], int(min(total, n)))
            for b, total, n in zip(batch, totals, held, strict=True)
        ]
        self.measured = [list(row) for row in zip(*shares, strict=True)]
        return True

    def _mean(self, b: int) -> float:
        """`mean_entries` of sequence b; a fraction is one of its declared length while a prefill knows that."""
        seen = self._until(b)
        if self.budget.kind == "fraction" and self.declared is not None:
            seen = max(seen, self.declared[b])
        return self.mean_entries(seen)

    def _evict(self, layer: LayerCache, view: View, over: list[bool], targets: list[int], limits: list[int]) -> None:
        assert self.parts.scorer is not None
        heads = layer.num_kv_heads
        scores = self.parts.scorer.score(view).float()
        valid = view.valid
        protected = protected_entries(view.positions, view.seen, self.parts.protect, self.spans)
        held = layer.evictable()
        counts = torch.zeros(layer.batch_size, heads, dtype=torch.long, device=scores.device)
        for b, target in enumerate(targets):
            if not over[b]:
                split = held[b]
            elif self.parts.heads is not None:
                split = list(held[b])
                free = self._free[self.layers.index(layer)]
                rest = target - sum(held[b]) + sum(held[b][h] for h in free)
                shared = self.parts.heads.split(scores[b, free], protected[b, free], valid[b, free], rest)
                for h, entries in zip(free, shared, strict=True):
                    split[h] = entries
            else:
                split = [target // heads] * heads
            counts[b] = torch.tensor(split, device=scores.device)
        if self.parts.protect.recent_share:
            recent = (counts * self.parts.protect.recent_share).long()
            recent = recent.minimum((counts - protected.sum(-1)).clamp_min(0))
            protected = protected | (newest(view.positions, recent) & valid)
        units = layer.sealed_units().to(scores.device).unflatten(0, (-1, heads)) if self._in_units(layer) else None
        keep = select(scores, protected, valid, counts, units).flatten(0, 1)
        # Room for the steps until the next eviction, the same in all rows and inside the smallest share.
        kept = keep.sum(1).view(layer.batch_size, heads).sum(1).tolist()
        spare = max(0, min((limit - k) // heads for limit, k in zip(limits, kept, strict=True)))
        evicted = None
        if self.parts.destination is not None:
            evicted = self._gather(layer, ~keep & valid.flatten(0, 1), scores.flatten(0, 1))
        layer.evict(keep, spare)
        self.evictions += 1
        if self.parts.destination is not None and evicted is not None and evicted.position.numel():
            self.parts.destination.receive(layer, evicted)

    def _gather(self, layer: LayerCache, gone: Tensor, scores: Tensor) -> Evicted:
        begin = 0
        pieces = []
        for segment in layer.main:
            part = gone[:, begin : begin + segment.longest]
            key, value, meta, counts = segment.gather(part)
            pieces.append((key, value, meta["position"], scores[:, begin : begin + segment.longest][part], counts))
            begin += segment.longest
        return Evicted.join(pieces)

    def _in_units(self, layer: LayerCache) -> bool:
        return layer.page > 1 or any(segment.unit > 1 for segment in layer.main)

    def _slack(self, entries: int, new_queries: int) -> int:
        """Entries per head to evict ahead, so that small steps do not pay for an eviction each."""
        every = min(self.parts.trigger.every, max(1, entries // 8))
        return every - 1 if 0 < new_queries <= every else 0

    @cached_property
    def _grows(self) -> bool:
        """Whether shares of a byte budget shrink as the text grows, for something else that grows with it."""
        return self.budget.kind == "bytes" and bool(self.cost.aside or sum(self._pinned))

    def _until(self, b: int) -> int:
        """The length that shares of sequence b are made for.

        Where they shrink with the length (`_grows`), it is that at the end of a stretch of small steps, the same for all
        layers, so that what one layer still holds and another one already may add up to no more than the budget.
        """
        seen = self.layers[0].seen[b]
        if not self._grows:
            return seen
        pinned, heads = sum(self._pinned), sum(layer.num_kv_heads for layer in self.layers)
        free = max(heads - pinned, 1)
        # Where entries go aside, stretches have one length for all texts: those of a new grid could end earlier.
        mean = (self.mean_entries(FAR if self.cost.aside else seen) * heads - pinned * seen) / free
        if self.parts.heads is not None:
            mean = min(mean, self.parts.heads.most(seen))
        every = min(self.parts.trigger.every, max(1, int(mean) // 8))
        if pinned:  # which grow to the end of the stretch too
            every = min(every, 1 + max(0, int((mean - self.floor) * free / pinned)))
        return -(-seen // every) * every

    @cached_property
    def _free(self) -> list[list[int]]:
        """KV heads of each layer that do not keep everything."""
        pinned = [() if self.parts.heads is None else self.parts.heads.pinned(layer.layer_idx) for layer in self.layers]
        return [
            [h for h in range(layer.num_kv_heads) if h not in p] for layer, p in zip(self.layers, pinned, strict=True)
        ]

    @cached_property
    def _pinned(self) -> list[int]:
        """How many KV heads of each layer keep everything."""
        return [layer.num_kv_heads - len(free) for layer, free in zip(self.layers, self._free, strict=True)]

    def _admit_pinned(self, longest: int, batch_size: int) -> None:
        """Raises BudgetError when heads that keep everything leave the others too little at this length."""
        pinned, heads = sum(self._pinned), sum(layer.num_kv_heads for layer in self.layers)
        if not pinned or self.budget.kind not in ("tokens", "bytes"):
            return
        need = pinned * longest + (heads - pinned) * min(self.floor, longest)
        if need <= int(self.mean_entries(longest, batch_size) * heads):
            return
        remedy = f"{-(-need // heads)} tokens"
        if self.budget.kind == "bytes":
            nbytes = batch_size * (int(need * self.cost.per_entry + heads * self.cost.fixed + 1) + self.overhead)
            remedy = f"{nbytes}B ({format_bytes(nbytes)})"
        raise BudgetError(
            f"{self.text} keeps {pinned} of {heads} KV heads whole, and {longest} tokens of those do not fit into "
            f"{self.budget}; give at least {remedy}"
        )

    def _acts(self) -> bool:
        return not (self.suspended or (self.parts.trigger.after_prefill and self.filled))

    def _batch_size(self) -> int:
        return self.layers[0].batch_size

    def _too_small(self, remedy: str) -> str:
        protect = self.parts.protect
        held = [f"{protect.sinks} sinks"] * bool(protect.sinks) + [f"{protect.recent} recent tokens"] * bool(
            protect.recent
        )
        marked = sum(end - start for start, end in self.spans)
        held += [f"{marked} marked tokens"] * bool(marked)
        windows = self.overhead if self.budget.kind == "bytes" else 0
        held += [f"{format_bytes(windows)} of sliding windows and recurrent states"] * bool(windows)
        return (
            f"budget {self.budget} is smaller than the {' + '.join(held) or 'one token'} that {self.text} has to hold; {remedy}"
            + (" or lower window=" if protect.recent else "")
        )
