"""StreamingLLM in both position modes."""

import pytest
import torch
from brute import Brute, chunks, kept_positions, run
from transformers import DynamicCache

from kvbudget.cache import KVCache
from tiny import random_text, tiny_model


def sinks_and_newest(step, limit):
    kept = []
    for head in step.heads:
        index = torch.arange(len(head.positions))
        kept.append(torch.cat([index[:4], index[4:][-(limit - 4) :]]))
    return kept


@pytest.mark.parametrize("sizes", [[150] + [1] * 40, chunks(150, 64) + [1] * 40, [7] * 20], ids=len)
def test_sinks_and_newest_entries_stay(sizes):
    model = tiny_model("llama")
    cache = KVCache(model, "streaming_llm", 24, when="every(1)")
    run(model, cache, random_text(sum(sizes)), sizes, Brute(sinks_and_newest, 24))
    seen = sum(sizes)
    assert kept_positions(cache, 1) == [[0, 1, 2, 3, *range(seen - 20, seen)]] * 2


def rotated(model, keys, delta):
    """Keys ``[..., D]`` turned by ``delta`` positions with the model's own frequencies (halves rotated, as in Llama)."""
    angle = delta * model.model.rotary_emb.inv_freq.double()
    cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
    first, second = keys.double().chunk(2, dim=-1)
    return (keys.double() * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)


@torch.inference_mode()
def renumbered(model, ids, size, sinks, steps):
    """The paper's cache: after each step the keys behind the gap are turned back, and positions count cached entries."""
    cache, logits, begin = DynamicCache(config=model.config), [], 0
    for n in steps:
        held = cache.get_seq_length()
        positions = torch.arange(held, held + n)[None]
        out = model(ids[:, begin : begin + n], past_key_values=cache, position_ids=positions)
        logits.append(out.logits)
        begin += n
        gap = cache.get_seq_length() - size
        if gap <= 0:
            continue
        for layer in cache.layers:
            moved = rotated(model, layer.keys[:, :, sinks + gap :], -gap)
            layer.keys = torch.cat([layer.keys[:, :, :sinks], moved], dim=2)
            layer.values = torch.cat([layer.values[:, :, :sinks], layer.values[:, :, sinks + gap :]], dim=2)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("steps", [[100] + [1] * 50, [30, 30, 30] + [5] * 6 + [1] * 10], ids=len)
def test_positions_inside_the_cache_equal_turned_keys(steps):
    model, ids = tiny_model("llama"), random_text(sum(steps))
    expected = renumbered(model, ids, 24, 4, steps)
    cache = KVCache(model, "streaming_llm(positions=cache)", 24, when="every(1)")
    logits = run(model, cache, ids, steps)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    plain = run(model, KVCache(model, "streaming_llm", 24, when="every(1)"), ids, steps)
    assert (plain[:, -1] - expected[:, -1]).abs().max() > 1e-2, "the two position modes cannot be told apart here"


def test_positions_inside_a_cache_that_holds_everything_are_the_texts():
    model, ids = tiny_model("llama"), random_text(60)
    logits = run(model, KVCache(model, "streaming_llm(positions=cache)", 64), ids, [50] + [1] * 10)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


def test_no_sinks_is_a_sliding_window():
    model = tiny_model("llama")
    cache = KVCache(model, "streaming_llm(sinks=0)", 24, when="every(1)")
    run(model, cache, random_text(90), [60] + [1] * 30)
    assert kept_positions(cache, 0) == [list(range(66, 90))] * 2
