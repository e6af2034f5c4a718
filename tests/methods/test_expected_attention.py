"""Expected Attention against its formula in float64, Monte Carlo, and with calibrated statistics."""

from collections.abc import Sequence

import pytest
import torch
from brute import chunks, kept_positions, run
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.calibrate.queries import QueryMoments
from kvbudget.errors import PolicyError, UnsupportedModel
from kvbudget.layer import LayerCache
from kvbudget.models import fingerprint, rotations_of
from kvbudget.models.rotation import Rotation
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.moments import Moments, square, triangle
from kvbudget.policy.scorers.expected import ExpectedAttention
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


def recorded(model, cache: KVCache, ids: Tensor, sizes: Sequence[int]) -> list[list[Tensor]]:
    """Feeds the text; per layer the post-RoPE queries ``[Hq, T, D]``, keys and values ``[Hkv, T, D]`` in float64."""
    calls: dict[int, list] = {}
    attend = cache.attend

    def keep(index, call, *args):
        calls.setdefault(index, []).append([x[0].double() for x in (call.query, call.key, call.value)])
        return attend(index, call, *args)

    cache.attend = keep
    run(model, cache, ids, sizes)
    return [[torch.cat(part, dim=1) for part in zip(*pieces, strict=True)] for _, pieces in sorted(calls.items())]


def turn(positions: Tensor, rotation: Rotation, width: int) -> Tensor:
    """Rotation matrices ``[n, D, D]`` at positions, written out pair by pair for the half layout, times YaRN's factor."""
    out = torch.eye(width).double().repeat(len(positions), 1, 1)
    half = rotation.rotary_dim // 2
    for i, frequency in enumerate(rotation.inv_freq.double()):
        angle = positions.double() * frequency
        out[:, i, i] = out[:, i + half, i + half] = angle.cos()
        out[:, i + half, i] = angle.sin()
        out[:, i, i + half] = -angle.sin()
    out[:, : 2 * half] *= rotation.attention_scaling
    return out


def expected_scores(query, key, value, rotation, sinks=4, future=512, covariance=True, moments=None) -> Tensor:
    """The paper's score ``[Hkv, T]``, by matrices and in float64."""
    heads, length, width = query.shape
    turns = turn(torch.arange(length), rotation, width)
    plain = torch.linalg.solve(turns, query[..., None])[..., 0][:, sinks:] if moments is None else None
    mean_turn = turn(torch.arange(length, length + future), rotation, width).mean(0)
    scores = []
    for h in range(heads):
        mu, spread = moments[h] if moments else (plain[h].mean(0), plain[h].T.cov(correction=0))
        mu, spread = mean_turn @ mu, mean_turn @ spread @ mean_turn.T
        k = key[h // (heads // len(key)), sinks:]
        z = k @ mu / width**0.5
        if covariance:
            z = z + torch.einsum("td,de,te->t", k, spread, k) / (2 * width)
        scores.append(z.softmax(0))
    grouped = torch.stack(scores).unflatten(0, (len(key), -1)).mean(1)
    return grouped * value[:, sinks:].norm(dim=-1)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("sizes", [[150], chunks(140, 40) + [1] * 10], ids=["one pass", "chunks and steps"])
def test_scores_follow_the_formula(sizes, covariance):
    model = tiny_model("llama")
    cache = KVCache(model, f"expected_attention(covariance={covariance})", 1000)
    tensors = recorded(model, cache, random_text(150), sizes)
    rotations = rotations_of(model)
    for layer, (query, key, value) in enumerate(tensors):
        expected = expected_scores(query, key, value, rotations[layer], covariance=covariance)
        found = cache.parts.scorer.score(View(cache.enforcer.layers[layer]))[0, :, 4:]
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "stablelm"])
def test_the_best_scores_stay(name):
    """Partial rotations too; the sinks stay, and the rest of the budget goes to the best scores of each head."""
    model, ids = tiny_model(name), random_text(120)
    whole, cache = KVCache(model, "expected_attention", 1000), KVCache(model, "expected_attention", 40)
    tensors = recorded(model, whole, ids, [120])
    run(model, cache, ids, [120])
    for layer, rotation in enumerate(rotations_of(model)):
        scores = expected_scores(*tensors[layer], rotation)
        for h, kept in enumerate(kept_positions(cache, layer)):
            # The trigger keeps the budget exactly after a forward of many tokens.
            assert kept == sorted([0, 1, 2, 3, *(scores[h].topk(36).indices + 4).tolist()])


