"""Native integer codes are those of the torch reference, bit for bit."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbudget.kernels import encode

native = pytest.importorskip("kvbudget.kernels.native", reason="the native extension was not built")


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    width=st.sampled_from([8, 24, 64, 80, 128, 192]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-7, 1e-4, 1.0, 3e4, 1e30]),
    entries=st.sampled_from([0, 1, 5, 70]),
    group=st.sampled_from([1, 3, 8, 20, 32, 64]),
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_codes_scales_and_zeros(
    instruction_set: str,
    seed: int,
    bits: int,
    width: int,
    dtype: torch.dtype,
    size: float,
    entries: int,
    group: int,
    sign: float,
) -> None:
    """Tiny, huge, constant and offset groups, of one sign or both, with zeros of either sign; rows with a gap between them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(entries * group, width + 8, generator=generator) * torch.rand(width + 8, generator=generator)
    x = x.mul_(size).add_(torch.randn(width + 8, generator=generator) * size)
    if sign:
        x.abs_().mul_(sign)
    x[torch.rand(x.shape, generator=generator) < 0.1] = -0.0
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    x[: group + 1] = size
    x = x.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)[:, :width]
    if seed % 8 == 0 and len(x):
        x[-1, -1], x[0, 0] = math.inf, -math.inf
    channels = next(g for g in range(group, 0, -1) if width % g == 0)
    cases = [(encode.encode_tokens, channels, False)]
    if entries:
        cases.append((encode.encode_units, group, True))
    for reference, extent, by_units in cases:
        got = native.encode(x, bits, extent, by_units)
        assert got is not None
        if not entries:
            assert all(column.numel() == 0 for column in got)
            continue
        for found, expected in zip(got, reference(x, bits, extent), strict=True):
            assert found.shape == expected.shape
            assert torch.equal(found, expected)


@pytest.mark.parametrize("offset", [0.0, 95.0, -95.0, 97.0, -767.0, 770.0, 5000.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_between_codes_round_as_a_division_does(
    instruction_set: str, bits: int, offset: float, dtype: torch.dtype
) -> None:
    """Every scale that half precision has, with values halfway between two codes and the floats beside them, and zeros as many
    scales away as `offset` says: the kernels round otherwise before and after some of these."""
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()[:, None]
    levels = 2**bits - 1
    codes = torch.randint(0, levels, (len(scales), 20), generator=torch.Generator().manual_seed(0))
    zeros = (offset * scales).clamp(-6e4, 6e4).half().float()
    between = zeros + (codes + 0.5) * scales
    beside = [torch.nextafter(between, torch.full_like(between, way)) for way in (0.0, torch.inf)]
    ends = zeros + torch.cat([torch.zeros_like(scales), levels * scales, scales, 2 * scales], -1)
    x = torch.cat([ends, between, *beside], -1).to(dtype)
    expected = encode.encode_tokens(x, bits, x.shape[1])
    if not offset and dtype == torch.float32:
        assert torch.equal(expected[1].float(), scales)
    for found, column in zip(native.encode(x, bits, x.shape[1], False) or (), expected, strict=True):
        assert torch.equal(found, column)
    for part in x.T.contiguous().split(1024, dim=1):
        width = part.shape[1] // 64 * 64
        units = part[:, :width]
        for found, column in zip(
            native.encode(units, bits, 64, True) or (), encode.encode_units(units, bits, 64), strict=True
        ):
            assert torch.equal(found, column)


def test_what_the_extension_cannot_encode_is_left_to_the_reference() -> None:
    assert native.encode(torch.zeros(2, 12), 4, 4, False) is None
    assert native.encode(torch.zeros(2, 16, dtype=torch.float64), 4, 4, False) is None
    assert native.encode(torch.zeros(2, 16), 5, 4, False) is None
