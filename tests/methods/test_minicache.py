"""MiniCache: exact restoring of equal and parallel layers, magnitudes kept, outliers bit by bit, and bytes that count."""

import math

import pytest
import torch
from brute import chunks, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.segments.base import AttendContext
from kvbudget.segments.paired import PairedSegment, interpolate
from residency import resident_bytes
from tiny import left_padded, random_text, tiny_model


def filled(lower: Tensor, upper: Tensor, retained: float, pieces: int = 1) -> PairedSegment:
    """One row; keys and values alike ``[N, D]``."""
    segment = PairedSegment(1, 0.6, retained)
    begin = 0
    for low, high in zip(lower.tensor_split(pieces), upper.tensor_split(pieces), strict=True):
        both = torch.cat([low, high], dim=-1)
        segment.append(both, both, {"position": torch.arange(begin, begin + len(low)).int()}, [len(low)])
        begin += len(low)
    segment.check_integrity()
    return segment


def faces(segment: PairedSegment) -> list[Tensor]:
    """Keys of both layers, by what `gather` gives."""
    keys, _, _, _ = segment.gather(segment.meta.valid())
    return list(keys.chunk(2, dim=-1))


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.0])
def test_equal_and_parallel_vectors_come_back(factor):
    lower = torch.randn(40, 16)
    for found, expected in zip(faces(filled(lower, factor * lower, 0.0)), (lower, factor * lower), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_directions_are_spherical_and_norms_and_outliers_stay():
    torch.manual_seed(0)
    lower, upper = torch.randn(60, 16), torch.randn(60, 16)
    upper[10:] = lower[10:] + 0.3 * upper[10:]
    direction, norms, angle = interpolate(lower, upper, 0.6)
    plain = torch.rad2deg(torch.nn.functional.cosine_similarity(lower, direction).acos() / angle)
    torch.testing.assert_close(plain, torch.full((60,), math.degrees(0.6)), atol=0.05, rtol=0)
    torch.testing.assert_close(norms, torch.stack([lower.norm(dim=-1), upper.norm(dim=-1)], -1))
    segment = filled(lower, upper, 0.1)
    most = angle.argsort(descending=True)[:6].sort().values
    assert segment.apart.row("position", 0).tolist() == most.tolist()
    for face, (found, own) in enumerate(zip(faces(segment), (lower, upper), strict=True)):
        torch.testing.assert_close(found.norm(dim=-1), own.norm(dim=-1))
        assert torch.equal(found[most], own[most])
        query = torch.randn(1, 3, 16)
        answer = segment.attend(query, AttendContext(0.5, face=face))
        torch.testing.assert_close(answer.out[0], (query[0] @ found.T * 0.5).softmax(-1) @ found, atol=1e-5, rtol=1e-4)
    mean = (lower + upper) / 2
    slerp = sum(
        (found - own).norm(dim=-1)[10:].mean() for found, own in zip(faces(segment), (lower, upper), strict=True)
    )
    scaled = torch.nn.functional.normalize(mean, dim=-1)
    assert slerp < 2.2 * sum(
        (scaled * own.norm(dim=-1, keepdim=True) - own).norm(dim=-1)[10:].mean() for own in (lower, upper)
    )


def test_evicting_truncating_and_joining_keep_outliers_with_their_entries():
    torch.manual_seed(1)
    lower, upper = torch.randn(50, 8), torch.randn(50, 8)
    segment = filled(lower, upper, 0.2, pieces=7)
    assert segment.apart.lengths == [10]
    before = faces(segment)
    keep = torch.rand(1, 50) < 0.5
    segment.take(keep, spare=3)
    segment.check_integrity()
    held = segment.apart.row("position", 0).long()
    for found, old, own in zip(faces(segment), before, (lower, upper), strict=True):
        torch.testing.assert_close(found.norm(dim=-1), old[keep[0]].norm(dim=-1))
        assert torch.equal(found[torch.isin(segment.meta.row("position", 0), held.int())], own[held])
    segment.truncate([segment.lengths[0] - 5])
    segment.check_integrity()
    twin = segment.share()
    branch = twin.branch(False)
    assert branch is not twin
    both = torch.cat([lower[:4], upper[:4]], dim=-1)
    branch.append(both, both, {"position": torch.arange(60, 64).int()}, [4])
    expected = torch.cat([faces(twin)[1], faces(branch)[1]])
    twin.absorb([branch])
    twin.check_integrity()
    torch.testing.assert_close(faces(twin)[1].norm(dim=-1), expected.norm(dim=-1))


def halves(model) -> None:
    """Upper layers of a pair get the lower one's attention weights, so that both see nearly the same keys and values."""
    for one, other in ((1, 2), (3, 4)):
        for name in ("k_proj", "v_proj", "q_proj"):
            getattr(model.model.layers[other].self_attn, name).weight.copy_(
                getattr(model.model.layers[one].self_attn, name).weight
            )
        for layer in (one, other):  # what a layer adds to the stream is small, as in trained models
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)


