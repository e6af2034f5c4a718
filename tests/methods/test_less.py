"""LESS: the state by plain sums, the answers of cache and training alike, and a fit that helps on held-out text."""

from pathlib import Path

import pytest
import torch
from brute import chunks, kept_positions, run
from test_registry import feed
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import build, calibrate
from kvbudget.calibrate.base import watch
from kvbudget.errors import PolicyError
from kvbudget.kernels import merge
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations import recurrence
from kvbudget.policy.destinations.recurrence import Recurrence, key_features, query_features
from kvbudget.segments.base import AttendContext
from kvbudget.segments.dense import DenseSegment
from tiny import random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))


def weights(layers: int = 2, query_heads: int = 4, heads: int = 2, dim: int = 16, rank: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(layers, *shape, generator=generator) * 0.3

    return {
        "query_in": drawn(query_heads, dim, 12), "query_out": drawn(query_heads, 12, rank),
        "key_in": drawn(heads, dim, 12), "key_out": drawn(heads, 12, rank), "key_mix": drawn(heads, rank, rank),
        "key_scale": drawn(heads, rank) + 1, "mix_scale": drawn(heads, rank) + 1,
    }  # fmt: skip


def test_the_state_is_a_sum_in_any_order_and_answers_by_its_features():
    torch.manual_seed(0)
    rule = Recurrence(8, weights())
    key, value, query = torch.randn(4, 30, 16), torch.randn(4, 30, 5), torch.randn(4, 2 * 3, 16)
    segments = []
    for order in (torch.arange(30), torch.randperm(30)):
        layer = LayerCache(1, 2)
        layer.start(2)  # rows: two sequences of two heads
        for at in order.split(11):
            n = [len(at)] * 4
            flat = key[:, at].flatten(0, 1), value[:, at].flatten(0, 1), at.int().repeat(4)
            rule.receive(layer, Evicted(*flat, torch.zeros(sum(n)), n))
        segments.append(layer.front[0])
        assert layer.nbytes() == 4 * rule.fixed_bytes(16, 5, 4)
    found = [segment.attend(query, AttendContext(0.5)) for segment in segments]
    torch.testing.assert_close(found[0].out, found[1].out, atol=1e-4, rtol=1e-4)
    for row in range(4):
        own = {name: x[1] for name, x in weights().items()}
        psi = key_features(key[row].expand(2, -1, -1), own)[row % 2]
        for member in range(2):
            asked = query[row].unflatten(0, (2, 3))[member]
            phi = query_features(asked.expand(4, -1, -1), own)[row % 2 * 2 + member]
            mass = phi @ psi.T
            rows = slice(3 * member, 3 * member + 3)
            torch.testing.assert_close(found[0].lse[row, rows], mass.sum(-1).log(), atol=1e-4, rtol=1e-4)
            expected = mass @ value[row] / mass.sum(-1, keepdim=True)
            torch.testing.assert_close(found[0].out[row, rows], expected, atol=1e-4, rtol=1e-4)


def test_features_that_give_the_exponential_make_it_full_attention(monkeypatch):
    """Keys that are unit vectors are their own features, and a query's are the exponentials of its products with them."""
    monkeypatch.setattr(recurrence, "key_features", lambda key, own: key)
    monkeypatch.setattr(recurrence, "query_features", lambda query, own: (query * 0.5).exp())
    key, value, query = torch.eye(8)[torch.randint(8, (2, 30))], torch.randn(2, 30, 8), torch.randn(2, 6, 8)
    layer = LayerCache(0, 2)
    layer.start(1)
    gone = key[:, :25].flatten(0, 1), value[:, :25].flatten(0, 1), torch.arange(25).int().repeat(2)
    Recurrence(8, weights()).receive(layer, Evicted(*gone, torch.zeros(50), [25, 25]))
    kept = DenseSegment(2)
    kept.append(key[:, 25:].flatten(0, 1), value[:, 25:].flatten(0, 1), {"position": torch.arange(10).int()}, [5, 5])
    found = merge([segment.attend(query, AttendContext(0.5)) for segment in (layer.front[0], kept)])
    logits = query @ key.mT * 0.5
    torch.testing.assert_close(found.lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.out, logits.softmax(-1) @ value, atol=1e-4, rtol=1e-4)


def test_the_cache_answers_as_the_training_says():
    """One forward brings the cache to its window; the next token's answer is kept entries and state under one normalizer."""
    model, ids = tiny_model("llama", num_hidden_layers=1), random_text(61)
    Artifact("less", fingerprint(model), weights(layers=1), {}).save()
    cache = KVCache(model, "less", 20, when="every(1)")
    run(model, cache, ids[:, :60], [60])
    assert kept_positions(cache, 0) == [[0, 1, 2, 3, *range(44, 60)]] * 2
    calls: list[AttentionCall] = []
    watch(model, ids, lambda index, call, lse: calls.append(call))
    answer: list[Tensor] = []
    attend = cache.attend
    cache.attend = lambda *args: answer.append(attend(*args)) or answer[-1]  # type: ignore[method-assign]
    with torch.inference_mode():
        model(ids[:, 60:], past_key_values=cache)
    (call,) = calls
    rule = build("less", window=17)  # the new token is one of them
    _, expected = rule.answers(
        call.query[:, :, 60:], call.key, call.value, torch.tensor([60]), weights(layers=1), call.scale
    )
    torch.testing.assert_close(answer[0], expected, atol=1e-5, rtol=1e-4)


def test_exact_where_nothing_leaves_and_bytes_bound_the_rest():
    model, ids = tiny_model("llama"), random_text(110)
    Artifact("less", fingerprint(model), weights(), {}).save()
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(
        feed(model, KVCache(model, "less", 110), ids, chunks(110, 40)), expected, atol=1e-4, rtol=0
    )
    cache = KVCache(model, "h2o+less", "24KiB")
    feed(model, cache, ids, chunks(100, 40) + [1] * 10)
    assert cache.enforcer.evictions and cache.layers[0].store.front[0].lengths == [8, 8]
    with pytest.raises(PolicyError, match="no keys"):
        run(model, KVCache(model, "less+kcache(top=4)", 30), ids[:, :103], [100] + [1] * 3)


def test_the_fit_comes_closer_to_the_full_cache_on_text_that_it_has_not_seen():
    model = tiny_model("llama", num_hidden_layers=1)
    given = {"count": 2, "length": 96, "steps": 40, "window": 24, "hidden": 16, "rate": 1e-2}
    texts = [random_text(96, seed=s)[0] for s in range(2)]
    path = calibrate("less", model, texts=texts, **given)
    fitted = Artifact.load("less", fingerprint(model), path).tensors
    assert all(x.isfinite().all() for x in fitted.values())
    rule = build("less", **given)
    calls: list[AttentionCall] = []
    watch(model, random_text(96, seed=9), lambda index, call, lse: calls.append(call))
    call, steps = calls[0], torch.arange(40, 96)
    errors = []
    nothing = {name: x if name != "key_scale" else torch.zeros_like(x) for name, x in fitted.items()}
    for tried in (nothing, fitted):
        full, mixed = rule.answers(call.query[:, :, steps], call.key, call.value, steps, tried, call.scale)
        errors.append(float((full - mixed).square().mean()))
    assert errors[1] < 0.9 * errors[0], errors
    again = Artifact.load("less", fingerprint(model), calibrate("less", model, texts=texts, **given)).tensors
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)
