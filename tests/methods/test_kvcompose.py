"""KVCompose against the model's own eager attention: scores, slots that layers compete for, rectangles."""

import pytest
import torch
from brute import kept_positions

from kvbudget.cache import KVCache
from kvbudget.policy import judging
from tiny import left_padded, random_text, tiny_model


def scores_from_eager(model, ids, heads):
    """Scores ``[L, Hkv, T]`` of a second reading of ``ids [1, T]`` after the first."""
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    with torch.inference_mode():
        attentions = model(torch.cat([ids, ids], dim=1), output_attentions=True).attentions
    rows = torch.stack([a[0, :, length:, :length].double() for a in attentions])
    found = rows.amax(2).unflatten(1, (heads, -1)).mean(2)
    return found + found.mean(1, keepdim=True)


def composed(scores, total):
    """Kept positions ``[layer][head]`` when ``total`` slots are dealt out."""
    slots = scores.sort(-1, descending=True).values.mean(1)
    slots[0] = slots.amax(0)
    chosen = torch.zeros(slots.numel(), dtype=torch.bool)
    chosen[slots.flatten().argsort(descending=True)[:total]] = True
    counts = chosen.view(slots.shape).sum(1).tolist()
    return [
        [sorted(row.argsort(descending=True)[:n].tolist()) for row in layer]
        for layer, n in zip(scores, counts, strict=True)
    ]


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (4, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("block", [2**18, 1000])
def test_slots_compete_over_layers(heads, block, monkeypatch):
    monkeypatch.setattr(judging, "BLOCK", block)
    model = tiny_model("llama", num_hidden_layers=3, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    ids = random_text(110)
    cache = KVCache(model, "kvcompose", "30%")
    cache.prefill(model, ids)
    cache.check_integrity()
    kept = [kept_positions(cache, layer) for layer in range(3)]
    assert kept == composed(scores_from_eager(model, ids, heads[1]), 33 * 3)
    sizes = [{len(row) for row in layer} for layer in kept]
    assert all(len(size) == 1 for size in sizes) and sum(map(max, sizes)) == 99
    assert max(sizes[0]) == max(map(max, sizes))


def test_nothing_remains_of_the_second_reading():
    model, ids = tiny_model("llama"), random_text(90)
    cache, plain = KVCache(model, "kvcompose", "100%"), KVCache(model, "full")
    assert torch.equal(cache.prefill(model, ids), plain.prefill(model, ids))
    with torch.inference_mode():
        steps = [model(ids[:, :1], past_key_values=c).logits for c in (cache, plain)]
    assert torch.equal(*steps) and cache.seen == [91]


def test_padding_and_a_second_turn():
    model, texts = tiny_model("llama"), [random_text(100, seed=1), random_text(57, seed=2)]
    ids, mask = left_padded(texts)
    batch = KVCache(model, "kvcompose", "40%")
    batch.prefill(model, ids, attention_mask=mask)
    for b, text in enumerate(texts):
        single = KVCache(model, "kvcompose", "40%")
        single.prefill(model, text)
        assert [kept_positions(batch, i, b) for i in range(2)] == [kept_positions(single, i) for i in range(2)]
    turn = torch.cat([texts[0], random_text(50, seed=3)], dim=1)
    single = KVCache(model, "kvcompose", "40%")
    single.prefill(model, texts[0])
    single.prefill(model, turn)
    single.check_integrity()
    assert single.report().kept_entries == 60 * 4


def test_one_compressed_context_serves_several_questions():
    model, ids = tiny_model("llama"), random_text(120)
    base = KVCache(model, "kvcompose", "40%")
    base.prefill(model, ids)
    for seed in (1, 2):
        asked = torch.cat([ids, random_text(6, seed=seed)], dim=1)
        own = KVCache(model, "kvcompose", "40%")
        own.prefill(model, ids)
        answers = [
            model.generate(asked, past_key_values=c, max_new_tokens=6, do_sample=False) for c in (base.fork(), own)
        ]
        assert torch.equal(*answers)
    assert base.seen == [120]
