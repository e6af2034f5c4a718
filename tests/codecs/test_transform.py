"""Transform coding: bits shared out as well as by trying everything, streams that come back, errors that rates predict."""

import itertools

import pytest
import torch

from kvbudget.codecs import transform
from kvbudget.codecs.transform import STEPS, Transform, allocate, groups

pytest.importorskip("constriction")


def correlated(n: int = 600, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * 0.7 ** torch.arange(width)[:, None]
    return torch.randn(n, width, generator=generator) @ mix + 3.0


@pytest.mark.parametrize("seed", range(5))
def test_bits_are_shared_out_as_well_as_by_trying_everything(seed):
    generator = torch.Generator().manual_seed(seed)
    rate = torch.cat([torch.zeros(4, 1), torch.randint(1, 9, (4, 3), generator=generator).float()], 1)
    loss = torch.rand(4, 4, generator=generator).sort(1, descending=True).values
    for bits in (1.0, 4.0, 8.0, 16.0):
        options = [
            sum(float(loss[g, s]) for g, s in enumerate(plan))
            for plan in itertools.product(range(4), repeat=4)
            if sum(float(rate[g, s]) for g, s in enumerate(plan)) <= bits
        ]
        plan = allocate(rate, loss, bits)
        assert sum(float(rate[g, s]) for g, s in enumerate(plan)) <= bits
        assert sum(float(loss[g, s]) for g, s in enumerate(plan)) == pytest.approx(min(options))


def test_no_bits_drop_everything_and_groups_cover_the_rank():
    fitted = Transform.fit(correlated(), 24)
    assert fitted.plan(0.0) == [0] * len(fitted.sizes) and sum(fitted.sizes) == 24
    assert torch.allclose(fitted.restore([], fitted.plan(0.0), 2), fitted.mean.expand(2, -1))
    assert [sum(groups(rank)) for rank in (1, 7, 9, 100, 1536)] == [1, 7, 9, 100, 1536]


@pytest.mark.parametrize("count", [1, 5, 3000])
def test_streams_come_back(count):
    generator = torch.Generator().manual_seed(count)
    codes = [
        (torch.randn(count, size, generator=generator) * spread).round().int()
        for size, spread in ((1, 900.0), (1, 3.0), (2, 0.0), (7, 0.6))
    ]
    packed = transform.pack(codes)
    for mine, theirs in zip(transform.unpack(packed, [1, 1, 2, 7], count), codes, strict=True):
        assert torch.equal(mine, theirs)
    assert packed["stream"].dtype == torch.int32


def test_rates_and_losses_are_those_of_other_rows_of_the_kind():
    fitted, rows = Transform.fit(correlated(4000), 24), correlated(2000, seed=1)
    errors = []
    for bits in (12.0, 24.0, 48.0, 96.0):
        plan = fitted.plan(bits)
        packed = transform.pack(fitted.quantize(rows, plan))
        stream = packed["stream"].numel() * 32 / len(rows)
        assert stream == pytest.approx(sum(float(fitted.rate[g, s]) for g, s in enumerate(plan)), rel=0.05)
        sizes = [size for size, step in zip(fitted.sizes, plan, strict=True) if step]
        back = fitted.restore(transform.unpack(packed, sizes, len(rows)), plan, len(rows))
        errors.append(float((back - rows).square().sum(1).mean()))
        assert errors[-1] == pytest.approx(sum(float(fitted.loss[g, s]) for g, s in enumerate(plan)), rel=0.1)
        # No worse than the same step everywhere at the rate of that choice.
        for step in range(1, len(STEPS)):
            if float(fitted.rate[:, step].sum()) <= bits:
                assert errors[-1] <= 1.1 * float(fitted.loss[:, step].sum())
    assert errors == sorted(errors, reverse=True)


def test_layers_transformed_together_lose_less_than_each_by_itself_at_the_same_rate():
    shared, rows = correlated(4000), correlated(2000, seed=1)

    def lost(columns: slice, bits: float) -> float:
        fitted = Transform.fit(shared[:, columns], columns.stop - columns.start)
        plan = fitted.plan(bits)
        back = fitted.restore(fitted.quantize(rows[:, columns], plan), plan, len(rows))
        return float((back - rows[:, columns]).square().sum(1).mean())

    assert lost(slice(0, 24), 40.0) < 0.9 * sum(lost(half, 20.0) for half in (slice(0, 12), slice(12, 24)))


def test_all_components_at_fine_steps_are_nearly_exact():
    fitted, rows = Transform.fit(correlated(), 24), correlated(50, seed=2)
    plan = [len(STEPS) - 1] * len(fitted.sizes)
    back = fitted.restore(fitted.quantize(rows, plan), plan, 50)
    assert float((back - rows).abs().max()) < 0.02
    few = Transform.fit(correlated(), 6)
    assert few.basis.shape == (6, 24)
    torch.testing.assert_close(few.basis @ few.basis.T, torch.eye(6), atol=1e-5, rtol=0)


def test_the_same_rows_give_the_same_transform():
    one, other = (Transform.fit(correlated(), 6) for _ in range(2))
    assert all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("mean", "basis", "scale", "rate", "loss")
    )
