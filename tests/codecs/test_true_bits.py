"""True bits per element from what is stored, against the papers' formulas, tails included, for a text of 4k tokens."""

from dataclasses import fields, replace

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.codecs.base import Codec
from kvbudget.codecs.transform import Transform, pack
from kvbudget.eval.rate import expected_bits, stored_bytes, true_bits
from kvbudget.methods import parse, registry
from kvbudget.models import Rotation
from kvbudget.segments.quantized import QuantizedSegment
from tiny import random_text, tiny_model

T, D = 4096, 128
NAT = 16  # bits of the model's own elements

# Bits of a coded element of keys and of values; entries in full precision (tails and sinks) of keys and of values.
FORMULAS = {
    "bf16": (16, 16, 0, 0),
    "fp8_e4m3": (8, 8, 0, 0),
    "fp8_e5m2": (8, 8, 0, 0),
    "int8": (8 + 32 / D, 8 + 32 / D, 0, 0),
    "posit8": (8, 8, 0, 0),
    "posit16": (16, 16, 0, 0),
    "kivi(bits=2)": (2 + 32 / 32, 2 + 32 / 32, T % 128, 128),
    "kivi(bits=4, group=64)": (4 + 32 / 64, 4 + 32 / 64, T % 128, 128),
    "squat(bits=2)": (2 + 32 / 32, 2 + 32 / 32, T % 32, 32),
    # Outliers of 24 bits: one at each end of 64 elements of a channel, or of the 128 of an entry.
    "gear(bits=2)": (
        2 + 32 / 64 + 24 * 2 / 64 + NAT * 4 * (T + D) / (T * D),
        2 + 32 / 64 + 24 * 2 / 128 + NAT * 4 * (T + D) / (T * D),
        0,
        0,
    ),
    "zipcache": (4 * 0.6 + 2 * 0.4 + 8 / D, 4 * 0.6 + 2 * 0.4 + 8 / D + 32 / D, T % 100, T % 100),
    "qaq(least=3, most=3)": (3 + 24 / D + 40 / D, 3 + 24 / D + 40 / D, 0, 0),
    "turboquant(bits=3)": (3 + 16 / D, 3 + 16 / D, 0, 0),
    "turboquant(bits=3, qjl=True)": (3 + 32 / D, 3 + 16 / D, 0, 0),
    "rotatekv(bits=2)": (2 + 32 / 128, 2 + 32 / 128, 4, 4),
    "kvquant(bits=3)": (3 + 24 / D, 3 + 24 / D + 32 / D, 1, 1),
    "vidkv": (1.5 + (16 * 0.5 + 16) / 32, 1.6 + 16 / 32, 0, 0),
    "visual_1bit": (1 + 32 / T, 1 + 32 / T, 4 + 32, 4 + 32),
    "zipvl": (4 + 8 / D, 4 + 8 / D + 32 / D, T % 100, T % 100),  # without queries every entry is important
    "nsnquant(bits=1)": (1 + 32 / D + 16 / 64, 1 + 32 / D + 16 / 64, 0, 0),
    "quantspec": (8 + 32 / 128, 8 + 32 / 128, 128, 128),
    "hcattention(channels=8)": (8 / 8 + NAT * 256 / T, 16, 0, 0),
    "cq": (8 / 8, 8 / 8, 4 + 32, 4 + 32),
    "commvq(bits=1)": (136 / D + 16 / D, 1 + 16 / D, 128, 128),  # 11 codes of 12 bits in 17 bytes
    "csr(terms=2)": ((24 * 2 + 16) / D, (24 * 2 + 16) / D, 4 + 68, 4 + 68),
    "quantized_pruning(bits=4)": (4 + 32 / 64, 4 + 32 / 64, 32, 32),
    "kv_codecs": (4 + 32 / 128, 3 + 16 / D, 4, 0),
    "kv_codecs(keys='commvq(bits=1)', values='kivi(bits=2)')": (136 / D + 16 / D, 2 + 32 / 32, 128, 128),
}


def test_no_codec_is_missing():
    """Those of all heads together are in test_joint.py; destinations and saved caches have a test of their own below."""
    named = {policy.partition("(")[0] for policy in FORMULAS} | {"xquant", "xquant_cl", "aquakv"}
    assert named == {name for name, kind in registry().items() if kind.role == "codec"}


@pytest.mark.parametrize("policy", FORMULAS)
def test_stored_bits_are_those_of_the_formula(policy):
    key, value = (calibrated(codec) for codec in parse(policy).parts().codec)
    segment = QuantizedSegment(1, key, value, rotation=Rotation(torch.empty(0)))
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    segment.append(x[0], x[1], {"position": torch.arange(T, dtype=torch.int32)}, [T])
    segment.seal()
    found = 8 * stored_bytes(segment) / (2 * T * D)
    bits = [(b * (T - n) + NAT * n) / T for b, n in zip(FORMULAS[policy][:2], FORMULAS[policy][2:], strict=True)]
    assert found == pytest.approx(sum(bits) / 2, rel=0.02)
    own = (expected_bits(key, D, T, 2) + expected_bits(value, D, T, 2)) / 2
    assert found == pytest.approx(own, rel=1e-6) or (key.variable and found < own)


def test_important_and_demoted_entries_take_the_bits_of_the_formula():
    """MiKV with a fifth of the entries in full precision: ``r 16 + (1 - r) (b + 32 / g)``, with half a head per scale."""
    model = tiny_model(
        "llama", torch.bfloat16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=D
    )
    cache = KVCache(model, "mikv(bits=2)", T // 5)
    for begin in range(0, T, 512):
        with torch.inference_mode():
            model.base_model(random_text(T)[:, begin : begin + 512], past_key_values=cache)
    assert true_bits(cache) == pytest.approx(0.2 * NAT + 0.8 * (2 + 32 / 64), rel=0.02)


def test_streams_of_kvtc_take_the_bits_that_were_asked_for():
    """Rows as they were fitted to; the first 4 and the newest 128 tokens of a text stay in 16 bits beside them."""
    pytest.importorskip("constriction")
    width, asked, plain = 512, 2.0, 4 + 128
    rows = torch.randn(2 * T, width, generator=torch.Generator().manual_seed(0)) * 0.98 ** torch.arange(width)
    fitted = Transform.fit(rows[:T], 256)
    packed = pack(fitted.quantize(rows[T + plain :], fitted.plan(width * asked)))
    stream = 8 * sum(x.numel() * x.itemsize for x in packed.values())
    found = (stream + NAT * width * plain) / (width * T)
    assert found == pytest.approx((asked * (T - plain) + NAT * plain) / T, rel=0.02)


def calibrated(codec: Codec) -> Codec:
    """A codec with what a calibration of one KV head would give it."""
    found = {
        "book": torch.linspace(-1, 1, 8).expand(2, 8),
        "offset": torch.zeros(1, D),
        "spread": torch.full((1, D), 3.0),
        "words": torch.randn(1, 16, 256, 8),
        "atoms": torch.eye(D),
        "vectors": torch.randn(1, 22, 1, 64, D),
        "order": torch.arange(D),
    }
    return replace(codec, **{name: x for name, x in found.items() if name in {field.name for field in fields(codec)}})
