"""CHAI: copied heads join and lose nothing, plain linkage, keys held once per cluster, and budgets, forks and files that hold."""

from pathlib import Path

import pytest
import torch
from brute import kept_positions, run
from test_registry import feed
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import build, calibrate
from kvbudget.calibrate.head_clusters import nearest
from kvbudget.errors import PolicyError
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from residency import resident_bytes
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def copied(order: tuple[int, int] = (0, 1)):
    """A model of 3 KV heads in whose upper layer the last has the keys of the first, and its query heads in this order."""
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=3)
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight[32:] = attention.k_proj.weight[:16]
    for head, source in enumerate(order):
        attention.q_proj.weight[64 + 16 * head : 80 + 16 * head] = attention.q_proj.weight[
            16 * source : 16 * source + 16
        ]
    return model


def fitted(model, **given: float) -> dict[str, Tensor]:
    texts = [random_text(40, seed=s)[0] for s in range(2)]
    path = calibrate("chai", model, texts=texts, count=2, length=40, **given)
    return dict(Artifact.load("chai", fingerprint(model), path).tensors)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_copied_heads_join_and_lose_nothing_but_their_keys(order):
    model, ids = copied(order), random_text(90)
    tables = fitted(model, distance=1e-4)
    assert tables["owners"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert tables["sources"][1].tolist() == [0, 1, 2, 3, *order]
    with torch.inference_mode():
        expected = model(ids).logits
    cache, full = KVCache(model, "chai"), KVCache(model)
    for it in (cache, full):
        torch.testing.assert_close(feed(model, it, ids, [60, 25, 1, 4]), expected, atol=1e-4, rtol=0)
    one, whole = cache.report().parts, full.report().parts
    assert one["keys"] * 6 == whole["keys"] * 5 and one["values"] == whole["values"]
    assert resident_bytes(cache) == cache.nbytes


def test_as_many_clusters_as_heads_are_exact_and_one_is_attention_by_the_first():
    model, ids = tiny_model("llama"), random_text(70)
    with torch.inference_mode():
        expected = model(ids).logits
    fitted(model, clusters=2)
    torch.testing.assert_close(feed(model, KVCache(model, "chai"), ids, [50, 20]), expected, atol=1e-4, rtol=0)
    sources = fitted(model, clusters=1)["sources"]
    found = feed(model, KVCache(model, "chai"), ids, [50, 1, 19])
    for layer, own in zip(model.model.layers, sources, strict=True):
        attention = layer.self_attn
        queries = attention.q_proj.weight.clone().unflatten(0, (4, 16))
        attention.q_proj.weight.copy_(queries[own].flatten(0, 1))
        attention.k_proj.weight[16:] = attention.k_proj.weight[:16]
    with torch.inference_mode():
        torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=0)


def test_the_linkage_is_the_average_and_query_heads_find_the_nearest():
    rule = build("chai", distance=0.45)
    line = torch.tensor([0.0, 0.3, 0.7, 2.0])
    apart = (line[:, None] - line[None]).abs()
    assert rule._joined(apart, 4).tolist() == [0, 0, 2, 3], "0.55 on average, though 0.4 from the nearest"
    assert build("chai", distance=0.6)._joined(apart, 4).tolist() == [0, 0, 0, 3]
    assert build("chai", clusters=1)._joined(apart, 4).tolist() == [0, 0, 0, 0]
    grouped = torch.tensor([0.0, 5.0, 5.1, 0.2])
    apart = (grouped[:, None] - grouped[None]).abs()
    assert rule._joined(apart, 2).tolist() == [0, 0] and nearest(apart, torch.tensor([0, 0])).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("scorer", "budget"), [("snapkv(window=8)", 48), ("h2o", "40KiB"), ("knorm", "40KiB")])
def test_clusters_keep_the_same_entries_inside_the_budget(scorer, budget):
    model, ids = copied(), random_text(150)
    fitted(model, distance=1e-4)
    cache = KVCache(model, f"{scorer}+chai", budget)
    feed(model, cache, ids[:, :140], [64, 64, 12])
    rows = kept_positions(cache, 1)
    assert cache.enforcer.evictions and rows[0] == rows[2]
    fork = cache.fork()
    one, other = (run(model, c, ids[:, 140:], [1] * 10) for c in (cache, fork))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    if budget != 48:
        return
    cache.batch_select_indices(torch.tensor([0, 0]))
    cache.check_integrity()


def test_a_saved_cache_goes_on_alike(tmp_path):
    model, ids = copied(), random_text(80)
    fitted(model, distance=1e-4)
    cache = KVCache(model, "snapkv(window=8)+chai", 40)
    run(model, cache, ids[:, :60], [60])
    cache.save(tmp_path / "held.kvb")
    again = KVCache.load(tmp_path / "held.kvb", model)
    torch.testing.assert_close(*(run(model, c, ids[:, 60:], [20]) for c in (cache, again)), atol=1e-5, rtol=0)


def test_what_shared_keys_cannot_do_is_refused():
    model = tiny_model("llama")
    fitted(model)
    for policy in ("knorm+pyramidkv+chai", "knorm+adakv+chai", "knorm+kivi+chai", "h2o+cam+chai", "cla+chai"):
        with pytest.raises(PolicyError, match="share keys"):
            KVCache(model, policy, 200)
    with pytest.raises(PolicyError, match="clusters=3"):
        fitted(model, clusters=3)
