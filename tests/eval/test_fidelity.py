import math

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from transformers import DynamicCache

from kvbudget import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.eval.fidelity import KL_FLOOR, attention_calls, attention_errors, compare_logits, continuation_logits
from kvbudget.eval.replay import Observed, record, replay
from kvbudget.eval.tasks import parse
from kvbudget.eval.tasks.base import Probe, Reading, read
from tiny import random_text, tiny_model


def plain_reading(model: object, context: torch.Tensor, probe: Probe) -> Reading:
    """The reading of a model without kvbudget: sdpa and transformers' own cache."""
    model.set_attn_implementation("sdpa")
    ids = torch.cat([context, probe.question, probe.answer])[None, :-1]
    with torch.inference_mode():
        logits = model(ids, past_key_values=DynamicCache(config=model.config)).logits[0, -len(probe.answer) :]
    return Reading(logits[probe.skip :], probe.answer[probe.skip :])


def test_distances_follow_their_definitions() -> None:
    full = torch.tensor([[math.log(0.5), math.log(0.5)], [math.log(0.9), math.log(0.1)]])
    other = torch.tensor([[math.log(0.25), math.log(0.75)], [math.log(0.9), math.log(0.1)]])
    found = compare_logits(full, other, torch.tensor([0, 1]))
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl_mean == pytest.approx(kl / 2, rel=1e-5)
    assert found.log_kl == pytest.approx(math.log(kl / 2), rel=1e-5)
    assert found.kl_p95 == pytest.approx(0.95 * kl, rel=1e-5)
    assert found.agreement == 0.5
    assert found.nll_rise == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.sqrt(2), rel=1e-5)
    assert found.tokens == 2


def test_equal_logits_have_the_floor_as_logarithm() -> None:
    logits = torch.randn(4, 9)
    assert compare_logits(logits, logits, torch.arange(4)).log_kl == math.log(KL_FLOOR)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_the_full_cache_equals_plain_attention(name: str) -> None:
    model = tiny_model(name, vocab_size=VOCAB_SIZE)
    (example,) = parse("fidelity(length=300, tokens=30, text=prose)").examples(byte_tokenizer(), 1)
    for probe in example.probes:
        expected = plain_reading(model, example.context, probe)
        cache = replay(record(model, example.context[None]), KVCache(model, "full"))
        found = compare_logits(expected.logits, read(model, cache, probe).logits, expected.targets)
        assert found.kl_mean <= 1e-6
        assert found.agreement == 1.0


def test_a_continuation_is_read_row_by_row() -> None:
    model = tiny_model("llama")
    ids, more = random_text(60), random_text(12, seed=7)
    recording = record(model, ids)
    cache = replay(recording, KVCache(model, "snapkv(window=8)", 30))
    at_once = continuation_logits(model, cache, recording.logits, more)
    assert at_once.shape == (12, model.config.vocab_size)
    assert torch.equal(at_once[0], recording.logits[0])
    assert cache.get_seq_length() == 60
    # Token by token the policy acts between the tokens: later rows are those of a smaller cache.
    by_one = continuation_logits(model, cache, recording.logits, more, step=1)
    assert torch.allclose(by_one[:2], at_once[:2], atol=1e-4)


def test_attention_errors_are_zero_for_the_full_cache_and_grow_with_eviction() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    recording, more = record(model, random_text(200)), random_text(20, seed=3)
    full = replay(recording, KVCache(model, "full"))
    calls = attention_calls(model, full, more)
    assert max(attention_errors(calls, full, replay(recording, KVCache(model, "full")))) == 0.0
    means = []
    for budget in ("75%", "50%", "25%"):
        errors = attention_errors(calls, full, replay(recording, KVCache(model, "random", budget)))
        assert len(errors) == 3
        means.append(sum(errors))
    assert 0.0 < means[0] < means[1] < means[2]
    assert full.get_seq_length() == 200 and full.probing is None


def test_layers_that_predict_one_another_are_asked_in_their_order(tmp_path) -> None:
    model = tiny_model("llama", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    file = calibrate("xquant_cl", model, tmp_path / "xquant_cl.safetensors")
    recording, more = record(model, random_text(60)), random_text(9, seed=3)
    full = replay(recording, KVCache(model, "full"))
    coded = replay(recording, KVCache(model, f"xquant_cl(bits=8, group=64, file={str(file)!r})"))
    assert max(attention_errors(attention_calls(model, full, more), full, coded)) < 0.02


@pytest.mark.parametrize(("kind", "method"), [("gemma3n", "snapkv"), ("llama", "snapkv+adakv+xquant_cl")])
def test_caches_that_begin_from_the_same_statistics_hold_what_they_would_alone(
    kind, method, tmp_path, monkeypatch
) -> None:
    """Where layers read, or judge, what another one holds."""
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model(kind)
    if kind == "llama":
        calibrate("xquant_cl", model)
    recording, token, observed = record(model, random_text(80)), random_text(1, seed=3), Observed()
    for budget in (30, 40):
        found, alone = (KVCache(model, method.replace("snapkv", "snapkv(window=8)"), budget) for _ in range(2))
        replay(recording, found, observed), replay(recording, alone)
        with torch.inference_mode():
            logits = [model(token, past_key_values=cache).logits for cache in (found, alone)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
        assert found.enforcer.evictions


def test_the_attention_error_is_that_of_a_direct_computation() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids, more = random_text(50), random_text(1, seed=4)
    recording = record(model, ids)
    full = replay(recording, KVCache(model, "full"))
    cut = replay(recording, KVCache(model, "knorm", 20))
    (found,) = attention_errors(attention_calls(model, full, more), full, cut)
    call = record(model, torch.cat([ids, more], 1)).calls[0]
    groups = call.query.shape[1] // call.key.shape[1]
    query = call.query[0, :, -1]
    outs = []
    for store in (full.layers[0].store, cut.layers[0].store):
        rows = []
        for head in range(query.shape[0]):
            segment, row = store.main[0], head // groups
            held = segment.positions()[row]
            kept = torch.cat([held[held >= 0].long(), torch.tensor([50])])
            key, value = call.key[0, row, kept], call.value[0, row, kept]
            rows.append((query[head] @ key.T * call.scale).softmax(-1) @ value)
        outs.append(torch.stack(rows))
    assert found == pytest.approx(float((outs[1] - outs[0]).norm() / outs[0].norm()), rel=1e-4)
