"""D2O against a brute-force cache that merges, and its allocation by the variance of attention."""

import math
from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, chunks, kept_positions, run
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvbudget.cache import KVCache
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from kvbudget.policy.allocators.variance import AttentionVariance
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations import merge
from kvbudget.policy.destinations.merge import THRESHOLD, MergeNearest
from kvbudget.policy.view import Queries, View
from kvbudget.segments.quantized import QuantizedSegment
from tiny import left_padded, random_text, tiny_model


def merged(anchors: Tensor, members: list[tuple[int, float, Tensor]]) -> Tensor:
    """Anchors ``[A, D]`` after the paper's weighted sum with ``(anchor, cosine, vector)`` members, one at a time."""
    out = anchors.clone()
    for a in {a for a, _, _ in members}:
        mine = [(u, x) for where, u, x in members if where == a]
        total = math.e + sum(math.exp(u) for u, _ in mine)
        out[a] = math.e / total * anchors[a] + sum(math.exp(u) / total * x for u, x in mine)
    return out


def merging(alpha: float = 0.5, beta: float = 0.5, sinks: int = 4):
    """Accumulated attention, half recent, and the merge of what leaves."""
    thresholds: dict[int, float] = {}

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for h, (head, weights) in enumerate(zip(step.heads, step.weights, strict=True)):
            head.memory = head.memory + weights.sum(1).mean(0)
            scores = head.memory.clone()
            scores[len(scores) - min(limit // 2, limit - sinks) :] = float("inf")
            scores[head.positions < sinks] = float("inf")
            kept.append(best(scores, limit).sort().values)
            gone = [i for i in range(len(scores)) if i not in kept[-1].tolist()]
            if len(scores) <= limit:
                continue
            anchors = kept[-1].tolist()
            cosine = [[cosine_similarity(head.keys[i], head.keys[a], dim=0).item() for a in anchors] for i in gone]
            top = [max((u, -a) for a, u in enumerate(row)) for row in cosine]
            mean = sum(u for u, _ in top) / len(top)
            thresholds[h] = alpha * thresholds[h] + beta * mean if h in thresholds else mean
            near = [(-a, u, i) for (u, a), i in zip(top, gone, strict=True) if u >= thresholds[h]]
            assert near or len(gone) < 20, "nothing to merge: the test shows nothing"
            for column in (head.keys, head.values):
                column[kept[-1]] = merged(column[kept[-1]], [(a, u, column[i]) for a, u, i in near])
        return kept

    return rule


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("sizes", [[110] + [1] * 25, chunks(110, 40) + [1] * 10, [5] * 16], ids=len)
def test_entries_are_merged_as_the_paper_says(heads, sizes):
    model = tiny_model("llama", num_hidden_layers=1, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "d2o", 32, when="every(1)")
    run(model, cache, random_text(sum(sizes)), sizes, Brute(merging(), 32))
    assert cache.report().kept == [[[32] * heads[1]]]


def dense_layer(rows: int, length: int, width: int = 8) -> LayerCache:
    layer = LayerCache(0, rows)
    layer.append(torch.randn(1, rows, length, width), torch.randn(1, rows, length, width), None)
    return layer


def evicted(keys: list[Tensor], values: list[Tensor]) -> Evicted:
    counts = [len(key) for key in keys]
    numbers = torch.zeros(sum(counts))
    return Evicted(torch.cat(keys), torch.cat(values), numbers.int(), numbers, counts)


def test_threshold_follows_its_recursion_per_head():
    layer = dense_layer(2, 30)
    part = MergeNearest(alpha=0.3, beta=0.7)
    expected = [math.nan, math.nan]
    for counts in ([5, 9], [0, 3], [4, 4], [1, 0]):
        keys = [torch.randn(n, 8) for n in counts]
        kept = layer.main[0].keys().clone()
        for r, key in enumerate(keys):
            if len(key):
                mean = float(cosine_similarity(key[:, None], kept[r][None], dim=-1).amax(1).mean())
                expected[r] = mean if math.isnan(expected[r]) else 0.3 * expected[r] + 0.7 * mean
        part.receive(layer, evicted(keys, [torch.randn(n, 8) for n in counts]))
        torch.testing.assert_close(layer.statistics[THRESHOLD], torch.tensor(expected), atol=1e-5, rtol=0)
        layer.check_integrity()


def test_only_what_is_near_enough_is_merged():
    layer = dense_layer(1, 10)
    keys, values = layer.main[0].keys().clone(), layer.main[0].values().clone()
    near = keys[0, 4] * 3 + 0.01  # same direction, another length
    far = torch.linalg.qr(torch.cat([keys[0, :1], torch.randn(7, 8)]).T).Q[:, -1]
    MergeNearest().receive(layer, evicted([torch.stack([near, far])], [torch.ones(2, 8)]))
    u = float(cosine_similarity(near, keys[0, 4], dim=0))
    weight = math.exp(u) / (math.e + math.exp(u))
    keys[0, 4] = (1 - weight) * keys[0, 4] + weight * near
    values[0, 4] = (1 - weight) * values[0, 4] + weight
    torch.testing.assert_close(layer.main[0].keys(), keys)
    torch.testing.assert_close(layer.main[0].values(), values)


def test_blocks_do_not_change_the_result(monkeypatch):
    keys, values = [torch.randn(57, 8)], [torch.randn(57, 8)]
    results = []
    for block in (2**20, 40):
        monkeypatch.setattr(merge, "BLOCK", block)
        torch.manual_seed(1)
        layer = dense_layer(1, 21)
        MergeNearest().receive(layer, evicted(keys, values))
        results.append((layer.main[0].keys(), layer.main[0].values()))
    torch.testing.assert_close(results[0], results[1])


def test_coded_entries_are_no_anchors():
    layer = LayerCache(
        0, 1, make_segment=lambda rows: QuantizedSegment(rows, ChannelQuant(unit=8, residual=8), TokenQuant(residual=8))
    )
    layer.append(torch.randn(1, 1, 21, 16), torch.randn(1, 1, 21, 16), None)
    layer.finish_forward()
    (segment,) = layer.main
    keys, values = segment.keys().clone(), segment.values().clone()
    MergeNearest().receive(layer, evicted([keys[0, [2, 18]] * 0.5], [values[0, [2, 18]] * 0.5]))
    changed = (segment.keys() != keys).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [18] and bool((segment.values() != values).any(-1)[0, 18])


def test_forks_merge_on_their_own():
    model, ids = tiny_model("llama"), random_text(100)
    endings = [random_text(20, seed=seed) for seed in (1, 2)]
    alone = [
        run(model, KVCache(model, "d2o", 40), torch.cat([ids, ending], dim=1), [100] + [1] * 20)[:, 100:]
        for ending in endings
    ]
    cache = KVCache(model, "d2o", 40)
    run(model, cache, ids, [100])
    for fork, ending, expected in zip([cache.fork(), cache.fork()], endings, alone, strict=True):
        steps = [model(ending[:, i : i + 1], past_key_values=fork).logits for i in range(20)]
        fork.check_integrity()
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=0)


def test_rows_are_independent():
    model = tiny_model("llama")
    texts = [random_text(length, seed=length) for length in (130, 45, 90)]
    ids, mask = left_padded(texts)
    cache = KVCache(model, "d2o", 40)
    with torch.inference_mode():
        logits = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache
        ).logits
        step = torch.full((3, 1), 9)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        after = model(step, attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1, past_key_values=cache).logits
    cache.check_integrity()
    for b, text in enumerate(texts):
        single = KVCache(model, "d2o", 40)
        expected = run(model, single, torch.cat([text, step[:1]], dim=1), [text.shape[1], 1])
        torch.testing.assert_close(logits[b, -1], expected[0, -2], atol=1e-4, rtol=0)
        torch.testing.assert_close(after[b, -1], expected[0, -1], atol=1e-4, rtol=0)
        for layer in range(2):
            assert kept_positions(cache, layer, b) == kept_positions(single, layer)


