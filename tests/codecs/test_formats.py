"""Number formats against their definitions and the errors that they have on normal data."""

import pytest
import torch

from kvbudget.codecs.base import alone
from kvbudget.codecs.formats import BFloat16, Float8, Posit, from_posit, to_posit


@pytest.mark.parametrize(("bits", "es"), [(8, 0), (8, 1), (8, 2), (16, 1), (16, 2)])
def test_every_posit_comes_back_and_codes_are_ordered_like_values(bits, es):
    codes = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    values = from_posit(codes, bits, es)
    assert torch.equal(to_posit(values, bits, es).long(), codes)
    assert bool((values[1:] > values[:-1]).all())


def test_posits_saturate_and_never_round_to_zero():
    x = torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30])
    assert from_posit(to_posit(x, 8, 0), 8, 0).tolist() == [0.0, 1 / 64, -1 / 64, 64.0, -64.0]


@pytest.mark.parametrize(("es", "expected"), [(0, 1.0e-4), (1, 1.8e-4), (2, 7.1e-4)])
def test_error_of_posit8_on_normal_data(es, expected):
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    error = (from_posit(to_posit(x, 8, es), 8, es) - x).square().mean()
    assert float(error) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("kind", "relative", "mse"), [("fp8_e4m3", 2**-4, 7.0e-4), ("fp8_e5m2", 2**-3, 2.8e-3)])
def test_error_of_eight_bit_floats(kind, relative, mse):
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * 5
    codec = Float8(kind=kind)
    place = alone(codec, x)
    found = codec.decode(codec.encode(x, place), place)
    normal = x.abs() > 0.05
    assert ((found - x).abs() / x.abs())[normal].max() <= relative
    assert float((found - x).square().mean()) == pytest.approx(25 * mse, rel=0.1)
    later = codec.decode(codec.encode(x * 100, place), place)
    assert bool(later.isfinite().all()) and later.abs().max() <= 2.001 * x.abs().max()


def test_bfloat16_is_torchs():
    x = torch.randn(50, 16) * 100
    codec = BFloat16()
    assert torch.equal(codec.decode(codec.encode(x)), x.bfloat16().float())


def test_a_power_of_two_brings_posits_to_their_best():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 3000
    codec = Posit(bits=8, es=0)
    place = alone(codec, x)
    scaled = codec.decode(codec.encode(x, place), place)
    assert (scaled - x).square().mean() < 2e-4 * x.square().mean()
    assert float(place.state["scale"].log2()) % 1 == 0
