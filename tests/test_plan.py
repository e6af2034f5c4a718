"""Capacity planning: prices agree with what real caches hold, for every kind of budget and of layer."""

import pytest
import torch

from kvbudget import KVCache
from kvbudget.errors import BudgetError, PolicyError, UnsupportedModel
from kvbudget.models import load_config
from kvbudget.plan import plan
from tiny import random_text, tiny_config, tiny_model


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "qwen3_next"])
def test_the_full_cache_is_priced_as_transformers_holds_it(name):
    from transformers import DynamicCache

    model = tiny_model(name)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(random_text(100), past_key_values=cache)
    held = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None
    )
    assert plan(model.config, 100).full_bytes == held


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize(("budget", "codec"), [("50%", "none"), (96, "none"), ("25%", "4 bits"), ("96KiB", "none")])
def test_what_a_budget_buys_is_what_a_cache_keeps(name, budget, codec):
    length = 400
    model = tiny_model(name)
    bought = next(p for p in plan(model.config, length, budgets=[budget]).purchases if p.codec == codec)
    assert bought.problem is None
    cache = KVCache(model, bought.policy, budget, max_length=length)
    with torch.inference_mode():
        model(random_text(length), past_key_values=cache)
    kept = [n for store in cache.enforcer.layers for row in store.kept() for n in row]
    unit = 32 if codec != "none" else 1
    assert bought.entries - unit < sum(kept) / len(kept) < bought.entries + 1
    assert max(kept) - min(kept) <= unit
    if not str(budget).endswith("KiB"):  # bytes that do not go up evenly are dealt out as single entries
        assert cache.nbytes <= bought.nbytes


def test_the_price_of_entries_is_a_byte_budget_that_buys_them_and_no_byte_too_much():
    model = tiny_model("llama")
    for wanted in plan(model.config, 600, budgets=["30%"]).purchases:
        (again,) = (
            p for p in plan(model.config, 600, budgets=[f"{wanted.nbytes}B"]).purchases if p.codec == wanted.codec
        )
        (less,) = (
            p for p in plan(model.config, 600, budgets=[f"{wanted.nbytes - 1}B"]).purchases if p.codec == wanted.codec
        )
        assert (again.entries, less.entries) == (wanted.entries, wanted.entries - 1)


def test_a_batch_shares_bytes_and_multiplies_prices():
    config = tiny_config("llama")
    one = plan(config, 500, budgets=["64KiB", 100]).purchases[::4]
    three = plan(config, 500, budgets=["192KiB", 100], batch=3).purchases[::4]
    assert [p.entries for p in one] == [p.entries for p in three]
    assert three[1].nbytes == 3 * one[1].nbytes


def test_memory_decides_what_fits():
    table = plan(tiny_config("llama"), 4096, memory="512KiB")
    assert {p.fits for p in table.purchases} == {True, False}
    for p in table.purchases:
        assert p.fits == (p.nbytes <= 512 * 1024)
    assert [p.budget for p in table.purchases[-4:]] == ["512KiB"] * 4
    assert all(p.fits for p in table.purchases[-4:])


def test_what_no_budget_can_shrink_is_counted():
    hybrid, plain = plan(tiny_config("lfm2"), 100), plan(tiny_config("llama"), 100)
    assert hybrid.floor_bytes == 2 * 64 * 3 * 4  # two convolution states of 64 channels and 3 taps, float32
    assert plain.floor_bytes == 0
    assert (hybrid.budgeted_layers, hybrid.other_layers) == (2, 2)
    small = plan(tiny_config("gemma3"), 4096, budgets=["64KiB"]).purchases[0]
    assert (
        small.entries
        < plan(tiny_config("gemma3", layer_types=["full_attention"] * 2), 4096, budgets=["128KiB"]).purchases[0].entries
    )


def test_an_impossible_budget_is_a_row_that_says_what_would_do():
    table = plan(tiny_config("llama"), 4096, budgets=["1KiB", 12], memory="1KiB")
    assert all(p.entries == 0 and p.fits is False and "give at least" in p.problem for p in table.purchases)


def test_a_method_that_holds_the_whole_prompt_cannot_keep_bytes():
    table = plan(tiny_config("llama"), 1000, policy="kvzip", budgets=["25%", "64KiB"])
    assert [p.problem is None for p in table.purchases] == [True] * 4 + [False] * 4
    assert "whole prompt" in table.purchases[-1].problem
    with pytest.raises(PolicyError, match="whole prompt"):
        KVCache(tiny_model("llama"), "kvzip", "64KiB")


def test_bad_questions_are_refused():
    config = tiny_config("llama")
    with pytest.raises(BudgetError, match="must be bytes"):
        plan(config, 100, memory="50%")
    with pytest.raises(BudgetError, match="must be from 1 to"):
        plan(config, 0)
    with pytest.raises(PolicyError, match="did you mean 'snapkv'"):
        plan(config, 100, policy="snapkw")
    with pytest.raises(PolicyError, match="keeps every entry"):
        plan(config, 100, policy="kivi")
    with pytest.raises(PolicyError, match="calibration"):
        plan(config, 100, policy="razor_attention")
    with pytest.raises(UnsupportedModel, match="latent"):
        plan(tiny_config("deepseek_v3"), 100)


@pytest.mark.model
def test_a_packaged_model_is_planned_without_its_weights():
    table = plan(load_config("smollm2-135m"), 4096)
    assert table.full_bytes == 30 * 2 * 3 * 64 * 4 * 4096  # layers, K and V, heads, dimensions, bytes, tokens
    assert table.max_positions == 8192
