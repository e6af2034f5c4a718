"""CAKE against brute force: preferences and scores from the window, exact shares, a cascade that loses nothing."""

import itertools

import pytest
import torch
from brute import Brute, best, chunks, kept_positions, run
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool1d

from kvbudget.budget import solve
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from tiny import random_text, tiny_model

WINDOW = 16


def window_attention(model, ids):
    """Per layer, the softmax rows of the last queries on the entries before the window: ``[Hkv, G, W, T - W]``."""
    plain = tiny_model("llama", **MODEL)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = plain(ids, output_attentions=True).attentions
    return [a[0].double().unflatten(0, (2, -1))[:, :, -WINDOW:, :-WINDOW] for a in attentions]


MODEL = {"num_hidden_layers": 4}


def preference(rows, tau1=1.0, tau2=1.0):
    entropy = -(rows * torch.log(rows + 1e-10)).sum().item()
    return entropy ** (1 / tau1) * rows.var(dim=2, unbiased=True).sum().item() ** (1 / tau2)


def scores(rows, gamma):
    raw = rows.mean(2) + gamma * rows.var(dim=2, unbiased=True)
    return avg_pool1d(raw, 5, stride=1, padding=2).mean(1)


@pytest.mark.parametrize(("tau1", "tau2", "gamma"), [(1.0, 1.0, 200.0), (1.6, 0.4, 200.0), (0.9, 2.3, 0.0)])
@pytest.mark.parametrize("budget", [40, 100])
def test_cascade_equals_one_allocation_at_the_end(tau1, tau2, gamma, budget):
    """Shares by water-filling over all layers at once, then each head's best: what the cascade must end with."""
    model, ids = tiny_model("llama", **MODEL), random_text(180)
    cache = KVCache(model, f"cake(window={WINDOW}, gamma={gamma}, tau1={tau1}, tau2={tau2})", budget)
    run(model, cache, ids, [180])
    rows = window_attention(model, ids)
    weights = [preference(r, tau1, tau2) for r in rows]
    shares = solve((budget - WINDOW) * 4, weights, 1, 180 - WINDOW)
    assert sum(shares) == (budget - WINDOW) * 4
    for layer, share in enumerate(shares):
        for head, judged in zip(kept_positions(cache, layer), scores(rows[layer], gamma), strict=True):
            expected = best(judged, share).sort().values.tolist() + list(range(180 - WINDOW, 180))
            assert head == expected, f"layer {layer}"


def test_earlier_layers_shrink_as_later_ones_arrive():
    model, ids = tiny_model("llama", **MODEL), random_text(180)
    cache = KVCache(model, f"cake(window={WINDOW})", 60)
    held = []
    attend = cache.attend

    def watched(*args):
        out = attend(*args)
        held.append([sum(store.kept()[0]) if store.seen else 0 for store in cache.enforcer.layers])
        return out

    cache.attend = watched
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    # The layers so far share the whole budget, so the peak is the budget and not all layers' prompts.
    assert all(sum(entries) <= 60 * 4 * 2 for entries in held)
    assert sum(held[-1]) == 60 * 4 * 2
    for before, after in itertools.pairwise(held):
        assert all(b >= a for b, a in zip(before, after, strict=True) if b)


@given(
    preferences=st.lists(st.floats(0, 1e6), min_size=2, max_size=32),
    budget=st.integers(2, 400),
    length=st.integers(2, 1000),
)
def test_shares_only_shrink_in_a_cascade(preferences, budget, length):
    total, last = budget * len(preferences), None
    for layers in range(1, len(preferences) + 1):
        # Every layer that has arrived also holds a window, here of one entry.
        shares = solve(max(total - layers, layers), preferences[:layers], 1, max(length - 1, 1))
        assert last is None or all(new <= old for new, old in zip(shares, last, strict=False))
        last = shares


def test_large_temperatures_are_uniform():
    model = tiny_model("llama", **MODEL)
    cache = KVCache(model, "cake(window=16, tau1=1e9, tau2=1e9)", 60)
    run(model, cache, random_text(150), [150])
    assert cache.report().kept == [[[60, 60]]] * 4


def test_without_variance_the_order_is_that_of_snapkv():
    model, ids = tiny_model("llama"), random_text(150)
    cake = KVCache(model, "cake(window=16, gamma=0.0, tau1=1e9, tau2=1e9)", 50)
    snap = KVCache(model, "snapkv(window=16)", 50)
    run(model, cake, ids, [150])
    run(model, snap, ids, [150])
    assert [kept_positions(cake, layer) for layer in range(2)] == [kept_positions(snap, layer) for layer in range(2)]


def test_decode_judges_by_the_newest_query():
    model, ids = tiny_model("llama"), random_text(160)

    def rule(step, limit):
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            count = min(step.new, WINDOW)
            older = head.positions < step.seen - WINDOW
            rows = weights[:, -count:, older]
            raw = rows.mean(1)
            if count > 1:
                raw = raw + 200 * rows.var(dim=1, unbiased=True)
            judged = torch.full_like(head.memory, float("inf"))
            judged[older] = avg_pool1d(raw.mean(0)[None], 5, stride=1, padding=2)[0]
            kept.append(best(judged, limit))
        return kept

    cache = KVCache(model, f"cake(window={WINDOW})", 50, when="every(1)")
    run(model, cache, ids[:, :120], [120])
    limits = [kept[0][0] for kept in cache.report().kept]
    assert sum(limits) == 100 and limits[0] != limits[1]
    again = KVCache(model, f"cake(window={WINDOW})", 50, when="every(1)")
    run(model, again, ids, [120] + [1] * 40, Brute(rule, limits))


def test_chunks_move_the_preference_and_keep_the_total():
    model = tiny_model("llama", **MODEL)
    for size in (64, 7, 1):
        cache = KVCache(model, f"cake(window={WINDOW})", 40, when="every(1)")
        run(model, cache, random_text(120 if size > 1 else 50), chunks(120 if size > 1 else 50, size))
        kept = [layer[0][0] for layer in cache.report().kept]
        assert sum(kept) <= 160
        assert min(kept) > WINDOW
        measured = [row[0] for row in cache.enforcer.measured]
        assert (measured == [None] * 4) == (size == 1)


def test_a_layer_without_variation_keeps_its_window():
    """Zero queries attend evenly and equally: no variance, hence the least share, and no division by zero."""
    model = tiny_model("llama", **MODEL)
    model.model.layers[2].self_attn.q_proj.weight.zero_()
    cache = KVCache(model, "cake(window=16)", 40)
    run(model, cache, random_text(170), [150] + [1] * 20)
    kept = [layer[0][0] for layer in cache.report().kept]
    assert kept[2] == 17 and sum(kept) <= 160


def test_temperatures_must_be_positive():
    with pytest.raises(PolicyError, match="tau2=0"):
        KVCache(tiny_model("llama"), "cake(tau2=0)", 64)
