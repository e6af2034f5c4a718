"""Caches saved without loss: what is loaded goes on bit by bit, and damaged or foreign files are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, KVBudgetError
from kvbudget.storage import container
from tiny import left_padded, random_text, tiny_model


def go_on(model, cache, ids, mask=None):
    """Logits of some more tokens, one by one."""
    logits = []
    for step in range(ids.shape[1] - cache.get_seq_length()):
        at = cache.get_seq_length()
        options = {}
        if mask is not None:
            options = {"attention_mask": mask[:, : at + 1], "position_ids": mask[:, : at + 1].sum(1)[:, None] - 1}
        with torch.inference_mode():
            logits.append(model(ids[:, at : at + 1], past_key_values=cache, **options).logits)
        if step % 10 == 0:
            cache.check_integrity()
    return torch.cat(logits, dim=1)


def kept(cache):
    return [store.kept() for store in cache.enforcer.layers]


@pytest.mark.parametrize(
    ("name", "policy", "budget"),
    [
        ("llama", "full", None),
        ("llama", "snapkv(window=8)+adakv", 48),
        ("llama", "cake(window=8)", "40KiB"),
        ("llama", "mikv(bits=2)", "60KiB"),
        ("llama", "streaming_llm+kivi(bits=2, group=8, residual=16)", 70),
        ("llama", "gear(group=16)", None),
        ("llama", "d2o", 60),
        ("llama", "lacache(positions=cache)", 40),
        ("gemma3", "h2o", "25%"),
        ("qwen3_next", "tova", 40),
    ],
)
def test_a_loaded_cache_goes_on_bit_by_bit(name, policy, budget, tmp_path):
    model, ids = tiny_model(name), random_text(150)
    cache = KVCache(model, policy, budget, max_length=150, protect=[(5, 9)])
    cache.prefill(model, ids[:, :110], chunk_size=37)
    go_on(model, cache, ids[:, :113])
    saved = cache.save(tmp_path / "some" / "cache.kv")
    assert saved.path.stat().st_size == saved.nbytes < cache.nbytes + 20_000
    loaded = KVCache.load(saved.path, model)
    loaded.check_integrity()
    assert str(loaded.policy) == str(cache.policy) and loaded.budget == cache.budget
    assert kept(loaded) == kept(cache) and loaded.seen == cache.seen
    assert torch.equal(go_on(model, loaded, ids), go_on(model, cache, ids))
    assert kept(loaded) == kept(cache) and loaded.enforcer.evictions == cache.enforcer.evictions
    with pytest.raises(CacheError, match="position 3"):
        changed = torch.cat([ids, ids], dim=1)
        changed[0, 3] += 1
        loaded.prefill(model, changed)


def test_padded_batches_and_forks_are_saved_too(tmp_path):
    model = tiny_model("llama")
    ids, mask = left_padded([random_text(n, seed=n) for n in (30, 75, 51)])
    cache = KVCache(model, "snapkv(window=8)", 40, when="every(4)")
    cache.prefill(model, ids, attention_mask=mask)
    fork = cache.fork()
    ids, mask = torch.cat([ids, random_text(12, rows=3)], dim=1), torch.cat([mask, mask.new_ones(3, 12)], dim=1)
    go_on(model, fork, ids[:, :80], mask)
    fork.save(tmp_path / "fork")
    loaded = KVCache.load(tmp_path / "fork", model)
    assert loaded.parts.trigger == cache.parts.trigger
    assert torch.equal(go_on(model, loaded, ids, mask), go_on(model, fork, ids, mask))


@pytest.fixture
def saved(tmp_path):
    model = tiny_model("llama")
    cache = KVCache(model, "full")
    cache.prefill(model, random_text(20))
    cache.save(tmp_path / "cache")
    return model, tmp_path / "cache"


def test_any_flipped_byte_and_any_cut_is_refused(saved):
    model, path = saved
    refuses_damage(path, lambda: KVCache.load(path, model), 997)


def refuses_damage(path: Path, load: Callable[[], KVCache], step: int) -> None:
    """Flips bytes, one at a time and every ``step``-th of them beyond the header, and cuts the file short and adds to it."""
    content = path.read_bytes()
    places = [*range(0, 64, 3), *range(64, len(content), step), len(content) - 1]
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(CacheError) as error:
            load()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    for length in (0, 5, 30, 70, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CacheError, match=r"cut off|not a saved cache"):
            load()
    path.write_bytes(content + b"x")
    with pytest.raises(CacheError, match="changed"):
        load()


def test_foreign_files_other_models_and_other_formats_are_refused(saved, monkeypatch):
    model, path = saved
    with pytest.raises(CacheError, match="another model"):
        KVCache.load(path, tiny_model("llama", seed=1))
    with pytest.raises(CacheError, match="float32 entries, the model runs in bfloat16"):
        KVCache.load(path, tiny_model("llama", dtype=torch.bfloat16))
    with pytest.raises(CacheError, match="cannot be read"):
        KVCache.load(path.with_name("missing"), model)
    monkeypatch.setattr(container, "VERSION", 2)
    with pytest.raises(CacheError, match="has version 1 of the format, this kvbudget reads version 2"):
        KVCache.load(path, model)
    path.write_text(json.dumps({"policy": "full"}))
    with pytest.raises(CacheError, match="not a saved cache"):
        KVCache.load(path, model)


def test_what_cannot_be_saved_is_refused(saved):
    model, path = saved
    before = path.read_bytes()
    cache = KVCache.load(path, model)
    with pytest.raises(CacheError, match="did you mean 'raw'"):
        cache.save(path, "rwa")
    with pytest.raises(CacheError, match="takes no options, got ratio"):
        cache.save(path, ratio=4)
    with pytest.raises(CacheError, match="cannot be written"):
        cache.save(path / "below")
    cache.activate_past_recording()
    with pytest.raises(CacheError, match="speculation"):
        cache.save(path)
    cache.broken = "layer 1 of 2"
    with pytest.raises(KVBudgetError, match="broken"):
        cache.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["cache"]


def test_the_model_is_not_kept_alive():
    cache = KVCache(tiny_model("llama"), "full")
    with pytest.raises(CacheError, match="is gone"):
        cache.save("nowhere")
