"""MiKV: attention over full and demoted entries against brute force, what a byte budget holds, and the balancer."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from brute import chunks, run
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.methods import parse
from kvbudget.methods.h2o import H2O
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations.demote import Demote
from kvbudget.policy.view import Queries, View
from kvbudget.segments.base import AttendContext
from kvbudget.segments.quantized import QuantizedSegment
from min_max import per_token
from tiny import left_padded, random_text, tiny_model


def positions(cache: KVCache, layer: int, part: str, b: int = 0) -> list[list[int]]:
    """Positions per KV head of sequence b in the layer's ``main`` or ``front`` segments."""
    store = cache.enforcer.layers[layer]
    rows = range(b * store.num_kv_heads, (b + 1) * store.num_kv_heads)
    return [[p for segment in getattr(store, part) for p in segment.meta.row("position", r).tolist()] for r in rows]


class Oracle:
    """Keeps all keys, values and queries of one sequence as they came, and decodes what the cache holds in few bits."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, bits: int, balanced: bool = True) -> None:
        self.model, self.cache, self.bits, self.balanced = model, cache, bits, balanced
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}
        self.balance: dict[tuple[int, int], Tensor] = {}

    def feed(self, ids: Tensor, sizes: Sequence[int]) -> None:
        attend = self.cache.attend

        def checked(index: int, call: AttentionCall, *rest: object) -> Tensor:
            self.remember(index, call)
            expected = self.answer(index, call)
            out = attend(index, call, *rest)
            torch.testing.assert_close(out[0].double(), expected, atol=2e-4, rtol=1e-4)
            self.fix_balance(index)
            return out

        self.cache.attend = checked  # type: ignore[method-assign]
        begin = 0
        for size in sizes:
            with torch.inference_mode():
                self.model(ids[:, begin : begin + size], past_key_values=self.cache)
            begin += size
            self.cache.check_integrity()
        del self.cache.attend

    def remember(self, index: int, call: AttentionCall) -> None:
        for store, new in ((self.keys, call.key[0]), (self.values, call.value[0])):
            store[index] = torch.cat([store[index], new], dim=1) if index in store else new.clone()
        largest = call.query[0].abs().unflatten(0, (call.key.shape[1], -1)).amax((1, 2))
        self.largest[index] = torch.maximum(largest, self.largest.get(index, largest))

    def fix_balance(self, index: int) -> None:
        """Heads that demote for the first time balance by all queries and keys that have been seen."""
        for h, held in enumerate(positions(self.cache, index, "front")):
            if held and (index, h) not in self.balance:
                largest = self.keys[index][h].abs().amax(0)
                ones = torch.ones_like(largest)
                self.balance[index, h] = (self.largest[index][h] / largest).sqrt() if self.balanced else ones

    def answer(self, index: int, call: AttentionCall) -> Tensor:
        """Softmax in float64 over what the cache holds before this call, and the call's own tokens."""
        new = call.key.shape[2]
        seen = self.keys[index].shape[1] - new
        empty: list[list[int]] = [[] for _ in self.keys[index]]
        main = positions(self.cache, index, "main") if self.cache.enforcer.layers[index].main else empty
        front = positions(self.cache, index, "front") if self.cache.enforcer.layers[index].front else empty
        outs = []
        for h, query in enumerate(call.query[0].double().unflatten(0, (len(main), -1))):
            key, value = self.keys[index][h], self.values[index][h]
            own = [*main[h], *range(seen, seen + new)]
            keys, values = [key[own].double()], [value[own].double()]
            if front[h]:
                balance = self.balance[index, h]
                half = key.shape[-1] // 2
                keys.append(per_token(key[front[h]] * balance, self.bits, half) / balance)
                values.append(per_token(value[front[h]], self.bits, half))
            logits = query @ torch.cat(keys).T * call.scale
            late = torch.tensor([*own, *[-1] * len(front[h])]) > seen + torch.arange(new)[:, None]
            outs.append(torch.softmax(logits.masked_fill(late, float("-inf")), dim=-1) @ torch.cat(values))
        return torch.cat(outs)


