"""RaggedTable does what a list of lists would do, and its storages are exactly as large as they should be."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from kvbudget.segments.ragged import RaggedTable

WIDTH = 3
BYTES = 4 * WIDTH + 4  # "vector [*, 3]" and "number [*]", both float32


class Twin:
    """A table beside its model: per row a list of ``(number, late)``; ``vector`` is derived from the number."""

    def __init__(self, num_rows: int) -> None:
        self.table = RaggedTable(num_rows)
        self.rows: list[list[tuple[float, float]]] = [[] for _ in range(num_rows)]

    @property
    def columns(self) -> set[str]:
        return set(self.table.columns)

    def fork(self) -> "Twin":
        other = Twin(0)
        other.table, other.rows = self.table.share(), [list(row) for row in self.rows]
        assert self.table.capacities == self.table.lengths
        assert all(
            a.data_ptr() == b.data_ptr() for a, b in zip(self.table.tensors(), other.table.tensors(), strict=True)
        )
        return other


def vector(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[..., None] * torch.tensor([1.0, -2.0, 0.5])


def masks(data: st.DataObject, lengths: list[int]) -> list[list[bool]]:
    return [data.draw(st.lists(st.booleans(), min_size=n, max_size=n), label="keep") for n in lengths]


def padded_mask(rows: list[list[bool]]) -> torch.Tensor:
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [False] * (longest - len(row)) for row in rows], dtype=torch.bool).view(
        len(rows), longest
    )


class RaggedMachine(RuleBasedStateMachine):
    """Appends, evicts, copies, forks and resizes tables and their models side by side."""

    twins = Bundle("twins")

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0.0
        self.all: list[Twin] = []

    @initialize(target=twins, num_rows=st.integers(1, 4), limit=st.none() | st.integers(0, 40))
    def start(self, num_rows: int, limit: int | None) -> Twin:
        twin = Twin(num_rows)
        twin.table.limits = None if limit is None else [limit] * len(twin.rows)
        self.all.append(twin)
        return twin

    @rule(twin=twins, data=st.data())
    def append(self, twin: Twin, data: st.DataObject) -> None:
        rows = len(twin.rows)
        even = st.integers(0, 5).map(lambda n: [n] * rows)
        counts = data.draw(even | st.lists(st.integers(0, 5), min_size=rows, max_size=rows), label="counts")
        total = sum(counts)
        numbers = self.counter + torch.arange(1, total + 1).float()
        self.counter += total
        late = data.draw(st.booleans(), label="with the late column")
        new = {"vector": vector(numbers), "number": numbers}
        if late:
            new["late"] = -numbers
        before = twin.table.capacities
        twin.table.append(new, counts)
        if not any(counts):
            assert twin.table.capacities == before
        fresh = iter(numbers.tolist())
        for row, count in zip(twin.rows, counts, strict=True):
            row += [(number, -number if late else 0.0) for number in (next(fresh) for _ in range(count))]

    @rule(twin=twins, data=st.data(), spare=st.integers(0, 3))
    def take(self, twin: Twin, data: st.DataObject, spare: int) -> None:
        kept = masks(data, twin.table.lengths)
        twin.table.take(padded_mask(kept), spare)
        twin.rows = [
            [e for e, keep in zip(row, mask, strict=True) if keep] for row, mask in zip(twin.rows, kept, strict=True)
        ]
        cells = sum(map(len, twin.rows)) + spare * len(twin.rows)
        assert twin.table.capacities == [len(row) + spare for row in twin.rows]
        width = BYTES + 4 * ("late" in twin.columns)
        assert twin.table.nbytes == (cells * width if twin.columns else 0), "the evicted entries' bytes were not freed"

    @rule(twin=twins, data=st.data())
    def gather(self, twin: Twin, data: st.DataObject) -> None:
        kept = masks(data, twin.table.lengths)
        columns, counts = twin.table.gather(padded_mask(kept))
        assert counts == [sum(mask) for mask in kept]
        if "number" in columns:
            expected = [
                e for row, mask in zip(twin.rows, kept, strict=True) for e, keep in zip(row, mask, strict=True) if keep
            ]
            assert columns["number"].tolist() == [number for number, _ in expected]
            assert torch.equal(columns["vector"], vector(columns["number"]))
            columns["number"].fill_(-1)  # a copy: the invariant would notice otherwise

    @rule(twin=twins, data=st.data())
    def truncate(self, twin: Twin, data: st.DataObject) -> None:
        lengths = [data.draw(st.integers(0, len(row)), label="length") for row in twin.rows]
        capacities = twin.table.capacities
        twin.table.truncate(lengths)
        twin.rows = [row[:n] for row, n in zip(twin.rows, lengths, strict=True)]
        assert twin.table.capacities == capacities

    @rule(twin=twins, data=st.data())
    def drop_oldest(self, twin: Twin, data: st.DataObject) -> None:
        counts = [data.draw(st.integers(0, len(row)), label="oldest") for row in twin.rows]
        capacities = twin.table.capacities
        if "number" in twin.columns and any(counts):
            expected = [number for row, n in zip(twin.rows, counts, strict=True) for number, _ in row[:n]]
            assert twin.table.oldest("number", counts).tolist() == expected
        twin.table.drop(counts)
        twin.rows = [row[n:] for row, n in zip(twin.rows, counts, strict=True)]
        assert twin.table.capacities == capacities

    @rule(twin=twins, data=st.data())
    def select_rows(self, twin: Twin, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, len(twin.rows) - 1), min_size=1, max_size=5), label="rows")
        twin.table.select_rows(index)
        twin.rows = [list(twin.rows[r]) for r in index]

    @rule(twin=twins, data=st.data())
    def reserve(self, twin: Twin, data: st.DataObject) -> None:
        capacities = [len(row) + data.draw(st.integers(0, 4), label="room") for row in twin.rows]
        twin.table.reserve(capacities)
        assert twin.table.capacities == capacities

    @rule(twin=twins, limit=st.none() | st.integers(0, 40))
    def trim(self, twin: Twin, limit: int | None) -> None:
        twin.table.limits = None if limit is None else [limit] * len(twin.rows)
        before = twin.table.capacities
        twin.table.trim()
        if limit is not None:
            expected = [min(c, max(len(row), limit)) for c, row in zip(before, twin.rows, strict=True)]
            assert twin.table.capacities == expected

    @rule(twin=twins)
    def write_padded(self, twin: Twin) -> None:
        if not twin.columns:
            return
        twin.rows = [[(number, 7 * number) for number, _ in row] for row in twin.rows]
        twin.table.write_padded("late", 7 * twin.table.padded("number"))

    @rule(target=twins, twin=twins)
    def fork(self, twin: Twin) -> Twin:
        other = twin.fork()
        self.all.append(other)
        return other

    @precondition(lambda self: len(self.all) > 1)
    @rule(twin=consumes(twins))
    def drop(self, twin: Twin) -> None:
        self.all.remove(twin)

    @invariant()
    def agree(self) -> None:
        for twin in self.all:
            check(twin)


def check(twin: Twin) -> None:
    table, rows = twin.table, twin.rows
    table.check_integrity()
    lengths = [len(row) for row in rows]
    note(f"{lengths} in {table.capacities}")
    assert table.lengths == lengths
    assert (table.num_rows, table.total, table.longest) == (len(rows), sum(lengths), max(lengths, default=0))
    assert table.valid().tolist() == padded_mask([[True] * n for n in lengths]).tolist()
    for at, name in enumerate(("number", "late")):
        if name not in table.columns:
            continue
        padded = table.padded(name, fill=0)
        assert padded.shape == (len(rows), table.longest)
        assert table.flat(name).tolist() == [entry[at] for row in rows for entry in row]
        for r, row in enumerate(rows):
            expected = [entry[at] for entry in row]
            assert table.row(name, r).tolist() == expected
            assert padded[r].tolist() == expected + [0.0] * (table.longest - len(row))
        if table.uniform:
            assert table.grid(name).tolist() == padded.tolist()
    if "vector" in table.columns:
        assert torch.equal(table.padded("vector"), vector(table.padded("number")))
        assert torch.equal(table.flat("vector"), vector(table.flat("number")))


TestRagged = RaggedMachine.TestCase


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.data())
def test_take_frees_exactly_what_it_drops(lengths: list[int], data: st.DataObject) -> None:
    table = RaggedTable(len(lengths))
    table.append({"half": torch.zeros(sum(lengths), 5, dtype=torch.bfloat16), "n": torch.zeros(sum(lengths))}, lengths)
    kept = masks(data, lengths)
    table.take(padded_mask(kept))
    count = sum(map(sum, kept))
    assert table.nbytes == count * (2 * 5 + 4)
    assert sum(t.untyped_storage().nbytes() for t in table.tensors()) == table.nbytes


def test_growth_is_bounded_and_amortized() -> None:
    table, moves, bytes_held = RaggedTable(2), 0, []
    for _ in range(2000):
        before = table.columns.get("x")
        table.append({"x": torch.ones(2)}, [1, 1])
        moves += table.columns["x"] is not before
        bytes_held.append(table.nbytes)
        assert table.nbytes <= 4 * 2 * max(table.lengths[0] * 17 // 16 + 1, table.lengths[0] + 64)
    assert moves <= 2000 // 64 + 1
    assert all(small <= large for small, large in pairwise(bytes_held))


@pytest.mark.parametrize("counts", [[2, 2], [2, 1]])
def test_a_column_that_is_not_given_is_zero_even_where_something_stood_before(counts: list[int]) -> None:
    table = RaggedTable(2)
    table.append({"x": torch.ones(6), "state": torch.ones(6)}, [3, 3])
    table.truncate([1, 1])
    table.append({"x": torch.ones(sum(counts))}, counts)
    assert [table.row("state", r).tolist() for r in range(2)] == [[1.0] + [0.0] * n for n in counts]


def test_limit_bounds_the_room() -> None:
    table = RaggedTable(2)
    table.limits = [10, 10]
    for n in range(1, 11):
        table.append({"x": torch.ones(2)}, [1, 1])
        assert table.capacities == [10, 10]
        assert table.lengths == [n, n]
    table.append({"x": torch.ones(2)}, [1, 1])
    assert table.capacities == [11, 11], "beyond the limit there is room for what is needed and no more"


def test_bad_masks_and_lengths_are_refused() -> None:
    table = RaggedTable(2)
    table.append({"x": torch.ones(5)}, [2, 3])
    with pytest.raises(AssertionError):
        table.take(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(AssertionError):
        table.truncate([3, 3])
    with pytest.raises(AssertionError):
        table.reserve([2, 2])
    assert table.lengths == [2, 3]


def test_padding_cells_of_a_mask_must_not_select() -> None:
    """A set cell beyond a row's length would read its neighbor."""
    table = RaggedTable(2)
    table.append({"x": torch.arange(5.0)}, [2, 3])
    with pytest.raises(AssertionError):
        table.take(torch.ones(2, 3, dtype=torch.bool))
