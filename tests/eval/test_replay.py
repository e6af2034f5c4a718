import pytest
import torch

from kvbudget import KVCache
from kvbudget.errors import CacheError
from kvbudget.eval.replay import record, replay
from tiny import random_text, tiny_model

POLICIES = (
    ("full", None),
    ("snapkv(window=8)", 40),
    ("snapkv(window=8)", "40%"),
    ("pyramidkv", 60),
    ("snapkv(window=8)+adakv", 40),
    ("knorm", 40),
    ("streaming_llm(positions=cache)", 40),
    ("kivi(bits=4, residual=32)", None),
    ("h2o", 40),
    ("random", 40),
)


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_a_replayed_cache_equals_a_one_pass_prefill(name: str, policy: str, budget: object) -> None:
    model = tiny_model(name)
    ids, more = random_text(150), random_text(10, seed=1)
    replayed = replay(record(model, ids), KVCache(model, policy, budget))
    direct = KVCache(model, policy, budget)
    with torch.inference_mode():
        model(ids, past_key_values=direct)
        assert replayed.report().kept == direct.report().kept
        assert replayed.nbytes == direct.nbytes
        assert replayed.peak_bytes == direct.peak_bytes
        assert replayed.get_seq_length() == direct.get_seq_length() == 150
        replayed.check_integrity()
        one = model(more, past_key_values=replayed).logits
        other = model(more, past_key_values=direct).logits
    assert torch.allclose(one, other, atol=1e-5)


def test_one_recording_serves_many_caches_that_do_not_touch_each_other() -> None:
    model = tiny_model("llama")
    recording = record(model, random_text(120))
    first = replay(recording, KVCache(model, "snapkv(window=8)", 40))
    before = [key.clone() for call in recording.calls.values() for key in (call.key, call.value)]
    second = replay(recording, KVCache(model, "knorm", 30))
    with torch.inference_mode():
        expected = model(random_text(5, seed=2), past_key_values=first.fork()).logits
        model(random_text(50, seed=3), past_key_values=second)
        assert torch.equal(model(random_text(5, seed=2), past_key_values=first.fork()).logits, expected)
    after = [key for call in recording.calls.values() for key in (call.key, call.value)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_recorded_logits_are_the_model_s() -> None:
    model = tiny_model("llama")
    ids = random_text(80)
    with torch.inference_mode():
        expected = model(ids).logits[:, -1]
    assert torch.allclose(record(model, ids).logits, expected, atol=1e-5)


def test_recurrent_layers_are_refused() -> None:
    with pytest.raises(CacheError, match="recurrent layers"):
        record(tiny_model("lfm2"), random_text(20))
