"""PyramidInfer against a plain simulation of thinned layers, and the attention that it saves."""

import math

import pytest
import torch
from brute import best, kept_positions

from kvbudget.budget import solve
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods.pyramidinfer import CosineDecay
from kvbudget.policy.view import View
from tiny import random_text, tiny_model

LAYERS, WINDOW, LENGTH, BUDGET = 4, 8, 130, 40


def watched(model, cache, ids):
    """Runs one forward; calls as the model makes them, with the answers of each layer."""
    calls, attend = [], cache.attend

    def recorded(index, call, *args):
        before = (call.query, call.key, call.value, call.scale)
        out = attend(index, call, *args)
        calls.append((*before, out))
        return out

    cache.attend = recorded
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache).logits
    del cache.attend
    return calls, logits


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_each_layer_attends_to_what_the_one_below_has_kept(decay):
    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), random_text(LENGTH)
    cache = KVCache(model, f"pyramidinfer(window={WINDOW}, decay={decay}, sinks=2)", BUDGET)
    calls, _ = watched(model, cache, ids)
    rates = [(1 - decay) * (math.cos(math.pi * i / LAYERS) + 1) / 2 + decay for i in range(LAYERS)]
    weights = [math.prod(rates[:i]) for i in range(LAYERS)]
    shares = [WINDOW + 2 + n for n in solve((BUDGET - WINDOW - 2) * LAYERS, weights, 1)]
    alive = torch.arange(LENGTH)
    for layer, (query, key, value, scale, out) in enumerate(calls):
        query, key, value = (x[0][:, alive].double() for x in (query, key, value))
        logits = query.unflatten(0, (2, -1)) @ key[:, None].mT * scale
        causal = torch.ones(len(alive), len(alive), dtype=torch.bool).tril()
        attention = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        expected = (attention @ value[:, None]).flatten(0, 1)
        torch.testing.assert_close(out[0][:, alive].double(), expected, atol=1e-5, rtol=1e-4)
        dropped = [i for i in range(LENGTH) if i not in alive.tolist()]
        assert out[0][:, dropped].eq(0).all()
        votes = (attention[:, :, -WINDOW:] * torch.linspace(1, 1.2, WINDOW)[:, None]).sum(2).mean((0, 1))
        votes[(alive < 2) | (alive >= LENGTH - WINDOW)] = float("inf")
        alive = alive[best(votes, shares[layer]).sort().values]
        assert kept_positions(cache, layer) == [alive.tolist()] * 2
    assert sum(shares) == BUDGET * LAYERS and (len(set(shares)) == 1) == (decay == 1.0)


@pytest.mark.parametrize("policy", ["pyramidinfer(window=8, decay=0.5)", "h2o+pyramidinfer(window=8)"])
def test_chunks_thin_their_own_tokens_and_positions_stay_true(policy):
    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), random_text(170)
    cache = KVCache(model, policy, BUDGET)
    begin, before = 0, [set() for _ in range(LAYERS)]
    for size in (90, 40, 1, 1, 38):
        with torch.inference_mode():
            model(ids[:, begin : begin + size], past_key_values=cache)
        begin += size
        cache.check_integrity()
        assert all(store.seen == [begin] for store in cache.enforcer.layers)
        held = [set(kept_positions(cache, layer)[0]) for layer in range(LAYERS)]
        for layer in range(1, LAYERS):
            fresh = {p for p in held[layer] - before[layer] if p >= begin - size}
            assert size == 1 or fresh <= held[layer - 1], "a layer kept a token that the one below has dropped"
        before = held


def test_attention_over_the_prompt_really_falls():
    """Pairs of a query and a key of the prompt that are computed, against the same budget without thinning."""
    from kvbudget.kernels import flash

    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), random_text(400)
    original, pairs = flash.causal_grid_attend, []

    def counted(query, key, value, **options):
        pairs.append(query.shape[-2] * key.shape[-2])
        return original(query, key, value, **options)

    totals = {}
    for policy in ("pyramidinfer(window=8)", "snapkv(window=8)+pyramidkv"):
        pairs.clear()
        flash.causal_grid_attend = counted
        try:
            with torch.inference_mode():
                model(ids, past_key_values=KVCache(model, policy, 100))
        finally:
            flash.causal_grid_attend = original
        totals[policy] = list(pairs)
    thin, whole = totals.values()
    assert whole == [400 * 400] * LAYERS
    assert thin[0] == 400 * 400 and all(pair <= 110**2 for pair in thin[1:]) and thin == sorted(thin, reverse=True)


def test_scores_are_those_of_true_positions_after_gaps():
    """Accumulated attention over survivors only: their sums are the number of surviving queries."""
    model, ids = tiny_model("llama", num_hidden_layers=2), random_text(120)
    cache = KVCache(model, "h2o+pyramidinfer(window=8)", 60)
    sums = []
    settle = cache.enforcer.settle
    cache.enforcer.settle = lambda layer, view, *a: (
        sums.append(view.state("received").sum(-1)) or settle(layer, view, *a)
    )
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    survivors = len(kept_positions(cache, 0)[0])
    torch.testing.assert_close(sums[0], torch.full((1, 2), 120.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(sums[1], torch.full((1, 2), float(survivors)), atol=1e-3, rtol=0)
    assert View(cache.enforcer.layers[1]).seen == [120]


def test_the_schedule_and_what_is_refused():
    assert CosineDecay(1.0).weights([None] * 5, 10.0, 1.0) == [1.0] * 5
    weights = CosineDecay(0.9).weights([None] * 30, 10.0, 1.0)
    assert weights == sorted(weights, reverse=True) and weights[1] == 1.0 and 0.15 < weights[-1] < 0.3
    with pytest.raises(PolicyError, match="sliding windows or recurrent"):
        KVCache(tiny_model("gemma2"), "pyramidinfer", 80)
    with pytest.raises(PolicyError, match="same entries in all heads"):
        KVCache(tiny_model("llama"), "snapkv+adakv+pyramidinfer", 80)
    with pytest.raises(PolicyError, match=r"decay=1\.5"):
        KVCache(tiny_model("llama"), "pyramidinfer(decay=1.5)", 80)


def test_queries_that_come_alone_weigh_as_the_newest_of_a_window():
    model, ids, votes = tiny_model("llama"), random_text(103), []
    for quick in (True, False):
        cache = KVCache(model, f"pyramidinfer(window={WINDOW})", 95)
        if not quick:
            for layer in cache.layers:
                layer.store._step = lambda call, add: None
        with torch.inference_mode():
            for begin, end in ((0, 100), (100, 101), (101, 102), (102, 103)):
                model(ids[:, begin:end], past_key_values=cache)
        votes.append([View(layer.store).state("votes") for layer in cache.layers])
    for a, b in zip(*votes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
