"""The mergers' common rules: every weighting against its formula, counts that make merging equal entries exact, positions."""

import math

import pytest
import torch
from brute import kept_positions, run
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvbudget.cache import KVCache
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations.cluster import Cluster
from kvbudget.policy.destinations.merge import Merge, MergeNearby, MergeNearest
from tiny import random_text, tiny_model


def layer_of(keys: Tensor, values: Tensor, positions: list[int], seen: int) -> LayerCache:
    """A layer of one head that holds these entries of a text of ``seen`` tokens, each counted once."""
    layer = LayerCache(0, 1, states=("count",))
    whole = torch.zeros(2, 1, 1, seen, keys.shape[1])
    whole[0, 0, 0, positions], whole[1, 0, 0, positions] = keys, values
    layer.append(whole[0], whole[1], None)
    keep = torch.zeros(1, seen, dtype=torch.bool)
    keep[0, positions] = True
    layer.evict(keep)
    return layer


def leaving(keys: Tensor, values: Tensor, positions: list[int], scores: Tensor, kept: Tensor) -> Evicted:
    at = torch.tensor(positions, dtype=torch.int32)
    return Evicted(keys, values, at, scores, [len(keys)], torch.ones(len(keys)), kept)


@pytest.mark.parametrize("weights", ["mean", "pivot", "cosine", "softmax", "score", "count"])
def test_weights_are_those_of_the_formulas(weights):
    torch.manual_seed(3)
    keys, values, gone, lost = (torch.randn(n, 8) for n in (4, 4, 7, 7))
    scores, kept = torch.rand(7), 1 + torch.rand(4)
    layer = layer_of(keys, values, [0, 3, 6, 9], 12)
    MergeNearest(least=-1.0, weights=weights, counts=True).receive(
        layer, leaving(gone, lost, [1, 2, 4, 5, 7, 8, 10], scores, kept)
    )
    found = layer.main[0]
    cosine = cosine_similarity(gone[:, None], keys[None], dim=-1)
    for a in range(4):
        mine = [i for i in range(7) if int(cosine[i].argmax()) == a]
        own = {"mean": 1.0, "count": 1.0, "cosine": 1.0, "softmax": math.e, "pivot": 1 + len(mine) / 2}.get(weights)
        own = float(kept[a]) if own is None else own
        other = {
            "cosine": lambda i, a=a: (1 + float(cosine[i, a])) / 2,
            "softmax": lambda i, a=a: math.exp(float(cosine[i, a])),
            "pivot": lambda i: 0.5,
            "score": lambda i: float(scores[i]),
        }.get(weights, lambda i: 1.0)
        total = own + sum(other(i) for i in mine)
        for before, members, after in ((keys, gone, found.keys()[0, a]), (values, lost, found.values()[0, a])):
            expected = (own * before[a] + sum((other(i) * members[i] for i in mine), torch.zeros(8))) / total
            torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
        assert float(found.meta.row("count", 0)[a]) == 1 + len(mine)


@pytest.mark.parametrize(
    ("part", "weights"),
    [(MergeNearest, w) for w in ("mean", "pivot", "cosine", "softmax", "score", "count")] + [(MergeNearby, "mean")],
)
def test_duplicates_leave_their_anchors_as_they_are(part, weights):
    """Of the anchor that is nearest by key and by position; entries that nothing resembles join none by key."""
    torch.manual_seed(4)
    keys, values = torch.linalg.qr(torch.randn(8, 8)).Q, torch.randn(4, 8)
    layer = layer_of(keys[:4], values, [0, 4, 8, 12], 16)
    twins = leaving(keys[[0, 1, 1]], values[[0, 1, 1]], [1, 3, 5], torch.rand(3), torch.rand(4))
    options = {"least": 0.6} if part is MergeNearest else {}
    merger = part(weights=weights, counts=True, **options)
    merger.receive(layer, twins)
    assert layer.main[0].meta.row("count", 0).tolist() == [2, 3, 1, 1]
    if part is MergeNearest:
        merger.receive(layer, leaving(keys[4:], values, [2, 6, 9, 13], torch.rand(4), torch.rand(4)))
    torch.testing.assert_close(layer.main[0].keys()[0], keys[:4])
    torch.testing.assert_close(layer.main[0].values()[0], values)


