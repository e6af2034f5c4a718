"""The enforcer deals out exact shares, keeps the best entries and hands on exactly what leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbudget.budget import Budget
from kvbudget.costs import EntryCost
from kvbudget.enforcer import Enforcer
from kvbudget.errors import BudgetError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.methods import parse
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.base import Destination, Evicted, Granularity, LayerAllocator, Parts, Protect, Scorer, Trigger
from kvbudget.policy.view import Queries, View

DIM = 8


def score_of(layer: int, sequence: int, head: int, position: int) -> float:
    """A fixed value per entry, the same for a sequence wherever it stands in a batch (sequences are told by seed)."""
    return ((position * 7919 + head * 104729 + layer * 1299709 + sequence * 15485863 + 13) % 10007) / 10007


@dataclass(frozen=True)
class Fixed(Scorer):
    """Scores by `score_of`; ``seeds`` name the sequences of the batch."""

    seeds: tuple[int, ...] = (0,)
    ties: bool = False

    def score(self, view: View) -> Tensor:
        scores = torch.zeros(view.positions.shape)
        for b, h, t in (view.positions >= 0).nonzero().tolist():
            value = score_of(view.layer_idx, self.seeds[b], h, int(view.positions[b, h, t]))
            scores[b, h, t] = 1.0 if self.ties else value
        return scores


@dataclass(frozen=True)
class Measured(LayerAllocator):
    """A cascade with known preferences."""

    measures: ClassVar[bool] = True

    preferences: tuple[float, ...] = ()

    def preference(self, view: View, last: Sequence[float | None]) -> Sequence[float | None]:
        return [self.preferences[view.layer_idx]] * view.batch_size

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0 if m is None else m for m in measured]


@dataclass(frozen=True)
class Joint(LayerAllocator):
    """All layers' entries compete by score."""

    joint: ClassVar[bool] = True

    def rank(self, scores: Sequence[Tensor], total: int) -> list[float]:
        flat = torch.cat([score.flatten() for score in scores])
        owner = torch.cat([torch.full((score.numel(),), i) for i, score in enumerate(scores)])
        best = owner[flat.argsort(descending=True, stable=True)[:total]]
        return torch.bincount(best, minlength=len(scores)).double().tolist()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0 if m is None else m for m in measured]


@dataclass(frozen=True)
class Collect(Destination):
    """Remembers what it receives."""

    received: list[tuple[int, Evicted]] = field(default_factory=list, compare=False)

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        self.received.append((layer.layer_idx, evicted))


class Machine:
    """Layers without a model: random entries pass through them, one layer after the other."""

    def __init__(
        self,
        parts: Parts,
        budget: object,
        *,
        layers: int = 2,
        heads: int = 2,
        spans: Sequence[tuple[int, int]] = (),
        max_length: int | None = None,
    ) -> None:
        stores = [
            LayerCache(i, heads, states=() if parts.scorer is None else parts.scorer.states) for i in range(layers)
        ]
        for store in stores:
            store.page = parts.granularity.size
        self.enforcer = Enforcer(
            "policy", parts, Budget.parse(budget), stores, EntryCost(100.0), 0, max_length, list(spans)
        )
        self.layers = stores
        self.held_after_each_layer: list[list[list[list[int]]]] = []

    def forward(self, n: int, batch: int = 1, valid: Tensor | None = None) -> None:
        self.held_after_each_layer = []
        for index, layer in enumerate(self.layers):
            key = torch.randn(batch, layer.num_kv_heads, n, DIM)
            call = AttentionCall(key, key, key, 1.0, valid=valid)
            _, lse = layer.forward(call)
            self.enforcer.after_attention(index, View(layer, Queries(call.query, lse, 1.0, None, valid)))
            layer.check_integrity()
            self.held_after_each_layer.append([store.evictable() for store in self.layers])

    def positions(self, layer: int, b: int = 0) -> list[list[int]]:
        """Positions held per head."""
        store = self.layers[layer]
        rows = torch.cat([segment.positions() for segment in store.main], 1)
        rows = rows[b * store.num_kv_heads : (b + 1) * store.num_kv_heads]
        return [sorted(p for p in row if p >= 0) for row in rows.tolist()]


