"""CodecStore: the keys or the values of a segment, coded but for the first and the newest entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.kernels.operands import DecodedOperand, DenseOperand, Operand
from kvbudget.kernels.ragged import kept_cells
from kvbudget.kernels.turned import TurnedOperand
from kvbudget.models import Rotation
from kvbudget.segments.base import Side
from kvbudget.segments.ragged import RaggedTable

FIRST, SEALED, TAIL = range(3)


class CodecStore:
    """One side (keys or values) of a segment: first entries in full precision, sealed units, a full-precision tail.

    ``meta`` is the segment's table of positions; ``rotation`` is what keys are turned back by before they are coded. Units
    that differ in size lie in ``payload``, whose cells are bytes. ``state`` holds what rows keep, ``[R, ...]`` each; its
    tensors are replaced and never written in place, so that forks share them. Rows that have been ``thinned`` by an
    eviction await no whole lump when they are sealed next, so that the rows of a layer are sealed together, when entries leave.
    """

    def __init__(self, num_rows: int, codec: Codec, meta: RaggedTable, rotation: Rotation | None = None) -> None:
        assert not codec.sinks or codec.unit == 1, "units would not begin at a multiple of their size"
        self.codec = codec
        self.meta = meta
        self.rotation = rotation
        self.first = RaggedTable(num_rows)
        self.sealed = RaggedTable(num_rows, step=-(-64 // codec.unit))
        self.payload = RaggedTable(num_rows)
        self.tail = RaggedTable(num_rows, step=codec.longest_tail)
        self.first.limits = [codec.sinks] * num_rows
        self.tail.limits = [codec.longest_tail] * num_rows
        self.state: dict[str, Tensor] = {}
        self.started = [False] * num_rows
        self.thinned = [False] * num_rows

    @property
    def num_sealed(self) -> list[int]:
        """Sealed entries per row."""
        return [units * self.codec.unit for units in self.sealed.lengths]

    @property
    def lengths(self) -> list[int]:
        tables = (self.first.lengths, self.num_sealed, self.tail.lengths)
        return [f + s + t for f, s, t in zip(*tables, strict=True)]

    @property
    def coded(self) -> list[int]:
        """Entries per row before the tail."""
        return [f + s for f, s in zip(self.first.lengths, self.num_sealed, strict=True)]

    @property
    def tables(self) -> list[RaggedTable]:
        return [self.first, self.sealed, self.payload, self.tail]

    def bounds(self, part: int) -> list[tuple[int, int]]:
        """Where the first, the sealed or the newest entries of each row begin and end."""
        ends = [[0] * len(self.started), self.first.lengths, self.coded, self.lengths]
        return list(zip(ends[part], ends[part + 1], strict=True))

    def append(self, x: Tensor, counts: Sequence[int]) -> None:
        self.tail.append({"data": x}, counts)

    def due(self) -> list[int]:
        """Entries per row that the tail holds beyond its residual, and beyond the first ones where these are not set apart."""
        codec, due = self.codec, []
        for length, started, thinned in zip(self.tail.lengths, self.started, self.thinned, strict=True):
            length -= 0 if started else codec.sinks
            over = length if codec.cyclic else length - codec.residual
            step = codec.unit if thinned and started and not codec.cyclic else codec.lump
            due.append(max(0, over) // step * step)
        return due

    @property
    def rest(self) -> int:
        """As `Segment.rest`."""
        codec = self.codec
        return max(0, codec.lump + (0 if codec.cyclic else codec.residual) - 1 - self.tail.longest)

    def seal(self, asked: Asked | None = None, salience: Tensor | None = None) -> None:
        """Encodes what is `due`; ``salience`` is that of these entries, flat in row order."""
        codec = self.codec
        full = codec.lump + (0 if codec.cyclic else codec.residual)
        due = self.due() if self.tail.longest >= full or any(self.thinned) else []
        self.thinned = [False] * len(self.thinned)
        if not any(due):
            return
        fresh = [n > 0 and not started for n, started in zip(due, self.started, strict=True)]
        if codec.sinks and any(fresh):
            self._set_first([codec.sinks if f else 0 for f in fresh])
        self._encode(self.tail.oldest("data", due), due, fresh, asked, salience)
        self.tail.drop(due)
        if not codec.residual or max(self.tail.capacities) > codec.longest_tail:
            self.tail.reserve(self.tail.lengths)

    def decoded(self, row: int, begin: int, end: int) -> Tensor:
        """Sealed entries ``begin:end`` of a row (counted from the first sealed one): float32 ``[end - begin, D]``."""
        data = self.tail.columns["data"]
        if end <= begin:
            return data.new_zeros((0, data.shape[-1]), dtype=torch.float32)
        codec, start = self.codec, self.sealed.starts[row]
        units = slice(begin // codec.unit, -(-end // codec.unit))
        at = slice(start + units.start, start + units.stop)
        cells = {name: column[at] for name, column in self.sealed.columns.items()}
        if codec.variable:
            before = {name: column[start : at.start] for name, column in self.sealed.columns.items()}
            skip, size = int(codec.sizes(before, data.shape[-1]).sum()), int(codec.sizes(cells, data.shape[-1]).sum())
            cells["payload"] = self.payload.row("payload", row)[skip : skip + size]
        rows = torch.full((at.stop - at.start,), row, device=data.device)
        dense = codec.decode(cells, Place(rows, self.state, data.shape[-1]))
        dense = dense[begin - units.start * codec.unit : end - units.start * codec.unit]
        if self.rotation is None:
            return dense
        first = self.first.lengths[row]
        return self.rotation.embed(dense, self.meta.row("position", row)[first + begin : first + end])

    def rows(self, row: int, begin: int, end: int) -> Tensor:
        """Entries ``begin:end`` of a row in the tail's dtype, whatever holds them."""
        first, coded = self.first.lengths[row], self.coded[row]
        parts = []
        if begin < first:
            parts.append(self.first.row("data", row)[begin:end])
        if begin < coded and end > first:
            parts.append(self.decoded(row, max(begin, first) - first, min(end, coded) - first))
        if end > coded or not parts:
            parts.append(self.tail.row("data", row)[max(begin - coded, 0) : max(end - coded, 0)])
        return torch.cat([part.to(self.tail.columns["data"].dtype) for part in parts])

    def padded(self) -> Tensor:
        """All entries decoded, in the tail's dtype: ``[R, longest, D]``."""
        lengths = self.lengths
        tail = self.tail.columns["data"]
        out = tail.new_zeros((len(lengths), max(lengths), tail.shape[-1]))
        for r, length in enumerate(lengths):
            if length:
                out[r, :length] = self.rows(r, 0, length)
        return out

    def take(self, keep: Tensor, spare: int) -> None:
        """Keeps the entries where ``keep [R, longest]`` is set, with room for ``spare`` more in each row."""
        codec, unit = self.codec, self.codec.unit
        first, coded = list(self.first.lengths), self.coded
        if codec.variable and self.payload.columns:
            units = kept_cells(keep, self.sealed.lengths, first, unit)
            cells = torch.zeros(self.payload.num_rows, self.payload.longest, dtype=torch.bool)
            for r, size in enumerate(self._sizes()):
                cells[r, : int(size.sum())] = units[r, : len(size)].repeat_interleave(size.cpu())
            self.payload.take(cells, -(-spare // unit) * self._most())
        if self.sealed.columns:
            self.sealed.take(keep, -(-spare // unit), first, unit)
        if self.first.columns:
            self.first.take(keep, 0, [0] * len(first))
        counts = kernels.count_kept(keep, self.tail.lengths, coded)
        if sum(counts) < self.tail.total:
            most = codec.longest_tail if codec.residual else 0
            self.tail.take(keep, [min(max(0, most - count), self.tail.step) for count in counts], coded)

    def keep_sealed(self, units: Sequence[int]) -> None:
        """Forgets everything but the first entries and as many oldest units of each row."""
        if self.codec.variable and self.payload.columns:
            self.payload.truncate([int(size[:n].sum()) for size, n in zip(self._sizes(), units, strict=True)])
        self.sealed.truncate(units)
        self.tail.take(torch.zeros(self.tail.num_rows, self.tail.longest, dtype=torch.bool))

    def absorb(self, other: "CodecStore") -> None:
        """Takes over the units and the tail of a store whose entries follow; this one's tail is empty."""
        for mine, theirs in ((self.sealed, other.sealed), (self.payload, other.payload)):
            mine.append({name: theirs.flat(name) for name in theirs.columns}, theirs.lengths)
        assert not other.first.total or other.first.lengths == self.first.lengths, "first entries in the middle"
        self.tail, self.state, self.started, self.thinned = other.tail, other.state, other.started, other.thinned

    def select_rows(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row ``rows[i]`` in everything but the tables."""
        self.state = {name: column[list(rows)] for name, column in self.state.items()}
        self.started, self.thinned = [self.started[r] for r in rows], [self.thinned[r] for r in rows]

    def set_limits(self, limits: Sequence[int] | None) -> None:
        """Bounds the entries per row for which units may reserve room ahead of need."""
        units = None if limits is None else [-(-n // self.codec.unit) for n in limits]
        self.sealed.limits = units
        self.payload.limits = None if units is None else [n * self._most() for n in units]

    def operand(self, begin: Sequence[int], part: int) -> Operand:
        """Rows from entry ``begin[r]`` of one of the three parts on."""
        if part == SEALED:
            fused = self.codec.operand(self._cells(), self.sealed.starts, begin)
            if fused is None:
                return DecodedOperand(lambda row, b, e: self.decoded(row, begin[row] + b, begin[row] + e))
            return fused if self.rotation is None else self._turned(fused, self.rotation, begin)
        table = self.first if part == FIRST else self.tail
        return DenseOperand(table.columns["data"], [s + b for s, b in zip(table.starts, begin, strict=True)])

    def side(self) -> Side | None:
        """The sealed units and the tail for a lane; None where there is more, or units have no fused form.

        Operands made of what rows keep may hold tensors that nobody else does, and a lane knows addresses only.
        """
        if self.codec.sinks or self.codec.variable or self.rotation is not None or self.state:
            return None
        tail, sealed = DenseOperand(self.tail.columns["data"], self.tail.starts), None
        if self.sealed.columns:
            sealed = self.codec.operand(self.sealed.columns | self.state, self.sealed.starts, [0] * len(self.started))
            if sealed is None or sealed.basis is not None:
                return None
        return Side(sealed, self.codec.unit, self.sealed if sealed is not None else None, tail, self.tail)

    def _cells(self) -> dict[str, Tensor]:
        """What a codec's operand is made of; of units that differ in size also where in the payload they begin."""
        cells = self.sealed.columns | self.state
        if not self.codec.variable:
            return cells
        at = torch.zeros(len(next(iter(self.sealed.columns.values()))), dtype=torch.long)
        starts = zip(self.sealed.starts, self.sealed.lengths, self.payload.starts, strict=True)
        for size, (start, length, first) in zip(self._sizes(), starts, strict=True):
            at[start : start + length] = size.cumsum(0) - size + first
        width = torch.tensor(self.tail.columns["data"].shape[-1])
        return cells | {"payload": self.payload.columns["payload"], "at": at, "width": width}

    def _turned(self, base: Operand, rotation: Rotation, begin: Sequence[int]) -> TurnedOperand:
        """Rows of an operand from entry ``begin[r]`` on, turned as the model turns its keys."""
        position = self.meta.columns["position"]
        matrix, base.basis = None if base.basis is None else base.basis.T.contiguous(), None
        entries = [s + f + b for s, f, b in zip(self.meta.starts, self.first.lengths, begin, strict=True)]
        turned, scaling = rotation.layout == "interleaved", rotation.attention_scaling
        return TurnedOperand(base, rotation.inv_freq.to(position.device), turned, position, entries, matrix, scaling)

    def share(self) -> "CodecStore":
        other = object.__new__(CodecStore)
        other.__dict__.update(self.__dict__)
        for name in ("first", "sealed", "payload", "tail"):
            setattr(other, name, getattr(self, name).share())
        other.started, other.thinned = list(self.started), list(self.thinned)
        return other

    def _set_first(self, counts: Sequence[int]) -> None:
        """Moves the oldest entries of the tails out of the way of the codec."""
        oldest = torch.arange(self.tail.longest) < torch.tensor(counts)[:, None]
        columns, moved = self.tail.gather(oldest)
        self.first.append(columns, moved)
        self.tail.take(~oldest & self.tail.valid())

    def _encode(
        self, x: Tensor, due: list[int], fresh: list[bool], asked: Asked | None, salience: Tensor | None
    ) -> None:
        codec, units = self.codec, [n // self.codec.unit for n in due]
        if not codec.placed and self.rotation is None and not any(fresh):
            self.sealed.append(codec.encode(x), units)
            return
        begins = zip(self.coded, due, strict=True)
        positions = torch.cat([self.meta.row("position", r)[b : b + n] for r, (b, n) in enumerate(begins)])
        if self.rotation is not None:
            x = self.rotation.strip(x.float(), positions)
        if any(fresh):
            for r, entries in enumerate(x.split(due)):
                if fresh[r]:
                    self._start(r, codec.start(entries, r, asked))
            self.started = [s or f for s, f in zip(self.started, fresh, strict=True)]
        rows = torch.arange(len(units), device=x.device).repeat_interleave(torch.tensor(units, device=x.device))
        cells = codec.encode(x, Place(rows, self.state, x.shape[-1], positions, salience))
        if codec.variable:
            payload = cells.pop("payload")
            sizes = codec.sizes(cells, x.shape[-1]).split(units)
            self.payload.append({"payload": payload}, [int(size.sum()) for size in sizes])
        self.sealed.append(cells, units)

    def _start(self, row: int, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            column = self.state.get(name)
            column = value.new_zeros(len(self.started), *value.shape) if column is None else column.clone()
            column[row] = value
            self.state[name] = column

    def _sizes(self) -> list[Tensor]:
        """Bytes of the units of each row."""
        names, width = list(self.sealed.columns), self.tail.columns["data"].shape[-1]
        rows = range(len(self.started))
        return [self.codec.sizes({name: self.sealed.row(name, r) for name in names}, width) for r in rows]

    def _most(self) -> int:
        """Most bytes of a unit in the payload."""
        data = self.tail.columns.get("data")
        return self.codec.payload_bytes(data.shape[-1]) if self.codec.variable and data is not None else 0
