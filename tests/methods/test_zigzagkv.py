"""ZigZagKV: minimum budgets from eager attention, shares by the paper's formula, exact totals."""

import math

import pytest
import torch
from brute import best, kept_positions, run

from kvbudget.budget import solve
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods.zigzagkv import Uncertainty
from kvbudget.policy.view import View
from tiny import random_text, tiny_model

WINDOW, LENGTH, BUDGET = 16, 170, 48


def needed(row: torch.Tensor, theta: float) -> int:
    """Entries, the highest first, until ``theta`` of the row's mass is reached; counted one by one."""
    got, target = 0.0, theta * row.sum().item()
    for n, weight in enumerate(sorted(row.tolist(), reverse=True), start=1):
        got += weight
        if got >= target * (1 - 1e-6):
            return n
    raise AssertionError


@pytest.mark.parametrize(("theta", "least"), [(0.9, 0.2), (0.5, 0.0), (0.9, 1.0)])
def test_layers_get_what_the_formula_says(theta, least):
    model, ids = tiny_model("llama", num_hidden_layers=4), random_text(LENGTH)
    cache = KVCache(
        model, f"snapkv(window={WINDOW}, kernel=1)+zigzagkv(window={WINDOW}, theta={theta}, least={least})", BUDGET
    )
    run(model, cache, ids, [LENGTH])
    plain = tiny_model("llama", num_hidden_layers=4)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = plain(ids, output_attentions=True).attentions
    mass = [a[0].double().unflatten(0, (2, -1))[:, :, -WINDOW:, :-WINDOW].sum(2).mean(1) for a in attention]
    lmba = [sum(needed(row, theta) for row in layer) / 2 for layer in mass]
    weights = [least + (1 - least) * 4 * m / sum(lmba) for m in lmba]
    shares = solve((BUDGET - WINDOW) * 4, weights, 1, LENGTH - WINDOW)
    for layer, share in enumerate(shares):
        newest = list(range(LENGTH - WINDOW, LENGTH))
        expected = [best(row, share).sort().values.tolist() + newest for row in mass[layer]]
        assert kept_positions(cache, layer) == expected
    assert sum(shares) == 4 * (BUDGET - WINDOW) and (len(set(shares)) == 1) == (least == 1.0)


class Masses(View):
    def __init__(self, mass):
        layer = LayerCache(0, mass.shape[0])
        tokens = torch.zeros(1, *mass.shape, 4)
        layer.append(tokens, tokens, None)
        super().__init__(layer)
        self.given = mass

    def mass(self, last=None):
        return self.given[None]


@pytest.mark.parametrize("number", [10, 57, 100])
def test_even_and_peaked_attention(number):
    flat, peak = torch.full((2, number), 0.37), torch.eye(2, number)
    measure = Uncertainty(window=0).measure
    assert measure(Masses(flat)) == [math.ceil(0.9 * number)]
    assert measure(Masses(peak)) == [1.0]


def test_excess_of_capped_layers_goes_to_the_others():
    """A layer with even attention needs most; with a short text it is capped, and nothing of the budget is lost."""
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers[1].self_attn.q_proj.weight.zero_()
    cache = KVCache(model, f"snapkv(window={WINDOW})+zigzagkv(window={WINDOW}, least=0.0)", 60)
    run(model, cache, random_text(100), [100])
    kept = [layer[0][0] for layer in cache.report().kept]
    assert sum(kept) == 180 and kept[1] == max(kept)


def test_impossible_parameters_are_refused():
    for text in ("theta=0.0", "least=1.5", "window=0"):
        with pytest.raises(PolicyError, match=text.split("=")[0]):
            KVCache(tiny_model("llama"), f"zigzagkv({text})", 64)
