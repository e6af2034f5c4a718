"""H2O against running sums kept by brute force, and the checks of its card."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, chunks, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.scorers.received import AccumulatedAttention
from kvbudget.policy.view import Queries, View
from tiny import random_text, tiny_model


def heavy_hitters(recent_share: float = 0.5):
    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            head.memory = head.memory + weights.sum(1).mean(0)
            recent = int(limit * recent_share)
            scores = head.memory.clone()
            scores[len(scores) - recent :] = float("inf")
            kept.append(best(scores, limit))
        return kept

    return rule


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
def test_kept_entries_follow_the_running_sums(heads, sizes):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "h2o(every=1)", 40)
    run(model, cache, random_text(sum(sizes)), sizes, Brute(heavy_hitters(), 40))
    assert cache.report().kept == [[[40] * heads[1]]] * 2


def test_amortized_evictions_take_the_same_sums():
    model = tiny_model("llama")
    cache = KVCache(model, "h2o(recent_share=0.25, every=8)", 96)
    run(model, cache, random_text(260), [200] + [1] * 60, Brute(heavy_hitters(0.25), 96, every=8))


def test_sums_count_the_processed_queries():
    model = tiny_model("llama")
    cache = KVCache(model, "h2o", 1000)
    run(model, cache, random_text(90), [50, 1, 39])
    for layer in cache.enforcer.layers:
        torch.testing.assert_close(View(layer).state("received").sum(-1), torch.full((1, 2), 90.0))


def test_three_tokens_by_hand():
    layer = LayerCache(0, 1, states=("received",))
    call = AttentionCall(torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), scale=1.0)
    _, lse = layer.forward(call)
    view = View(layer, Queries(call.query, lse, 1.0))
    AccumulatedAttention().observe(view)
    # Zero queries attend evenly: rows (1), (1/2, 1/2), (1/3, 1/3, 1/3).
    expected = torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])
    torch.testing.assert_close(AccumulatedAttention().score(view)[0, 0], expected)


def test_all_recent_is_a_local_window():
    model, ids = tiny_model("llama"), random_text(120)
    cache, window = KVCache(model, "h2o(recent_share=1.0)", 32), KVCache(model, "streaming_llm(sinks=0)", 32)
    torch.testing.assert_close(run(model, cache, ids, [100] + [1] * 20), run(model, window, ids, [100] + [1] * 20))
    assert kept_positions(cache, 1) == kept_positions(window, 1)


@pytest.mark.parametrize("text", ["h2o(recent_share=1.5)", "h2o(every=0)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="h2o"):
        KVCache(tiny_model("llama"), text, 64)
