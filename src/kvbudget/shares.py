"""Shares: how many entries the budget buys each layer of a cache, and the refusal of budgets that buy too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kvbudget.budget import Budget, format_bytes, solve
from kvbudget.costs import EntryCost
from kvbudget.errors import BudgetError
from kvbudget.layer import LayerCache
from kvbudget.policy.allocators.layers import Uniform
from kvbudget.policy.base import LookingBack, Parts, Span

FAR = 2**62
"""A length beyond every text."""


@dataclass
class Shares:
    """What each of the budgeted ``layers`` may hold of ``budget`` by the ``parts`` of a policy.

    ``cost`` turns bytes into entries; ``overhead`` is what one sequence holds outside of the budgeted layers (sliding
    windows, convolution and recurrent states), in bytes. ``max_length`` is the declared length of the text in tokens,
    ``declared[b]`` that of sequence b while a prefill knows it; ``spans`` are the user's protected ranges of positions.
    ``granted[b]`` are the entries per layer and KV head that a plan under way grants at most. ``text`` is the policy as the
    user wrote it, for messages; ``measured[l][b]`` is what the allocator over layers found.
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
    granted: list[float] | None = None
    measured: list[list[float | None]] = field(default_factory=list)
    _solved: dict[tuple, list[int]] = field(default_factory=dict)
    _found: dict[int, tuple[tuple, list[int]]] = field(default_factory=dict)

    @property
    def protected(self) -> int:
        """Entries per KV head and layer that protection may hold; it holds every page or coded unit that it touches."""
        protect, marked = self.parts.protect, sum(end - start for start, end in self.spans)
        edges = (1 if protect.firm else 0) + 2 * len(self.spans)
        unit = max(self.parts.granularity.size, 1 if self.parts.sharing is None else self.parts.sharing.unit)
        for codec in self.parts.codec or ():
            # What fits into the full-precision tail need not be coded while the budget is that small.
            if codec.cyclic or protect.sinks + protect.firm + marked >= codec.residual:
                unit = max(unit, codec.unit)
        return -(-protect.sinks // unit) * unit + protect.firm + marked + edges * (unit - 1)

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
        each = " (with one, all that are coded with it)" if self.parts.votes else ""
        if pinned and pinned == heads and kind != "none":
            raise BudgetError(
                f"{self.text} keeps all {heads} KV heads whole{each}, so that {self.budget} could not be kept; use full or keep "
                "fewer layers or heads whole"
            )
        if pinned and kind == "fraction" and amount * heads <= pinned:
            raise BudgetError(
                f"{self.text} keeps {pinned} of {heads} KV heads whole{each}, which is more than {self.budget}; "
                f"give more than {100 * pinned / heads:.1f}%"
            )
        if pinned and self.max_length is not None:
            self._admit_pinned(self.max_length, batch_size)

    def admit(self, tokens: Sequence[int]) -> None:
        """Before a forward: refuses ``tokens[b]`` new tokens where a policy keeps more of them than the budget holds."""
        if not self.layers:
            return
        seen = self.layers[0].seen or [0] * len(tokens)
        if 0 in seen:
            begun = zip(seen, self.layers[0].prompt or seen, self.declared or tokens, strict=True)
            prompt = [known if s else new for s, known, new in begun]
            for layer in self.layers:
                layer.prompt = prompt
        if self.budget.kind == "none":
            return
        longest = max(s + n for s, n in zip(seen, tokens, strict=True))
        self.admit_texts(longest, len(tokens))
        if self.parts.scorer is None:
            room = int(self.mean_entries(longest, len(tokens)))
            for layer in self.layers:
                layer.set_capacity([room * layer.num_kv_heads] * len(tokens))

    def admit_texts(self, longest: int, batch_size: int) -> None:
        """Refuses ``batch_size`` texts of up to ``longest`` tokens where a policy keeps more of them than the budget holds."""
        if self.budget.kind == "none" or not self.layers:
            return
        if self.parts.scorer is not None:
            self._admit_pinned(longest, batch_size)
            return
        alone = isinstance(self.parts.selector, LookingBack)  # goes with no evicting method
        evicting = [] if alone else [f"add an evicting method (streaming_llm+{self.text})"]
        if self.budget.kind == "fraction" and self.max_length is None:
            raise BudgetError(
                f"{self.text} keeps every entry, so it cannot hold {self.budget} of what it sees; "
                + " or ".join([*evicting, "drop the budget"])
            )
        if longest > self.mean_entries(longest, batch_size):
            remedy = f"{longest} tokens"
            if self.budget.kind == "bytes":
                heads = sum(layer.num_kv_heads for layer in self.layers)
                rows = heads * (self.cost.fixed + longest * self.cost.per_entry)
                need = batch_size * (int(rows + 1) + self.overhead)
                remedy = f"{need}B ({format_bytes(need)})"
            texts = f" of {batch_size} sequences" if batch_size > 1 else ""
            raise BudgetError(
                f"{self.text} keeps every entry, and {longest} tokens{texts} do not fit into {self.budget}; "
                + " or ".join([f"give at least {remedy}", *evicting])
            )

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
        if self.parts.layers is not None and (self.parts.layers.measures or self.parts.layers.joint):
            return self._share_out(b)
        # Without measurements all layers of a forward would find the same.
        seen = self.layers[0].seen
        stamp = (seen[b], len(seen), self.declared and self.declared[b], self.granted and self.granted[b])
        if b not in self._found or self._found[b][0] != stamp:
            self._found[b] = (stamp, self._share_out(b))
        return self._found[b][1]

    def _limit(self, index: int, b: int) -> int:
        """Entries that a layer may hold of sequence b, over all KV heads: its share, or the mean where all hold the same."""
        shares = self.shares(b)
        if not self.parts.jury:
            return shares[index]
        heads = self.layers[index].num_kv_heads
        return sum(shares) // (len(shares) * heads) * heads

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
        known = [m is not None or not (allocator.measures or allocator.joint) for m in measured]
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
        # Where every head of a layer keeps the same, entries are dealt out to all of them at once.
        unit = [1] * len(heads) if self._apart else heads
        total = int(mean * sum(free)) // unit[0]
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
            leaders = [allocator.leader(i) for i in range(len(heads))]
            if leaders != list(range(len(heads))):
                groups = [
                    [n for n, other in zip(shares, leaders, strict=True) if other == leader] for leader in leaders
                ]
                shares = [min(group) for group in groups]
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

    def _mean(self, b: int) -> float:
        """`mean_entries` of sequence b; a fraction is one of its declared length while a prefill knows that."""
        seen = self._until(b)
        if self.budget.kind == "fraction" and self.declared is not None:
            seen = max(seen, self.declared[b])
        mean = self.mean_entries(seen)
        if self.granted is not None:
            mean = min(mean, self.granted[b])
        stages = self.parts.stages
        if stages is None or mean >= (self.max_length or float("inf")):
            return mean
        return stages.entries(mean, self.layers[0].prompt[b], self.layers[0].seen[b])

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
        every = min(self.parts.trigger.small, max(1, int(mean) // 8))
        if pinned:  # which grow to the end of the stretch too
            every = min(every, 1 + max(0, int((mean - self.floor) * free / pinned)))
        return -(-seen // every) * every

    @cached_property
    def _apart(self) -> bool:
        """Whether the heads of a layer may hold different entries."""
        return self.parts.heads is not None and not self.parts.votes

    @cached_property
    def _free(self) -> list[list[int]]:
        """KV heads of each layer that do not keep everything; of those that are coded together, none where one of them does."""
        allocator, found = self.parts.heads, []
        for layer in self.layers:
            heads, layers = range(layer.num_kv_heads), layer.together if self.parts.votes else (layer.layer_idx,)
            pinned = [h for h in heads if allocator is not None and any(h in allocator.pinned(i) for i in layers)]
            found.append([h for h in heads if h not in pinned] if not (pinned and self.parts.votes) else [])
        return found

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

    def _batch_size(self) -> int:
        return self.layers[0].batch_size

    def _too_small(self, remedy: str) -> str:
        protect = self.parts.protect
        held = [f"{protect.sinks} sinks"] * bool(protect.sinks)
        held += [f"{protect.firm} recent tokens"] * bool(protect.firm)
        marked = sum(end - start for start, end in self.spans)
        held += [f"{marked} marked tokens"] * bool(marked)
        windows = self.overhead if self.budget.kind == "bytes" else 0
        held += [f"{format_bytes(windows)} of sliding windows and recurrent states"] * bool(windows)
        return (
            f"budget {self.budget} is smaller than the {' + '.join(held) or 'one token'} that {self.text} has to hold; {remedy}"
            + (" or lower window=" if protect.firm else "")
        )
