"""Integer codes against the min-max formula, their true size, and the cases that break published codes."""

import pytest
import torch

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import BITS, ChannelQuant, TokenQuant
from kvbudget.errors import PolicyError
from min_max import per_channel, per_token

WIDTHS = (16, 32, 64, 80, 96, 128)
GROUPS = {16: 16, 32: 32, 64: 32, 80: 20, 96: 32, 128: 32}
"""The largest divisor of the width that is no more than 32."""


def entries(number: int, width: int) -> torch.Tensor:
    """Entries whose channels differ in scale and offset, as those of keys do."""
    return torch.randn(number, width) * torch.rand(width) * 3 + torch.randn(width)


def stored_bytes(columns: dict[str, torch.Tensor]) -> int:
    return sum(column.untyped_storage().nbytes() for column in columns.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_decode_as_the_formula_says(bits, width, dtype):
    x = entries(64, width).to(dtype)
    token = TokenQuant(bits=bits, group=32)
    torch.testing.assert_close(
        token.decode(token.encode(x)).double(), per_token(x, bits, GROUPS[width]), atol=1e-5, rtol=0
    )
    channel = ChannelQuant(bits=bits, unit=16)
    torch.testing.assert_close(channel.decode(channel.encode(x)).double(), per_channel(x, bits, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_stored(bits, width):
    x = entries(64, width)
    for codec in (TokenQuant(bits=bits, group=32), ChannelQuant(bits=bits, unit=32)):
        assert stored_bytes(codec.encode(x)) == 64 * codec.bytes_per_entry(width)


@pytest.mark.parametrize("bits", BITS)
def test_true_bits_per_element(bits):
    token, channel = TokenQuant(bits=bits, group=32), ChannelQuant(bits=bits, unit=32)
    assert token.bytes_per_entry(128) * 8 / 128 == channel.bytes_per_entry(128) * 8 / 128 == bits + 32 / 32
    assert TokenQuant(bits=bits, group=64).bytes_per_entry(128) * 8 / 128 == bits + 32 / 64


@pytest.mark.parametrize("codec", [TokenQuant(bits=2, group=8), ChannelQuant(bits=2, unit=8)])
@pytest.mark.parametrize("constant", [0.0, -3.0, 1e-8, 2048.0])
def test_constant_groups_decode_to_their_constant(codec: Codec, constant):
    x = torch.full((16, 16), constant)
    decoded = codec.decode(codec.encode(x))
    torch.testing.assert_close(decoded, x.half().float(), atol=0, rtol=0)


@pytest.mark.parametrize("codec", [TokenQuant(bits=4, group=8), ChannelQuant(bits=4, unit=8)])
def test_values_beyond_half_precision_stay_finite(codec: Codec):
    x = torch.randn(8, 16)
    x[3, 5], x[6, 0] = 1e6, -1e6
    assert bool(codec.decode(codec.encode(x)).isfinite().all())


def test_outlier_channels_want_groups_along_entries():
    keys = torch.randn(256, 64)
    keys[:, [3, 17, 40]] *= 20
    error = {}
    for name, codec in (("token", TokenQuant(bits=2, group=32)), ("channel", ChannelQuant(bits=2, unit=32))):
        error[name] = (
            (codec.decode(codec.encode(keys)) - keys)[:, [c for c in range(64) if c not in (3, 17, 40)]].square().mean()
        )
    assert error["token"] > 5 * error["channel"]


def test_values_are_not_worse_per_token():
    """A token whose values are large would coarsen the groups along entries of all its neighbors (KIVI, figure 2)."""
    values = torch.randn(256, 64) * torch.linspace(0.05, 2, 256)[torch.randperm(256)][:, None]
    weights = torch.softmax(3 * torch.randn(64, 256), dim=-1)
    error = {}
    for name, codec in (("token", TokenQuant(bits=2, group=32)), ("channel", ChannelQuant(bits=2, unit=32))):
        error[name] = (weights @ (codec.decode(codec.encode(values)) - values)).square().mean()
    assert error["token"] <= error["channel"]


def test_impossible_parameters_are_refused():
    with pytest.raises(PolicyError, match=r"bits=5 .* 1, 2, 3, 4, 8"):
        TokenQuant(bits=5)
    with pytest.raises(PolicyError, match=r"residual 100 .* residual=128"):
        ChannelQuant(bits=4, unit=32, residual=100)
