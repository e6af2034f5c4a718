"""MPCache: the static set against brute force, the clusters against plain loops."""

import math
from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, best, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.policy.selectors.levels import Clusters
from kvbudget.segments.selective import Reading
from tiny import random_text, tiny_model


def highest_of_latest(share: float):
    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        last = math.ceil(share * step.new)
        paid = torch.cat(step.weights)[:, -last:].mean(0).amax(0)
        kept = []
        for head in step.heads:
            head.memory = torch.maximum(head.memory, paid)
            kept.append(best(head.memory.masked_fill(head.positions == step.seen - 1, float("inf")), limit))
        return kept

    return rule


@pytest.mark.parametrize("sizes", [[120] + [1] * 10, [70, 60, 9]], ids=len)
def test_what_the_end_of_the_prompt_looked_at_stays(sizes):
    model, ids = tiny_model("llama"), random_text(sum(sizes))
    cache = KVCache(model, "mpcache(coarse=1.0, fine=1.0)", 40, when="every(1)")
    run(model, cache, ids, sizes, Brute(highest_of_latest(0.2), 40))
    assert kept_positions(cache, 1)[0] == kept_positions(cache, 1)[1]


def read_by_loops(query: Tensor, keys: Tensor, rule: Clusters) -> set[int]:
    """Entries that one decode query ``[G, D]`` of a KV head reads of ``keys [T, D]``."""

    def similarity(cells: list[int]) -> float:
        r = rule.alpha * keys[cells].amax(0) + (1 - rule.alpha) * keys[cells].amin(0)
        return float((query @ r).max())

    def cut(size: int) -> list[list[int]]:
        return [list(range(i, min(i + size, len(keys)))) for i in range(0, len(keys), size)]

    coarse = cut(rule.size)
    order = sorted(range(len(coarse)), key=lambda c: -similarity(coarse[c]))
    chosen = {0, len(coarse) - 1, *order[: math.ceil(len(coarse) * rule.coarse)]}
    inside = {t for c in chosen for t in coarse[c]}
    fine = cut(rule.size // 2)
    order = [c for c in sorted(range(len(fine)), key=lambda c: -similarity(fine[c])) if set(fine[c]) & inside]
    chosen = {0, len(fine) - 1, *order[: math.ceil(len(fine) * rule.fine)]}
    return {t for c in chosen for t in fine[c]}


@pytest.mark.parametrize("length", [5, 64, 203])
def test_clusters_are_those_of_plain_loops(length):
    generator = torch.Generator().manual_seed(length)
    query, keys = torch.randn(1, 2, 3, 1, 8, generator=generator), torch.randn(1, 2, length, 8, generator=generator)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", query, keys)
    visible = torch.ones(1, 2, 1, length, dtype=torch.bool)
    rule = Clusters(size=16)
    chosen = rule.select(Reading(0, query, keys, keys, logits, logits.logsumexp(-1), visible))
    for h in range(2):
        read = read_by_loops(query[0, h, :, 0], keys[0, h], rule)
        for g in range(3):
            assert set((chosen.weights[0, h, g, 0] > 0).nonzero()[:, 0].tolist()) == read
            expected = logits[0, h, g, 0][sorted(read)].softmax(-1)
            torch.testing.assert_close(chosen.weights[0, h, g, 0][sorted(read)], expected)
    assert length < 100 or len(read) < 0.4 * length


def test_the_representative_is_no_upper_bound():
    """Quest's bound takes the better end per channel; the linear form may be below a product of its cluster."""
    keys = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    query = torch.tensor([1.0, -1.0])
    linear = query @ (0.6 * keys.amax(0) + 0.4 * keys.amin(0))
    assert linear < (keys @ query).max()
    positive = torch.rand(20, 4)
    direction = torch.rand(4)
    r = direction @ (0.6 * positive.amax(0) + 0.4 * positive.amin(0))
    assert direction @ positive.amin(0) <= r <= direction @ positive.amax(0)


def test_reading_everything_is_attention_over_the_static_set():
    model, ids = tiny_model("llama"), random_text(162)
    logits = []
    for policy in ("mpcache(coarse=1.0, fine=1.0)", "mpcache"):
        cache = KVCache(model, policy, 100, when="after_prefill")
        logits.append(run(model, cache, ids, [150] + [1] * 12))
        assert {len(row) for layer in range(2) for row in kept_positions(cache, layer)} == {112}
    assert logits[0][:, :150].equal(logits[1][:, :150]), "the prompt is read whole"
    assert not logits[0][:, 151:].allclose(logits[1][:, 151:], atol=1e-2)


@pytest.mark.parametrize("text", ["mpcache(alpha=1.5)", "mpcache(size=1)", "mpcache(static_share=0.0)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="mpcache"):
        KVCache(tiny_model("llama"), text, 64)
