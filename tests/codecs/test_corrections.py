"""Outliers and low-rank terms: what they recover, and that they never hurt what the codes alone give."""

import pytest
import torch

from kvbudget import kernels
from kvbudget.codecs.base import Codec, Place, alone
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.codecs.low_rank import LowRank
from kvbudget.codecs.sparse import Outliers
from kvbudget.errors import PolicyError
from kvbudget.kernels import FEW_QUERIES, reference
from kvbudget.kernels.operands import DenseOperand
from kvbudget.methods import parse


def error(codec: Codec, x: torch.Tensor) -> float:
    place = alone(codec, x)
    return float((codec.decode(codec.encode(x, place), place) - x).square().mean())


def heavy(count: int, width: int) -> torch.Tensor:
    """Normal data with some outliers and a few strong directions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=generator)
    x += torch.randn(count, 3, generator=generator) @ torch.randn(3, width, generator=generator) * 2
    return torch.where(torch.rand(count, width, generator=generator) < 0.01, x * 8, x)


def test_a_full_rank_term_is_exact():
    x = torch.randn(64, 16)
    for base in (TokenQuant(bits=2, group=16), ChannelQuant(bits=2, unit=64, residual=64)):
        assert error(LowRank(base=base, rank=16), x) < 1e-5 < 1e-3 < error(base, x)


def test_the_low_rank_term_is_the_best_of_its_rank():
    x, base = heavy(128, 32), TokenQuant(bits=2, group=32)
    residual = (x - base.decode(base.encode(x))).double()
    best = torch.linalg.svdvals(residual)[4:].square().sum() / residual.numel()
    assert abs(error(LowRank(base=base, rank=4), x) / float(best) - 1) < 0.01


def test_every_correction_lowers_the_error():
    x = heavy(256, 64)
    for side in (0, 1):
        policies = ("gear(bits=2)", "gear(bits=2, sparsity=0)", "gear(bits=2, sparsity=0, rank=0)")
        found = [error(parse(policy).parts().codec[side], x) for policy in policies]
        assert found == sorted(found) and found[0] < 0.8 * found[2], found


def test_outliers_are_kept_to_half_precision_on_either_axis():
    x = heavy(32, 16)
    for axis, dim, base in (("entry", 1, TokenQuant(bits=2, group=16)), ("unit", 0, ChannelQuant(bits=2, unit=32))):
        codec = Outliers(base=base, share=0.2, axis=axis)
        found = codec.decode(codec.encode(x))
        ends = torch.cat([x.topk(2, dim=dim).indices, x.topk(2, dim=dim, largest=False).indices], dim=dim)
        torch.testing.assert_close(found.gather(dim, ends), x.gather(dim, ends), atol=2e-3, rtol=1e-3)


def test_true_bits_are_the_formulas():
    keys, values = parse("gear(bits=2, group=64, rank=4)").parts().codec
    # One outlier at each end of 64 elements: 24 bits each (the paper counts 32 and 2%).
    assert keys.bytes_per_entry(128) * 8 / 128 == 2 + 32 / 64 + 2 * 24 / 64 + 16 * 4 / 128
    assert values.bytes_per_entry(128) * 8 / 128 == 2 + 32 / 64 + 2 * 24 / 128 + 16 * 4 / 128


@pytest.mark.parametrize(
    "stages", ["gear(bits=2, group=16)", "gear(group=16, sparsity=0.0)", "gear(bits=8, group=16, rank=0)"]
)
@pytest.mark.parametrize("queries", [3, FEW_QUERIES + 1])
def test_corrected_codes_are_attended_to_as_their_decoded_entries_are(stages, queries):
    """Two rows with states of their own, entries passed over at the beginning, and a window of two steps that hides some."""
    codecs, x = parse(stages).parts().codec, heavy(2 * 64, 32).unflatten(0, (2, 64))
    operands, dense, skip, lengths = [], [], [0, 5], [64, 59]
    for codec in codecs:
        starts = [0, 64 // codec.unit]
        state = [codec.start(part, 0, None) for part in x]
        state = {name: torch.stack([found[name] for found in state]) for name in state[0]}
        place = Place(torch.arange(2).repeat_interleave(64 // codec.unit), state, 32)
        columns = codec.encode(x.flatten(0, 1), place)
        operands.append(codec.operand(columns | state, starts, skip))
        dense.append(codec.decode(columns, place).unflatten(0, (2, 64)))
        for row in range(2):
            own = dense[-1][row, skip[row] + 7 : skip[row] + 40]
            torch.testing.assert_close(operands[-1].block(row, 7, 40), own, atol=1e-4, rtol=1e-4)
    query = torch.randn(2, queries * 2, 32)
    steps = torch.tensor([[70, 90], [70, 90]])
    plain = [DenseOperand(side.flatten(0, 1), [0, 64 + 5]) for side in dense]
    options = {
        "scale": 0.2,
        "window": 40,
        "query_positions": steps,
        "positions": torch.arange(64).repeat(2),
        "entry_starts": [0, 69],
    }
    found = kernels.attend(query, *operands, lengths, **options)
    expected = reference.attend(query, *plain, lengths, **options)
    torch.testing.assert_close(found.out, expected.out, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.lse, expected.lse, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "base", ["turboquant(bits=2)", "nsnquant(bits=1, chunk=16)", "rotatekv(bits=2)", "kivi(bits=2, group=16)"]
)
def test_any_base_is_corrected(base):
    x = heavy(256, 32)
    for plain, corrected in zip(parse(base).parts().codec, parse(f"gear(base={base!r})").parts().codec, strict=True):
        errors = []
        for codec in (plain, corrected):
            place = alone(codec, x)
            columns = codec.encode(x, place)
            errors.append(float((codec.decode(columns, place) - x).square().mean()))
        assert errors[1] < 0.8 * errors[0]
        assert corrected.bytes_per_entry(32) > plain.bytes_per_entry(32) and corrected.before_rope == plain.before_rope
    policy = parse(f"snapkv+gear(base={base!r})")
    assert parse(str(policy)) == policy


@pytest.mark.parametrize("base", ["cq", "qaq", "snapkv", "xquant"])
def test_what_cannot_be_corrected_is_refused(base):
    with pytest.raises(PolicyError, match="is no codec that can be corrected"):
        parse(f"gear(base={base!r})")
