"""RaggedTable: per-entry columns of rows that differ in length, in flat tensors that really shrink and grow."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.kernels import Layout

# Up to this many appended cells, Python's own loops beat one call into torch per row.
FEW_CELLS = 256
MOST_STEP = 256
"""The most entries of a row that room is made for ahead of need where it is short, however long it may become."""


def ranges(
    begins: Sequence[int],
    counts: Sequence[int],
    *,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Tensor:
    """The numbers ``begins[r] .. begins[r] + counts[r] - 1`` of all rows after each other: ``[sum(counts)]``.

    >>> ranges([5, 20], [2, 3]).tolist()
    [5, 6, 20, 21, 22]
    """
    if sum(counts) <= FEW_CELLS:
        numbers = [i for begin, count in zip(begins, counts, strict=True) for i in range(begin, begin + count)]
        return torch.tensor(numbers, dtype=dtype, device=device)
    rows = zip(begins, counts, strict=True)
    return torch.cat([torch.arange(b, b + n, dtype=dtype, device=device) for b, n in rows])


class Leaves(Protocol):
    """Whoever keeps addresses of columns."""

    def leave(self) -> None:
        """Takes note that they are not to be used any more."""


class Columns(dict[str, Tensor]):
    """Columns by name; the ``lane`` that keeps their addresses leaves with the first change."""

    lane: Leaves | None = None

    def __setitem__(self, name: str, column: Tensor) -> None:
        super().__setitem__(name, column)
        self.changed()

    def changed(self) -> None:
        """Addresses, or where rows begin, are others now, or nothing may be written there."""
        if self.lane is not None:
            self.lane.leave()
            self.lane = None

    def __getstate__(self) -> None:
        """Copies and pickles have no lane."""


class RaggedTable:
    """Named columns over R rows of different lengths.

    A column is one flat tensor ``[sum(capacities), *tail]``; row r occupies ``starts[r] : starts[r] + lengths[r]`` of it and
    may grow in place up to its capacity. Columns come into being with the first append. All columns share the layout, so
    one selection gathers all of them.

    Appending grows a row by a sixteenth (at least ``step`` entries) at a time, inside the row's ``limits`` where they are
    given; what is needed beyond them is granted exactly. Columns named in ``borrowed`` lie in storages that another table
    reads too, and are copied before the first write.
    """

    def __init__(self, num_rows: int, step: int = 64) -> None:
        self.lengths = [0] * num_rows
        self.capacities = [0] * num_rows
        self.starts = [0] * num_rows
        self.columns = Columns()
        self.borrowed: set[str] = set()
        self.limits: list[int] | None = None
        self.step = min(step, MOST_STEP)

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], counts: Sequence[int]) -> "RaggedTable":
        """A table that is exactly these flat columns ``[sum(counts), *tail]``, without spare room and not to grow."""
        table = cls(len(counts))
        table.columns = Columns(columns)
        table.lengths, table.capacities, table.limits = list(counts), list(counts), list(counts)
        table.starts = _starts(counts)
        return table

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Entries held over all rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Entries of the longest row."""
        return max(self.lengths, default=0)

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same length and capacity, so that a column is a plain ``[R, T, ...]`` view."""
        return len(set(self.lengths)) <= 1 and len(set(self.capacities)) <= 1

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the columns, spare capacity included."""
        return sum(column.untyped_storage().nbytes() for column in self.columns.values())

    def tensors(self) -> list[Tensor]:
        """Every resident tensor."""
        return list(self.columns.values())

    def own(self, name: str) -> Tensor:
        """A column that may be written in place: copied first where another table reads its storage."""
        if name in self.borrowed:
            self.columns[name] = self.columns[name].clone()
            self.borrowed.remove(name)
        return self.columns[name]

    def grid(self, name: str) -> Tensor:
        """A uniform column as a view ``[R, T, *tail]``."""
        column = self.columns[name]
        return column.view(self.num_rows, self.capacities[0], *column.shape[1:])[:, : self.lengths[0]]

    def row(self, name: str, row: int) -> Tensor:
        """One row of a column as a view ``[T_r, *tail]``."""
        return self.columns[name][self.starts[row] : self.starts[row] + self.lengths[row]]

    def padded(self, name: str, fill: float = 0) -> Tensor:
        """A column as ``[R, longest, *tail]``, short rows filled up at their end (a view when uniform)."""
        if self.uniform:
            return self.grid(name)
        column = self.columns[name]
        out = column.new_full((self.num_rows, self.longest, *column.shape[1:]), fill)
        for r, length in enumerate(self.lengths):
            out[r, :length] = self.row(name, r)
        return out

    def flat(self, name: str) -> Tensor:
        """A column's entries without spare room, rows after each other ``[total, *tail]`` (a copy where there is any)."""
        if self.lengths == self.capacities:
            return self.columns[name]
        if self.uniform:
            return self.grid(name).flatten(0, 1)
        return torch.cat([self.row(name, r) for r in range(self.num_rows)])

    def write_padded(self, name: str, values: Tensor) -> None:
        """Overwrites (or creates) a column from ``[R, longest, *tail]``."""
        if name not in self.columns:
            self.columns[name] = values.new_zeros((sum(self.capacities), *values.shape[2:]))
        self.own(name)
        if self.uniform:
            if self.longest:
                self.grid(name).copy_(values)
            return
        for r, length in enumerate(self.lengths):
            self.row(name, r).copy_(values[r, :length])

    def valid(self, device: torch.device | str = "cpu") -> Tensor:
        """Which cells of `padded` hold an entry: bool ``[R, longest]``."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.longest, device=device)[None, :] < lengths[:, None]

    def append(self, new: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        """Appends ``counts[r]`` entries to row r; ``new`` holds flat columns ``[sum(counts), *tail]`` in row order.

        Columns that exist but are missing in ``new`` are filled with zeros.
        """
        needed = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        for name, values in new.items():
            if name not in self.columns:
                self.columns[name] = values.new_zeros((sum(self.capacities), *values.shape[1:]))
        self.make_room(needed)
        cells = [
            (self.own(name), None if name not in new else new[name].to(self.columns[name].dtype))
            for name in (self.columns if any(counts) else ())
        ]
        # Few cells are scattered for all columns at once; many are copied row by row as blocks.
        if sum(counts) > FEW_CELLS and self.uniform and len(set(counts)) == 1:
            at = slice(self.lengths[0], needed[0])
            for column, fresh in cells:
                target = column.view(self.num_rows, self.capacities[0], *column.shape[1:])[:, at]
                if fresh is None:
                    target.zero_()
                else:
                    target.copy_(fresh.reshape(target.shape))
        elif cells:
            begins = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            kernels.scatter(cells, begins, counts)
        self.lengths = needed

    def make_room(self, needed: Sequence[int]) -> bool:
        """Grows rows that cannot hold ``needed[r]`` entries, and others along with them; False where all can."""
        if not any(n > capacity for n, capacity in zip(needed, self.capacities, strict=True)):
            return False
        self.reserve([max(self._room(r, n), c) for r, (n, c) in enumerate(zip(needed, self.capacities, strict=True))])
        return True

    def reserve(self, capacities: Sequence[int]) -> None:
        """Moves the columns into storages with exactly these row capacities (each at least the row's length)."""
        if list(capacities) != self.capacities:
            assert all(c >= n for c, n in zip(capacities, self.lengths, strict=True))
            self._lay_out(self.lengths, capacities, None, (), 1)

    def trim(self) -> None:
        """Gives back room beyond ``limits`` that was reserved before they were known."""
        if self.limits is not None and self.columns:
            rows = zip(self.lengths, self.capacities, self.limits, strict=True)
            self.reserve([min(capacity, max(length, limit)) for length, capacity, limit in rows])

    def take(self, keep: Tensor, spare: int | Sequence[int] = 0, begins: Sequence[int] = (), unit: int = 1) -> None:
        """Keeps the entries where ``keep [R, longest]`` (bool) is set, in order, and returns the rest's memory.

        Each row gets room for ``spare`` more entries. Where all rows together need as many cells as they have, entries move
        inside of the storages. With ``begins``, the entries are cells of a mask of something else: entry t of row r stays
        where ``keep[r, begins[r] + unit * t]`` and the flags after it are set.
        """
        lengths = self._count(keep, begins, unit)
        room = [spare] * len(lengths) if isinstance(spare, int) else spare
        capacities = [length + more for length, more in zip(lengths, room, strict=True)]
        if lengths != self.lengths or capacities != self.capacities or self.borrowed:
            self._lay_out(lengths, capacities, keep, begins, unit)

    def gather(self, keep: Tensor) -> tuple[dict[str, Tensor], list[int]]:
        """Copies of the entries where ``keep [R, longest]`` is set: flat columns in row order, and counts per row."""
        lengths = self._count(keep, (), 1)
        before, after = Layout(self.starts, self.lengths, self.capacities), Layout(_starts(lengths), lengths, lengths)
        copies = kernels.compact(list(self.columns.values()), keep, before, after)
        return dict(zip(self.columns, copies, strict=True)), lengths

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the newest entries of each row; capacities stay."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def oldest(self, name: str, counts: Sequence[int]) -> Tensor:
        """The oldest ``counts[r]`` entries of each row of a column, rows after each other ``[sum(counts), *tail]``."""
        column = self.columns[name]
        return torch.cat([column[start : start + n] for start, n in zip(self.starts, counts, strict=True) if n])

    def drop(self, counts: Sequence[int]) -> None:
        """Forgets the oldest ``counts[r]`` entries of each row; capacities stay."""
        rest = [length - n for length, n in zip(self.lengths, counts, strict=True)]
        starts = [start + n for start, n in zip(self.starts, counts, strict=True)]
        before, after = Layout(starts, rest, self.capacities), Layout(self.starts, rest, self.capacities)
        self._move(before, after, None, (), 1)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row ``rows[i]`` (beams, repeated or dropped sequences), limits included."""
        lengths = [self.lengths[r] for r in rows]
        capacities = [self.capacities[r] for r in rows]
        for name, column in self.columns.items():
            parts = [column[self.starts[r] : self.starts[r] + self.capacities[r]] for r in rows]
            self.columns[name] = torch.cat(parts) if parts else column[:0]
        self.lengths, self.capacities = lengths, capacities
        self.starts = _starts(capacities)
        self.limits = None if self.limits is None else [self.limits[r] for r in rows]
        self.borrowed.clear()

    def share(self) -> "RaggedTable":
        """A second table over the same storages; spare room is given back first, since only one could use it."""
        self.reserve(self.lengths)
        other = RaggedTable(self.num_rows, self.step)
        other.lengths, other.capacities, other.starts = list(self.lengths), list(self.capacities), list(self.starts)
        other.columns, other.limits = Columns(self.columns), None if self.limits is None else list(self.limits)
        self.borrowed, other.borrowed = set(self.columns), set(self.columns)
        self.columns.changed()
        return other

    def check_integrity(self) -> None:
        """Raises AssertionError unless lengths, capacities, starts and columns agree."""
        assert self.starts == _starts(self.capacities), "starts disagree with capacities"
        assert all(0 <= n <= c for n, c in zip(self.lengths, self.capacities, strict=True)), "row longer than its room"
        for name, column in self.columns.items():
            assert column.shape[0] == sum(self.capacities), f"column {name} has {column.shape[0]} cells"
        assert self.borrowed <= set(self.columns), "a column that does not exist is borrowed"
        assert self.limits is None or len(self.limits) == self.num_rows, "limits for another number of rows"

    def _room(self, row: int, needed: int) -> int:
        grown = needed + max(self.step, needed // 16)
        return grown if self.limits is None else max(needed, min(grown, self.limits[row]))

    def _count(self, keep: Tensor, begins: Sequence[int], unit: int) -> list[int]:
        expected = (self.num_rows, self.longest)
        assert begins or keep.shape == expected, f"mask {tuple(keep.shape)} for a table of {expected}"
        return kernels.count_kept(keep, self.lengths, begins, unit)

    def _lay_out(
        self, lengths: Sequence[int], capacities: Sequence[int], keep: Tensor | None, begins: Sequence[int], unit: int
    ) -> None:
        """Brings the entries that ``keep`` names (None: all) into rows of these lengths and capacities."""
        before = Layout(self.starts, self.lengths, self.capacities)
        self._move(before, Layout(_starts(capacities), list(lengths), list(capacities)), keep, begins, unit)

    def _move(self, before: Layout, after: Layout, keep: Tensor | None, begins: Sequence[int], unit: int) -> None:
        """Brings the entries of ``before`` that ``keep`` names (None: all) to their places in ``after``."""
        in_place = not self.borrowed and sum(after.capacities) == sum(self.capacities)
        columns = list(self.columns.values())
        moved = kernels.compact(columns, keep, before, after, begins, unit, in_place=in_place)
        for name, column in zip(list(self.columns), moved, strict=True):
            if column is not self.columns[name]:
                self.columns[name] = column
        if after.capacities != self.capacities:
            self.columns.changed()
        self.starts, self.lengths, self.capacities = map(list, after)
        self.borrowed.clear()


def _starts(capacities: Sequence[int]) -> list[int]:
    """Where rows of these capacities begin."""
    return list(accumulate(capacities[:-1], initial=0))
