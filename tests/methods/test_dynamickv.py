"""DynamicKV: rounds over the layers so far against a plain simulation, and the checks of its card."""

import pytest
import torch
from brute import best, kept_positions, run

from kvbudget.budget import solve
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods.dynamickv import UNITS, Rounds
from tiny import random_text, tiny_model

LAYERS, WINDOW, LENGTH, BUDGET = 5, 8, 140, 30


def votes(model, ids):
    """Votes of the entries before the window ``[Hkv, T - W]`` per layer, not pooled: later rounds would pool what is left."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = model(ids, output_attentions=True).attentions
    return [a[0].unflatten(0, (2, -1))[:, :, -WINDOW:, :-WINDOW].sum(2).mean(1) for a in attention]


def simulated(scores, every):
    """Entries per head that each layer ends up with: rounds over what the layers still hold."""
    held, total = [LENGTH] * LAYERS, LAYERS * BUDGET
    for seen in range(1, LAYERS + 1):
        if (seen % every and seen < LAYERS) or sum(held[:seen]) <= total:
            continue
        ranked = []
        for layer in range(seen):
            for row in scores[layer]:
                kept = row.sort(descending=True).values[: held[layer] - WINDOW].tolist()
                ranked += [(s, layer) for s in [float("inf")] * WINDOW + kept]
        ranked.sort(key=lambda pair: -pair[0])
        winners = [sum(where == layer for _, where in ranked[: 2 * BUDGET * seen]) for layer in range(seen)]
        shares = solve(total, winners, WINDOW + 1, LENGTH)
        held[:seen] = [min(h, s) for h, s in zip(held, shares, strict=False)]
    return held


@pytest.mark.parametrize("every", [1, 2, 4, 5])
def test_layers_compete_in_rounds(every):
    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), random_text(LENGTH)
    cache = KVCache(model, f"snapkv(window={WINDOW}, kernel=1)+dynamickv(every={every})", BUDGET)
    run(model, cache, ids, [LENGTH])
    scores = votes(tiny_model("llama", num_hidden_layers=LAYERS), ids)
    held = simulated(scores, every)
    assert len(set(held)) > 1
    for layer, count in enumerate(held):
        newest = list(range(LENGTH - WINDOW, LENGTH))
        expected = [best(row, count - WINDOW).sort().values.tolist() + newest for row in scores[layer]]
        assert kept_positions(cache, layer) == expected, f"layer {layer}"


def test_layers_so_far_share_the_whole_budget():
    model, ids = tiny_model("llama", num_hidden_layers=LAYERS), random_text(LENGTH)
    cache, held = KVCache(model, "dynamickv(every=2)", BUDGET), []
    attend = cache.attend

    def watched(*args):
        out = attend(*args)
        held.append([sum(store.kept()[0]) // 2 if store.seen else 0 for store in cache.enforcer.layers])
        return out

    cache.attend = watched
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    del cache.attend
    assert sum(held[1]) == sum(held[3]) == sum(held[4]) == LAYERS * BUDGET
    assert all(after <= before for before, after in zip(held[1][:2], held[4][:2], strict=True))


def test_equal_scores_share_equally_and_higher_ones_get_more():
    row = torch.rand(2, 50)
    assert Rounds().rank([row, row], 80) == [40, 40]
    more = Rounds().rank([row, 10 * row], 80)
    assert more[1] > more[0]


def test_no_layer_gets_more_than_the_largest_multiple():
    weights = Rounds(most=2.0).weights([900.0, 50.0, 25.0, 25.0], 30.0, 9.0)
    assert weights[0] / UNITS == pytest.approx(0.5, abs=1e-5)
    assert weights[1] == pytest.approx(2 * weights[2], rel=1e-4)
    # Two layers of four, both of which must hold half: more than the multiple allows.
    assert Rounds(most=1.0).weights([3.0, 1.0, None, None], 30.0, 9.0)[0] == pytest.approx(UNITS / 2, abs=2)


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match="most="):
        KVCache(tiny_model("llama"), "dynamickv(most=0.5)", 64)
