"""A report says what is kept and what it costs, adds up, and goes through JSON."""

import json
import re

import pytest
import torch
from transformers import DynamicCache

from kvbudget import KVCache
from kvbudget.report import CacheReport
from residency import model_tensors, resident_bytes
from tiny import random_text, tiny_model


def filled(name: str, policy: str, budget: object, tokens: int = 90, batch: int = 1, **options: object) -> KVCache:
    model = tiny_model(name, **options)
    cache = KVCache(model, policy, budget)
    with torch.no_grad():
        model(random_text(tokens, rows=batch), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", "snapkv(window=8)"),
        ("llama", "snapkv(window=8)+adakv+kivi(residual=32)"),
        ("llama", "mikv"),
        ("llama", "d2o"),
        ("gemma2", "streaming_llm"),
        ("gpt_oss", "knorm"),
        ("lfm2", "knorm"),
        ("qwen3_next", "streaming_llm"),
    ],
)
def test_parts_add_up_to_the_bytes_that_are_resident(name: str, policy: str) -> None:
    cache = filled(name, policy, 40, batch=2)
    report = cache.report()
    assert sum(report.parts.values()) == report.nbytes == resident_bytes(cache)
    assert report.peak_bytes >= report.nbytes
    assert ("recurrent states" in report.parts) == (name in ("lfm2", "qwen3_next"))


def test_counts_and_the_full_cache_of_the_same_text() -> None:
    cache = filled("llama", "streaming_llm", 30, batch=3)
    report = cache.report()
    assert report.seen == [90] * 3 and report.kept == [[[30, 30]] * 3] * 2
    assert (report.kept_entries, report.seen_entries) == (2 * 3 * 2 * 30, 2 * 3 * 2 * 90)
    model = tiny_model("llama")
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_text(90, rows=3), past_key_values=full)
    assert report.full_bytes == sum(x.nbytes for layer in full.layers for x in (layer.keys, layer.values))
    assert report.evictions == 2


def test_the_peak_counts_what_a_forward_held_before_it_was_evicted() -> None:
    report = filled("llama", "knorm", 10, tokens=500).report()
    entry = 4 * (16 + 16) + 4
    assert report.nbytes == 2 * 2 * 10 * entry
    assert 2 * 500 * entry + 2 * 10 * entry <= report.peak_bytes < 2 * 2 * 500 * entry, "one layer at a time is full"


def test_text_and_json() -> None:
    report = filled("llama", "snapkv(window=8)+adakv", "64KiB", tokens=200).report()
    text = str(report)
    assert re.search(r"^policy snapkv\(window=8\)\+adakv, budget 64KiB$", text, re.MULTILINE)
    assert (
        f"kept {report.kept_entries} of 800 entries" in text and "question visible when compressed: not known" in text
    )
    assert len(re.findall(r"^layer +\d+: kept per head \d+ \d+$", text, re.MULTILINE)) == 2
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["kept_entries"] == report.kept_entries
    fields = {name: value for name, value in plain.items() if name not in ("kept_entries", "seen_entries")}
    assert CacheReport(**fields) == report


def test_a_new_cache_has_a_report_too() -> None:
    model = tiny_model("llama")
    cache = KVCache(model, "knorm", 100)
    report = cache.report()
    assert (report.nbytes, report.kept_entries, report.seen_entries, report.seen) == (0, 0, 0, [])
    assert "seen 0 tokens" in str(report) and resident_bytes(cache, model_tensors(model)) == 0


def test_a_report_is_a_value_of_its_moment() -> None:
    cache = filled("llama", "knorm", 10)
    before = cache.report()
    cache.reset()
    assert before.kept_entries == 40 and cache.report().kept_entries == 0
