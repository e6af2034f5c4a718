"""LayerEntries: what one attention layer holds, in ordered segments; how entries come, leave and are bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kvbudget.kernels import count_kept
from kvbudget.segments.base import RotatesKeys, Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import ranges

# A sliding window may overrun by this many entries, so that sliding copies the window now and then, not once per token.
WINDOW_OVERRUN = 64
# What a fork adds beside the entries that it shares grows by this many at a time, so that many short answers stay small.
FORK_STEP = 16

Number = TypeVar("Number", int, float)
Same = TypeVar("Same", bound="LayerEntries")


class LayerEntries:
    """Entries of one layer: ``front`` segments (a destination's own) and ``main`` segments (what the policy evicts from).

    ``statistics`` are a scorer's or a destination's own tensors per row ``[R, ...]``, which are replaced and never written in
    place. ``marks`` are the kinds of tokens (`kvbudget.policy.marks`) of each sequence's text as far as they are known, which
    belong to the text like its ids and are not counted. ``seen[b]`` counts the tokens of sequence b that passed through,
    ``prompt[b]`` those that it began with; ``make_segment`` builds an empty main segment for a number of rows; ``window`` is
    the layer's own sliding window: entries outside of it are dropped after every forward.
    ``depth`` runs from 0 in the first budgeted layer to 1 in the last. ``hard`` says that a byte budget counts, so that a fork
    copies codes rather than hold a few of them twice. ``rest`` is how many more tokens, one at a time, leave nothing to be
    evicted or sealed; ``together`` are the layers whose entries these are.
    """

    def __init__(
        self,
        layer_idx: int,
        num_kv_heads: int,
        *,
        make_segment: Callable[[int], Segment] = DenseSegment,
        states: Sequence[str] = (),
        window: int | None = None,
        rotation: RotatesKeys | None = None,
    ) -> None:
        self.layer_idx = layer_idx
        self.num_kv_heads = num_kv_heads
        self.make_segment = make_segment
        self.states = tuple(states)
        self.window = window
        self.rotation = rotation
        self.main: list[Segment] = []
        self.front: list[Segment] = []
        self.statistics: dict[str, Tensor] = {}
        self.marks: list[Tensor] = []
        self.seen: list[int] = []
        self.prompt: list[int] = []
        self.apart = 0
        self.together: tuple[int, ...] = (layer_idx,)
        self.moving = False
        self.depth = 0.0
        self.shift: list[int] | None = None
        self.capacity: list[int] | None = None
        self.hard = False
        self.page = 1
        self.paged: list[int] = []
        self.rest = 0

    @property
    def batch_size(self) -> int:
        return len(self.seen)

    @property
    def num_rows(self) -> int:
        return self.batch_size * self.num_kv_heads

    @property
    def segments(self) -> list[Segment]:
        return self.front + self.main

    def kept(self) -> list[list[int]]:
        """Entries held per sequence and KV head, demoted and merged ones included."""
        return self._by_sequence(self._lengths(self.segments))

    def evictable(self) -> list[list[int]]:
        """Entries per sequence and KV head that the policy may evict."""
        return self._by_sequence(self._lengths(self.main))

    @property
    def longest(self) -> int:
        """Entries of the longest row that the policy may evict from."""
        return max(self._lengths(self.main), default=0)

    def start(self, batch_size: int) -> None:
        """Fixes the batch size of an empty layer."""
        self.seen = [0] * batch_size
        self.paged = [0] * self.num_rows
        if self.capacity is not None and len(self.capacity) != batch_size:
            self.capacity = None

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None, steps: Tensor | None = None) -> None:
        """Stores new tokens ``[B, Hkv, n, D]``; padding (``valid`` False) is never stored.

        ``steps [B, n]`` are their positions, the last of which is the newest token seen (None: they follow each other).
        """
        batch, heads, n = key.shape[:3]
        self.rest = -1
        if not self.seen:
            self.start(batch)
        segment = self.main[-1].branch(self.hard) if self.main else self.make_segment(self.num_rows)
        if not self.main or segment is not self.main[-1]:
            segment.meta.step = FORK_STEP if self.main else segment.meta.step
            self.main.append(segment)
            self._limit_room()
        segment = self.main[-1]
        if valid is None:
            counts = [n] * batch
            rows = (key.reshape(-1, key.shape[-1]), value.reshape(-1, value.shape[-1]))
        else:
            counts = valid.sum(1).tolist()
            grid = valid[:, None].expand(batch, heads, n)
            rows = (key[grid], value[grid])
        row_counts = self._per_row(counts)
        if steps is None:
            position = ranges(self._per_row(self.seen), row_counts, dtype=torch.int32, device=key.device)
        else:
            position = steps.int()[:, None].expand(batch, heads, n)
            position = position.flatten() if valid is None else position[grid]
        # What is missing in an append is filled with zeros, so states are named once.
        new = [name for name in self.states if name not in segment.meta.columns]
        meta = {"position": position} | {name: torch.zeros_like(position).float() for name in new}
        if "count" in self.states:
            meta["count"] = torch.ones_like(position).float()
        segment.append(*rows, meta, row_counts)
        if steps is None:
            self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]
        else:
            grown = zip(self.seen, counts, steps[:, -1].tolist(), strict=True)
            self.seen = [newest + 1 if count else seen for seen, count, newest in grown]

    def sealed_units(self) -> Tensor:
        """Unit that each evictable cell belongs to: int64 ``[R, T]``; cells with one id stay or go together."""
        ids = []
        base, before = 0, [0] * self.num_rows
        for segment in self.main:
            bound, cell = segment.sealed, torch.arange(segment.longest)
            if self.page > 1:
                paged = [min(max(p - b, 0), n) for p, b, n in zip(self.paged, before, segment.lengths, strict=True)]
                bound = list(map(max, bound, paged))
            if any(bound):
                first = cell - cell % max(segment.unit, self.page)
                ids.append(base + torch.where(cell < torch.tensor(bound)[:, None], first, cell))
            else:
                ids.append((base + cell).expand(self.num_rows, -1))
            base += segment.longest
            before = [b + n for b, n in zip(before, segment.lengths, strict=True)]
        return torch.cat(ids, dim=1)

    def evict(self, keep: Tensor, spare: int = 0) -> None:
        """Keeps the main entries where ``keep [R, T]`` (over the main segments side by side) is set; frees the rest."""
        begin, self.rest = 0, -1
        before = self._lengths(self.main)
        moves = self._moves(keep) if self.moving else None
        trail = self._trail()
        absorber = len(self.main) - 1 - len(trail)
        for index, segment in enumerate(self.main):
            end = begin + segment.longest
            part = keep[:, begin:end]
            if index == absorber and trail and isinstance(segment, DenseSegment | QuantizedSegment):
                # With room for what will join it, so that it moves once.
                joining = keep[:, end:]
                segment.take(part, [spare + n for n in count_kept(joining, [joining.shape[1]] * len(joining))])
            else:
                segment.take(part, 0 if trail or index < absorber else spare)
            begin = end
        if trail := self._trail():  # of which there may be more now, since what was shared has been copied
            self.main = self.main[: len(self.main) - len(trail)]
            self.main[-1].absorb(trail, spare)
        if self.apart and self.shift is None:
            self._set_apart(spare)
        self._limit_room()
        if moves is not None:
            self._move(moves)
        if not self.apart:
            return
        gone = [old - new for old, new in zip(before, self._lengths(self.main), strict=True)]
        self.shift = [s + gone[b * self.num_kv_heads] for b, s in enumerate(self.shift or [0] * self.batch_size)]

    def _moves(self, keep: Tensor) -> list[Tensor]:
        """Per row, by how many positions each kept key has to move so that what is evicted leaves no gap behind it."""
        gone = torch.cat([segment.meta.valid(keep.device) for segment in self.main], dim=1) & ~keep
        behind = gone.sum(1, keepdim=True) - gone.cumsum(1)
        return [behind[r][keep[r]] for r in range(self.num_rows)]

    def _move(self, moves: Sequence[Tensor]) -> None:
        """Rotates the kept keys, as far as segments can."""
        assert self.rotation is not None
        done = [0] * self.num_rows
        for segment in self.main:
            for r, length in enumerate(segment.lengths):
                segment.move(r, moves[r][done[r] : done[r] + length], self.rotation)
                done[r] += length

    def _set_apart(self, spare: int) -> None:
        """Splits the first ``apart`` positions off into a main segment of their own, whose queries `_turned` turns.

        A coded unit that holds one of them goes with them whole: nothing has left it, so there is no gap before its end.
        """
        (segment,) = self.main
        positions = segment.positions()
        valid = positions >= 0
        number = (valid & (positions < self.apart)).sum(1)
        whole = -(-number // segment.unit) * segment.unit
        number = torch.where(number <= torch.tensor(segment.sealed, device=number.device), whole, number)
        first = torch.arange(segment.longest, device=number.device) < number[:, None]
        rest = segment.share()
        segment.take(first & valid)
        for table in segment.tables():  # nothing joins them, but they may be coded yet
            table.limits = list(table.lengths)
            table.trim()
        rest.take(~first & valid, spare)
        self.main = [segment, rest]

    def nbytes(self) -> int:
        """Bytes of every resident tensor, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tensors(self) -> list[Tensor]:
        """Every resident tensor of the layer."""
        return [tensor for segment in self.segments for tensor in segment.tensors()] + list(self.statistics.values())

    def parts(self) -> dict[str, int]:
        """Resident bytes by what they hold."""
        parts: dict[str, int] = {}
        for segment in self.segments:
            for name, size in segment.parts().items():
                parts[name] = parts.get(name, 0) + size
        if self.statistics:
            sizes = [column.untyped_storage().nbytes() for column in self.statistics.values()]
            parts["states"] = parts.get("states", 0) + sum(sizes)
        return parts

    def set_capacity(self, capacity: list[int] | None) -> None:
        """Bounds the entries of each sequence, over all heads, for which appending may reserve room ahead of need."""
        if capacity != self.capacity:
            self.capacity = capacity
            self._limit_room()

    def _limit_room(self) -> None:
        if not self.main:
            return
        last = self.main[-1]
        if self.window is not None:
            most, held = self.window - 1 + WINDOW_OVERRUN, self._lengths(self.main)
            last.set_limits([own + max(0, most - n) for own, n in zip(last.lengths, held, strict=True)])
            return
        if self.capacity is None:
            last.set_limits(None)
            return
        # All heads of a sequence grow alike, so each may have the same share of what is left.
        heads = self.num_kv_heads
        left = [(c - sum(held)) // heads for c, held in zip(self.capacity, self.evictable(), strict=True)]
        last.set_limits([length + max(0, left[r // heads]) for r, length in enumerate(last.lengths)])
        if min(left) >= 0:  # else an eviction is about to give the room back
            for table in last.tables():
                table.trim()

    def can_truncate(self, tokens: int) -> bool:
        """Whether the newest ``tokens`` of each sequence are all still held, untouched, in the last segment.

        A sliding window must also hold what it covers once they are gone.
        """
        if tokens == 0:
            return True
        if not self.main:
            return False
        last = self.main[-1]
        rest = [length - tokens for length in last.lengths]
        if min(rest) < 0 or not last.can_truncate(rest):
            return False
        for r, length in enumerate(rest):
            seen = self.seen[r // self.num_kv_heads] - tokens
            # Positions rise, so the newest `tokens` entries are the newest positions if the first of them is.
            if int(last.meta.row("position", r)[length]) != seen:
                return False
            if self.window is not None:
                oldest = next(segment for segment in self.main if segment.lengths[r]).meta.row("position", r)[0]
                if int(oldest) > max(0, seen - self.window + 1):
                    return False
        return True

    def truncate(self, tokens: int) -> None:
        """Forgets the newest ``tokens`` of each sequence (see `can_truncate`)."""
        if tokens:
            last = self.main[-1]
            last.truncate([length - tokens for length in last.lengths])
            self.seen = [seen - tokens for seen in self.seen]
            self.marks = [marks[:seen] for marks, seen in zip(self.marks, self.seen, strict=False)]
            self.paged = [min(p, n) for p, n in zip(self.paged, self._lengths(self.main), strict=True)]
            self._limit_room()

    def select_sequences(self, index: Sequence[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]``."""
        heads, self.rest = self.num_kv_heads, -1
        rows = [b * heads + h for b in index for h in range(heads)]
        for segment in self.segments:
            segment.select_rows(rows)
        self.statistics = {name: column[rows] for name, column in self.statistics.items()}
        self.marks = [self.marks[b] for b in index] if self.marks else []
        self.paged = [self.paged[r] for r in rows]
        self.seen = [self.seen[b] for b in index]
        self.prompt = [self.prompt[b] for b in index] if self.prompt else []
        if self.shift is not None:
            self.shift = [self.shift[b] for b in index]
        self.capacity = None if self.capacity is None else [self.capacity[b] for b in index]

    def fork(self: Same) -> Same:
        """A second layer over the same storages; whatever either of them writes from now on goes elsewhere."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.main = [segment.share() for segment in self.main]
        other.front = [segment.share() for segment in self.front]
        other.statistics = dict(self.statistics)
        other.seen, other.paged = list(self.seen), list(self.paged)
        other.shift = None if self.shift is None else list(self.shift)
        return other

    def check_integrity(self) -> None:
        """Raises AssertionError when segments, lengths or positions disagree."""
        for segment in self.segments:
            assert segment.num_rows == self.num_rows, f"{segment.num_rows} rows in a layer of {self.num_rows}"
            segment.check_integrity()
        for segment in self.main:
            for r in range(self.num_rows):
                positions = segment.meta.row("position", r) if segment.lengths[r] else None
                if positions is not None:
                    assert bool((positions[1:] > positions[:-1]).all()), "entries are not in position order"
                    assert int(positions[-1]) < self.seen[r // self.num_kv_heads], "an entry from the future"
        for name, column in self.statistics.items():
            assert len(column) == self.num_rows, f"{len(column)} rows of {name} in a layer of {self.num_rows}"

    def _slide(self) -> None:
        assert self.window is not None
        room = self.window - 1
        if self.longest <= room + WINDOW_OVERRUN:
            return
        oldest = torch.tensor(self.seen).repeat_interleave(self.num_kv_heads) - room
        positions = torch.cat([segment.positions() for segment in self.main], dim=1)
        self.evict((positions >= oldest[:, None].to(positions.device)) & (positions >= 0))

    def _trail(self) -> list[Segment]:
        """Segments that the one before them takes over in an eviction, so that forks do not leave a trail of small ones."""
        segments = self.main[0 if self.shift is None else 1 :]
        return [] if any(segment.shared for segment in segments) else segments[1:]

    def _per_row(self, values: Sequence[Number]) -> list[Number]:
        """Numbers of the sequences, repeated for their KV heads."""
        return [value for value in values for _ in range(self.num_kv_heads)]

    def _by_sequence(self, rows: list[int]) -> list[list[int]]:
        heads = self.num_kv_heads
        return [rows[r : r + heads] for r in range(0, len(rows), heads)]

    def _lengths(self, segments: Sequence[Segment]) -> list[int]:
        """Entries per row of all these segments."""
        if len(segments) == 1:
            return segments[0].meta.lengths
        if not segments:
            return [0] * self.num_rows
        return list(map(sum, zip(*(segment.meta.lengths for segment in segments), strict=True)))
