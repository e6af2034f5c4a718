"""Native moves and choices of ragged entries are those of the torch reference, cell by cell."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbudget.kernels import Layout, ragged
from kvbudget.policy.selection import plain_select

native_ragged = pytest.importorskip("kvbudget.kernels.native_ragged", reason="the native extension was not built")

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def layout(lengths: list[int], spare: list[int]) -> Layout:
    capacities = [n + s for n, s in zip(lengths, spare, strict=True)]
    return Layout(list(accumulate(capacities[:-1], initial=0)), lengths, capacities)


def rows_of(column: torch.Tensor, at: Layout) -> list[torch.Tensor]:
    return [column[start : start + n] for start, n in zip(at.starts, at.lengths, strict=True)]


@settings(max_examples=120, deadline=None)
@given(
    lengths=ROWS,
    unit=st.sampled_from([1, 1, 3]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    inside=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_moves(lengths: list[int], unit: int, share: float, inside: bool, in_place: bool, seed: int) -> None:
    """Rows of any length move down or up, whether a mask is their own or they are units inside of a wider one."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(high: int) -> list[int]:
        return torch.randint(high, (len(lengths),), generator=generator).tolist()

    begins = numbers(4) if inside or unit > 1 else []
    before = layout(lengths, numbers(5))
    cells = torch.rand(len(lengths), max(lengths), generator=generator) < share
    cells &= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    keep = cells
    if begins:
        keep = torch.rand(len(lengths), 5 + max(lengths) * unit, generator=generator) < 0.5
        for r, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            keep[r, begin : begin + length * unit] = cells[r, :length].repeat_interleave(unit)
    counts = ragged.count_kept(keep, lengths, begins, unit)
    assert native_ragged.count_kept(keep, lengths, begins, unit) == counts == cells.sum(1).tolist()
    spare = numbers(5)
    if in_place:  # the same cells as before, dealt out anew
        spare[-1] = max(0, sum(before.capacities) - sum(counts) - sum(spare[:-1]))
    after = layout(counts, spare)
    in_place = in_place and sum(after.capacities) == sum(before.capacities)
    total = sum(before.capacities)
    columns = [torch.randn(total, 3, generator=generator).bfloat16(), torch.arange(total, dtype=torch.int32)]
    expected = ragged.compact(columns, keep, before, after, begins, unit)
    if not in_place:
        whole = layout(lengths, spare)
        assert torch.equal(
            native_ragged.compact(columns, None, before, whole, (), 1, False)[1],
            ragged.compact(columns, None, before, whole, (), 1)[1],
        )
    moved = native_ragged.compact(columns, keep, before, after, begins, unit, in_place)
    for old, new, right in zip(columns, moved, expected, strict=True):
        assert (new is old) == in_place
        assert in_place or torch.equal(new, right)
        assert all(map(torch.equal, rows_of(new, after), rows_of(right, after)))


def test_a_mask_that_breaks_its_rules_is_refused() -> None:
    torn, past = torch.tensor([[True, False, True, True]]), torch.ones(2, 3, dtype=torch.bool)
    for count in (ragged.count_kept, native_ragged.count_kept):
        assert count(torn, [1], [2], 2) == [1]
        with pytest.raises(AssertionError, match="whole"):
            count(torn, [2], [0], 2)
        with pytest.raises(AssertionError, match="padding"):
            count(past, [2, 3], (), 1)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 3),
    width=st.integers(0, 70),
    distinct=st.sampled_from([1, 3, 1000]),
    units=st.sampled_from([0, 1, 4, 7]),
    fill=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_choices(rows: int, width: int, distinct: int, units: int, fill: bool, seed: int) -> None:
    """Ties, infinite scores and not-a-number, empty cells in between, units that straddle each other, any count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, rows, width)
    scores = torch.randint(-distinct, distinct, shape, generator=generator) / 8
    for special in (float("inf"), float("-inf"), -0.0) + (() if units else (float("nan"),)):
        scores[torch.rand(shape, generator=generator) < 0.05] = special
    protected, valid = torch.rand(shape, generator=generator) < 0.1, torch.rand(shape, generator=generator) < 0.9
    counts = torch.randint(width + 3, (1, rows), generator=generator)
    ids = torch.randint(max(1, 2 * width // max(units, 1)), shape, generator=generator) if units else None
    found = native_ragged.select(scores, protected, valid, counts, ids, fill)
    assert torch.equal(found, plain_select(scores, protected, valid, counts, ids, fill))


def test_choices_that_the_extension_leaves_to_torch() -> None:
    scores, none = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, dtype=torch.bool)
    for ids in (torch.tensor([0, 1, -1, 2]), torch.tensor([0, 1, 2, 10**9])):
        assert native_ragged.select(scores, none, ~none, torch.tensor([[2]]), ids.view(1, 1, 4), True) is None
    assert native_ragged.select(scores.double(), none, ~none, torch.tensor([[2]]), None, True) is None