def best(
    layer: int, head: int, candidates: Sequence[int], count: int, sure: Sequence[int] = (), seed: int = 0
) -> list[int]:
    """Positions that have to stay: the sure ones and the best of the others."""
    others = [p for p in candidates if p not in sure]
    others.sort(key=lambda p: (-score_of(layer, seed, head, p), p))
    return sorted([*sure, *others[: count - len(sure)]])


shapes = {"layers": st.integers(1, 6), "heads": st.integers(1, 4), "seen": st.integers(1, 300)}


@given(
    **shapes,
    tokens=st.integers(1, 200),
    beta=st.sampled_from([None, 1.0, 4.0, 20.0]),
    ragged=st.booleans(),
    recent=st.integers(0, 30),
)
def test_shares_sum_to_the_budget(
    layers: int, heads: int, seen: int, tokens: int, beta: float | None, ragged: bool, recent: int
) -> None:
    parts = Parts(
        Fixed(), None if beta is None else parse(f"pyramidkv(beta={beta})").parts().layers, JointTopK() if ragged else None,
        protect=Protect(recent=recent),
    )  # fmt: skip
    machine = Machine(parts, tokens, layers=layers, heads=heads)
    enforcer = machine.enforcer
    if tokens < enforcer.floor:
        with pytest.raises(BudgetError, match=f"at least {enforcer.floor} tokens"):
            enforcer.check()
        return
    for layer in machine.layers:
        layer.seen = [seen]
    shares = enforcer.shares(0)
    assert sum(shares) == min(tokens, seen) * layers * heads
    assert all(min(enforcer.floor, seen) * heads <= share <= seen * heads for share in shares)
    if not ragged:
        assert all(share % heads == 0 for share in shares)
    if beta is None:
        assert set(shares) == {min(tokens, seen) * heads}
    else:
        assert sorted(shares, reverse=True) == shares


@given(seen=st.integers(1, 500), share=st.floats(0.01, 1.0), declared=st.none() | st.integers(1, 500))
def test_fractions_are_of_the_declared_or_the_seen_length(seen: int, share: float, declared: int | None) -> None:
    machine = Machine(Parts(Fixed()), share, max_length=declared)
    for layer in machine.layers:
        layer.seen = [seen]
    expected = min(max(1, int(share * (declared or seen))), seen)
    assert machine.enforcer.shares(0) == [2 * expected] * 2


@given(nbytes=st.integers(400, 100_000), batch=st.integers(1, 4), layers=st.integers(1, 3), heads=st.integers(1, 3))
def test_bytes_buy_as_many_entries_as_fit(nbytes: int, batch: int, layers: int, heads: int) -> None:
    machine = Machine(Parts(Fixed()), f"{nbytes}B", layers=layers, heads=heads)
    smallest = machine.enforcer.smallest_bytes(batch)
    for layer in machine.layers:
        layer.seen = [10**6] * batch
    if nbytes < smallest:
        with pytest.raises(BudgetError, match=f"at least {smallest}B"):
            machine.enforcer.check(batch)
        return
    machine.enforcer.check(batch)
    entries = sum(sum(machine.enforcer.shares(b)) for b in range(batch))
    assert entries * 100 <= nbytes
    assert nbytes - entries * 100 < batch * 100 * heads + batch, "more would have fitted"


