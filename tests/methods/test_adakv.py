"""Ada-KV: the checks of its card, and the joint top-k against brute force."""

import pytest
import torch
from brute import Brute, Step, kept_positions, run
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import max_pool1d

from kvbudget.cache import KVCache
from kvbudget.policy.allocators.heads import JointTopK
from tiny import random_text, tiny_model


def split(scores, total, *, safeguard=0.2, normalize=False, recent=0):
    protected = torch.zeros_like(scores, dtype=torch.bool)
    protected[:, scores.shape[1] - recent :] = recent > 0
    valid = torch.ones_like(protected)
    return JointTopK(safeguard, normalize).split(scores, protected, valid, total)


def retained(scores, counts):
    return sum(row.sort(descending=True).values[:n].sum().item() for row, n in zip(scores, counts, strict=True))


@given(seed=st.integers(0, 10_000), base=st.integers(1, 60), safeguard=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_exact_total_safeguard_and_never_below_uniform(seed, base, safeguard):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, 80, generator=generator) ** (1 + 8 * torch.rand(4, 1, generator=generator))
    counts = split(scores, 4 * base, safeguard=safeguard)
    assert sum(counts) == 4 * base
    assert min(counts) >= int(base * safeguard)
    assert retained(scores, counts) >= retained(scores, [base] * 4) - 1e-6
    if safeguard == 1.0:
        assert counts == [base] * 4


@pytest.mark.parametrize(
    "row", [torch.rand(200), torch.zeros(200), torch.arange(200) // 50], ids=["any", "zero", "ties"]
)
def test_equal_scores_in_all_heads_give_equal_budgets(row):
    assert split(row.float().expand(4, -1), 4 * 30, safeguard=0.0) == [30] * 4


def test_the_safeguard_is_beyond_the_window():
    scores = torch.rand(4, 200)
    scores[0] *= 1e-6
    assert split(scores, 4 * 52, safeguard=0.5, recent=32)[0] == 32 + 10


def test_normalized_scores_favor_heads_whose_mass_the_budget_holds():
    flat = torch.full((1, 100), 0.01)
    peaked = torch.cat([torch.full((1, 10), 0.05), torch.full((1, 90), 0.5 / 90)], dim=1)
    scores = torch.cat([flat, peaked])
    # Uniform budgets of 20 would retain 0.2 of the flat head and 0.5 + 10 * 0.5 / 90 of the peaked one.
    scaled = scores * torch.tensor([[0.2], [0.5 + 5 / 90]])
    expected = torch.bincount(scaled.flatten().argsort(descending=True, stable=True)[:40] // 100, minlength=2)
    assert split(scores, 40, safeguard=0.0, normalize=True) == expected.tolist()
    assert split(scores, 40, safeguard=0.0) != expected.tolist()


def joint_votes(window: int, safeguard: float):
    """SnapKV's votes (max-pooled), pinned safeguards, then the layer's best entries whatever their head."""

    def rule(step: Step, limit: int):
        scored = []
        for h, (head, weights) in enumerate(zip(step.heads, step.weights, strict=True)):
            fresh = weights[:, -window:].sum(1).mean(0)
            head.memory = max(0.0, 1 - step.new / window) * head.memory + fresh
            older = head.memory[head.positions < step.seen - window]
            pooled = max_pool1d(older[None], 7, stride=1, padding=3)[0].tolist() if len(older) else []
            scores = pooled + [float("inf")] * (len(head.memory) - len(pooled))
            order = sorted(range(len(scores)), key=lambda t: -scores[t])
            pinned = set(order[: window + int((limit - window) * safeguard)])
            scored += [(float("inf") if t in pinned else s, h, t) for t, s in enumerate(scores)]
        chosen = sorted(scored, key=lambda item: -item[0])[: limit * len(step.heads)]
        return [torch.tensor([t for _, head, t in chosen if head == h]) for h in range(len(step.heads))]

    return rule


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (8, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_heads_compete_for_the_layers_entries(heads):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    cache = KVCache(model, "snapkv(window=16, kernel=7, pooling=max)+adakv", 48)
    run(model, cache, random_text(180), [180], Brute(joint_votes(16, 0.2), 48))
    for layer in cache.report().kept:
        assert sum(layer[0]) == 48 * heads[1]
        assert min(layer[0]) >= 16 + int(32 * 0.2)
    if heads[1] > 1:
        assert len({n for layer in cache.report().kept for n in layer[0]}) > 1, "no head got more than another"


def test_ragged_heads_really_shrink_and_stay_in_the_budget():
    model = tiny_model("llama", num_key_value_heads=4)
    cache, uniform = KVCache(model, "adakv", 64), KVCache(model, "snapkv", 64)
    for c in (cache, uniform):
        run(model, c, random_text(320), [300] + [1] * 20)
    assert cache.nbytes <= uniform.nbytes * 1.02
    assert sum(map(len, kept_positions(cache, 0))) <= 4 * 64
