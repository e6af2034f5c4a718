"""Rotations before coding, and codes that are best for normal data, against their known errors."""

import pytest
import torch

from kvbudget import kernels
from kvbudget.codecs.integer import TokenQuant
from kvbudget.codecs.rotated import NormalCodes, Rotated, SignSketch, hadamard, lloyd_max, random_rotation
from kvbudget.kernels import reference


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_rotations_are_orthogonal(width):
    for matrix in (hadamard(width), random_rotation(width, 3)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), atol=1e-5, rtol=0)


def test_best_values_for_normal_data():
    known = {
        1: [0.7979],
        2: [0.4528, 1.5104],
        3: [0.2451, 0.7560, 1.3439, 2.1519],
        4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
    }
    for bits, positive in known.items():
        torch.testing.assert_close(lloyd_max(bits)[2 ** (bits - 1) :], torch.tensor(positive), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_distortion_of_unit_vectors(bits, distortion):
    x = torch.nn.functional.normalize(torch.randn(2000, 128) * torch.logspace(-2, 1, 128), dim=-1)
    codec = Rotated(base=NormalCodes(bits=bits), kind="random")
    error = (codec.decode(codec.encode(x)) - x).square().sum(-1).mean()
    assert float(error) == pytest.approx(distortion, rel=0.05)


def test_sign_sketch_is_unbiased_over_sketches_where_the_codes_shrink():
    x, query = torch.nn.functional.normalize(torch.randn(2, 64), dim=-1)
    x = x[None] + 0.5 * query
    base = Rotated(base=NormalCodes(bits=1), kind="random")
    estimates = []
    for seed in range(400):
        codec = SignSketch(base=base, seed=seed)
        estimates.append(float(query @ codec.decode(codec.encode(x))[0]))
    plain = float(query @ base.decode(base.encode(x))[0])
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std() / 20
    truth = float(query @ x[0])
    assert abs(mean - truth) < 4 * spread < abs(plain - truth)


def test_rotation_helps_entries_with_outlier_channels():
    x = torch.randn(256, 64)
    x[:, [3, 40]] *= 20
    plain = TokenQuant(bits=2, group=64)
    rotated = Rotated(base=plain)
    error = {name: (c.decode(c.encode(x)) - x).square().mean() for name, c in (("plain", plain), ("rotated", rotated))}
    assert error["rotated"] < 0.3 * error["plain"]


def test_clipped_ranges_suit_two_bits_of_normal_data():
    x = torch.randn(500, 128)
    error = [
        float((c.decode(c.encode(x)) - x).square().mean())
        for c in (TokenQuant(bits=2, group=128, clip=0.8), TokenQuant(bits=2, group=128))
    ]
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize(("bits", "sketched"), [(1, False), (2, False), (4, False), (8, False), (2, True)])
def test_rotated_codes_are_attended_to_without_being_decoded(bits, sketched):
    """Queries turned once and answers turned back are those over decoded entries, by both kernels."""
    x = torch.randn(2 * 70, 64, generator=torch.Generator().manual_seed(bits))
    codec = Rotated(base=NormalCodes(bits=bits), kind="random")
    codec = SignSketch(base=codec) if sketched else codec
    columns, query = codec.encode(x), torch.randn(2, 3, 64)
    operand = codec.operand(columns, [0, 70], [0, 5])
    assert operand is not None and operand.basis is not None
    dense = codec.decode(columns).view(2, 70, 64)
    for kernel in (reference.attend, kernels.attend):
        part = kernel(query @ operand.basis, operand, operand, [70, 65], scale=0.3)
        for row, begin in enumerate((0, 5)):
            own = dense[row, begin:]
            expected = (query[row] @ own.T * 0.3).softmax(-1) @ own
            torch.testing.assert_close(part.out[row] @ operand.basis.T, expected, atol=1e-4, rtol=1e-4)