@pytest.mark.parametrize("sizes", [[150] + [1] * 40, chunks(150, 40) + [1] * 40, [7] * 15 + [3] * 20], ids=len)
@pytest.mark.parametrize("policy", ["mikv(bits=2)", "mikv(balance=False)", "snapkv(window=8)+mikv(bits=3)"])
def test_attention_is_that_over_full_and_decoded_entries(policy, sizes):
    model = tiny_model("llama")
    cache = KVCache(model, policy, 40)
    part = cache.parts.destination
    assert isinstance(part, Demote)
    Oracle(model, cache, part.bits, part.balanced).feed(random_text(sum(sizes)), sizes)
    for layer in range(2):
        for main, front in zip(positions(cache, layer, "main"), positions(cache, layer, "front"), strict=True):
            assert len(main) <= 40 and sorted(main + front) == list(range(sum(sizes)))


@pytest.mark.parametrize("heads", [(3, 3), (8, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("budget", ["40KiB", "20KiB"])
def test_byte_budgets_and_head_groups(budget, heads):
    """At 40 KiB of 8 heads everything fits in few bits; three heads at 20 KiB have to drop some."""
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "mikv(bits=2)", budget)
    sizes = [100, 33, *[1] * 50]
    Oracle(model, cache, 2).feed(random_text(sum(sizes)), sizes)
    report = cache.report()
    assert report.nbytes <= cache.budget.amount
    in_place = sum(sum(map(sum, store.evictable())) for store in cache.enforcer.layers)
    if report.kept_entries < report.seen_entries:
        assert 0.1 < in_place / report.kept_entries < 0.25
        assert report.nbytes > 0.85 * cache.budget.amount
    else:
        assert in_place < report.seen_entries


def test_bytes_go_to_full_precision_first_and_nothing_is_dropped_while_all_fits():
    model, ids = tiny_model("llama"), random_text(400)
    cache = KVCache(model, "mikv(bits=2)", "64KiB")
    in_place = []
    for begin in range(0, 400, 8):
        with torch.inference_mode():
            model(ids[:, begin : begin + 8], past_key_values=cache)
        cache.check_integrity()
        report = cache.report()
        held = sum(sum(map(sum, store.evictable())) for store in cache.enforcer.layers)
        in_place.append(held / report.seen_entries)
        if in_place[-1] > 0.21:
            assert report.kept_entries == report.seen_entries
    assert in_place[0] == 1.0 and all(b <= a + 0.05 for a, b in pairwise(in_place))
    assert report.kept_entries < report.seen_entries and in_place[-1] > 0.08


def test_the_lowest_scores_are_dropped_when_bits_run_out():
    destination, layer = Demote(bits=4), filled_layer(rows=2, length=1)
    score = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0, 9.0, 8.0])
    position = torch.arange(8).int()
    evicted = Evicted(torch.randn(8, 16), torch.randn(8, 16), position, score, [5, 3])
    destination.receive(layer, evicted)
    destination.limit(layer, [2, 3])
    (segment,) = layer.front
    assert segment.lengths == [2, 3]
    assert segment.meta.row("position", 0).tolist() == [3, 4] and segment.meta.row("position", 1).tolist() == [5, 6, 7]


def filled_layer(rows: int, length: int, width: int = 16) -> LayerCache:
    layer = LayerCache(0, rows)
    tokens = torch.randn(1, rows, length, width)
    layer.append(tokens, torch.randn(1, rows, length, width), None)
    return layer


def test_balance_is_fixed_by_the_prefill():
    layer = filled_layer(rows=2, length=20)
    destination = Demote(bits=2)
    query = torch.randn(1, 6, 20, 16) * torch.rand(16) * 10
    destination.observe(View(layer, Queries(query, torch.zeros(1, 6, 20), 1.0)))
    keys = layer.main[0].keys().clone()
    evict(layer, destination, [0, 1, 2])
    (segment,) = layer.front
    assert isinstance(segment, QuantizedSegment) and segment.balance is not None
    expected = (query[0].abs().unflatten(0, (2, 3)).amax((1, 2)) / keys.abs().amax(1)).sqrt()
    torch.testing.assert_close(segment.balance, expected)
    destination.observe(View(layer, Queries(100 * query, torch.zeros(1, 6, 20), 1.0)))
    evict(layer, destination, [0, 1])
    torch.testing.assert_close(segment.balance, expected)
    assert not layer.statistics, "maxima are given back once the balance is known"


