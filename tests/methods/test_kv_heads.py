"""Projected heads: products with projected keys, exact where heads are images of one, error of the singular values, fewer bytes."""

from pathlib import Path

import pytest
import torch
from brute import run
from test_registry import feed
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.calibrate.base import watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.projection import HeadProjection
from residency import resident_bytes, resident_tensors
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def fitted(model, **given: int) -> dict[str, Tensor]:
    texts = [random_text(60, seed=s)[0] for s in range(2)]
    path = calibrate("kv_heads", model, texts=texts, count=2, length=60, **given)
    return dict(Artifact.load("kv_heads", fingerprint(model), path).tensors)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Full attention of ``[B, Hq, n, D]`` over as many keys and values per query head, causal."""
    logits = query @ key.mT * scale
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def test_products_are_those_with_projected_keys_and_answers_those_of_projected_values():
    torch.manual_seed(0)
    keys, values = (torch.linalg.qr(torch.randn(1, 2, 16, 5)).Q for _ in range(2))
    rule = HeadProjection(keys, values)
    call = AttentionCall(torch.randn(1, 12, 9, 8), torch.randn(1, 4, 9, 8), torch.randn(1, 4, 9, 8), 0.3)
    inside = rule.enter(0, call)
    assert inside.query.shape == (1, 12, 9, 5) and inside.key.shape == inside.value.shape == (1, 2, 9, 5)
    held = [x.repeat_interleave(6, dim=1) for x in (inside.key, inside.value)]
    found = rule.leave(0, attention(inside.query, *held, 0.3), call)
    for head in range(12):
        own = head // 3
        group, place = own // 2, slice(own % 2 * 8, own % 2 * 8 + 8)
        plain = []
        for x, basis in ((call.key, keys), (call.value, values)):
            joined = torch.cat([x[0, 2 * group], x[0, 2 * group + 1]], dim=1)
            plain.append((joined @ basis[0, group] @ basis[0, group].T)[:, place])
        expected = attention(call.query[:, head : head + 1], plain[0], plain[1], 0.3)[:, 0]
        torch.testing.assert_close(found[:, head], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [32, 12])
def test_the_error_on_the_texts_is_the_tail_of_the_singular_values(rank):
    model = tiny_model("llama")
    bases = fitted(model, rank=rank)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for s in range(2):
        look = lambda index, call, lse: seen[index].append(call.key[0].transpose(0, 1).flatten(1))  # noqa: E731
        watch(model, random_text(60, seed=s), look)
    for index, rows in seen.items():
        joined, basis = torch.cat(rows).double(), bases["keys"][index, 0].double()
        error = (joined - joined @ basis @ basis.T).square().sum()
        tail = torch.linalg.svdvals(joined)[rank:].square().sum()
        torch.testing.assert_close(error, tail, atol=1e-3, rtol=1e-3)


def test_the_basis_of_texts_loses_less_than_the_mean_of_heads():
    """What converting heads by their mean does is a basis, too: the same number for each channel of each head."""
    model, ids = tiny_model("llama"), random_text(90, seed=7)
    with torch.inference_mode():
        expected = model(ids).logits
    fitted(model)
    errors = [float((feed(model, KVCache(model, "kv_heads"), ids, [60, 30]) - expected).square().mean())]
    mean = torch.eye(16).repeat(2, 1).div(2**0.5).expand(2, 1, -1, -1).contiguous()
    Artifact("kv_heads", fingerprint(model), {"keys": mean, "values": mean}, {}).save()
    errors.append(float((feed(model, KVCache(model, "kv_heads"), ids, [60, 30]) - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("given", [{"group": 1}, {"group": 2, "rank": 32}], ids=str)
def test_full_rank_is_exact(given):
    model, ids = tiny_model("llama"), random_text(90)
    fitted(model, **given)
    with torch.inference_mode():
        expected = model(ids).logits
    for policy in ("kv_heads", "kv_heads+cla(factor=1)"):
        found = feed(model, KVCache(model, policy), ids, [60, 25, 1, 4])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_heads_that_are_images_of_one_lose_nothing_and_take_half_the_bytes():
    model, ids = tiny_model("llama"), random_text(90)
    for layer in model.model.layers:
        for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
            weight[16:] = -0.5 * weight[:16]
    fitted(model)
    with torch.inference_mode():
        expected = model(ids).logits
    cache, full = KVCache(model, "kv_heads"), KVCache(model)
    found = feed(model, cache, ids, [70, 1, 19])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    feed(model, full, ids, [70, 1, 19])
    assert cache.nbytes * 2 == full.nbytes and cache.report().full_bytes == full.report().full_bytes
    assert len(cache.report().kept[0][0]) == 1


def test_budgets_forks_and_sliding_models():
    model, ids = tiny_model("llama"), random_text(150)
    fitted(model, rank=8)
    for budget in (48, "14KiB"):
        cache = KVCache(model, "snapkv(window=8)+kv_heads", budget)
        run(model, cache, ids[:, :140], [64, 64, 12])
        assert cache.enforcer.evictions
        fork = cache.fork()
        assert resident_bytes([cache, fork], besides=resident_tensors(cache.policy)) <= 14 * 1024
        one, other = (run(model, c, ids[:, 140:], [1] * 10) for c in (cache, fork))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    sliding = tiny_model("gemma2")
    fitted(sliding, rank=32)
    with torch.inference_mode():
        expected = sliding(ids).logits
    torch.testing.assert_close(run(sliding, KVCache(sliding, "kv_heads"), ids, [100, 50]), expected, atol=1e-3, rtol=0)


def test_what_turns_keys_or_knows_other_heads_is_refused():
    model = tiny_model("llama")
    fitted(model)
    for policy in ("streaming_llm(positions=cache)+kv_heads", "expected_attention+kv_heads"):
        with pytest.raises(PolicyError, match="mixtures"):
            KVCache(model, policy, 64)
    with pytest.raises(PolicyError, match="group=3 must divide"):
        fitted(model, group=3)