PARTS = [MergeNearest(least=-1.0, weights="count", counts=True), Cluster(4), MergeNearby(weights="count", counts=True)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_merging_equal_entries_with_counts_is_exact(part: Merge):
    """Attention over entries of which many have the same key, and different values, before and after the merge."""
    torch.manual_seed(0)
    key = torch.randn(1, 8).expand(20, -1) * torch.ones(20, 1)
    value = torch.randn(20, 8)
    query = torch.randn(1, 1, 3, 8)
    full = LayerCache(0, 1)
    full.append(key[None, None], value[None, None], None)
    layer = layer_of(key[5::6], value[5::6], [5, 11, 17], 20)
    gone = [i for i in range(20) if i not in (5, 11, 17)]
    for some in (gone[:9], gone[9:]):
        part.receive(layer, leaving(key[some], value[some], some, torch.rand(len(some)), torch.rand(3)))
    assert float(layer.main[0].meta.flat("count").sum()) == 20
    fresh = torch.randn(1, 1, 3, 8)
    outs = [store.probe(AttentionCall(query, fresh, fresh, 0.3))[0] for store in (full, layer)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["chelsea(recent=8)", "h2o+cam(weights=count, counts=True)"])
def test_a_text_of_few_equal_tokens_loses_nothing(policy):
    """A model without positions, whose equal tokens have equal keys and values: half of the cache says the same."""
    model = tiny_model("gpt2", num_hidden_layers=1)
    model.transformer.wpe.weight.zero_()
    ids = random_text(150) % 6 + 1
    with torch.inference_mode():
        expected = model(ids).logits[:, 120:]
    cache = KVCache(model, policy, 70)
    got = run(model, cache, ids, [120] + [1] * 30)[:, 120:]
    assert cache.report().kept_entries <= 70 * 4
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    dropped = run(model, KVCache(model, "h2o", 70), ids, [120] + [1] * 30)[:, 120:]
    assert (dropped - expected).abs().max() > 10 * (got - expected).abs().max()


def test_nearest_positions_and_what_is_no_anchor():
    keys = torch.eye(4)
    layer = layer_of(keys, keys.clone(), [0, 4, 10, 11], 14)
    gone, positions = torch.randn(5, 4), [1, 3, 7, 8, 13]
    MergeNearby(weights="mean", sinks=1, recent=3).receive(
        layer, leaving(gone, gone.clone(), positions, torch.zeros(5), torch.zeros(4))
    )
    found = layer.main[0].keys()[0]
    # 1, 3 and, as far from 4 as from 10, 7 join 4; 8 and 13 join 10, since 0 is a sink and 11 recent.
    torch.testing.assert_close(found[1], (keys[1] + gone[:3].sum(0)) / 4)
    torch.testing.assert_close(found[2], (keys[2] + gone[3:].sum(0)) / 3)
    assert found[0].equal(keys[0]) and found[3].equal(keys[3])


def test_nothing_that_leaves_and_far_entries_change_nothing():
    layer = layer_of(torch.eye(4), torch.eye(4), [0, 1, 2, 3], 4)
    part = MergeNearest(least=1.1, weights="mean")
    part.receive(layer, leaving(torch.eye(4), torch.eye(4), [0, 1, 2, 3], torch.ones(4), torch.ones(4)))
    assert layer.main[0].keys()[0].equal(torch.eye(4))


@pytest.mark.parametrize("merger", ["ems", "chelsea", "elastic_cache", "cam", "cam+kivi"])
@pytest.mark.parametrize("scorer", ["knorm", "tova"])
def test_any_scorer_can_be_merged(scorer, merger):
    """The scorer alone decides what stays, as if nothing were merged."""
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(150)
    texts = f"{scorer}+{merger}", scorer + "+kivi" * ("kivi" in merger)
    merged, dropped = (KVCache(model, text, 60) for text in texts)
    for cache in (merged, dropped):
        run(model, cache, ids, [150])
    assert kept_positions(merged, 0) == kept_positions(dropped, 0)
    values = [cache.enforcer.layers[0].main[0].values() for cache in (merged, dropped)]
    assert not torch.equal(*values)
    run(model, merged, random_text(30), [1] * 30)
