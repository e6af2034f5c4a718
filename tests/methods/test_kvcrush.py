"""KVCrush: representatives against brute force, and the checks of its card."""

import pytest
import torch
from brute import kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.policy.refinements.representatives import Representatives
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def crushed(scores: Tensor, counts: list[int], share: float, anchor: list[bool] | str) -> list[set[int]]:
    """Positions each head of one sequence keeps, by lists; all entries are held and none is protected."""
    heads, length = scores.shape
    order = [sorted(range(length), key=lambda t, h=h: (-float(scores[h, t]), t)) for h in range(heads)]
    bits = [[order[h].index(t) < length / 2 for h in range(heads)] for t in range(length)]
    if isinstance(anchor, str):
        majority = [sum(row[h] for row in bits) / length > 0.5 for h in range(heads)]
        anchor = majority if anchor == "mean" else [not bit for bit in majority]
    distance = [sum(a != b for a, b in zip(row, anchor, strict=True)) for row in bits]
    kept = []
    for h, count in enumerate(counts):
        number = max(int(count * share), 1 if share else 0)
        important = order[h][: count - number]
        rejected = sorted(set(range(length)) - set(important), key=lambda t: (distance[t], t))
        step = (len(rejected) - 1) / (number - 1) if number > 1 else 0.0
        chosen = {rejected[round(i * step)] for i in range(number)}
        assert len(chosen) == number and not chosen & set(important)
        kept.append(set(important) | chosen)
    return kept


def view_of(heads: int, length: int) -> View:
    layer = LayerCache(0, heads)
    layer.append(torch.randn(1, heads, length, 4), torch.randn(1, heads, length, 4), None)
    return View(layer)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 0.01])
@pytest.mark.parametrize("name", ["alternating", "zeros", "ones", "mean", "inverse"])
def test_representatives_lie_evenly_in_the_order_of_distances(name, share):
    scores = torch.rand(3, 61, generator=torch.Generator().manual_seed(0))
    view, counts = view_of(3, 61), torch.tensor([[20, 20, 17]])
    none = torch.zeros(1, 3, 61, dtype=torch.bool)
    refined = Representatives(share, name).refine(view, scores[None], none, counts)[0]
    anchor = {"alternating": [False, True, False], "zeros": [False] * 3, "ones": [True] * 3}.get(name, name)
    expected = crushed(scores, counts[0].tolist(), share, anchor)
    for h, count in enumerate(counts[0].tolist()):
        assert set(refined[h].topk(count).indices.tolist()) == expected[h]


def test_equal_signatures_are_taken_by_position():
    scores = torch.linspace(1, 0, 40).repeat(2, 1)  # the first half is the better one in both heads
    view = view_of(2, 40)
    none = torch.zeros(1, 2, 40, dtype=torch.bool)
    refined = Representatives(0.5, "zeros").refine(view, scores[None], none, torch.tensor([[20, 20]]))[0]
    kept = sorted(refined[0].topk(20).indices.tolist())
    assert kept[:10] == list(range(10)) and kept[10] >= 10  # ten important, then by distance 0: the worse half first
    assert {20, 19} <= set(kept), "the first and the last of the order are taken"


def test_no_share_is_the_scorer_alone():
    model, ids = tiny_model("llama"), random_text(160)
    for text in ("snapkv(window=8)", "h2o"):
        crush, plain = KVCache(model, f"{text}+kvcrush(share=0.0)", 40), KVCache(model, text, 40)
        assert run(model, crush, ids, [148] + [1] * 12).equal(run(model, plain, ids, [148] + [1] * 12))


@pytest.mark.parametrize("anchor", ["alternating", "random"])
def test_budget_and_protection_hold(anchor):
    model = tiny_model("llama")
    cache = KVCache(model, f"kvcrush(anchor={anchor}, share=0.5)", 48)
    run(model, cache, random_text(164), [150] + [1] * 14)
    for layer in range(2):
        for row in kept_positions(cache, layer):
            assert len(row) <= 48 and row[-16:] == list(range(148, 164))
    with pytest.raises(PolicyError, match="kvcrush: share"):
        KVCache(model, "kvcrush(share=1.5)", 48)
