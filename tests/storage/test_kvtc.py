"""Caches saved transform-coded: small files whose loss is small, exact where nothing is coded, refused where nothing can be."""

import pytest
import torch
from test_raw import refuses_damage

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import CacheError, PolicyError
from tiny import left_padded, random_text, tiny_model

pytest.importorskip("constriction")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "artifacts"))
    model = tiny_model("llama")
    texts = [random_text(100, seed=50 + i)[0] for i in range(3)]
    calibrate("kvtc", model, texts=texts, count=3, length=100, rank=128)
    return model


def positions_and_keys(cache, layer=0):
    segment = cache.enforcer.layers[layer].main[0]
    return segment.positions(), segment.keys(), segment.values()


def test_the_rest_is_exact_and_more_bytes_lose_less(model, tmp_path):
    ids = random_text(210)
    cache = KVCache(model, "full")
    cache.prefill(model, ids[:, :200])
    errors, sizes = [], []
    for ratio in (2, 4, 8):
        saved = cache.save(tmp_path / "kv", "kvtc", ratio=ratio, sinks=3, recent=20)
        assert saved.coded_bytes == 177 * 2 * 2 * 16 * 2 * 4 and saved.coded_ratio > 0.6 * ratio
        loaded = KVCache.load(tmp_path / "kv", model)
        loaded.check_integrity()
        (at, keys, values), (_, close_keys, close_values) = positions_and_keys(cache), positions_and_keys(loaded)
        assert torch.equal(at, loaded.enforcer.layers[0].main[0].positions())
        for exact, close in ((keys, close_keys), (values, close_values)):
            assert torch.equal(exact[:, :3], close[:, :3]) and torch.equal(exact[:, 180:], close[:, 180:])
            assert not torch.equal(exact[:, 3:180], close[:, 3:180])
        errors.append(float((keys - close_keys).square().mean() + (values - close_values).square().mean()))
        sizes.append(saved.nbytes)
        with torch.inference_mode():
            assert bool(model(ids[:, 200:], past_key_values=loaded).logits.isfinite().all())
    assert errors == sorted(errors) and errors[0] < 2e-3 and sizes == sorted(sizes, reverse=True)


def test_padded_batches_and_the_same_evictions_everywhere(model, tmp_path):
    ids, mask = left_padded([random_text(n, seed=n) for n in (90, 150, 121)])
    cache = KVCache(model, "streaming_llm", 80)
    cache.prefill(model, ids, attention_mask=mask)
    saved = cache.save(tmp_path / "kv", "kvtc", ratio=2, recent=16)
    assert saved.coded_bytes > 0
    loaded = KVCache.load(tmp_path / "kv", model)
    loaded.check_integrity()
    for layer in range(2):
        (at, *exact), (other, *close) = positions_and_keys(cache, layer), positions_and_keys(loaded, layer)
        assert torch.equal(at, other)
        for one, two in zip(exact, close, strict=True):
            assert 0 < float((one - two).norm()) < 0.05 * float(one.norm())


def test_tokens_that_some_heads_evicted_stay_exact(model, tmp_path):
    cache = KVCache(model, "snapkv(window=8)+adakv", 115)
    cache.prefill(model, random_text(150))
    cache.save(tmp_path / "kv", "kvtc", recent=8)
    loaded = KVCache.load(tmp_path / "kv", model)
    common = set.intersection(
        *(
            set(s.meta.row("position", r).tolist())
            for layer in cache.enforcer.layers
            for s in layer.main
            for r in range(2)
        )
    )
    assert len([p for p in common if 4 <= p < 142]) > 5
    for layer, other in zip(cache.enforcer.layers, loaded.enforcer.layers, strict=True):
        for row in range(2):
            for i, position in enumerate(layer.main[0].meta.row("position", row).tolist()):
                same = torch.equal(layer.main[0].meta.row("key", row)[i], other.main[0].meta.row("key", row)[i])
                assert same == (position not in common or not 4 <= position < 142)


def test_what_kvtc_cannot_do_is_refused(model, tmp_path):
    coded = KVCache(model, "kivi(bits=4, group=8, residual=16)")
    coded.prefill(model, random_text(150))
    with pytest.raises(CacheError, match="codec='raw'"):
        coded.save(tmp_path / "kv", "kvtc")
    short = KVCache(model, "full")
    short.prefill(model, random_text(40))
    with pytest.raises(CacheError, match="nothing to code"):
        short.save(tmp_path / "kv", "kvtc")
    for options, message in (
        ({"ratio": 0.5}, "ratio=0.5"),
        ({"ratio": "a"}, "ratio='a' .* give a number"),
        ({"rati": 2}, "'ratio'"),
        ({"ratio": 2**63}, r"give a number from 1 to 2147483647"),
        ({"sinks": -1}, "sinks=-1"),
        ({"sinks": 2**63}, "sinks=9223372036854775808 is no number of tokens"),
        ({"recent": "x"}, "recent='x' .* whole number"),
    ):
        with pytest.raises(CacheError, match=message):
            short.save(tmp_path / "kv", "kvtc", **options)
    other = tiny_model("llama", seed=3)
    uncalibrated = KVCache(other, "full")
    uncalibrated.prefill(other, random_text(150))
    with pytest.raises(PolicyError, match="kvbudget calibrate kvtc"):
        uncalibrated.save(tmp_path / "kv", "kvtc")


def test_another_calibration_is_refused(model, tmp_path):
    cache = KVCache(model, "full")
    cache.prefill(model, random_text(150))
    cache.save(tmp_path / "kv", "kvtc", recent=8)
    texts = [random_text(100, seed=70 + i)[0] for i in range(2)]
    path = calibrate("kvtc", model, tmp_path / "other", texts=texts, count=2, length=100, rank=32)
    with pytest.raises(CacheError, match="another calibration"):
        KVCache.load(tmp_path / "kv", model, calibration=path)
    cache.save(tmp_path / "kv", "kvtc", recent=8, calibration=path)
    assert KVCache.load(tmp_path / "kv", model, calibration=path).seen == [150]


def test_damaged_files_are_refused(model, tmp_path):
    cache = KVCache(model, "full")
    cache.prefill(model, random_text(150))
    cache.save(tmp_path / "kv", "kvtc", recent=8)
    refuses_damage(tmp_path / "kv", lambda: KVCache.load(tmp_path / "kv", model), 499)