def test_the_closed_form_is_the_mean_over_sampled_queries():
    generator = torch.Generator().manual_seed(0)
    layer = LayerCache(0, 1, rotation=Rotation(torch.empty(0)))
    factor = 0.06 * torch.randn(16, 16, generator=generator)
    mean, spread = 0.3 * torch.randn(1, 16, generator=generator), factor @ factor.T
    layer.append(torch.randn(1, 1, 30, 16, generator=generator), torch.ones(1, 1, 30, 4), None)
    scorer = ExpectedAttention(0, mean=mean[None], spread=triangle(spread)[None, None], value_norm=False)
    queries = mean + torch.randn(200_000, 16, generator=generator) @ factor.T
    weights = (queries @ View(layer).keys[0, 0].T).exp().mean(0)
    torch.testing.assert_close(scorer.score(View(layer))[0, 0], weights / weights.sum(), atol=0, rtol=0.05)
    alone = ExpectedAttention(0, covariance=False, mean=mean[None], spread=scorer.spread, value_norm=False)
    torch.testing.assert_close(alone.score(View(layer))[0, 0], (View(layer).keys[0, 0] @ mean[0]).softmax(0))


def test_equal_keys_differ_by_the_norm_of_their_values():
    layer = LayerCache(0, 1, rotation=Rotation(torch.empty(0)))
    value = torch.randn(1, 1, 9, 4)
    layer.append(torch.ones(1, 1, 9, 16), value, None)
    scorer = ExpectedAttention(0, mean=torch.randn(1, 2, 16), spread=torch.zeros(1, 2, 136))
    torch.testing.assert_close(scorer.score(View(layer))[0, 0], value[0, 0].norm(dim=-1) / 9)


def test_moments_of_parts_are_those_of_the_whole():
    x = torch.randn(2, 3, 50, 4, dtype=torch.float64) + 2.0
    counted = torch.rand(2, 50) < 0.7
    counted[0, :20] = False
    joined = Moments.of(x[:, :, :20], counted[:, :20]).join(Moments.of(x[:, :, 20:], counted[:, 20:]))
    for b in range(2):
        for h in range(3):
            kept = x[b, h][counted[b]]
            torch.testing.assert_close(joined.mean[b, h], kept.mean(0))
            torch.testing.assert_close(joined.covariance[b, h], kept.T.cov(correction=0))
    assert square(triangle(joined.covariance), 4).equal(joined.covariance)


@pytest.mark.parametrize("covariance", [True, False])
def test_moments_count_as_bytes(covariance):
    model = tiny_model("llama")
    text = f"expected_attention(covariance={covariance})"
    plain, cache = KVCache(model, "streaming_llm", "64KiB"), KVCache(model, text, "64KiB")
    run(model, cache, random_text(170), [150] + [1] * 20)
    cache.check_integrity()
    held = sum(x.untyped_storage().nbytes() for layer in cache.enforcer.layers for x in layer.statistics.values())
    assert held == 4 * cache.enforcer.cost.fixed  # 2 layers of 2 KV heads
    assert cache.enforcer.cost.fixed == 4 * 2 * (16 + (136 if covariance else 0))
    assert cache.enforcer.mean_entries(200, 1) < plain.enforcer.mean_entries(200, 1)


