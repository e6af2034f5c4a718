"""SABlock: blocks inside of segments, found by plain loops, and the checks of its card."""

import math

import pytest
import torch
from brute import kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.policy.marks import DELIMITER
from kvbudget.policy.refinements.blocks import SemanticBlocks
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def by_loops(score: list[float], segment: list[int], room: int, block: int, fidelity: float) -> tuple[set[int], dict]:
    """Entries kept in whole blocks, and each segment's accepted size."""
    best = set(sorted(range(len(score)), key=lambda t: (-score[t], t))[:room])
    kept, sizes = set(), {}
    for s in dict.fromkeys(segment):
        cells = [t for t, of in enumerate(segment) if of == s]
        quota = [t for t in cells if t in best]
        target = sum(score[t] for t in quota)
        width = block
        while True:
            blocks = [cells[i : i + width] for i in range(0, len(cells), width)]
            blocks.sort(key=lambda b: -sum(score[t] for t in b) / len(b))
            tried, count = [], 0
            for b in blocks:
                if count + len(b) > len(quota):
                    break
                tried += b
                count += len(b)
            if width == 1 or sum(score[t] for t in tried) >= fidelity * target:
                break
            width //= 2
        kept |= set(quota if width == 1 else tried)
        sizes[s] = width
    return kept, sizes


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ends = (torch.rand(120, generator=generator) < 0.06).long()
    score = torch.rand(120, generator=generator) ** 3
    return torch.nn.functional.avg_pool1d(score[None], 5, 1, 2)[0], ends.cumsum(0) - ends


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fidelity", [0.0, 0.7, 0.9, 1.0])
def test_blocks_are_those_of_plain_loops(seed, fidelity):
    score, segment = random_case(seed)
    rule = SemanticBlocks(16, fidelity)
    kept = rule.blocks(score, segment, 40)
    expected, sizes = by_loops(score.double().tolist(), segment.tolist(), 40, 16, fidelity)
    assert set(kept.nonzero()[:, 0].tolist()) == expected and int(kept.sum()) <= 40
    if fidelity == 1.0:
        assert expected == set(score.topk(40).indices.tolist()), "only the best single entries retain everything"
    if fidelity == 0.0:
        assert set(sizes.values()) == {16}


def test_the_importance_of_segments():
    score, segment = random_case(3)
    raised = SemanticBlocks(weight=2.0).raised(score, segment)
    means, entropies = {}, {}
    for s in segment.unique().tolist():
        part = score[segment == s].double()
        p = part / part.sum()
        means[s] = part.mean().item()
        entropies[s] = float(-(p * p.log()).sum()) / math.log(len(part)) if len(part) > 1 else 1.0
    top = max(means.values())
    for a, b, s in zip(score.tolist(), raised.tolist(), segment.tolist(), strict=True):
        assert b == pytest.approx(a * (1 + 2.0 * means[s] / top * entropies[s]), rel=1e-4)
    assert SemanticBlocks(weight=0.0).raised(score, segment).equal(score)


def test_blocks_do_not_cross_delimiters_in_a_cache():
    model, ids = tiny_model("llama"), random_text(160)
    cache = KVCache(model, "snapkv(window=8)+sablock(block=8, fidelity=0.5, weight=0.0)", 58)
    marks = torch.zeros(160, dtype=torch.uint8)
    marks[9::10] = DELIMITER
    for layer in cache.enforcer.layers:
        layer.marks = [marks]
    run(model, cache, ids, [160])
    plain, whole = KVCache(model, "snapkv(window=8)", 58), KVCache(model, "snapkv(window=8)", 1000)
    for other in (plain, whole):
        run(model, other, ids, [160])
    for layer in range(2):
        scores = whole.parts.scorer.score(View(whole.enforcer.layers[layer]))[0, :, :152]
        for h, row in enumerate(kept_positions(cache, layer)):
            blocks, sizes = by_loops(scores[h].tolist(), [t // 10 for t in range(152)], 50, 8, 0.5)
            assert len(row) == 58 and blocks <= set(row) and len(set(sizes.values())) > 1
            assert row != kept_positions(plain, layer)[h] and set(range(152, 160)) <= set(row)


def test_without_marks_the_text_is_one_segment():
    model, ids = tiny_model("llama"), random_text(160)
    cache = KVCache(model, "snapkv(window=8)+sablock(block=1)", 40)
    plain = KVCache(model, "snapkv(window=8)", 40)
    assert run(model, cache, ids, [150] + [1] * 10).equal(run(model, plain, ids, [150] + [1] * 10))
    with pytest.raises(PolicyError, match="block=12"):
        KVCache(model, "sablock(block=12)", 40)
