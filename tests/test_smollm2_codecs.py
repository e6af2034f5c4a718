"""Codecs on the real model: how far each may be from the full cache on real text, and what their papers order."""

from functools import cache

import pytest
import torch

import kvbudget
from kvbudget.calibrate import calibrate
from kvbudget.codecs.base import alone
from kvbudget.codecs.integer import ChannelQuant
from kvbudget.codecs.span import SpanQuant
from kvbudget.eval.fidelity import continuation_logits
from kvbudget.eval.rate import measure
from kvbudget.eval.replay import record, replay
from kvbudget.eval.texts import passages
from kvbudget.models import rotation_of

pytestmark = [pytest.mark.model, pytest.mark.slow]
CONTEXT, NEW = 1024, 128


def measured(model, tokenizer, context, new):
    """Fidelity to the full cache under a policy, measured once: over ``new`` tokens after a context of the model's own text."""
    (ids,) = passages(tokenizer, context + new, 1)
    recording, continuation = record(model, ids[None, :context]), ids[None, context:]
    whole = replay(recording, kvbudget.KVCache(model, "full"))
    full = continuation_logits(model, whole, recording.logits, continuation)

    @cache
    def fidelity(policy, budget=None):
        return measure(model, recording, policy, continuation, full, budget)[1]

    return fidelity, recording


@pytest.fixture(scope="module")
def smollm2():
    return kvbudget.load("smollm2-135m")


@pytest.fixture(scope="module")
def text(smollm2):
    return measured(*smollm2, CONTEXT, NEW)


@pytest.fixture(scope="module")
def fidelity(text):
    return text[0]


@pytest.mark.parametrize(("policy", "kl"), [("int8", 1e-3), ("bf16", 1e-3), ("posit8", 1e-2)])
def test_eight_bits_and_more_are_next_to_the_full_cache(fidelity, policy, kl):
    assert fidelity(policy).kl_mean < kl


def test_eight_bits_lose_no_more_in_the_checkpoints_own_format():
    """In bfloat16 the same entries in another order of sums already cost a thousandth of a nat; int8 adds next to nothing."""
    found, _ = measured(*kvbudget.load("smollm2-135m", dtype="bfloat16"), 128, 48)
    assert found("int8").kl_mean < found("bf16").kl_mean + 1e-3


def test_four_bits_of_kivi_lose_less_than_a_fiftieth_of_a_nat(fidelity):
    assert abs(fidelity("kivi(bits=4)").nll_rise) < 0.02


KIVI_2 = "kivi(bits=2, residual=32)"
LOW_RANK = "gear(bits=2, sparsity=0)"


@pytest.mark.parametrize(
    ("better", "worse", "factor"),
    [
        ("kivi(residual=32)", KIVI_2, 0.2),
        (LOW_RANK, "gear(bits=2, sparsity=0, rank=0)", 0.9),
        ("gear(bits=2)", LOW_RANK, 0.9),
        ("nsnquant(bits=2)", KIVI_2, 1.0),
        ("kivi(bits_k=4, bits_v=2, residual=32)", "kivi(bits_k=2, bits_v=4, residual=32)", 0.6),
        ("visual_1bit", "visual_1bit(lowered=0)", 0.7),
    ],
    ids=["KIVI", "low rank", "outliers", "NSNQuant", "keys need more bits", "calibrated logits"],
)
def test_what_papers_order_is_so(fidelity, better, worse, factor):
    assert fidelity(better).kl_mean < factor * fidelity(worse).kl_mean


def test_keys_per_channel_come_before_keys_per_entry(fidelity):
    per_entry = fidelity("quantized_pruning(bits=2, group=32)", CONTEXT + NEW)
    assert fidelity(KIVI_2).kl_mean < 0.7 * per_entry.kl_mean


def test_more_entries_in_fewer_bits_come_before_fewer_in_more(fidelity):
    """A fifth of the bytes of a 16-bit cache: 8 bits hold nearly twice the entries (More Tokens, Lower Precision)."""
    budget = f"{CONTEXT * 4608}B"  # 30 layers of 3 heads with 64 elements, keys and values, in 2 bytes: 23040 a token
    more, fewer = (
        fidelity(policy, budget).kl_mean for policy in ("quantized_pruning(bits=8, residual=0)", "snapkv+bf16")
    )
    assert more < 0.8 * fewer


def test_what_papers_order_of_calibrated_codecs_is_so(fidelity, smollm2, tmp_path):
    """KVQuant's outliers help its 3 bits, and AQUA-KV's predictors come before KIVI at 2, fitted to a passage or two."""
    model, tokenizer = smollm2
    texts = passages(tokenizer, 256, 2, seed=1)
    kvquant = calibrate("kvquant", model, tmp_path / "kvquant", texts=texts[:1], count=1, length=256, tokens=128)
    aquakv = calibrate("aquakv", model, tmp_path / "aquakv", texts=texts, count=2, length=256)
    plain, outliers = (fidelity(f"kvquant(sparsity={share}, file='{kvquant}')").kl_mean for share in (0.0, 0.01))
    assert outliers < 0.7 * plain
    assert fidelity(f"aquakv(file='{aquakv}')").kl_mean < 0.5 * fidelity(KIVI_2).kl_mean


def test_channels_of_keys_are_even_before_their_rotation(smollm2, text):
    """Per-channel codes lose less before RoPE than after it (KVQuant, section 3.1), over a whole text."""
    codec, error = ChannelQuant(bits=3, unit=CONTEXT, residual=CONTEXT), {"before": 0.0, "after": 0.0}
    for index, call in text[1].calls.items():
        rotation = rotation_of(smollm2[0], index)
        for key in call.key[0].float():
            for name, x in (("after", key), ("before", rotation.strip(key, torch.arange(CONTEXT)))):
                error[name] += float((codec.decode(codec.encode(x)) - x).square().mean())
    assert error["before"] < 0.9 * error["after"]


@pytest.mark.parametrize(("bits", "shrink"), [(1, 0.5), (2, 1.0)])
def test_few_bits_peak_the_softmax_over_a_span(text, bits, shrink):
    """Without calibrated logits (CalibQuant, arXiv 2502.14882), in most heads, by the mean entropy of the newest 32 queries."""
    codec, rows = SpanQuant(bits=bits, shrink=shrink), []
    for call in text[1].calls.values():
        query = call.query[0, :, -32:].float().unflatten(0, (len(call.key[0]), -1)).flatten(1, 2)
        for own, span in zip(query, call.key[0, :, 4:-32].float(), strict=True):
            place = alone(codec, span)
            coded = codec.decode(codec.encode(span, place), place)
            weights = [(own @ x.T * call.scale).softmax(-1) for x in (span, coded)]
            rows.append([float(-torch.special.xlogy(w, w).sum(-1).mean()) for w in weights])
    plain, peaked = torch.tensor(rows).T
    assert (peaked < plain).float().mean() > 0.6 and peaked.mean() < plain.mean() - 0.3
