"""The random control: fair, repeatable, and the same whenever it is asked."""

import torch
from brute import chunks, kept_positions, run

from kvbudget.cache import KVCache
from kvbudget.layer import LayerCache
from kvbudget.methods.random import RandomScore
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def scores(length: int, seed: int = 0, layer_idx: int = 0) -> torch.Tensor:
    layer = LayerCache(layer_idx, 2)
    layer.append(torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4), None)
    return RandomScore(seed).score(View(layer))[0]


def test_the_sample_does_not_depend_on_how_often_entries_were_judged():
    model, ids = tiny_model("llama"), random_text(120)
    kept = []
    for sizes in ([120], chunks(120, 64), chunks(120, 7), [1] * 120):
        cache = KVCache(model, "random", 60, when="every(1)")
        run(model, cache, ids, sizes)
        kept.append([kept_positions(cache, layer) for layer in range(2)])
    assert kept[0] == kept[1] == kept[2] == kept[3]


def test_numbers_are_uniform_and_independent_of_layer_head_and_seed():
    base = scores(20_000)
    assert base.min() >= 0 and base.max() < 1
    # A tenth per decile, within five standard deviations.
    deciles = torch.histc(base[0], 10, 0, 1)
    assert (deciles - 2000).abs().max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    for other in (base[1], scores(20_000, seed=1)[0], scores(20_000, layer_idx=1)[0], base[0].roll(1)):
        assert abs(torch.corrcoef(torch.stack([base[0], other]))[0, 1]) < 5 / 20_000**0.5


def test_seeds_differ_and_repeat():
    model, ids = tiny_model("llama"), random_text(150)
    kept = []
    for text in ("random", "random", "random(seed=1)"):
        cache = KVCache(model, text, 60)
        run(model, cache, ids, [150])
        kept.append(kept_positions(cache, 0))
        assert all(row[:4] == [0, 1, 2, 3] and row[-32:] == list(range(118, 150)) for row in kept[-1])
    assert kept[0] == kept[1] != kept[2]