def test_balance_without_queries_at_hand():
    layer = filled_layer(rows=2, length=20)
    keys = layer.main[0].keys().clone()
    evict(layer, Demote(bits=2), [3, 4])
    (segment,) = layer.front
    assert isinstance(segment, QuantizedSegment)
    torch.testing.assert_close(segment.balance, keys.abs().amax(1).rsqrt())


def test_dead_channels_do_not_blow_up():
    layer = filled_layer(rows=1, length=20)
    layer.main[0].meta.columns["key"][:, 3] = 0.0
    query = torch.randn(1, 1, 20, 16)
    query[..., 5] = 0.0
    destination = Demote(bits=2)
    destination.observe(View(layer, Queries(query, torch.zeros(1, 1, 20), 1.0)))
    evict(layer, destination, [0, 1, 2])
    part = layer.front[0].attend(query[0], AttendContext(scale=1.0))
    assert bool(part.out.isfinite().all() and part.lse.isfinite().all())


def evict(layer: LayerCache, destination: Demote, cells: list[int]) -> None:
    """Demotes the entries in these cells of every row."""
    (segment,) = layer.main
    gone = torch.zeros(layer.num_rows, segment.longest, dtype=torch.bool)
    gone[:, cells] = True
    key, value, meta, counts = segment.gather(gone)
    layer.evict(~gone & segment.meta.valid())
    destination.receive(layer, Evicted(key, value, meta["position"], torch.rand(len(key)), counts))


def test_a_needle_that_eviction_loses_is_recovered():
    """A query that matches one demoted key gets its value back; without that key it gets something else."""
    layer = filled_layer(rows=1, length=200, width=64)
    segment = layer.main[0]
    segment.meta.columns["key"].mul_(0.3)
    needle, answer = segment.meta.row("key", 0)[17].clone() * 10, segment.meta.row("value", 0)[17].clone()
    segment.meta.row("key", 0)[17] = needle
    query = needle[None, None] * 2
    evict(layer, Demote(bits=2), list(range(150)))
    ctx = AttendContext(scale=0.125)
    lost = layer.main[0].attend(query, ctx)
    found = layer.front[0].attend(query, ctx)
    assert float(found.lse) > float(lost.lse) + 5
    error = (found.out[0, 0] - answer).norm() / answer.norm()
    assert error < 0.5 < (lost.out[0, 0] - answer).norm() / answer.norm()


def test_more_bits_and_the_balancer_help():
    """With channels that are large in keys and small in queries, 2 bits need the balancer to be better than eviction."""
    model, ids = tiny_model("llama", head_dim=32), random_text(240)
    with torch.no_grad():
        for layer in model.model.layers:
            factor = torch.ones(32)
            factor[[5, 21]] = 12.0  # a rotated pair of channels
            weights = layer.self_attn
            weights.k_proj.weight.mul_(factor.repeat(2)[:, None])
            weights.q_proj.weight.div_(factor.repeat(4)[:, None])
    full = run(model, KVCache(model, "full"), ids, [200, 40])[:, 200:]
    error = {}
    for policy in ("mikv(bits=8)", "mikv(bits=3)", "mikv(bits=2)", "mikv(bits=2, balance=False)", "h2o"):
        logits = run(model, KVCache(model, policy, 40), ids, [200, 40])[:, 200:]
        error[policy] = float((logits - full).square().mean())
    *better, two_bits, unbalanced, evicted = error.values()
    assert better == sorted(better) and better[-1] < two_bits < 0.5 * min(unbalanced, evicted), error
    assert better[0] < 1e-3 * evicted


