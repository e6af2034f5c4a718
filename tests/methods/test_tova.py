"""TOVA against brute force, and the checks of its card."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, chunks, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from tiny import random_text, tiny_model


def least_attended_leaves(step: Step, limit: int) -> Sequence[Tensor]:
    newest = torch.cat([weights[:, -1] for weights in step.weights])
    return [best(newest.mean(0), limit)] * len(step.heads)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((4, 2), [150] + [1] * 40),
        ((3, 1), chunks(150, 64) + [1] * 20),
        ((8, 1), [150] + [1] * 20),
        ((4, 4), [7] * 15 + [1] * 20),
    ],
    ids=["one pass", "chunks of 64", "one pass of 8 queries", "chunks of 7, MHA"],
)
def test_kept_entries_are_those_that_the_newest_query_attends_to(heads, sizes):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "tova", 24)
    run(model, cache, random_text(sum(sizes)), sizes, Brute(least_attended_leaves, 24))
    assert cache.report().kept == [[[24] * heads[1]]] * 2


def test_one_entry_leaves_per_step_from_all_heads_alike():
    model, ids = tiny_model("llama"), random_text(100)
    cache = KVCache(model, "tova", 30)
    run(model, cache, ids[:, :80], [80])
    for step in range(80, 100):
        before = set(kept_positions(cache, 1)[0])
        run(model, cache, ids[:, step : step + 1], [1])
        rows = kept_positions(cache, 1)
        assert rows[0] == rows[1]
        assert len((before | {step}) - set(rows[0])) == 1


def test_an_allocator_over_heads_is_refused():
    with pytest.raises(PolicyError, match=r"tova keeps the same entries in all heads.*adakv"):
        KVCache(tiny_model("llama"), "tova+adakv", 64)
