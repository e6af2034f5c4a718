"""RoCo against running moments kept by brute force, and the checks of its card."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, chunks, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.layer import LayerCache
from kvbudget.policy.scorers.robust import KeepUnstable, MeanAttention, deviation
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def steady_and_low(share: float = 0.3, sinks: int = 4, recent: int = 10):
    """Sums of weights and of their squares are the real and the imaginary part of the memory."""

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            rows = weights.mean(0)
            head.memory = head.memory + torch.complex(rows.sum(0), rows.square().sum(0))
            number = step.seen - head.positions
            mean = head.memory.real / number
            spread = (head.memory.imag / number - mean**2).clamp_min(0).sqrt()
            fixed = (head.positions < sinks) | (head.positions >= step.seen - recent)
            spread[fixed] = float("inf")
            mean[best(spread, int(limit * share))] = 1e6
            kept.append(best(mean.masked_fill(fixed, float("inf")), limit))
        return kept

    return rule


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((4, 2), [120] + [1] * 12), ((3, 1), chunks(110, 20) + [1] * 6), ((4, 4), [7] * 15)],
    ids=["one pass", "strides of 20", "strides of 7, MHA"],
)
def test_kept_entries_follow_mean_and_deviation(heads, sizes):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "roco(every=1)", 40)
    run(model, cache, random_text(sum(sizes)), sizes, Brute(steady_and_low(), 40))
    assert cache.report().kept == [[[40] * heads[1]]] * 2


def test_strides_while_decoding():
    model = tiny_model("llama")
    cache = KVCache(model, "roco(unstable_share=0.5, recent=4)", 80)
    run(model, cache, random_text(138), [120] + [1] * 18, Brute(steady_and_low(0.5, recent=4), 80, every=8))


def layer_with(received: Tensor, squared: Tensor) -> View:
    """A layer of as many entries, each seen by as many queries as follow it, that received these sums."""
    layer = LayerCache(0, 1, states=("received", "received squared"))
    layer.append(torch.randn(1, 1, len(received), 4), torch.randn(1, 1, len(received), 4), None)
    view = View(layer)
    view.set_state("received", received[None, None])
    view.set_state("received squared", squared[None, None])
    return view


def test_a_spike_is_protected_and_steady_attention_is_not():
    number = torch.arange(20, 0, -1).float()
    steady = 0.05 * number
    received, squared = steady.clone(), 0.05**2 * number
    received[3] = 0.9  # one query out of 17 looked at it, hard
    squared[3] = 0.81
    view = layer_with(received, squared)
    assert deviation(view)[0, 0, 5] < 1e-3 and deviation(view)[0, 0, 3] > 0.2
    none = torch.zeros(1, 1, 20, dtype=torch.bool)
    scores = MeanAttention().score(view)
    refined = KeepUnstable(0.1).refine(view, scores, none, torch.tensor([[10]]))
    assert refined.argmax() == 3 and int((refined > 1).sum()) == 1


def test_old_entries_have_no_advantage():
    """By the sum the older of two entries with the same mean wins; by the mean they are equal."""
    number = torch.arange(20, 0, -1).float()
    view = layer_with(0.05 * number, 0.05**2 * number)
    torch.testing.assert_close(MeanAttention().score(view), torch.full((1, 1, 20), 0.05))


@pytest.mark.parametrize("text", ["roco(unstable_share=1.5)", "roco(every=0)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="roco"):
        KVCache(tiny_model("llama"), text, 64)
