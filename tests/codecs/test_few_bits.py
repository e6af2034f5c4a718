"""SQuat, VidKV and CalibQuant: what their papers promise of errors on normal data and along queries."""

import pytest
import torch
from test_registered import lowered

from kvbudget.codecs.base import Asked, Codec, alone
from kvbudget.codecs.integer import ChannelQuant
from kvbudget.codecs.span import SpanQuant
from kvbudget.codecs.subspace import SubspaceQuant
from kvbudget.codecs.ternary import MixedChannels, Ternary
from kvbudget.methods import parse


def decoded(codec: Codec, x: torch.Tensor, asked: Asked | None = None) -> torch.Tensor:
    place = alone(codec, x, asked)
    return codec.decode(codec.encode(x, place), place)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the softmax over the last dimension, in nats."""
    weights = logits.softmax(-1)
    return -torch.special.xlogy(weights, weights).sum(-1)


def queries(width: int, directions: int) -> Asked:
    """Queries that lie in a few directions."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(directions, width, generator=generator)
    query = torch.randn(1, 2, 300, directions, generator=generator) @ basis
    return Asked(query, torch.zeros(1, 2, 300), torch.arange(300)[None], 1.0)


def test_without_weight_queries_or_blocks_squat_is_kivi():
    x, asked = torch.randn(96, 64), queries(64, 5)
    expected = decoded(ChannelQuant(bits=2, unit=32, residual=32), x)
    shared = {"bits": 2, "unit": 32, "residual": 32}
    for codec, seen in (
        (SubspaceQuant(weight=0.0, **shared), asked),
        (SubspaceQuant(block=64, **shared), asked),
        (SubspaceQuant(**shared), None),
    ):
        torch.testing.assert_close(decoded(codec, x, seen), expected, atol=1e-6, rtol=0)


def test_squat_moves_errors_away_from_the_queries():
    x, asked = torch.randn(256, 64) * torch.rand(64) * 3, queries(64, 6)
    plain = decoded(ChannelQuant(bits=2, unit=32, residual=32), x) - x
    moved = decoded(SubspaceQuant(bits=2, unit=32, residual=32, rank=6), x, asked) - x
    along = asked.query.flatten(0, 2)
    assert (moved @ along.T).square().mean() < 0.7 * (plain @ along.T).square().mean()
    assert moved.square().mean() >= plain.square().mean()


def test_the_update_solves_the_weighted_problem():
    """What the second block is asked to become minimizes |d|^2 + w |Q d|^2 given the first block's error."""
    x, asked = torch.randn(8, 16), queries(16, 3)
    codec = SubspaceQuant(bits=8, unit=8, residual=8, rank=3, weight=0.01)
    place = alone(codec, x, asked)
    rough = SubspaceQuant(bits=1, unit=8, residual=8, rank=3, weight=0.01)
    first = (decoded(rough, x, asked) - x)[:, :8].double()
    hessian = (
        torch.eye(16, dtype=torch.float64)
        + 0.01 * place.state["subspace"][0].double().T @ place.state["subspace"][0].double()
    )
    best = -first @ hessian[:8, 8:] @ torch.linalg.inv(hessian[8:, 8:])
    inverse = torch.linalg.inv(hessian)
    pushed = first @ (inverse[8:, :8] @ torch.linalg.inv(inverse[:8, :8])).T
    torch.testing.assert_close(pushed, best)
    found = (decoded(rough, x, asked) - x)[:, 8:].double()
    coarse = (x + 0)[:, 8:].double() + best  # coded at one bit afterwards, per channel and unit
    low, high = coarse.amin(0), coarse.amax(0)
    nearest = torch.where((coarse - low) > (high - coarse), high, low)
    torch.testing.assert_close(found, nearest - x[:, 8:].double(), atol=5e-3, rtol=0)


def test_errors_of_ternary_and_one_bit_codes_on_normal_data():
    x = torch.randn(3200, 64, generator=torch.Generator().manual_seed(0))
    assert float((decoded(Ternary(), x) - x).square().mean()) == pytest.approx(0.213, rel=0.06)
    one = MixedChannels(share=0.5)
    place = alone(one, x)
    easy = place.state["channels"][0, 32:].long()
    error = (one.decode(one.encode(x, place), place) - x)[:, easy].square().mean()
    assert float(error) == pytest.approx(0.363, rel=0.06)


def test_hard_channels_get_the_second_bit():
    x = torch.randn(320, 64)
    x[:, ::2] *= 4
    codec = MixedChannels()
    place = alone(codec, x)
    assert place.state["channels"][0, :32].tolist() == list(range(0, 64, 2))
    signs = MixedChannels(share=0.0)  # eight channels at least
    assert (decoded(codec, x) - x).square().mean() < 0.65 * (decoded(signs, x) - x).square().mean()


@pytest.mark.parametrize(("shrink", "expected"), [(1.0, 6.3), (0.5, 1.05), (0.3, 0.40), (0.25, 0.37)])
def test_shrunken_ranges_suit_one_bit(shrink, expected):
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    assert float((decoded(SpanQuant(shrink=shrink), x) - x).square().mean()) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("bits", "shrink"), [(1, 0.5), (2, 1.0)])
def test_few_bits_peak_the_softmax_and_calibrated_logits_flatten_it_again(bits, shrink):
    """Levels that lie further out than the keys stretch the logits (CalibQuant, arXiv 2502.14882): entropy in nats."""
    generator = torch.Generator().manual_seed(0)
    keys, query = torch.randn(1024, 64, generator=generator), torch.randn(64, 64, generator=generator)
    exact, coded = (query @ x.T / 8 for x in (keys, decoded(SpanQuant(bits=bits, shrink=shrink), keys)))
    plain, peaked, calibrated = (entropy(logits).mean() for logits in (exact, coded, lowered(coded, 3.0)))
    assert peaked < plain - 0.15 and calibrated > peaked + 0.3


def test_channels_far_from_zero_shrink_toward_their_middle():
    x = torch.randn(500, 64) + 10
    zero, middle = ((decoded(SpanQuant(shrink=0.3, toward=t), x) - x).square().mean() for t in ("zero", "middle"))
    assert middle < 0.5 < 10 < zero


def test_true_bits_are_the_formulas():
    keys, values = parse("vidkv").parts().codec
    assert keys.bytes_per_entry(128) * 8 / 128 == 1.5 + (16 * 0.5 + 16) / 32
    assert values.bytes_per_entry(128) * 8 / 128 == pytest.approx(1.6 + 16 / 32, rel=1e-3)
    assert parse("visual_1bit").parts().codec[0].bytes_per_entry(128) * 8 / 128 == 1
