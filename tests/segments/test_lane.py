"""The prepared decode step answers, stores and sums as the longer way does, and steps aside where it cannot."""

from collections.abc import Callable

import pytest
import torch

import kvbudget
from kvbudget import kernels
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.view import View
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.quantized import QuantizedSegment
from tiny import random_text, tiny_model

pytestmark = pytest.mark.skipif(kernels.backend().name != "native", reason="lanes are the extension's")
BATCH, HEADS, GROUP, WIDTH = 2, 3, 2, 16


def coded(rows: int) -> QuantizedSegment:
    return QuantizedSegment(rows, ChannelQuant(bits=4, unit=8, residual=16), TokenQuant(bits=2, group=8, residual=24))


def token(dtype: torch.dtype, n: int = 1, window: int | None = None, softcap: float | None = None) -> AttentionCall:
    query = torch.randn(BATCH, HEADS * GROUP, n, WIDTH).to(dtype)
    key, value = (torch.randn(BATCH, HEADS, n, WIDTH).to(dtype) for _ in range(2))
    return AttentionCall(query, key, value, scale=0.3, window=window, softcap=softcap)


def pair(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[LayerCache, LayerCache]:
    """Two empty layers, of which the second always takes the longer way."""
    layers = tuple(LayerCache(0, HEADS, **options) for _ in range(2))  # type: ignore[arg-type]
    monkeypatch.setattr(layers[1], "_step", lambda call, add: None)
    return layers  # type: ignore[return-value]


def agree(
    layers: tuple[LayerCache, LayerCache],
    call: AttentionCall,
    decay: list[float] | None = None,
    keep: torch.Tensor | None = None,
) -> bool:
    """Gives both layers a call, and says whether the first took its lane (and, with ``decay``, its logits for the votes).

    With ``keep``, the forward ends with an eviction.
    """
    (out, lse), (expected, expected_lse) = (layer.forward(call) for layer in layers)
    torch.testing.assert_close(out, expected, rtol=1e-5 if out.dtype is torch.float32 else 1e-2, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    quick = layers[0]._fresh
    if decay is not None:
        for layer in layers:
            layer.add_mass("votes", call.query, expected_lse, call, decay, 0.5)
        votes = [torch.cat([part.meta.padded("votes") for part in layer.main], dim=1) for layer in layers]
        torch.testing.assert_close(votes[0], votes[1], rtol=1e-4, atol=1e-6)
        quick = quick and layers[0]._lane.kept
    for layer in layers:
        if keep is not None:
            layer.evict(keep)
        layer.finish_forward()
    assert layers[0].kept() == layers[1].kept() and layers[0].seen == layers[1].seen
    layers[0].check_integrity()
    return quick


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [DenseSegment, coded])
def test_as_the_longer_way(make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = pair(monkeypatch, make_segment=make)
    agree(layers, token(dtype, 37))
    # Over sealings of both sides and growing storages.
    assert all(agree(layers, token(dtype)) for _ in range(90))
    for segments in zip(layers[0].main, layers[1].main, strict=True):
        for a, b in zip(*([s.keys(), s.values(), s.positions()] for s in segments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("make", [DenseSegment, coded])
def test_ragged_rows_after_an_eviction_and_a_soft_cap(make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layers = pair(monkeypatch, make_segment=make, states=("votes",))
    agree(layers, token(torch.float32, 48))
    units = layers[0].sealed_units()
    keep = (units % 24 < torch.tensor([24, 8, 16, 8, 24, 16])[:, None]) | (units >= 40)
    for layer in layers:
        layer.evict(keep, spare=3)
    assert len(set(layers[0].main[0].lengths)) > 1
    decay = [0.5, 0.9, 1.0, 0.0, 0.3, 1.0]
    assert sum(agree(layers, token(torch.float32, softcap=2.0), decay) for _ in range(16)) > 4


def test_a_token_that_finds_no_room_waits_until_another_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves but what is behind the entry that leaves, be it the newest one itself."""
    torch.manual_seed(5)
    layers = pair(monkeypatch, states=("votes",))
    agree(layers, token(torch.float32, 12))
    for layer in layers:
        layer.evict(torch.ones(BATCH * HEADS, 12, dtype=torch.bool))
        layer.set_capacity([12 * HEADS] * BATCH)
        layer.spills = True
    address = layers[0].main[0].meta.columns["key"].data_ptr()
    for step in range(8):
        leaving = torch.randint(13, (BATCH * HEADS, 1)) if step < 7 else torch.full((BATCH * HEADS, 1), 12)
        assert agree(layers, token(torch.float32), [0.5] * BATCH * HEADS, torch.arange(13) != leaving) or step == 0
        (quick,), (slow,) = (layer.main for layer in layers)
        assert quick.meta.columns["key"].data_ptr() == address
        for a, b in zip(*([s.keys(), s.values(), s.positions()] for s in (quick, slow)), strict=True):
            assert torch.equal(a, b)


def test_a_token_that_waited_in_vain_is_coded_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a share has grown meanwhile, nothing leaves; the token must not stay apart from those that a codec awaits."""
    torch.manual_seed(6)
    layers = pair(monkeypatch, make_segment=coded)
    agree(layers, token(torch.float32, 31))
    for layer in layers:
        layer.evict(torch.ones(BATCH * HEADS, 31, dtype=torch.bool))
        layer.set_capacity([31 * HEADS] * BATCH)
        layer.spills = True
    for _ in range(4):
        assert agree(layers, token(torch.float32))
        (quick,), (slow,) = (layer.main for layer in layers)
        assert quick.key.coded == slow.key.coded == [32] * BATCH * HEADS
        assert quick.value.coded == slow.value.coded


def test_a_sliding_window_hides_what_it_has_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    layers = pair(monkeypatch, window=20)
    agree(layers, token(torch.float32, 12, window=20))
    for _ in range(100):
        agree(layers, token(torch.float32, window=20))


def test_a_fork_and_its_origin_go_their_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    layer = LayerCache(0, HEADS)
    layer.forward(token(torch.float32, 10))
    layer.forward(token(torch.float32))
    fork = layer.fork()
    before = layer.main[0].keys().clone()
    for _ in range(5):
        fork.forward(token(torch.float32))
    assert torch.equal(layer.main[0].keys(), before)
    for _ in range(5):
        layer.forward(token(torch.float32))
    assert torch.equal(fork.main[0].keys()[:, : before.shape[1]], before)
    assert layer.seen == fork.seen == [16, 16]


def test_mass_is_not_taken_from_an_older_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between that took the longer way must not leave the older logits to be used."""
    torch.manual_seed(4)
    layers = pair(monkeypatch, states=("votes",))
    agree(layers, token(torch.float32, 10))
    for strided in (False, False, True):
        call = token(torch.float32)
        if strided:
            call.key = torch.cat([call.key, call.key], dim=-1)[..., :WIDTH]
        out = [layer.forward(call) for layer in layers]
        for layer, (_, lse) in zip(layers, out, strict=True):
            layer.add_mass("votes", call.query, lse, call, [1.0] * BATCH * HEADS, 1.0)
    assert not layers[0]._fresh
    votes = [layer.main[0].meta.padded("votes") for layer in layers]
    torch.testing.assert_close(votes[0], votes[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "phi"])
@pytest.mark.parametrize("policy", ["full", "kivi(residual=32)", "snapkv(window=8)", "h2o+kivi(residual=32)"])
def test_models_decode_in_their_lanes(name: str, policy: str) -> None:
    """A lane that a model's tensors never fit into would only be slow, so the steps that take it are counted."""
    model = tiny_model(name)
    cache = kvbudget.KVCache(model, policy, None if policy in ("full", "kivi(residual=32)") else 80)
    ids, quick = random_text(150), 0
    with torch.no_grad():
        model(ids[:, :130], past_key_values=cache)
        for i in range(130, 150):
            model(ids[:, i : i + 1], past_key_values=cache)
            quick += all(layer.store._fresh for layer in cache.layers)
    assert quick >= 14


@pytest.mark.parametrize("policy", ["snapkv(window=8)", "h2o+kivi(residual=32)", "ems(window=8)"])
def test_sums_are_added_as_a_scorer_that_observes_adds_them(policy: str) -> None:
    model, ids = tiny_model("llama", num_hidden_layers=4), random_text(150)
    caches = [kvbudget.KVCache(model, policy, 80) for _ in range(2)]
    observed = [0, 0]
    for layer in caches[1].layers:
        layer.store.sums = None
    for i, cache in enumerate(caches):
        observe = cache.enforcer.observe

        def counted(index: int, view: View, i: int = i, observe: Callable[..., None] = observe) -> None:
            observed[i] += 1
            observe(index, view)

        cache.enforcer.observe = counted  # type: ignore[method-assign]
        with torch.no_grad():
            model(ids[:, :110], past_key_values=cache)
            for j in range(110, 150):
                model(ids[:, j : j + 1], past_key_values=cache)
    assert observed[1] - observed[0] > 40  # of 80 steps of layers between the first and the last
    for quick, slow in zip(*([View(layer.store) for layer in cache.layers] for cache in caches), strict=True):
        assert torch.equal(quick.positions, slow.positions)
        for name in caches[0].parts.scorer.states:
            assert quick.state(name).any() and torch.equal(quick.state(name), slow.state(name))
