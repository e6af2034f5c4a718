"""Lane: a layer's decode step as one native call, prepared once and good until one of its storages moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.segments.base import Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import RaggedTable


class Sum(NamedTuple):
    """What a running state gathers: ``state <- decay * state + attention mass`` of a forward's newest ``last`` queries.

    ``last`` is None for all of them; ``group`` reduces the GQA group.
    """

    name: str
    decay: float = 1.0
    last: int | None = None
    group: Literal["mean", "max", "sum"] = "mean"


class Lane:
    """Appends one entry to every row of the last of the ``main`` segments and attends to all that they hold.

    It serves what the extension can do alone: one query step, entries without counts, formats that it knows. ``front``
    segments are a destination's own and take no part in attention mass; ``wanted`` says that mass is asked for, and ``sums``
    what a step may add to states by itself, if it ``can_add`` that. Where the segments cannot be served, there is no
    ``handle``, and whoever asks takes the longer way until something has ``moved``.

    Where rows are as full as their limits allow, the last segment would move for one entry that is about to make another one
    leave: the new entries may then stay in a segment of their own, ``spilled``, for the eviction to join.
    """

    def __init__(
        self,
        front: Sequence[Segment],
        main: Sequence[Segment],
        queries: int,
        wanted: bool = False,
        sums: Sequence[Sum] | None = (),
    ) -> None:
        self.front, self.main = list(front), list(main)
        self.handle: Any = None
        self.moved = False
        self.kept, self.wanted, self.can_add = False, wanted, False
        self.spilled: DenseSegment | None = None
        segments = [*front, *main]
        for segment in segments:
            for table in segment.tables():
                table.columns.lane = self
        found = [segment.sides() for segment in segments]
        sides = [pair for pair in found if pair is not None]
        if len(sides) < len(segments):
            return
        newest = segments[-1].meta
        key, value = sides[-1]
        self.grown = list({id(table): table for table in (newest, key.table, value.table)}.values())
        self.dtype = key.tail.data.dtype
        if value.tail.data.dtype is not self.dtype or any(table.borrowed for table in self.grown):
            return
        zeroed = [column for name, column in newest.columns.items() if name not in ("key", "value", "position")]
        self.held = [(k.cells, v.cells, segment.meta) for segment, (k, v) in zip(segments, sides, strict=True)]
        portions = [
            (k.operands, v.operands, segment.meta.starts, segment.meta.columns["position"])
            for segment, (k, v) in zip(segments, sides, strict=True)
        ]
        room = (newest.capacities, key.table.capacities, value.table.capacities)
        tables = [segment.meta for segment in main]
        self.states = {
            name: [table.columns[name].data_ptr() for table in tables]
            for name in newest.columns
            if all(name in table.columns and name not in table.borrowed for table in tables)
        }
        added = []
        single = queries == 1
        if sums is not None and all(one.name in self.states and (one.group != "max" or single) for one in sums):
            self.can_add, self.wanted = True, wanted or bool(sums)
            added = [(self.states[n], fade, 1 / queries if group == "mean" else 1.0) for n, fade, _, group in sums]
        rows, first = newest.num_rows, len(front)
        self.handle = kernels.lane(rows, queries, portions, room, zeroed, self.dtype, first, added)

    def leave(self) -> None:
        """A storage has moved, or may no longer be written: the addresses must not be used, nor segments be kept alive."""
        self.handle, self.spilled, self.moved = None, None, True
        self.front, self.main, self.held, self.grown = [], [], [], []

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: list[int],
        scale: float,
        softcap: float | None,
        window: int | None,
        out: Tensor,
        lse: Tensor | None,
        apart: DenseSegment | None = None,
        *,
        add: bool = False,
    ) -> bool:
        """Stores ``key [B, Hkv, 1, D]`` and ``value [B, Hkv, 1, Dv]`` and answers ``query [B, Hq, 1, D]``.

        ``seen`` are the positions of the new entries per sequence; with ``apart``, which holds the same entries, they are not
        stored. The answer goes to ``out [B, 1, Hq, Dv]`` in the query's dtype and ``lse [B, Hq, 1]`` float32; with ``add``,
        the attention mass goes to the states of the lane's sums. False, with nothing done, where that cannot be.
        """
        self.spilled, wanted = None, self.wanted
        positions = 0 if apart is None else apart.meta.columns["position"].data_ptr()
        done = self.handle.step(
            query, key, value, self.dtype, seen, self.held, self.grown, scale, softcap, window, out,
            0 if lse is None else lse.data_ptr(), wanted, add, positions, torch.get_num_threads(),
        )  # fmt: skip
        self.kept = wanted and done
        if done:
            self.spilled = apart
        return done

    def apart(self, key: Tensor, value: Tensor, seen: Sequence[int]) -> DenseSegment | None:
        """The new entries as a segment, where the last one is full and not to grow."""
        last = self.main[-1]
        table = last.meta
        if type(last) not in (DenseSegment, QuantizedSegment) or table.limits is None:
            return None
        if all(n < max(c, most) for n, c, most in zip(table.lengths, table.capacities, table.limits, strict=True)):
            return None
        rows = table.num_rows
        fresh = {"key": key.reshape(rows, -1).clone(), "value": value.reshape(rows, -1).clone()}
        fresh["position"] = torch.tensor(seen, dtype=torch.int32).repeat_interleave(rows // len(seen))
        segment = DenseSegment(rows)
        columns = fresh | {name: torch.zeros(rows) for name in table.columns if name not in fresh}
        segment.meta = RaggedTable.of(columns, [1] * rows)
        return segment

    def grow(self) -> bool:
        """Makes room for the new entries where rows are full, which ends the lane; False where no room is missing."""
        return any([table.make_room([n + 1 for n in table.lengths]) for table in list(self.grown)])

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
        return self.handle.accumulate(states, decay, factor, torch.get_num_threads())