def test_layers_that_are_alike_lose_little_and_those_that_are_not_lose_much():
    ids = random_text(90)
    errors = []
    for alike in (True, False):
        model = tiny_model("llama", num_hidden_layers=5)
        if alike:
            halves(model)
        with torch.inference_mode():
            expected = model(ids).logits
        cache = KVCache(model, "minicache(start=0.2)")
        found = run(model, cache, ids, [60, 26, *[1] * 4])
        torch.testing.assert_close(found[:, :60], expected[:, :60], atol=1e-4, rtol=0)  # merged only afterwards
        errors.append(float((found - expected)[:, 60:].square().mean()))
        everything = KVCache(model, "minicache(start=0.2, retained=1.0)")
        torch.testing.assert_close(run(model, everything, ids, [60, 30]), expected, atol=1e-4, rtol=0)
    assert errors[0] < 1e-3 * errors[1], errors


def test_two_layers_take_little_more_than_one():
    model, ids = tiny_model("llama", num_hidden_layers=4), random_text(200)
    cache, full = KVCache(model, "minicache(retained=0.0)"), KVCache(model)
    for it in (cache, full):
        it.enforcer.layers[0].set_capacity(None)
        run(model, it, ids, [200])
    entries = 200 * 2
    vectors = sum(cache.report().parts[name] for name in ("keys", "values"))
    assert vectors / full.nbytes < 0.8 and len(cache.report().kept) == 3
    assert vectors >= entries * 4 * (2 * 2 * 16 + (2 * 16 + 4)) and sum(cache.report().parts.values()) == cache.nbytes
    assert resident_bytes(cache) == cache.nbytes


@pytest.mark.parametrize(("scorer", "budget"), [("snapkv(window=8)", 48), ("h2o", "40KiB"), ("knorm+adakv", 48)])
def test_budgets_hold_and_rows_and_forks_are_independent(scorer, budget):
    model, policy = tiny_model("llama", num_hidden_layers=4), f"{scorer}+minicache"
    ids = random_text(130)
    cache = KVCache(model, policy, budget)
    run(model, cache, ids[:, :118], chunks(110, 50) + [1] * 8)
    assert cache.enforcer.evictions and len(cache.enforcer.layers) == 3
    fork = cache.fork()
    one, other = (run(model, c, ids[:, 118:], [1] * 12) for c in (cache, fork))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    if "adakv" not in scorer:
        return
    texts = [random_text(n, seed=n) for n in (40, 90)]
    rows, mask = left_padded(texts)
    batch = KVCache(model, policy, budget)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(rows, past_key_values=batch, attention_mask=mask, position_ids=positions)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = model(
            rows[:, -1:], past_key_values=batch, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1
        )
        for b, text in enumerate(texts):
            single = KVCache(model, policy, budget)
            model(text, past_key_values=single)
            alone = model(rows[b : b + 1, -1:], past_key_values=single).logits
            torch.testing.assert_close(step.logits[b : b + 1], alone, atol=1e-3, rtol=0)


def test_what_merged_layers_cannot_do_is_refused():
    model = tiny_model("llama")
    for policy in ("knorm+pyramidkv+minicache", "knorm+kivi+minicache", "knorm+transformer_vq+minicache"):
        with pytest.raises(PolicyError, match="merged layers"):
            KVCache(model, policy, 200)
    with pytest.raises(PolicyError, match="t=2"):
        KVCache(model, "minicache(t=2.0)")
