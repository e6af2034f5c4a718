"""Lane: a layer's decode step as one native call, prepared once and good until one of its storages moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.segments.base import Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.ragged import RaggedTable


class Lane:
    """Appends one entry to every row of the last of ``segments`` and attends to all that they hold.

    It serves what the extension can do alone: one query step, entries without counts, formats that it knows. ``front`` of
    the segments are a destination's own and take no part in attention mass; ``wanted`` says that mass is asked for. Where
    the segments cannot be served, `step` says None until something moves, and whoever asks takes the longer way.

    Where rows are as full as their limits allow, the last segment would move for one entry that is about to make another one
    leave: the new entries may then stay in a segment of their own, ``spilled``, for the eviction to join.
    """

    def __init__(self, segments: list[Segment], front: int, queries: int, wanted: bool = False) -> None:
        found = [segment.sides() for segment in segments]
        sides = [pair for pair in found if pair is not None]
        self.segments, self.front = segments, front
        self.versions = [(table, table.columns.version) for segment in segments for table in segment.tables()]
        self.handle = None
        self.kept, self.wanted = False, wanted
        self.spilled: DenseSegment | None = None
        if len(sides) < len(segments):
            return
        newest = segments[-1].meta
        key, value = sides[-1]
        grown = list({id(table): table for table in (newest, key.table, value.table)}.values())
        self.dtype = key.tail.data.dtype
        self.width = value.tail.data.shape[-1]
        if value.tail.data.dtype is not self.dtype or any(table.borrowed for table in grown):
            return
        zeroed = [column for name, column in newest.columns.items() if name not in ("key", "value", "position")]
        portions, held = [], []
        for segment, (k, v) in zip(segments, sides, strict=True):
            portions.append((k.operands, v.operands, segment.meta.starts, segment.meta.columns["position"]))
            held.append((k.cells, v.cells, segment.meta))
        room = (newest.capacities, key.table.capacities, value.table.capacities)
        self.handle = kernels.lane(newest.num_rows, queries, portions, held, grown, room, zeroed, self.dtype)
        main = [segment.meta for segment in segments[front:]]
        self.states = {
            name: [table.columns[name].data_ptr() for table in main]
            for name in newest.columns
            if all(name in table.columns and name not in table.borrowed for table in main)
        }

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Sequence[int],
        scale: float,
        softcap: float | None,
        window: int | None,
        *,
        spill: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Stores ``key [B, Hkv, 1, D]`` and ``value [B, Hkv, 1, Dv]`` and answers ``query [B, Hq, 1, D]``.

        ``seen`` are the positions of the new entries per sequence. Returns ``out [B, Hq, 1, Dv]`` in the query's dtype and
        ``lse [B, Hq, 1]`` float32; None, with nothing done, where it cannot. With ``spill``, entries that find no room are
        ``spilled`` after the call.
        """
        self.kept, self.spilled = False, None
        handle, wanted = self.handle, self.wanted
        if handle is None:
            return None
        batch, heads = query.shape[:2]
        out = torch.empty(batch, heads, 1, self.width, dtype=self.dtype)
        lse = torch.empty(batch, heads, 1)
        threads = torch.get_num_threads()
        if not handle.step(query, key, value, seen, scale, softcap, window, out, lse, wanted, 0, threads):
            apart = self._apart(key, value, seen) if spill else None
            if apart is None:
                return None
            positions = apart.meta.columns["position"].data_ptr()
            if not handle.step(query, key, value, seen, scale, softcap, window, out, lse, wanted, positions, threads):
                return None
            self.spilled = apart
        self.kept = wanted
        return out, lse

    def _apart(self, key: Tensor, value: Tensor, seen: Sequence[int]) -> DenseSegment | None:
        """The new entries as a segment, where the last one is dense, full and not to grow."""
        last = self.segments[-1]
        table = last.meta
        if type(last) is not DenseSegment or table.limits is None:
            return None
        if all(n < max(c, most) for n, c, most in zip(table.lengths, table.capacities, table.limits, strict=True)):
            return None
        rows = table.num_rows
        fresh = {"key": key.reshape(rows, -1).clone(), "value": value.reshape(rows, -1).clone()}
        fresh["position"] = torch.tensor(seen, dtype=torch.int32).repeat_interleave(rows // len(seen))
        segment = DenseSegment(rows)
        columns = {name: fresh[name] if name in fresh else torch.zeros(rows) for name in table.columns}
        segment.meta = RaggedTable.of(columns, [1] * rows)
        return segment

    def accumulate(self, name: str, decay: Sequence[float], factor: float) -> bool:
        """Adds the attention mass of the last step to a state column, as `Segment.add_to_state` does; False where it cannot.

        ``decay`` has one number per sequence or per row. The first time it only takes note, so that later steps keep their
        logits.
        """
        self.wanted = True
        if not self.kept or self.handle is None or name not in self.states:
            return False
        states = self.states[name]
        if self.spilled is not None:
            states = [*states, self.spilled.meta.columns[name].data_ptr()]
        return self.handle.accumulate(self.front, states, decay, factor, torch.get_num_threads())
