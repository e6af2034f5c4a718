"""LaCache: the ladder over layers, what all layers hold together, and positions inside of the cache."""

import pytest
import torch
from brute import kept_positions

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from tiny import random_text, tiny_model


def ladder(length, count, layer, before, after, sinks, recent):
    """Kept positions when one entry after the other leaves: the oldest of those that the lowest pass of the ladder takes."""
    fate = {}
    left, step = list(range(sinks, length)), 0
    first = layer % (before - after + 1)
    while left and step < 100:
        stay = [p for i, p in enumerate(left) if first <= i % before < first + after]
        fate |= {p: step for p in left if p not in stay}
        left, step = stay, step + 1
    order = sorted(range(sinks, length - recent), key=lambda p: (fate.get(p, 100), p))
    gone = set(order[: length - count])
    return [p for p in range(length) if p not in gone]


@pytest.mark.parametrize("rung", [(2, 1), (7, 2), (5, 3)])
@pytest.mark.parametrize("budget", [90, 60, 25])
def test_rungs_leave_from_old_to_new(rung, budget):
    model, before, after = tiny_model("llama", num_hidden_layers=3), *rung
    cache = KVCache(model, f"lacache(before={before}, after={after}, sinks=3, recent_share=0.4)", budget)
    cache.prefill(model, random_text(120))
    for layer in range(3):
        expected = ladder(120, budget, layer, before, after, 3, int(budget * 0.4))
        assert kept_positions(cache, layer) == [expected] * 2


def test_all_layers_together_hold_a_whole_rung():
    model = tiny_model("llama", num_hidden_layers=6)
    cache = KVCache(model, "lacache(before=7, after=2, sinks=2, recent_share=0.3)", 60)
    cache.prefill(model, random_text(100))
    rows = [kept_positions(cache, layer)[0] for layer in range(6)]
    assert {len(row) for row in rows} == {60} and all(row[:2] == [0, 1] for row in rows)
    assert set().union(*rows) == set(range(100)), "40 have left each layer, and none has left them all"


def test_it_does_not_matter_when_it_acts():
    model, ids = tiny_model("llama"), random_text(150)
    one, steps = (KVCache(model, "lacache(before=3, after=1)", 40, when="every(1)") for _ in range(2))
    one.prefill(model, ids)
    steps.prefill(model, ids[:, :60], chunk_size=17)
    with torch.inference_mode():
        for token in ids[0, 60:]:
            model(token.view(1, 1), past_key_values=steps)
    steps.check_integrity()
    assert [kept_positions(one, i) for i in range(2)] == [kept_positions(steps, i) for i in range(2)]


def test_positions_inside_of_the_cache():
    """In one layer, what is kept must be as a text of its own, without gaps."""
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(130)
    cache = KVCache(model, "lacache(positions=cache)", 40)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        after = model(ids[:, :1], past_key_values=cache).logits
        # The last forward saw what was held before it evicted anything.
        kept = [*ladder(130, 40, 0, 2, 1, 4, 20), 130]
        text = torch.cat([ids, ids[:, :1]], dim=1)[:, kept]
        alone = model(text, past_key_values=KVCache(model)).logits[:, -1:]
    torch.testing.assert_close(after, alone, atol=1e-4, rtol=1e-4)


def test_one_context_serves_several_questions():
    model, ids = tiny_model("llama"), random_text(120)
    base = KVCache(model, "lacache", 48)
    base.prefill(model, ids)
    for seed in (1, 2):
        asked = torch.cat([ids, random_text(6, seed=seed)], dim=1)
        own = KVCache(model, "lacache", 48)
        own.prefill(model, ids)
        answers = [
            model.generate(asked, past_key_values=c, max_new_tokens=6, do_sample=False) for c in (base.fork(), own)
        ]
        assert torch.equal(*answers)


def test_refusals():
    with pytest.raises(PolicyError, match="nothing could leave"):
        KVCache(tiny_model("llama"), "lacache(before=2, after=2)", 50)