def test_a_fork_has_moments_of_its_own():
    model, ids = tiny_model("llama"), random_text(150)
    alone = KVCache(model, "expected_attention", 48)
    run(model, alone, ids[:, :100], [100])
    before = [x.clone() for layer in alone.enforcer.layers for x in layer.statistics.values()]
    run(model, alone.fork(), random_text(20, seed=9), [20])
    after = [x for layer in alone.enforcer.layers for x in layer.statistics.values()]
    assert len(after) == 4 and all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_models_without_a_rotation_are_refused():
    with pytest.raises(UnsupportedModel, match="no rotary position embedding"):
        KVCache(tiny_model("gpt2"), "expected_attention", 64)
    with pytest.raises(PolicyError, match="future=0"):
        KVCache(tiny_model("llama"), "expected_attention(future=0)", 64)


# -- with calibrated statistics ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    return tmp_path


def test_statistics_are_the_moments_over_all_texts(folder):
    model = tiny_model("llama")
    texts = [random_text(60, seed=s)[0] for s in range(3)]
    calibrate("expected_attention_stats", model, texts=texts, count=3, length=60)
    whole = [recorded(model, KVCache(model, "full"), ids[None], [60]) for ids in texts]
    cache = KVCache(model, "expected_attention_stats", 1000)
    query, key, value = recorded(model, cache, random_text(150), [150])[1]
    rotation = rotations_of(model)[1]
    turns = turn(torch.arange(60), rotation, 16)
    plain = [torch.linalg.solve(turns, layers[1][0][..., None])[..., 0][:, 4:] for layers in whole]
    plain = torch.cat(plain, dim=1)
    moments = [(q.mean(0), q.T.cov(correction=0)) for q in plain]
    scores = cache.parts.scorer.score(View(cache.enforcer.layers[1]))[0, :, 4:]
    expected = expected_scores(query, key, value, rotation, moments=moments)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=2e-3)
    assert not cache.enforcer.layers[1].statistics and cache.enforcer.cost.fixed == 0


def test_a_calibration_goes_on_where_it_was_stopped(folder, monkeypatch):
    model = tiny_model("llama")
    texts = [random_text(40, seed=s)[0] for s in range(3)]
    whole = calibrate("expected_attention_stats", model, folder / "whole", texts=texts, count=3, length=40)
    read = []
    add = QueryMoments.add

    def stopped(self, model, ids, state):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(ids)
        return add(self, model, ids, state)

    monkeypatch.setattr(QueryMoments, "add", stopped)
    options = {"texts": texts, "count": 3, "length": 40}
    with pytest.raises(KeyboardInterrupt):
        calibrate("expected_attention_stats", model, folder / "part", **options)
    assert not (folder / "part").exists()
    read.clear()
    # Another text set does not go on from there, the same one does.
    with pytest.raises(KeyboardInterrupt):
        calibrate("expected_attention_stats", model, folder / "part", **(options | {"texts": texts[::-1]}))
    assert len(read) == 2 and read[0][0].equal(texts[2])
    read.clear()
    calibrate("expected_attention_stats", model, folder / "part", **(options | {"texts": texts[::-1]}))
    assert len(read) == 1 and read[0][0].equal(texts[0]) and not list(folder.glob("*.unfinished"))
    one, other = (Artifact.load("expected_attention_stats", fingerprint(model), folder / p) for p in ("whole", "part"))
    assert whole == folder / "whole"
    for name in ("mean", "covariance"):
        torch.testing.assert_close(one.tensors[name], other.tensors[name], atol=1e-5, rtol=1e-4)


def test_texts_must_be_as_announced(folder):
    model = tiny_model("llama")
    for texts in (None, [random_text(40)[0]], [random_text(39)[0]] * 2):
        with pytest.raises(PolicyError, match="2 texts of 40 tokens"):
            calibrate("expected_attention_stats", model, texts=texts, count=2, length=40)


def test_moments_count_where_another_scorer_judges_the_answer():
    model = tiny_model("llama")
    cache = KVCache(model, "expected_attention+scope(recent=8)", "64KiB")
    run(model, cache, random_text(150), [130] + [1] * 20)
    assert cache.enforcer.cost.fixed == 4 * 2 * (16 + 136)
    assert all(set(layer.statistics) == {"query mean", "query covariance"} for layer in cache.enforcer.layers)
