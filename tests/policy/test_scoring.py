"""Pooling and reductions against loops."""

import pytest
import torch

from kvbudget.policy.scoring import pool, reduce_group


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7, 40, 41, 100])
@pytest.mark.parametrize("how", ["avg", "max"])
def test_pooling_against_a_loop(kernel, how):
    scores = torch.rand(2, 3, 20)
    pooled = pool(scores, kernel, how)
    assert pooled.shape == scores.shape
    for t in range(20):
        inside = [scores[..., u] for u in range(t - kernel // 2, t - kernel // 2 + kernel) if 0 <= u < 20]
        near = torch.stack(inside)
        expected = near.sum(0) / kernel if how == "avg" else near.amax(0)
        torch.testing.assert_close(pooled[..., t], expected)


def test_nothing_to_pool():
    scores = torch.rand(2, 0)
    assert pool(scores, 5).shape == (2, 0)
    assert pool(torch.ones(3), 5, "none").equal(torch.ones(3))


@pytest.mark.parametrize(("how", "expected"), [("mean", 2.0), ("max", 3.0), ("sum", 6.0)])
def test_reductions_over_the_group(how, expected):
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1).expand(2, 4, 3, 5)
    assert reduce_group(x, how).equal(torch.full((2, 4, 5), expected))
