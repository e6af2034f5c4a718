"""Enforcer: the budget path, which brings each layer back to its share whenever a forward leaves it above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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

    def admit(self, tokens: Sequence[int]) -> None:
        """Before a forward: refuses ``tokens[b]`` new tokens that a policy without eviction could not hold."""
        if self.parts.scorer is not None or self.budget.kind == "none" or not self.layers:
            return
        seen = self.layers[0].seen or [0] * len(tokens)
        longest = max(s + n for s, n in zip(seen, tokens, strict=True))
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
            return max(0.0, self.parts.destination.main_entries(each, self.cost.per_entry, seen))
        return max(0.0, each / self.cost.per_entry)

    def shares(self, b: int) -> list[int]:
        """Entries that each layer may hold of sequence b, over all its KV heads."""
        seen = self.layers[0].seen[b]
        mean = self._mean(b)
        if mean == float("inf"):
            return [seen * layer.num_kv_heads for layer in self.layers]
        allocator = self.parts.layers or Uniform()
        measured = [row[b] if row else None for row in self.measured] or [None] * len(self.layers)
        known = [m is not None or not allocator.measures for m in measured]
        if not any(known):
            known = [True] * len(self.layers)
        # What a joint ranking counted are whole layers; all other weights share out what is not protected.
        fixed = 0 if allocator.joint else min(self.protected, seen)
        weights = allocator.weights(measured, mean, self.floor)
        heads = [layer.num_kv_heads for layer in self.layers]
        # Without an allocator over heads every head of a layer keeps the same, so entries are dealt out head by head.
        unit = [1] * len(heads) if self.parts.heads is not None else heads
        total = int(mean * sum(heads)) if self.parts.heads is not None else int(mean * sum(heads)) // heads[0]
        shown = [w for w, k in zip(weights, known, strict=True) if k]
        capped = seen <= self.floor or max(shown) * mean * len(heads) > (seen - fixed) * sum(shown)
        key = (b, total, tuple(weights), tuple(known), seen if capped else None, self.floor)
        if key not in self._solved:
            index = [i for i, k in enumerate(known) if k]
            per = [heads[i] // unit[i] for i in index]
            floors = [(min(self.floor, seen) - fixed) * p for p in per]
            free = max(total - fixed * sum(per), sum(floors))
            table = solve(free, shown, floors, [(seen - fixed) * p for p in per])
            shares = [0] * len(heads)
            for i, p, entries in zip(index, per, table, strict=True):
                shares[i] = (fixed * p + entries) * unit[i]
            if len(self._solved) > 256:
                self._solved.clear()
            self._solved[key] = shares
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
        return replace(self, layers=layers, measured=[list(row) for row in self.measured], _solved={})

    def reset(self) -> None:
        """Forgets what was measured."""
        self.measured, self.filled, self.evictions = [], False, 0
        self._solved.clear()

    def select_sequences(self, index: Sequence[int]) -> None:
        """Sequence i goes on from the former sequence ``index[i]``."""
        self.measured = [[row[b] for b in index] if row else [] for row in self.measured]
        self._solved.clear()

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
        layer.set_capacity(None if self.budget.kind == "none" else limits)
        ragged = self.parts.heads is not None
        over = [
            sum(held[b]) > limits[b] if ragged else max(held[b]) * heads > limits[b] for b in range(layer.batch_size)
        ]
        if not any(over):
            return
        fresh = new_tokens or view.new_tokens
        slack = [self._slack(limit // heads, new) for limit, new in zip(limits, fresh, strict=True)]
        targets = [max(limit - s * heads, self.floor * heads) for limit, s in zip(limits, slack, strict=True)]
        self._evict(layer, view, over, [min(t, limit) for t, limit in zip(targets, limits, strict=True)], limits)

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
        seen = self.layers[0].seen[b]
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
                split = self.parts.heads.split(scores[b], protected[b], valid[b], target)
            else:
                split = [target // heads] * heads
            counts[b] = torch.tensor(split, device=scores.device)
        if self.parts.protect.recent_share:
            recent = (counts * self.parts.protect.recent_share).long()
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
