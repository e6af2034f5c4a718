"""Chelsea: soft matching against a plain simulation, chains of rounds, and the checks of its card."""

import pytest
import torch
from brute import run
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from kvbudget.policy.base import Evicted
from kvbudget.policy.clustering import kmeans
from kvbudget.policy.matching import match
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def clustered(keys: list[torch.Tensor], target: int, chunk: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Centroids and their members after rounds of soft matching down to ``target``, one pair at a time."""
    left = [(key.double(), [i]) for i, key in enumerate(keys)]
    while len(left) > target:
        edges = []
        for begin in range(0, len(left), chunk):
            places = range(begin, min(begin + chunk, len(left)))
            for a in places[0::2]:
                best = [(float(cosine_similarity(left[a][0], left[b][0], dim=0)), b) for b in places[1::2]]
                if best:
                    edges.append((*max(best, key=lambda pair: (pair[0], -pair[1])), a))
        edges.sort(key=lambda edge: -edge[0])
        joined: dict[int, list[int]] = {}
        for _, b, a in edges[: len(left) - target]:
            joined.setdefault(b, []).append(a)
        for b, members in joined.items():
            groups = [left[b], *(left[a] for a in members)]
            number = sum(len(group[1]) for group in groups)
            centroid = sum(key * len(group) for key, group in groups) / number
            left[b] = (centroid, sorted(i for _, group in groups for i in group))
        gone = {a for members in joined.values() for a in members}
        left = [item for i, item in enumerate(left) if i not in gone]
    return left


@pytest.mark.parametrize(("target", "chunk"), [(45, 8), (30, 8), (30, 128), (14, 8), (8, 16)])
def test_clusters_are_those_of_soft_matching(target, chunk):
    torch.manual_seed(1)
    keys, values = torch.randn(60, 6), torch.randn(60, 6)
    parts = parse(f"chelsea(chunk={chunk}, sinks=0, recent=0)").parts()
    layer = LayerCache(0, 1, states=("count",))
    layer.append(keys[None, None], values[None, None], None)
    scores = parts.scorer.score(View(layer))[0, 0]
    keep = torch.zeros(1, 60, dtype=torch.bool)
    keep[0, scores.argsort(descending=True, stable=True)[:target]] = True
    key, value, meta, counts = layer.main[0].gather(~keep)

    layer.evict(keep)
    parts.destination.receive(layer, Evicted(key, value, meta["position"], scores[~keep[0]], counts, meta["count"]))
    expected = clustered(list(keys), target, chunk)
    segment = layer.main[0]
    assert segment.meta.flat("count").tolist() == [len(group) for _, group in expected]
    for i, (centroid, group) in enumerate(expected):
        torch.testing.assert_close(segment.keys()[0, i].double(), centroid, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(segment.values()[0, i], values[group].mean(0), atol=1e-4, rtol=1e-4)


def test_every_entry_is_counted_and_nothing_happens_while_all_fits():
    model, ids = tiny_model("llama"), random_text(200)
    cache = KVCache(model, "chelsea(chunk=32, recent=8)", 60)
    run(model, cache, ids, [90, 60] + [1] * 50)
    for layer in cache.enforcer.layers:
        counts = [segment.meta.row("count", r) for segment in layer.main for r in range(2)]
        assert [float(row.sum()) for row in counts] == [200.0, 200.0]
        assert all(row[:4].eq(1).all() and row[-8:].eq(1).all() for row in counts)
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(run(model, KVCache(model, "chelsea", 200), ids, [200]), expected, atol=1e-4, rtol=0)


def test_clusters_of_neighbors_are_nearly_as_tight_as_those_of_kmeans():
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(8, 8, generator=generator)
    labels = torch.randint(8, (128,), generator=generator)
    keys = centers[labels] + 0.3 * torch.randn(128, 8, generator=generator)
    ours = clustered(list(keys), 32, 128)
    spread = sum(float((keys[group].double() - centroid).square().sum()) for centroid, group in ours)
    means, nearest = kmeans(keys, 8)
    assert spread <= 1.3 * float((keys - means[nearest]).square().sum())


def test_products_grow_with_the_text_and_not_with_its_square():
    """Multiplications of scoring and clustering, counted, for fixed chunks: twice the entries, twice as many."""
    counted = []
    for number in (512, 1024):
        parts = parse("chelsea(chunk=32, sinks=0, recent=0)").parts()
        keys = torch.randn(number, 8, generator=torch.Generator().manual_seed(0))
        layer = LayerCache(0, 1, states=("count",))
        layer.append(keys[None, None], keys[None, None], None)
        keep = torch.zeros(1, number, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            scores = parts.scorer.score(View(layer))[0, 0]
            keep[0, scores.argsort(descending=True, stable=True)[: number // 4]] = True
            key, value, meta, counts = layer.main[0].gather(~keep)
            layer.evict(keep)
            gone = Evicted(key, value, meta["position"], scores[~keep[0]], counts, meta["count"])
            parts.destination.receive(layer, gone)
        counted.append(counter.get_total_flops())
    assert counted[0] and counted[1] < 2.1 * counted[0], counted


def test_sides_can_be_exchanged_and_single_entries_stay_alone():
    keys = torch.randn(7, 4)
    even, _ = match(keys, 4)
    odd, partner = match(keys, 4, odd=True)
    assert even.isfinite().tolist() == [True, False, True, False, True, False, True]
    assert odd.isfinite().tolist() == [False, True, False, True, False, True, False]
    assert set(partner[[1, 3]].tolist()) <= {0, 2} and partner[5].item() in (4, 6)
    assert match(keys[:1], 4)[0].tolist() == [float("-inf")]


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match="chunk=7"):
        parse("chelsea(chunk=7)")