@pytest.mark.parametrize("spans", [[], [(30, 40)]])
def test_the_best_entries_stay_beside_the_protected_ones(spans: list[tuple[int, int]]) -> None:
    parts = Parts(Fixed(), protect=Protect(sinks=3, recent=5))
    machine = Machine(parts, 25, spans=spans)
    machine.forward(100)
    marked = [p for start, end in spans for p in range(start, end)]
    for layer in range(2):
        sure = [0, 1, 2, *marked, *range(95, 100)]
        expected = [best(layer, head, range(100), 25, sure) for head in range(2)]
        assert machine.positions(layer) == expected
    before = [machine.positions(layer) for layer in range(2)]
    machine.forward(30)  # more than a small step: without slack
    for layer in range(2):
        sure = [0, 1, 2, *marked, *range(125, 130)]
        expected = [best(layer, h, [*before[layer][h], *range(100, 130)], 25, sure) for h in range(2)]
        assert machine.positions(layer) == expected


def test_equal_scores_keep_the_older_entry() -> None:
    machine = Machine(Parts(Fixed(ties=True)), 10)
    machine.forward(40)
    assert machine.positions(0) == [list(range(10))] * 2


def test_a_share_of_the_kept_entries_can_be_the_newest() -> None:
    machine = Machine(Parts(Fixed(), protect=Protect(sinks=4, recent_share=0.5)), 12)
    machine.forward(60)
    expected = [best(0, head, range(60), 12, [0, 1, 2, 3, *range(54, 60)]) for head in range(2)]
    assert machine.positions(0) == expected
    crowded = Machine(Parts(Fixed(), protect=Protect(sinks=4, recent_share=1.0)), 5)
    crowded.forward(60)
    assert crowded.positions(0) == [[0, 1, 2, 3, 59]] * 2, "sinks and newest entries together stay within the share"


def test_heads_that_compete_keep_the_best_of_the_layer() -> None:
    machine = Machine(Parts(Fixed(), heads=JointTopK(safeguard=0.0)), 20, heads=3)
    machine.forward(80)
    entries = sorted((-score_of(0, 0, h, p), h, p) for h in range(3) for p in range(80))[:60]
    assert machine.positions(0) == [sorted(p for _, h, p in entries if h == head) for head in range(3)]


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=3), ragged=st.booleans(), page=st.sampled_from([1, 4]))
def test_sequences_of_a_batch_are_independent(lengths: list[int], ragged: bool, page: int) -> None:
    longest = max(lengths)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    heads = JointTopK() if ragged else None
    parts = Parts(
        Fixed(tuple(range(len(lengths)))), heads=heads, granularity=Granularity(page), protect=Protect(sinks=1)
    )
    together = Machine(parts, 16)
    together.forward(longest, len(lengths), valid)
    together.forward(1, len(lengths))
    for b, length in enumerate(lengths):
        alone = Machine(replace(parts, scorer=Fixed((b,))), 16)
        alone.forward(length)
        alone.forward(1)
        assert [alone.positions(layer) for layer in range(2)] == [together.positions(layer, b) for layer in range(2)]


def test_pages_that_were_full_before_leave_whole() -> None:
    machine = Machine(Parts(Fixed(), granularity=Granularity(8), protect=Protect(recent=3)), 64)
    machine.forward(60)
    machine.forward(20)
    for layer in range(2):
        for row in machine.positions(layer):
            assert 64 - 7 <= len(row) <= 64 and {77, 78, 79} <= set(row)
            pages = [len(set(row) & set(range(page, page + 8))) for page in range(0, 56, 8)]
            assert set(pages) == {0, 8}


def test_a_cascade_shares_out_the_total_while_layers_arrive() -> None:
    preferences = (1.0, 4.0, 2.0, 1.0)
    machine = Machine(Parts(Fixed(), layers=Measured(preferences)), 30, layers=4)
    machine.forward(100)
    total = 4 * 2 * 30
    held = [[sum(rows[0]) if rows else 0 for rows in after] for after in machine.held_after_each_layer]
    for after, row in enumerate(held):
        assert row[after + 1 :] == [0] * (3 - after)
        assert sum(row) == min(total, (after + 1) * 2 * 100)
    for before, after in pairwise(held):
        assert all(b >= a for b, a in zip(before, after, strict=True) if b), "an evicted layer cannot grow again"
    assert held[-1] == [30, 120, 60, 30]