def test_merging_is_closer_to_the_full_cache_than_dropping():
    """Where texts repeat, what leaves resembles what stays."""
    model, model_error = tiny_model("llama", num_hidden_layers=1), {"d2o": 0.0, "h2o": 0.0}
    for seed in range(8):
        ids = random_text(20, seed=seed).repeat(1, 8)
        full = run(model, KVCache(model, "full"), ids, [160])
        for policy in model_error:
            logits = run(model, KVCache(model, policy, 40), ids, [120] + [1] * 40)
            model_error[policy] += float((logits - full)[:, 120:].square().mean())
    assert model_error["d2o"] < 0.95 * model_error["h2o"]


def test_equal_variances_share_equally():
    allocator = AttentionVariance()
    assert len(set(allocator.weights([2.5] * 6, 100.0, 5.0))) == 1
    weights = allocator.weights([1.0, 3.0, 2.0], 100.0, 5.0)
    torch.testing.assert_close(torch.tensor(weights), torch.exp(-torch.tensor([0.0, 1.0, 0.5])))


def test_even_attention_keeps_more():
    """Heads that attend to a few entries only leave their layer less; the total is that of a uniform split."""
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(0.01)
    cache = KVCache(model, "d2o", 60)
    run(model, cache, random_text(200), [200])
    kept = [sum(row) for (row,) in cache.report().kept]
    assert kept[1] > max(kept[0], kept[2]) and 3 * 120 - 6 < sum(kept) <= 3 * 120


def test_layers_at_the_ends_can_be_kept_and_are_charged():
    model = tiny_model("llama", num_hidden_layers=5)
    cache = KVCache(model, "d2o(keep_ends=True)", 100)
    run(
        model,
        cache,
        random_text(130),
        [
            130,
        ],
    )
    kept = [row for (row,) in cache.report().kept]
    assert kept[0] == kept[1] == kept[4] == [130, 130]
    assert sum(map(sum, kept)) <= 5 * 2 * 100 and min(map(min, kept)) >= 50


def test_variance_is_that_of_accumulated_attention():
    layer = LayerCache(0, 2, states=("received",))
    tokens = torch.randn(1, 2, 9, 8)
    layer.append(tokens, tokens, None)
    mass = torch.rand(1, 2, 9) * 4
    view = View(layer, Queries(torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9), 1.0))
    view.set_state("received", mass)
    expected = (mass.var(-1, unbiased=False) / mass.mean(-1) ** 2).mean().item()
    allocator = AttentionVariance("received")
    assert allocator.preference(view, [None]) == pytest.approx([expected])
    assert allocator.preference(view, [7.0]) == pytest.approx([expected])
    step = View(layer, Queries(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1), 1.0))
    layer.seen = [17]
    assert allocator.preference(step, [7.0]) == [7.0], "a single step does not measure again"


def test_the_scorer_is_part_of_the_method():
    parts = parse("d2o(sinks=2)+kivi").parts()
    assert parts.protect.sinks == 2 and parts.protect.recent_share == 0.5
    assert isinstance(parts.destination, MergeNearest) and isinstance(parts.layers, AttentionVariance)
    assert parts.layers.state in parts.scorer.states
