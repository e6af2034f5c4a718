"""Elastic Cache: the merged prompt from eager attention, and what the answer pushes out."""

import pytest
import torch
from brute import best, kept_positions, run

from kvbudget.cache import KVCache
from tiny import random_text, tiny_model

LENGTH, BUDGET = 120, 60


def test_the_prompt_is_merged_into_its_anchors():
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(LENGTH)
    cache = KVCache(model, "elastic_cache", BUDGET)
    recorded = {}
    attend = cache.attend
    cache.attend = lambda index, call, *args: recorded.update({"call": call}) or attend(index, call, *args)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    plain = tiny_model("llama", num_hidden_layers=1)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        score = plain(ids, output_attentions=True).attentions[0][0].sum(1).mean(0).tolist()
    score = torch.tensor(score)
    score[0] = score[-1] = float("inf")
    kept = best(score, BUDGET).sort().values.tolist()
    assert kept_positions(cache, 0) == [kept, kept]
    groups: dict[int, list[int]] = {at: [] for at in kept}
    for i in range(LENGTH):
        if i not in groups:
            groups[min(kept[1:], key=lambda at, i=i: (abs(at - i), at))].append(i)
    for stored, full in ((cache.enforcer.layers[0].main[0].keys(), recorded["call"].key[0]),):
        for h in range(2):
            for slot, at in enumerate(kept):
                expected = full[h, [at, *groups[at]]].mean(0)
                torch.testing.assert_close(stored[h, slot], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("distance", [25, 5])
def test_decoding_keeps_the_head_of_the_prompt_and_the_newest_tokens(distance):
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(LENGTH + 50)
    cache = KVCache(model, f"elastic_cache(distance={distance})", BUDGET, when="every(1)")
    run(model, cache, ids[:, :LENGTH], [LENGTH])
    prompt = kept_positions(cache, 0)[0]
    values = cache.enforcer.layers[0].main[0].values().clone()
    for i in range(50):
        with torch.inference_mode():
            model(ids[:, LENGTH + i : LENGTH + i + 1], past_key_values=cache)
    after = kept_positions(cache, 0)[0]
    slot = BUDGET - distance
    # What is behind the slot leaves from the oldest on, and nothing is merged any more.
    rest = (prompt[slot:] + list(range(LENGTH, LENGTH + 50)))[-distance:]
    assert after == prompt[:slot] + rest
    assert cache.enforcer.layers[0].main[0].values()[:, :slot].equal(values[:, :slot])


def test_another_turn_is_a_prompt_again():
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(200)
    cache = KVCache(model, "elastic_cache", BUDGET)
    run(model, cache, ids, [100] + [1] * 30 + [70])
    slot = cache.enforcer.layers[0].statistics["slot"]
    assert slot.eq(0).all() and len(kept_positions(cache, 0)[0]) == BUDGET
