"""CORM against votes kept by brute force, and the checks of its card."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from brute import Brute, Step, best, chunks, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from tiny import random_text, tiny_model


def unimportant_for(window: int, recent: int, strength: float = 1.0):
    """Keeps what any of the last ``window`` queries found important; the memory holds one more than its position."""

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            steps = torch.arange(step.seen - step.new, step.seen)
            votes = (weights >= strength / (steps + 1)[:, None]).any(0) & (weights > 0).any(0)
            # A query that left the window has no vote, even in the forward that brings both.
            votes &= (steps >= step.seen - window)[:, None]
            last = torch.where(votes, (steps + 1)[:, None], 0).amax(0).double()
            head.memory = torch.maximum(head.memory, last)
            stays = (head.memory - 1 >= step.seen - window) | (head.positions >= step.seen - recent)
            kept.append(stays.nonzero()[:, 0])
        return kept

    return rule


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("sizes", [[100] + [1] * 12, chunks(100, 37) + [1] * 6], ids=len)
def test_entries_leave_when_nobody_wanted_them_for_long(heads, sizes):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "corm(window=12, recent=8, every=1)")
    run(model, cache, random_text(sum(sizes)), sizes, Brute(unimportant_for(12, 8), 0))
    kept = [len(row) for layer in range(2) for row in kept_positions(cache, layer)]
    assert len(set(kept)) > 1 or heads[1] == 1
    assert max(kept) < sum(sizes)


def test_nothing_leaves_before_as_many_queries_have_passed_it_over():
    model, ids = tiny_model("llama"), random_text(120)
    kept = {}
    for text in ("window=121, recent=1", "window=20, recent=1", "window=20, recent=1, strength=0.0"):
        cache = KVCache(model, f"corm({text})")
        run(model, cache, ids, [120])
        kept[text] = cache.report().kept_entries
    wide, narrow, never = kept.values()
    assert wide == never == 480 > narrow


def test_decode_steps_between_two_evictions():
    model = tiny_model("llama")
    cache = KVCache(model, "corm(window=8, recent=4, every=5)")
    run(model, cache, random_text(60), [60])
    sizes = [60]
    for token in random_text(12, seed=3)[0]:
        run(model, cache, token.view(1, 1), [1])
        sizes.append(sum(len(row) for row in kept_positions(cache, 0)))
    # Entries leave with the 65th and the 70th token; each other step adds one to both heads.
    grown = [b - a for a, b in pairwise(sizes[1:])]
    assert [i for i, n in enumerate(grown) if n != 2] in ([3, 8], [3], [8])
    assert min(grown) < 2


def test_the_cache_of_a_repetitive_text_grows_slower_than_the_text():
    model = tiny_model("llama")
    cache = KVCache(model, "corm(window=16, recent=16)")
    text = random_text(8).repeat(1, 60)
    sizes = []
    for begin in range(0, 480, 120):
        run(model, cache, text[:, begin : begin + 120], [120])
        sizes.append(cache.report().kept_entries)
    assert sizes[3] - sizes[2] < 0.75 * 4 * 120


def test_a_budget_caps_it_and_heads_get_what_they_ask_for():
    model, ids = tiny_model("llama"), random_text(200)
    free = KVCache(model, "corm(window=12, recent=8)")
    run(model, free, ids, [200])
    asked = [[len(row) for row in kept_positions(free, layer)] for layer in range(2)]
    cache = KVCache(model, "corm(window=12, recent=8)", 30)
    run(model, cache, ids, [200])
    for layer, wanted in enumerate(asked):
        kept = [len(row) for row in kept_positions(cache, layer)]
        assert sum(kept) == min(60, sum(wanted))
        if sum(wanted) > 60:
            # In proportion, as integers with an exact total.
            assert all(abs(n - 60 * w / sum(wanted)) <= 2 for n, w in zip(kept, wanted, strict=True))
        for few, many in zip(kept_positions(cache, layer), kept_positions(free, layer), strict=True):
            assert set(few) <= set(many)
    assert best(torch.tensor(asked[0]), 1).numel()


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match="corm"):
        KVCache(tiny_model("llama"), "corm(window=0)", 64)


def test_a_budget_below_the_window_is_kept_and_half_of_it_is_recent():
    model, ids = tiny_model("llama"), random_text(200)
    cache = KVCache(model, "corm(window=128)", 40)
    run(model, cache, ids, [200])
    for layer in range(2):
        kept = kept_positions(cache, layer)
        assert sum(len(row) for row in kept) <= 80
        assert all({*range(180, 200)} <= set(row) for row in kept)
        assert any(min(row) < 72 for row in kept), "older ones stay for their votes"
    free = KVCache(model, "corm(window=128)")
    run(model, free, ids, [200])
    assert all({*range(72, 200)} <= set(row) for row in kept_positions(free, 0))
