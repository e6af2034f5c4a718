"""Knorm against brute force."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, chunks, distinct_text, kept_positions, run, with_newest
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import BudgetError
from kvbudget.policy.view import View
from tiny import tiny_model


def low_norms(recent: int = 0):
    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        first = step.seen - recent
        return [with_newest(-head.keys.norm(dim=-1), head.positions, first, limit) for head in step.heads]

    return rule


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sizes", [[150] + [1] * 40, chunks(150, 64) + [1] * 40], ids=len)
def test_the_lowest_key_norms_stay(name, sizes):
    model = tiny_model(name, vocab_size=1024)
    run(model, KVCache(model, "knorm", 24, when="every(1)"), distinct_text(190), sizes, Brute(low_norms(), 24))


def test_recent_entries_stay():
    model = tiny_model("llama", vocab_size=1024)
    cache = KVCache(model, "knorm(recent=10)", 24, when="every(1)")
    run(model, cache, distinct_text(130), [100] + [1] * 30, Brute(low_norms(10), 24))
    assert all(row[-10:] == list(range(120, 130)) for row in kept_positions(cache, 0))


def test_rotations_keep_the_norm():
    """A token's key in the first layer depends on nothing but the token and its position."""
    model = tiny_model("llama", vocab_size=1024)
    cache = KVCache(model, "knorm", 200)
    run(model, cache, distinct_text(60).repeat(1, 2), [120])
    scores = cache.parts.scorer.score(View(cache.enforcer.layers[0]))
    torch.testing.assert_close(scores[..., :60], scores[..., 60:])


def test_skipped_layers_keep_everything_and_the_others_what_is_left():
    model, ids = tiny_model("llama", vocab_size=1024, num_hidden_layers=4), distinct_text(120)
    full, cache = KVCache(model, "full"), KVCache(model, "knorm(skip=1)", 40)
    for each in (full, cache):
        run(model, each, ids[:, :100], [100])
    for layer, store in enumerate(full.enforcer.layers):
        norms = View(store).keys[0].norm(dim=-1)
        expected = [sorted(best(-row, 100 if layer == 0 else (40 * 8 - 2 * 100) // 6).tolist()) for row in norms]
        assert kept_positions(cache, layer) == expected
    run(model, cache, ids[:, 100:], [1] * 20)
    assert kept_positions(cache, 0) == [list(range(120))] * 2 and cache.report().kept_entries <= 40 * 8
    with pytest.raises(BudgetError, match=r"keeps 2 of 8 KV heads whole, and 100 tokens .* give at least 26 tokens"):
        run(model, KVCache(model, "knorm(skip=1)", 25), ids[:, :100], [100])
    with pytest.raises(BudgetError, match=r"keeps all 8 KV heads whole.* use full or keep fewer layers"):
        KVCache(model, "knorm(skip=4)", "100%")
