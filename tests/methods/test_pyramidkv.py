"""PyramidKV: the checks of its card, with exact totals."""

import pytest
import torch
from brute import Brute, kept_positions, run, running_votes

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.costs import EntryCost
from kvbudget.enforcer import Enforcer
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from tiny import random_text, tiny_model


def selected(capacity: int, length: int, *, layers: int = 32, window: int = 8, beta: float = 20) -> list[int]:
    """Entries per layer beyond the window that the policy deals out for a prompt of ``length`` tokens."""
    policy = parse(f"snapkv(window={window})+pyramidkv(beta={beta})")
    stores = [LayerCache(index, 2) for index in range(layers)]
    for store in stores:
        store.start(1)
        store.seen = [length]
    enforcer = Enforcer(str(policy), policy.parts(), Budget.parse(capacity), stores, EntryCost(1.0))
    return [share // 2 - window for share in enforcer.shares(0)]


@pytest.mark.parametrize(("capacity", "published"), [(64, 2032), (128, 4016), (256, 8048), (512, 16576)])
def test_totals_are_exact_where_the_published_steps_overshoot(capacity, published):
    base = capacity - 8
    low, high = base // 20, 2 * base - base // 20
    step = (high - low) // 31
    assert sum(high - layer * step for layer in range(32)) == published

    counts = selected(capacity, 8000)
    assert sum(counts) == 32 * base < published
    exact_low, exact_high = base / 20, 2 * base - base / 20
    ramp = [exact_high - layer * (exact_high - exact_low) / 31 for layer in range(32)]
    assert all(abs(n - real) < 1 for n, real in zip(counts, ramp, strict=True))
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1


@pytest.mark.parametrize("length", [100, 130, 200, 400])
def test_short_prompts_cap_the_lower_layers_and_the_others_get_their_excess(length):
    counts = selected(100, length)
    assert sum(counts) == 32 * (min(100, length) - 8)
    assert counts == sorted(counts, reverse=True) and counts[0] <= length - 8


def test_beta_of_one_is_uniform():
    assert selected(100, 4000, beta=1.0) == [92] * 32
    with pytest.raises(PolicyError, match=r"beta=0\.5"):
        parse("pyramidkv(beta=0.5)")


def test_one_layer_gets_everything():
    assert selected(100, 4000, layers=1) == [92]


def test_selection_inside_a_layer_is_that_of_the_scorer():
    model = tiny_model("llama", num_hidden_layers=3)
    cache = KVCache(model, "pyramidkv+snapkv(window=16)", 50, when="every(1)")
    limits = [16 + n for n in selected(50, 150, layers=3, window=16)]
    run(model, cache, random_text(170), [150] + [1] * 20, Brute(running_votes(16), limits))
    assert [layer[0][0] for layer in cache.report().kept] == limits and len(set(limits)) == 3


def test_a_prompt_below_the_budget_is_untouched():
    model, ids = tiny_model("llama"), random_text(90)
    cache = KVCache(model, "pyramidkv", 100)
    with torch.inference_mode():
        torch.testing.assert_close(run(model, cache, ids, [90]), model(ids).logits, atol=0, rtol=0)
    assert kept_positions(cache, 1) == [list(range(90))] * 2
