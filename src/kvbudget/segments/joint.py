"""JointSegment: entries of all KV heads of a layer, or of a group of layers, coded together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvbudget.codecs.joint import JointCodec, State
from kvbudget.models import Rotation
from kvbudget.segments.base import RotatesKeys, Segment
from kvbudget.segments.ragged import RaggedTable
from kvbudget.segments.restored import RestoredSegment

MOVED = "moved"
"""The column of positions that a key has been moved by."""


class Group(NamedTuple):
    """Layers of the model that hold their entries together, their KV heads, and what turns their keys."""

    layers: tuple[int, ...]
    heads: int
    rotations: tuple[Rotation, ...] = ()


class JointSegment(RestoredSegment):
    """Tokens whose heads and layers one codec holds together; all KV heads of a sequence hold the same ones.

    ``first`` and ``tail`` are entries in full precision, a row per KV head with the layers of the ``group`` side by side;
    ``cells`` are the coded tokens, a row per sequence, with the columns of each layer under its number in the group. What the
    last layer that was asked for decodes to is kept, for it and the one above it, as long as a forward lasts.
    """

    def __init__(self, num_rows: int, codec: JointCodec, group: Group) -> None:
        assert not codec.sinks or codec.unit == 1, "units would not begin at a multiple of their size"
        self.codec, self.group, self.unit = codec, group, codec.unit
        self.meta = RaggedTable(num_rows)
        self.first = RaggedTable(num_rows)
        self.cells = RaggedTable(num_rows // group.heads, step=-(-64 // codec.unit))
        self.tail = RaggedTable(num_rows, step=codec.longest_tail)
        self.first.limits, self.tail.limits = [codec.sinks] * num_rows, [codec.longest_tail] * num_rows
        self._last: tuple[int, Tensor, Tensor, State] | None = None

    @property
    def coded(self) -> list[int]:
        """Entries per row before the tail."""
        units = zip(self.first.lengths, self._by_row(self.cells.lengths), strict=True)
        return [first + cells * self.unit for first, cells in units]

    @property
    def sealed(self) -> list[int]:
        return self.coded if self.unit > 1 else [0] * self.num_rows

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        self._last = None
        self.meta.append(meta, counts)
        self.tail.append({"key": key, "value": value}, counts)

    def seal(self, asked: object = None) -> None:
        codec, self._last = self.codec, None
        fresh = [not coded for coded in self.coded]
        awaited = [n - codec.sinks * f for n, f in zip(self.tail.lengths, fresh, strict=True)]
        due = [max(0, n) // codec.lump * codec.lump for n in awaited]
        if not any(due):
            return
        apart = [codec.sinks * (f and n > 0) for f, n in zip(fresh, due, strict=True)]
        if any(apart):
            self.first.append(*self._leave(apart))
        begins, heads, faces = self.coded, self.group.heads, len(self.group.layers)
        counts = due[::heads]
        rows = enumerate(counts)
        positions = torch.cat([self._places(b, begins[b * heads], n) for b, n in rows])
        columns, _ = self._leave(due)

        def tokens(name: str) -> Tensor:
            """``[N, F, Hkv, D]``."""
            width = columns[name].shape[-1] // faces
            split = zip(columns[name].split([n * heads for n in counts]), counts, strict=True)
            return torch.cat([x.view(heads, n, faces, width).permute(1, 2, 0, 3) for x, n in split]).float()

        keys, values = tokens("key"), tokens("value")
        cells: dict[str, Tensor] = {}
        below: State = None
        for face, layer in enumerate(self.group.layers):
            key = self.group.rotations[face].strip(keys[:, face], positions[:, None]).flatten(1)
            found = codec.encode(layer, key, values[:, face].flatten(1), below)
            cells |= {f"{face}.{name}": column for name, column in found.items()}
            if face + 1 < faces:
                below = codec.decode(layer, found, below)[2]
        self.cells.append(cells, [n // self.unit for n in counts])

    def restored(self, face: int) -> tuple[Tensor, Tensor]:
        heads, faces = self.group.heads, len(self.group.layers)
        out = []
        for name in ("key", "value"):
            tail = self.tail.columns[name]
            out.append(tail.new_zeros(self.num_rows, self.longest, tail.shape[-1] // faces))
        if self.cells.total:
            key, value = self._decoded(face)
            counts = [n * self.unit for n in self.cells.lengths]
            firsts = self.first.lengths[::heads]
            rows = enumerate(zip(firsts, counts, strict=True))
            positions = torch.cat([self._places(b, f, n) for b, (f, n) in rows])
            key = self.group.rotations[face].embed(key.unflatten(1, (heads, -1)), positions[:, None])
            for whole, x in zip(out, (key, value.unflatten(1, (heads, -1))), strict=True):
                for b, (begin, part) in enumerate(zip(firsts, x.split(counts), strict=True)):
                    own = slice(b * heads, (b + 1) * heads)
                    whole[own, begin : begin + len(part)] = part.transpose(0, 1).to(whole.dtype)
        for table, begins in ((self.first, [0] * self.num_rows), (self.tail, self.coded)):
            for row, (begin, length) in enumerate(zip(begins, table.lengths, strict=True)):
                if length:
                    for whole, name in zip(out, ("key", "value"), strict=True):
                        whole[row, begin : begin + length] = table.row(name, row).chunk(faces, -1)[face]
        return out[0], out[1]

    def keys(self) -> Tensor:
        found, self._last = super().keys(), None
        return found

    def values(self) -> Tensor:
        found, self._last = super().values(), None
        return found

    def writable(self, row: int, face: int = 0) -> tuple[Tensor, Tensor]:
        """As of any segment: the row's tail, of one of the layers."""
        self.tail.own("key"), self.tail.own("value")
        key, value = (self.tail.row(name, row).chunk(len(self.group.layers), -1)[face] for name in ("key", "value"))
        return key, value

    def move(self, row: int, delta: Tensor, rotation: RotatesKeys) -> None:
        """As of any segment; coded keys, which are turned where they are read, are turned by so much more."""
        if not bool(delta.any()):
            return
        self.meta.own(MOVED)
        self.meta.row(MOVED, row).add_(delta)
        for table, begin in ((self.first, 0), (self.tail, self.coded[row])):
            if table.lengths[row]:
                table.own("key")
                keys = table.row("key", row).unflatten(-1, (len(self.group.layers), -1))
                for face, own in enumerate(self.group.rotations):
                    keys[:, face] = own.rotate(keys[:, face], delta[begin:][: len(keys)])

    def take(self, keep: Tensor, spare: int = 0) -> None:
        self._last = None
        heads, keep = self.group.heads, keep.cpu()
        alike = keep.unflatten(0, (-1, heads))
        assert bool((alike == alike[:, :1]).all()), "all KV heads keep the same entries"
        units = torch.zeros(self.cells.num_rows, self.cells.longest, dtype=torch.bool)
        first = torch.zeros(self.num_rows, self.first.longest, dtype=torch.bool)
        tail = torch.zeros(self.num_rows, self.tail.longest, dtype=torch.bool)
        for row, (begin, end) in enumerate(zip(self.first.lengths, self.coded, strict=True)):
            first[row, :begin] = keep[row, :begin]
            tail[row, : self.tail.lengths[row]] = keep[row, end : end + self.tail.lengths[row]]
            whole = keep[row, begin:end].unflatten(0, (-1, self.unit))
            assert bool((whole == whole[:, :1]).all()), "a sealed unit can only be kept or evicted whole"
            units[row // heads, : len(whole)] = whole[:, 0]
        self.meta.take(keep, spare)
        if self.cells.columns:
            self.cells.take(units, -(-spare // self.unit))
        if self.first.columns:
            self.first.take(first)
        if tail.sum() < self.tail.total:
            self.tail.take(tail, max(0, min(self.codec.longest_tail - int(tail.sum(1).max()), self.tail.step)))

    def truncate(self, lengths: Sequence[int]) -> None:
        self._last = None
        self.tail.truncate([n - coded for n, coded in zip(lengths, self.coded, strict=True)])
        self.meta.truncate(lengths)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return all(n >= coded for n, coded in zip(lengths, self.coded, strict=True))

    def tables(self) -> list[RaggedTable]:
        return [self.meta, self.first, self.cells, self.tail]

    def set_limits(self, limits: Sequence[int] | None) -> None:
        self.meta.limits = None if limits is None else list(limits)
        cells = None if limits is None else [-(-n // self.unit) for n in limits[:: self.group.heads]]
        self.cells.limits = cells

    def select_rows(self, rows: Sequence[int]) -> None:
        self._last = None
        for table in (self.meta, self.first, self.tail):
            table.select_rows(rows)
        self.cells.select_rows([row // self.group.heads for row in rows[:: self.group.heads]])

    def parts(self) -> dict[str, int]:
        parts = {"codes": 0, "codec metadata": 0, "tails": self.first.nbytes + self.tail.nbytes}
        for name, column in self.cells.columns.items():
            parts["codes" if name.endswith(".codes") else "codec metadata"] += column.untyped_storage().nbytes()
        for name, column in self.meta.columns.items():
            label = "positions" if name == "position" else "states"
            parts[label] = parts.get(label, 0) + column.untyped_storage().nbytes()
        return parts

    def share(self) -> Segment:
        other = super().share()
        assert isinstance(other, JointSegment)
        other._last = None
        return other

    def check_integrity(self) -> None:
        super().check_integrity()
        coded = zip(self.coded, self.tail.lengths, self.lengths, strict=True)
        assert all(n + tail == length for n, tail, length in coded), (
            "coded entries, tails and positions differ in number"
        )

    def _decoded(self, face: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values ``[N, Hkv * D]`` of the coded tokens of all sequences."""
        known, key, value, below = self._last or (-1, None, None, None)
        if known > face:
            known, below = -1, None
        for at in range(known + 1, face + 1):
            begin = f"{at}."
            columns = {n.removeprefix(begin): self.cells.flat(n) for n in self.cells.columns if n.startswith(begin)}
            key, value, below = self.codec.decode(self.group.layers[at], columns, below)
        assert key is not None and value is not None
        self._last = (face, key, value, below) if len(self.group.layers) > 1 else None
        return key, value

    def _places(self, b: int, begin: int, count: int) -> Tensor:
        """Where the keys of so many tokens of a sequence stand: their positions, and what they have been moved by."""
        row = b * self.group.heads
        places = self.meta.row("position", row)[begin : begin + count]
        return places + self.meta.row(MOVED, row)[begin : begin + count].int() if MOVED in self.meta.columns else places

    def _leave(self, counts: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
        """Takes as many oldest entries out of each row of the tail."""
        oldest = torch.arange(self.tail.longest) < torch.tensor(counts)[:, None]
        found = self.tail.gather(oldest)
        self.tail.take(~oldest & self.tail.valid())
        return found

    def _by_row(self, values: Sequence[int]) -> list[int]:
        return [value for value in values for _ in range(self.group.heads)]


class FaceSegment(RestoredSegment):
    """The entries of a `JointSegment` as those of its layer number ``face``, with states of its own."""

    def __init__(self, num_rows: int, whole: Callable[[], JointSegment], face: int) -> None:
        self.meta, self.whole, self.face = RaggedTable(num_rows), whole, face

    def restored(self, face: int) -> tuple[Tensor, Tensor]:
        return self.whole().restored(self.face)

    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        return self.whole().writable(row, self.face)

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        self.meta.append(meta, counts)

    def take(self, keep: Tensor, spare: int = 0) -> None:
        self.meta.take(keep, spare)

    def truncate(self, lengths: Sequence[int]) -> None:
        self.meta.truncate(lengths)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return True

    def tables(self) -> list[RaggedTable]:
        return [self.meta]

    def parts(self) -> dict[str, int]:
        position = self.meta.columns["position"].untyped_storage().nbytes() if self.meta.columns else 0
        return {"positions": position, "states": self.meta.nbytes - position}