def test_forks_demote_on_their_own():
    model, ids = tiny_model("llama"), random_text(120)
    endings = [random_text(25, seed=seed) for seed in (1, 2)]
    alone = []
    for ending in endings:
        single = KVCache(model, "mikv", "30KiB")
        alone.append(run(model, single, torch.cat([ids, ending], dim=1), [120] + [1] * 25)[:, 120:])
    cache = KVCache(model, "mikv", "30KiB")
    run(model, cache, ids, [120])
    forks = [cache.fork() for _ in endings]
    logits: list[list[Tensor]] = [[], []]
    for step in range(25):
        for out, fork, ending in zip(logits, forks, endings, strict=True):
            with torch.inference_mode():
                out.append(model(ending[:, step : step + 1], past_key_values=fork).logits)
            fork.check_integrity()
    for out, expected in zip(logits, alone, strict=True):
        torch.testing.assert_close(torch.cat(out, dim=1), expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        again = torch.cat([model(endings[0][:, i : i + 1], past_key_values=cache).logits for i in range(25)], dim=1)
    torch.testing.assert_close(again, alone[0], atol=1e-5, rtol=0)


def test_rows_are_independent_and_can_be_reordered():
    """Rows that demote at different times have the balance and entries of their single runs, also after a reorder."""
    model = tiny_model("llama")
    texts = [random_text(length, seed=length) for length in (130, 50, 90)]
    steps = [random_text(20, seed=seed) for seed in range(3)]
    ids, mask = left_padded(texts)
    cache = KVCache(model, "mikv", 40)
    where = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        model(ids, attention_mask=mask, position_ids=where, past_key_values=cache)
    order = [2, 0, 1, 0]
    cache.batch_select_indices(torch.tensor(order))
    mask = mask[order]
    rows = []
    for step in range(20):
        mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
        new = torch.cat([steps[i][:, step : step + 1] for i in order])
        with torch.inference_mode():
            rows.append(
                model(new, attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1, past_key_values=cache).logits
            )
        cache.check_integrity()
    for b, i in enumerate(order):
        single = KVCache(model, "mikv", 40)
        length = texts[i].shape[1]
        expected = run(model, single, torch.cat([texts[i], steps[i]], dim=1), [length] + [1] * 20)[:, length:]
        torch.testing.assert_close(torch.cat([row[b : b + 1] for row in rows], dim=1), expected, atol=1e-4, rtol=0)
        for layer in range(2):
            assert positions(cache, layer, "front", b) == positions(single, layer, "front")


def test_demotions_wait_for_the_end_of_a_speculation():
    model, ids = tiny_model("llama"), random_text(104)
    cache = KVCache(model, "mikv", 40)
    run(model, cache, ids[:, :100], [100])
    plain, other = cache.fork(), cache.fork()
    expected = run(model, plain, ids[:, 100:], [4])
    other.activate_past_recording()
    with torch.inference_mode():
        model(random_text(4, seed=5), past_key_values=other)
        other.crop(-4)
        logits = model(ids[:, 100:], past_key_values=other).logits
        other.crop(0)
    other.check_integrity()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for layer in range(2):
        for part in ("main", "front"):
            assert positions(other, layer, part) == positions(plain, layer, part)


def test_everything_demoted_counts_in_the_bytes():
    model = tiny_model("llama")
    cache = KVCache(model, "mikv(bits=4)", 32)
    run(model, cache, random_text(150), [150])
    report, cost = cache.report(), cache.enforcer.cost
    assert sum(report.parts.values()) == report.nbytes
    demoted = sum(sum(segment.lengths) for store in cache.enforcer.layers for segment in store.front)
    assert demoted == 2 * 2 * (150 - 32)
    by_the_prices = 4 * 32 * cost.per_entry + demoted * cost.aside + 4 * cost.fixed
    assert by_the_prices - 4 * 2 * 4 * 16 <= report.nbytes <= by_the_prices  # fixed: balances, and maxima while needed


def test_the_default_scorer_gives_way():
    assert parse("mikv").parts().scorer == H2O().parts()["scorer"]
    assert parse("mikv").parts().protect == H2O().parts()["protect"]
    assert type(parse("snapkv+mikv(bits=2)").parts().scorer).__name__ == "WindowAttention"
    assert parse("snapkv+mikv").parts().protect.recent_share == 0


@pytest.mark.parametrize("text", ["mikv(bits=5)", "mikv(share=0.0)", "mikv(share=1.5)", "mikv(group=-1)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match=text[5:9]):
        KVCache(tiny_model("llama"), text, 64)
