"""QAQ: the bound of its paper, bits that follow attention, and plain rounding where all bits are the same."""

import math

import pytest
import torch

from kvbudget.codecs.adaptive import AdaptiveQuant
from kvbudget.codecs.base import Asked, Place


def place(count: int, width: int, salience: torch.Tensor | None = None) -> Place:
    return Place(torch.zeros(count, dtype=torch.long), {}, width, torch.arange(count), salience)


def test_bits_are_those_of_the_formulas():
    spread, attention = torch.rand(50) * 20, torch.rand(50).square()
    length = torch.full((50,), 1000)
    keys = AdaptiveQuant(side="keys", low=0, high=4, eps=1.0).bits(spread, None, length)
    values = AdaptiveQuant(side="values", low=0, high=4, eps=3.0).bits(spread, attention, length)
    for i in range(50):
        e = math.sqrt(12 / 300 * math.log(1000**3 / 999 + 1))
        assert keys[i] == min(4, math.ceil(math.log2(float(spread[i]) / (2 * e) + 1)))
        e = math.sqrt(12 / 1000) * 3 / float(attention[i])
        assert values[i] == min(4, math.ceil(math.log2(float(spread[i]) / (2 * e) + 1)))


def test_entries_that_get_more_attention_get_no_fewer_bits():
    attention = torch.logspace(-4, 0, 64)
    x = torch.randn(1, 64).expand(64, 64)
    bits = AdaptiveQuant(side="values", low=0, high=4).encode(x, place(64, 64, attention))["bits"]
    assert bits.tolist() == sorted(bits.tolist()) and bits[0] < bits[-1]


def test_halving_the_bound_adds_a_bit():
    spread, length = torch.full((20,), 1e3), torch.full((20,), 100)
    attention = torch.linspace(0.06, 0.095, 20)  # well above the bound, where log2(x + 1) is near log2(x)
    codec = [AdaptiveQuant(side="values", low=0, high=4, eps=eps) for eps in (20.0, 10.0)]
    some, more = (c.bits(spread, attention, length).long() for c in codec)
    assert some.tolist() == [3] * 20 and more.tolist() == [4] * 20


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_equal_limits_are_plain_rounding(bits):
    x = torch.randn(30, 64)
    codec = AdaptiveQuant(low=bits, high=bits, share=0.0)
    mean, spread = x.mean(-1, keepdim=True).half().float(), x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    scale = (spread / 2**bits).half().float()
    expected = ((x - mean) / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale + mean
    where = place(30, 64)
    torch.testing.assert_close(codec.decode(codec.encode(x, where), where), expected, atol=1e-5, rtol=0)


def test_no_bits_keep_the_mean():
    x = torch.randn(5, 16)
    codec, where = AdaptiveQuant(low=0, high=0, share=0.0), place(5, 16)
    columns = codec.encode(x, where)
    assert columns["payload"].numel() == 0
    torch.testing.assert_close(codec.decode(columns, where), x.mean(-1, keepdim=True).half().float().expand(5, 16))


def test_attention_is_the_largest_of_the_newest_queries():
    n, query, keys = 12, torch.randn(1, 2, 12, 8), torch.randn(12, 8)
    position = torch.arange(n)
    logits = (query[0] @ keys.T).masked_fill(position[None] > position[:, None], -math.inf)
    asked = Asked(query, logits.logsumexp(-1)[None], position[None], 1.0)
    found = AdaptiveQuant(window=3).judge(asked, 0, keys, position)
    torch.testing.assert_close(found[:10], logits.softmax(-1)[:, -3:].amax((0, 1))[:10])
    assert bool(found[10:].isinf().all())