def test_joint_shares_wait_for_the_last_layer() -> None:
    machine = Machine(Parts(Fixed(), layers=Joint(), heads=JointTopK(safeguard=0.0)), 20, layers=3)
    machine.forward(60)
    held = [[sum(rows[0]) if rows else 0 for rows in after] for after in machine.held_after_each_layer]
    assert held[:2] == [[120, 0, 0], [120, 120, 0]] and sum(held[2]) == 3 * 2 * 20
    entries = sorted((-score_of(i, 0, h, p), i, h, p) for i in range(3) for h in range(2) for p in range(60))[:120]
    for layer in range(3):
        expected = [sorted(p for _, i, h, p in entries if (i, h) == (layer, head)) for head in range(2)]
        assert machine.positions(layer) == expected


@pytest.mark.parametrize("forked", [False, True])
def test_a_destination_gets_exactly_what_leaves(forked: bool) -> None:
    collect = Collect()
    machine = Machine(Parts(Fixed((0, 1)), heads=JointTopK(), destination=collect, trigger=Trigger(every=1)), 20)
    machine.forward(18, 2)
    if forked:
        machine.layers = machine.enforcer.layers = [layer.fork() for layer in machine.layers]
    before: dict[tuple[int, int], dict[int, Tensor]] = {}
    machine.forward(2, 2)
    assert not collect.received
    for layer in machine.layers:
        assert len(layer.main) == 1 + forked
        for segment in layer.main:
            for r in range(layer.num_rows):
                for p, key in zip(segment.meta.row("position", r).tolist(), segment.meta.row("key", r), strict=True):
                    before.setdefault((layer.layer_idx, r), {})[p] = key
    machine.forward(10, 2)
    assert [layer for layer, _ in collect.received] == [0, 1]
    for index, evicted in collect.received:
        kept = [machine.positions(index, b)[h] for b in range(2) for h in range(2)]
        assert evicted.counts == [30 - len(row) for row in kept]
        begin = 0
        for r, count in enumerate(evicted.counts):
            rows = slice(begin, begin + count)
            gone = evicted.position[rows].tolist()
            assert gone == sorted(set(range(30)) - set(kept[r])), "in position order, row by row"
            expected = torch.tensor([score_of(index, r // 2, r % 2, p) for p in gone])
            torch.testing.assert_close(evicted.score[rows], expected)
            for p, key in zip(gone, evicted.key[rows], strict=True):
                if p < 20:
                    assert torch.equal(key, before[index, r][p])
            begin += count
        assert begin == len(evicted.position) == len(evicted.value)


def test_while_suspended_nothing_leaves() -> None:
    machine = Machine(Parts(Fixed()), 10)
    machine.enforcer.suspended = True
    machine.forward(40)
    machine.forward(40)
    assert machine.layers[0].evictable() == [[80, 80]]
    machine.enforcer.suspended = False
    machine.enforcer.settle_all()
    assert [layer.evictable() for layer in machine.layers] == [[[10, 10]]] * 2


def test_forks_measure_on_their_own_and_sequences_keep_what_was_measured() -> None:
    parts = Parts(Fixed((0, 1)), layers=Measured((1.0, 3.0)))
    machine = Machine(parts, 10)
    machine.forward(50, 2)
    enforcer = machine.enforcer
    enforcer.measured[0] = [1.0, 2.0]
    twin = enforcer.fork([layer.fork() for layer in machine.layers])
    twin.measured[0][0] = 9.0
    assert enforcer.measured == [[1.0, 2.0], [3.0, 3.0]]
    enforcer.select_sequences([1, 1, 0])
    assert enforcer.measured == [[2.0, 2.0, 1.0], [3.0] * 3]
    enforcer.reset()
    assert enforcer.measured == [] and enforcer.evictions == 0
