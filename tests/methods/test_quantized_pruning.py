"""Quantized pruning: the same bytes whatever the bits, and the plain pruner at 16."""

import pytest
import torch
from brute import run

from kvbudget.cache import KVCache
from tiny import random_text, tiny_model


def test_the_same_bytes_buy_more_entries_of_fewer_bits():
    model, ids = tiny_model("llama", head_dim=64), random_text(900)
    kept = {}
    for bits in (16, 8, 4, 2):
        cache = KVCache(model, f"quantized_pruning(bits={bits}, residual=8)+snapkv(window=16)", "120KiB")
        run(model, cache, ids, [600, 290, *[1] * 10])
        assert 0.93 * 120 * 1024 < cache.nbytes <= 120 * 1024
        kept[bits] = cache.report().kept_entries
        cost = cache.enforcer.cost
        # Codes with scale and zero per 64 channels, position and vote.
        assert cost.per_entry == 2 * (64 * bits / 8 + 4 * (bits < 16)) * (2 if bits == 16 else 1) + 8
    assert kept[2] > kept[4] > kept[8] > kept[16] and kept[4] > 3 * kept[16]


def test_sixteen_bits_are_the_plain_pruner():
    model, ids = tiny_model("llama"), random_text(200)
    plain, coded = (
        run(model, KVCache(model, policy, 64), ids, [180, *[1] * 20])
        for policy in ("snapkv", "quantized_pruning(bits=16)")
    )
    torch.testing.assert_close(plain, coded, atol=0, rtol=0)


@pytest.mark.parametrize("scorer", ["h2o", "streaming_llm"])
def test_any_scorer_chooses(scorer):
    cache = KVCache(tiny_model("llama"), f"{scorer}+quantized_pruning", 64)
    assert type(cache.parts.scorer) is type(KVCache(tiny_model("llama"), scorer, 64).parts.scorer)
