"""True bits of a cache and its distance from the full one, as the rate-distortion figure needs them."""

import pytest

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.eval.fidelity import continuation_logits
from kvbudget.eval.rate import codecs, expected_bits, measure, true_bits
from kvbudget.eval.replay import record, replay
from tiny import random_text, tiny_model


def test_rate_and_distortion_of_codecs(tmp_path, monkeypatch):
    model, ids = tiny_model("llama"), random_text(120)
    recording, continuation = record(model, ids[:, :100]), ids[:, 100:]
    whole = replay(recording, KVCache(model, "full"))
    full = continuation_logits(model, whole, recording.logits, continuation)
    assert true_bits(whole) == 32
    found = {}
    for policy in ("full", "int8", "kivi(bits=4, group=16, residual=16)", "kivi(bits=2, group=16, residual=16)"):
        bits, fidelity = measure(model, recording, policy, continuation, full)
        found[policy] = fidelity.kl_mean
        sides = KVCache(model, policy).parts.codec or ()
        expected = [expected_bits(codec, 16, 100, 2) for codec in sides] or [16.0]
        assert bits == pytest.approx(sum(expected) / len(expected))
    assert list(found.values()) == sorted(found.values()) and found["full"] < 1e-6
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    calibrate("xquant_cl", model)
    bits, fidelity = measure(model, recording, "xquant_cl(group=16)", continuation, full)
    assert bits == pytest.approx((96 * (4 + 32 / 16) + 4 * 16) / 100)
    assert 0 < fidelity.kl_mean < found["kivi(bits=2, group=16, residual=16)"]


def test_the_figure_has_every_codec_that_runs_without_a_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    policies = codecs(tiny_model("llama"))
    assert {"bf16", "gear(bits=2)", "zipcache", "turboquant(bits=3)", "vidkv", "kivi"} <= set(policies)
    assert not any(policy.startswith(("kvquant", "quantized_pruning")) for policy in policies)
