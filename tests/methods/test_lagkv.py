"""LagKV against brute force, and the checks of its card."""

import pytest
import torch
from brute import Brute, Step, chunks, distinct_text, kept_positions, run

from kvbudget.cache import KVCache
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.policy.scorers.lag import LagRank
from tiny import tiny_model

SINKS, LAG = 4, 16


def relative(x, lag):
    low, high = lag.min(0).values, lag.max(0).values
    scaled = (x - low) / (high - low)
    deviation = (scaled - scaled.mean(-1, keepdim=True)).square().sum(-1).div(x.shape[-1] - 1).sqrt()
    return deviation.exp() / deviation.exp().sum()


def ranks(step: Step, limit: int):
    """Each partition is judged when the next one is complete; unjudged entries stay by position."""
    kept = []
    for head in step.heads:
        for p in range((step.seen - SINKS) // LAG - 1):
            begin = SINKS + p * LAG
            here = (head.positions >= begin) & (head.positions < begin + LAG)
            after = (head.positions >= begin + LAG) & (head.positions < begin + 2 * LAG)
            if bool((head.memory[here] > 0).any()) or not bool(here.any()):
                continue
            score = relative(head.keys[here], head.keys[after]) + relative(head.values[here], head.values[after])
            head.memory[here] = (score.argsort().argsort() + 1 + LAG - int(here.sum())).double() / LAG
        worth = torch.where(head.memory > 0, head.memory, 1.0 + head.positions)
        safe = (head.positions < SINKS) | (head.positions >= step.seen - LAG)
        kept.append(worth.masked_fill(safe, float("inf")).argsort(descending=True, stable=True)[:limit])
    return kept


@pytest.mark.parametrize("sizes", [[150] + [1] * 40, chunks(150, 64) + [1] * 20, [7] * 20 + [1] * 20], ids=len)
def test_partitions_are_ranked_against_the_next_one(sizes):
    model = tiny_model("llama", vocab_size=1024)
    cache = KVCache(model, "lagkv(lag=16)", 60, when="every(1)")
    run(model, cache, distinct_text(sum(sizes)), sizes, Brute(ranks, 60))


def test_all_judged_partitions_keep_the_same_number():
    model = tiny_model("llama", vocab_size=1024)
    length = SINKS + 8 * LAG + 5
    # Sinks, 6 of 16 in each of the 7 judged partitions, the last complete partition and the tail.
    budget = SINKS + 7 * 6 + LAG + 5
    cache = KVCache(model, "lagkv(lag=16)", budget)
    run(model, cache, distinct_text(length), [length])
    for layer in range(2):
        for row in kept_positions(cache, layer):
            counts = torch.bincount((torch.tensor(row[SINKS:]) - SINKS) // LAG, minlength=9).tolist()
            assert row[:SINKS] == [0, 1, 2, 3] and counts == [6] * 7 + [16, 5]


def test_channels_may_be_scaled_and_shifted():
    x, lag = torch.randn(LAG, 8).double(), torch.randn(LAG, 8).double()
    scale, shift = torch.rand(8) + 0.5, torch.randn(8)
    moved = LagRank._score(x * scale + shift, lag * scale + shift)
    torch.testing.assert_close(moved, LagRank._score(x, lag), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved.double(), relative(x, lag), atol=1e-5, rtol=1e-4)


def test_a_constant_channel_of_the_next_partition_is_no_division_by_zero():
    lag = torch.randn(LAG, 8)
    lag[:, 3] = 0.5
    assert bool(LagRank._score(torch.randn(LAG, 8), lag).isfinite().all())


def test_small_budgets_and_empty_partitions_are_refused():
    with pytest.raises(BudgetError, match="133 tokens"):
        KVCache(tiny_model("llama"), "lagkv", 100)
    with pytest.raises(PolicyError, match="lag=0"):
        KVCache(tiny_model("llama"), "lagkv(lag=0)", 100)
