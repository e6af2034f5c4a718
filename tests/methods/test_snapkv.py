"""SnapKV against brute force: the paper's votes after a prefill, running votes from then on."""

import pytest
import torch
from brute import Brute, chunks, kept_positions, run, running_votes
from induction import induction_model

from kvbudget.cache import KVCache
from tiny import random_text, tiny_model


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (8, 1), (4, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("settings", [(16, 5, "avg", "mean"), (16, 7, "max", "max"), (32, 5, "max", "mean")])
def test_one_pass_prefill_then_decode(heads, settings):
    window, kernel, pooling, reduction = settings
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    text = f"snapkv(window={window}, kernel={kernel}, pooling={pooling}, reduction={reduction})"
    cache = KVCache(model, text, 48, when="every(1)")
    run(model, cache, random_text(170), [150] + [1] * 20, Brute(running_votes(*settings), 48))
    assert cache.report().kept == [[[48] * heads[1]]] * 2


@pytest.mark.parametrize("size", [64, 7])
def test_chunked_prefill_keeps_a_running_vote(size):
    model = tiny_model("llama")
    cache = KVCache(model, "snapkv(window=16)", 48, when="every(1)")
    run(model, cache, random_text(150), chunks(130, size) + [1] * 20, Brute(running_votes(16), 48))


def test_slack_evicts_ahead():
    model = tiny_model("llama")
    cache = KVCache(model, "snapkv(window=16)", 128)
    run(model, cache, random_text(235), [200] + [1] * 35, Brute(running_votes(16), 128, every=16))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere", "granite"])
def test_votes_are_those_of_the_models_own_queries(name):
    """Norms on queries, soft caps, interleaved rotations and odd scales: the votes equal the model's eager attention."""
    model, ids = tiny_model(name), random_text(100)
    cache = KVCache(model, "snapkv(window=16, kernel=1)", 200)
    run(model, cache, ids, [100])
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    for layer in cache.enforcer.layers:
        rows = attentions[layer.layer_idx][0, :, -16:].unflatten(0, (layer.num_kv_heads, -1)).mean(1).sum(1)
        held = torch.stack([segment.meta.padded("votes") for segment in layer.main])[0]
        torch.testing.assert_close(held, rows, atol=1e-5, rtol=1e-4)


def test_without_decode_evictions_the_prompt_is_compressed_once():
    model = tiny_model("llama")
    cache = KVCache(model, "snapkv(window=16)", 48, when="after_prefill")
    run(model, cache, random_text(120), [100] + [1] * 20)
    assert cache.report().kept == [[[68, 68]]] * 2
    assert all(row[-36:] == list(range(84, 120)) for row in kept_positions(cache, 0))


def test_what_the_window_asks_for_stays_at_a_sixteenth():
    """The last four tokens repeat those at 37 to 40: one head looks these up, the other what followed them."""
    model = induction_model()
    ids = torch.randperm(124, generator=torch.Generator().manual_seed(0))[None]
    ids = torch.cat([ids, ids[:, 37:41]], dim=1)
    cache = KVCache(model, "snapkv(window=4, kernel=1)", 128 // 16)
    run(model, cache, ids, [128])
    followed, found = kept_positions(cache, 1)
    assert followed[:4] == [38, 39, 40, 41] and found[:4] == [37, 38, 39, 40]
