"""ShotKV: whole shots against brute force, what always stays, and the frozen prompt."""

import pytest
import torch
from brute import kept_positions

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from tiny import random_text, tiny_model

SHOTS = ((10, 30), (30, 42), (42, 75), (75, 80), (85, 110))


def layer_votes(model, ids, window):
    """Attention per token of the last queries, summed over them and averaged over heads: ``[L, T]``."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    return torch.stack([a[0, :, -window:].double().sum(1).mean(0) for a in attentions])


@pytest.mark.parametrize("budget", [80, 120, 150])
def test_whole_shots_in_order_of_their_mean(budget):
    model, ids = tiny_model("llama"), random_text(140)
    cache = KVCache(model, f"shotkv(shots={SHOTS}, window=8)", budget)
    cache.prefill(model, ids)
    outside = [p for p in range(140) if not any(begin <= p < end for begin, end in SHOTS)]
    for layer, votes in enumerate(layer_votes(model, ids, 8)):
        kept, room = list(outside), budget // 2 - len(outside)
        for begin, end in sorted(SHOTS, key=lambda shot: -votes[shot[0] : shot[1]].mean()):
            if end - begin <= room:
                kept, room = kept + list(range(begin, end)), room - (end - begin)
        expected = sorted(kept) if room >= 0 else sorted(outside)[: budget // 2 - 8] + list(range(132, 140))
        assert kept_positions(cache, layer) == [expected] * 2


def test_one_token_shots_are_a_token_selection_of_the_layer():
    model, ids = tiny_model("llama"), random_text(100)
    cache = KVCache(model, "shotkv(size=1, window=8)", 60)
    cache.prefill(model, ids)
    for layer, votes in enumerate(layer_votes(model, ids, 8)):
        best = votes[:92].argsort(descending=True)[:22].tolist()
        assert kept_positions(cache, layer) == [sorted(best) + list(range(92, 100))] * 2


def test_the_prompt_is_frozen_and_the_answer_keeps_what_is_attended_to():
    model, ids = tiny_model("llama"), random_text(140)
    cache = KVCache(model, f"shotkv(shots={SHOTS}, window=8)", 100)
    cache.prefill(model, ids)
    prompt = [kept_positions(cache, layer)[0] for layer in range(2)]
    with torch.inference_mode():
        for token in random_text(100, seed=1)[0]:
            model(token.view(1, 1), past_key_values=cache)
            cache.check_integrity()
    for layer in range(2):
        one, other = kept_positions(cache, layer)
        assert one == other and one[: len(prompt[layer])] == prompt[layer] and len(one) <= 100
        assert one[-8:] == list(range(232, 240)) and len(one) - len(prompt[layer]) > 30


@pytest.mark.parametrize("shots", ["((5, 5),)", "((0, 9), (8, 12))", "(1, 2, 3)"])
def test_shots_are_disjoint_ranges(shots):
    with pytest.raises(PolicyError, match="shots"):
        KVCache(tiny_model("llama"), f"shotkv(shots={shots})", 100)
