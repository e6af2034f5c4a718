"""PrefixKV: the best minimum ratio by brute force, the bisection of the paper, and what a model's layers get."""

import itertools

import pytest
import torch
from brute import best, kept_positions, run, with_newest

from kvbudget.cache import KVCache
from kvbudget.methods.prefixkv import EqualRatio
from tiny import random_text, tiny_model


def ratio(scores: torch.Tensor, count: int) -> float:
    """Share of a layer's scores ``[H, T]`` that the best ``count`` entries of each head hold."""
    return sum(row.sort(descending=True).values[:count].sum().item() for row in scores) / scores.sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_no_allocation_has_a_higher_minimum(seed):
    generator = torch.Generator().manual_seed(seed)
    power = 1 + 6 * torch.rand(3, 1, 1, generator=generator)
    layers = list(torch.rand(3, 2, 12, generator=generator) ** power)
    for total in (5, 13, 22, 36):
        found = [int(n) // 2 for n in EqualRatio().rank(layers, 2 * total)]
        assert sum(found) == total
        others = (c for c in itertools.product(range(13), repeat=3) if sum(c) == total)
        bound = max(min(map(ratio, layers, counts)) for counts in others)
        assert min(map(ratio, layers, found)) == pytest.approx(bound)


def test_equals_the_bisection_for_one_ratio():
    layers = [torch.rand(1, 400).double() ** k for k in (1, 3, 8, 20)]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        curves = [(row / row.sum()).sort(descending=True).values.cumsum(-1) for row in layers]
        sizes = [1 + int(torch.searchsorted(curve[0], middle)) for curve in curves]
        low, high = (middle, high) if sum(sizes) <= 600 else (low, middle)
    found = EqualRatio().rank(layers, 600)
    assert sum(found) == 600 and all(abs(a - b) <= 1 for a, b in zip(found, sizes, strict=True))


def test_equal_layers_share_equally_and_one_peak_needs_one_entry():
    row = torch.rand(2, 50)
    assert EqualRatio().rank([row, row, row], 2 * 60) == [40, 40, 40]
    peak = torch.zeros(2, 50)
    peak[:, 7] = 1.0
    peak[:, -3:] = float("inf")  # protected
    assert EqualRatio().rank([peak, row], 2 * 20) == [8, 32]


def test_scores_below_zero_are_raised():
    row = torch.rand(1, 60)
    assert EqualRatio().rank([row - 5, row * 3 - 9], 40) == EqualRatio().rank([row - row.min(), row - row.min()], 40)


def test_layers_hold_what_the_ratio_leaves_them():
    model, ids = tiny_model("llama", num_hidden_layers=3), random_text(150)
    cache = KVCache(model, "prefixkv(recent=8)", 40)
    run(model, cache, ids, [150])
    plain = tiny_model("llama", num_hidden_layers=3)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        sums = [
            a[0].double().sum(1).unflatten(0, (2, -1)).mean(1) for a in plain(ids, output_attentions=True).attentions
        ]
    inner = [s[:, 1:-8] for s in sums]
    curves = [sum(row.sort(descending=True).values for row in s).cumsum(0) / s.sum() for s in inner]
    order = sorted((float(c[n - 1]) if n else 0.0, layer) for layer, c in enumerate(curves) for n in range(len(c)))
    counts = [sum(where == layer for _, where in order[: 3 * 40 - 27]) for layer in range(3)]
    assert len(set(counts)) > 1
    for layer, count in enumerate(counts):
        scores = sums[layer].clone()
        scores[:, 0] = float("inf")
        expected = [with_newest(row, torch.arange(150), 142, count + 9).sort().values.tolist() for row in scores]
        assert kept_positions(cache, layer) == expected


def test_any_scorer_can_be_shared_out():
    model = tiny_model("llama")
    cache = KVCache(model, "knorm+prefixkv", 40)
    run(model, cache, random_text(120), [90] + [1] * 30)
    assert sum(sum(layer[0]) for layer in cache.report().kept) <= 2 * 2 * 40
    keys = cache.enforcer.layers[0].main[0].keys()
    assert best(-keys[0].norm(dim=-1), 1).numel() == 1
