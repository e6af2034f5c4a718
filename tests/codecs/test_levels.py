"""Entries of different bits, and salience by normalized attention, against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbudget.codecs.base import Asked, Place, alone
from kvbudget.codecs.integer import TokenQuant
from kvbudget.codecs.levels import SalientQuant, pack_levels, unpack_levels


@given(st.lists(st.sampled_from((0, 1, 2, 3, 4, 8)), max_size=12), st.sampled_from((8, 16, 80)))
def test_entries_of_any_bits_come_back(bits, width):
    bits = torch.tensor(bits, dtype=torch.uint8)
    limit = (2 ** bits.long())[:, None]
    codes = (torch.randint(0, 256, (len(bits), width)) % limit).to(torch.uint8)
    payload = pack_levels(codes, bits)
    assert payload.numel() == int(bits.sum()) * width // 8
    assert torch.equal(unpack_levels(payload, bits, width), codes)


def uniform(n: int) -> tuple[Asked, torch.Tensor]:
    """Queries that look at everything before them alike: keys of zeros."""
    steps = torch.arange(n)
    lse = (steps + 1.0).log()[None, None]
    return Asked(torch.randn(1, 1, n, 8), lse, steps[None], 1.0), torch.zeros(n, 8)


def test_normalization_takes_most_of_the_favor_for_early_tokens():
    asked, keys = uniform(50)
    normalized = SalientQuant(probes=1.0).judge(asked, 0, keys, torch.arange(50))
    accumulated = asked.weights(0, torch.arange(50), keys, torch.arange(50)).sum((0, 1))
    harmonic = sum(1 / t for t in range(1, 51))
    assert float(accumulated[0] / accumulated[-1]) == pytest.approx(50 * harmonic, rel=1e-4)  # about 225
    assert float(normalized[0] / normalized[-1]) == pytest.approx(harmonic, rel=1e-4)  # about 4.5


def test_probes_are_the_newest_and_evenly_spread_earlier_queries():
    n, codec = 40, SalientQuant(probes=0.1)
    query, keys = torch.randn(2, 3, n, 8), torch.randn(n, 8)
    position = torch.arange(n)
    logits = (query[1] @ keys.T * 0.3).masked_fill(position[None, :] > position[:, None], -math.inf)
    steps = position.expand(2, n).clone()
    asked = Asked(query, torch.stack([torch.zeros(3, n), logits.logsumexp(-1)]), steps, 0.3)
    probes = [0, 9, 18, 27, 36, 37, 38, 39]
    weights = logits.softmax(-1)[:, probes]
    expected = [float(weights[:, :, t].sum()) / max(1, sum(p >= t for p in probes)) for t in range(n)]
    torch.testing.assert_close(codec.judge(asked, 1, keys, position), torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_the_least_salient_share_of_each_row_has_fewer_bits():
    codec, x = SalientQuant(low_share=0.4), torch.randn(20, 16)
    rows = torch.arange(2).repeat_interleave(10)
    state = {name: torch.stack([v, v]) for name, v in codec.start(x, 0, None).items()}
    salience = torch.rand(20)
    bits = codec.encode(x, Place(rows, state, 16, torch.arange(20), salience))["bits"]
    for row in (0, 1):
        mine = slice(10 * row, 10 * row + 10)
        order = salience[mine].argsort()
        assert bits[mine][order].tolist() == [2] * 4 + [4] * 6


def test_channel_divisors_help_values_with_outlier_channels():
    x = torch.randn(200, 64)
    x[:, 5] *= 30
    codec = SalientQuant(side="values", low_share=0.0)
    place = alone(codec, x)
    plain = TokenQuant(bits=4, group=64)
    others = [c for c in range(64) if c != 5]
    error = (codec.decode(codec.encode(x, place), place) - x)[:, others].square().mean()
    assert error < 0.2 * (plain.decode(plain.encode(x)) - x)[:, others].square().mean()
