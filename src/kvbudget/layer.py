"""LayerCache: the ordered segments of one attention layer, and the data path of its attention calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked
from kvbudget.kernels import flash, merge
from kvbudget.kernels.reference import Partial
from kvbudget.segments import retrospective, selective
from kvbudget.segments.base import AttendContext, Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.lane import Lane
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import ranges

# Up to this many new tokens are stored first and then attended with the rest; more are attended as a block of their own.
FEW_TOKENS = 8
# A sliding window may overrun by this many entries, so that sliding copies the window now and then, not once per token.
WINDOW_OVERRUN = 64
# What a fork adds beside the entries that it shares grows by this many at a time, so that many short answers stay small.
FORK_STEP = 16
_NEXT = (1).__add__


Number = TypeVar("Number", int, float)


class RotatesKeys(Protocol):
    """What the layer needs of a rotation: moving vectors ``[..., D]`` by position deltas that broadcast to ``[...]``."""

    def rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        """Rotates by ``delta`` positions."""


@dataclass(slots=True)
class AttentionCall:
    """One attention call of the model: ``query [B, Hq, n, D]``, ``key [B, Hkv, n, D]``, ``value [B, Hkv, n, Dv]``.

    ``valid [B, n]`` marks tokens that are not padding (None: all); ``sink [Hq]`` are GPT-OSS's sink logits. ``steps [B, n]``
    are the positions of the tokens where some of the text between them is left out (None: they follow what has been seen).
    ``face`` says which of the layers asks, where two share what they hold merged.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None
    valid: Tensor | None = None
    steps: Tensor | None = None
    face: int = 0


class LayerCache:
    """Entries of one layer: ``front`` segments (a destination's own) and ``main`` segments (what the policy evicts from).

    ``statistics`` are a scorer's or a destination's own tensors per row ``[R, ...]``, which are replaced and never written in
    place. ``marks`` are the kinds of tokens (`kvbudget.policy.marks`) of each sequence's text as far as they are known, which
    belong to the text like its ids and are not counted. ``seen[b]`` counts the tokens of sequence b that passed through,
    ``prompt[b]`` those that it began with; ``make_segment`` builds an empty main segment for a number of rows; ``window`` is
    the layer's own sliding window: entries outside of it are dropped after every forward.
    ``depth`` runs from 0 in the first budgeted layer to 1 in the last. A ``selector`` says what queries read of the entries
    held (extra passes of a plan and of measurements read everything); ``reads`` says it where queries are answered again.
    ``hard`` says that a byte budget counts, so that a fork copies codes rather than hold a few of them twice. While ``spills``,
    a token that finds the rows full may stay in a segment of its own until the eviction that follows: where shares of layers
    move, none may follow. ``rest`` is how many more tokens by `step` leave nothing to be evicted or sealed.
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
        selector: selective.Selects | None = None,
        reads: retrospective.Reads | None = None,
    ) -> None:
        self.layer_idx = layer_idx
        self.num_kv_heads = num_kv_heads
        self.make_segment = make_segment
        self.states = tuple(states)
        self.window = window
        self.rotation = rotation
        self.selector = selector
        self.reads = reads
        self.main: list[Segment] = []
        self.front: list[Segment] = []
        self.statistics: dict[str, Tensor] = {}
        self.marks: list[Tensor] = []
        self.seen: list[int] = []
        self.prompt: list[int] = []
        self.apart = 0
        self.moving = False
        self.depth = 0.0
        self.shift: list[int] | None = None
        self.capacity: list[int] | None = None
        self.hard = False
        self.page = 1
        self.paged: list[int] = []
        self.spills = False
        self._lane: Lane | None = None
        self._fresh = False
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
    def rests(self) -> bool:
        """Whether the newest token came by `step` and leaves nothing to be evicted or sealed."""
        return self._fresh and self.rest >= 0

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

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attends the call's queries to everything held and to the new tokens, which are then held too.

        Returns ``out [B, Hq, n, Dv]`` in the query's dtype and ``lse [B, Hq, n]`` float32.
        """
        if self.selector is not None and (selected := self._selected(call, self.selector)) is not None:
            return selected
        if self.reads is not None:
            again = self.statistics.get(retrospective.RETURNED)
            fresh = call.query.shape[2] - (0 if again is None else again.shape[1])
            if call.valid is None and call.steps is None and fresh <= FEW_TOKENS:
                out, lse = retrospective.attend(self, self.reads, call)
                return out.to(call.query.dtype), lse
            retrospective.forget(self)
        few = call.valid is None and call.steps is None and call.query.shape[2] <= FEW_TOKENS
        self._fresh = False
        if few:
            if call.query.shape[2] == 1 and (answer := self._step(call)) is not None:
                return answer
            self.append(call.key, call.value, None)
            return self._join(call, list(self._held(call, tail=call.query.shape[2])))
        out, lse, _ = self.probe(call)
        self.append(call.key, call.value, call.valid, call.steps)
        return out, lse

    def _step(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """`forward` of one token as a `step`; None, with nothing done, where that cannot be."""
        batch, heads, _, _ = call.query.shape
        if call.sink is not None or call.face or not call.query.is_cpu:
            return None
        out, lse = call.query.new_empty(batch, 1, heads, call.value.shape[-1]), torch.empty(batch, heads, 1)
        done = self.step(call.query, call.key, call.value, call.scale, call.softcap, out, lse)
        return (out.transpose(1, 2), lse) if done else None

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        out: Tensor,
        lse: Tensor | None,
    ) -> bool:
        """One token of each sequence by the prepared lane; False, with nothing done, where that cannot be.

        The answer goes to ``out [B, 1, Hq, Dv]``, heads behind the token, and to ``lse [B, Hq, 1]`` float32.
        """
        lane, main, seen, window = self._lane, self.main, self.seen, self.window
        if lane is None or lane.handle is None or lane.main != main or lane.front != self.front:
            if self.shift is not None or self.selector is not None or self.reads is not None or not main:
                return False
            if lane is None or lane.moved or lane.main != main or lane.front != self.front:
                group = query.shape[1] // self.num_kv_heads
                lane = self._lane = Lane(self.front, main, group, lane is not None and lane.wanted)
            if lane.handle is None:
                return False
        rest = self.rest - 1
        if not lane.step(query, key, value, seen, scale, softcap, window, out, lse):
            spills = self.spills and len(main) == 1 and window is None and not self.apart
            apart = lane.apart(key, value, seen) if spills else None
            if apart is None or not lane.step(query, key, value, seen, scale, softcap, window, out, lse, apart):
                return False
            main.append(apart)
            rest = -1
        self.seen, self.rest, self._fresh = list(map(_NEXT, seen)), rest, True
        return True

    def _leave_lane(self) -> None:
        """Forgets a lane over segments that have been replaced, and what it set apart, which it would keep alive."""
        if self._lane is not None:
            self._lane.spilled = None
            if self._lane.main != self.main or self._lane.front != self.front:
                self._lane = None

    def _selected(self, call: AttentionCall, selector: selective.Selects) -> tuple[Tensor, Tensor] | None:
        """As `forward`, but a selector says what the queries read; None where all of them read everything."""
        whole = None
        if not selector.prefill:
            new = call.query.shape[2] if call.valid is None else call.valid.sum(1)
            whole = torch.as_tensor(new, device=call.query.device).expand(call.query.shape[0]) > FEW_TOKENS
            if bool(whole.all()):
                return None
        seen = torch.tensor(self.seen or [0] * call.query.shape[0], device=call.query.device)[:, None]
        if call.valid is None:
            steps = seen + torch.arange(call.query.shape[2], device=seen.device)
        else:
            steps = seen + call.valid.long().cumsum(1) - 1
        self.append(call.key, call.value, call.valid)
        out, lse = selective.attend(
            selector, self.layer_idx, self.depth, self.segments, call.query, steps,
            scale=call.scale, softcap=call.softcap, sink=call.sink, whole=whole,
        )  # fmt: skip
        return out.to(call.query.dtype), lse

    def probe(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, but leaves the new tokens out of the cache; also returns what held entries do not add to the lse."""
        self._fresh = False
        inside = self._inside(call)
        out, lse = self._join(call, [*self._held(call, tail=0), inside])
        own = inside.lse.view(lse.shape)
        return out, lse, own if call.sink is None else torch.logaddexp(own, call.sink.float()[:, None])

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

    def finish_forward(self, asked: Asked | None = None) -> None:
        """Ends a forward: drops what the layer's own window no longer covers, and compresses full-precision tails.

        ``asked`` are its queries, for codecs that look at them.
        """
        if self.rests:
            return
        if self.window is not None:
            self._slide()
        for segment in self.segments:
            segment.seal(asked)
        self._leave_lane()
        if self.page > 1:
            self.paged = [length // self.page * self.page for length in self._lengths(self.main)]
        self.rest = min((segment.rest for segment in self.segments), default=0) if self.page == 1 else 0
        if self.window is not None:
            self.rest = min(self.rest, self.window - 1 + WINDOW_OVERRUN - self.longest)

    def masses(
        self, query: Tensor, lse: Tensor, like: object, *, summed: bool = True
    ) -> Iterator[tuple[Segment, list[Tensor]]]:
        """Attention mass per main segment from ``query [B, Hq, W, D]`` whose tokens are the newest entries held.

        ``like`` carries ``scale`` and ``softcap``; ``lse [B, Hq, W]`` is merged over everything (+inf: do not count).
        Without ``summed`` a row's weights ``[G * W, T_r]`` are given instead of their sums ``[T_r]`` over the queries.
        """
        width = query.shape[2]
        rows = self._rows(query)
        flat = lse.reshape(self.num_rows, -1)
        positions = self._positions(width, query.device) if width > 1 else None
        steps = getattr(like, "steps", None)
        if steps is not None and width > 1:
            positions = steps[:, -width:].repeat_interleave(self.num_kv_heads, dim=0)
        for index, segment in enumerate(self.main):
            tail = width if index == len(self.main) - 1 else 0
            if segment.longest:
                ctx = AttendContext(like.scale, like.softcap, None, positions, tail)  # type: ignore[attr-defined]
                measure = segment.mass if summed else segment.weights
                yield segment, measure(self._turned(segment, rows, width), flat, ctx)

    def add_mass(
        self, name: str, query: Tensor, lse: Tensor, like: object, decay: Sequence[float], factor: float
    ) -> None:
        """Adds the `masses` of these queries to a state column: ``state <- decay[r] * state + factor * mass``.

        ``decay`` has one number per sequence or per row.
        """
        lane = self._lane
        if self._fresh and query.shape[2] == 1 and lane is not None and lane.accumulate(name, decay, factor):
            return
        each = decay if len(decay) == self.num_rows else self._per_row(decay)
        for segment, rows in self.masses(query, lse, like):
            segment.add_to_state(name, rows, each, factor)

    def sealed_units(self) -> Tensor:
        """Unit that each evictable cell belongs to: int64 ``[R, T]``; cells with one id stay or go together."""
        ids = []
        base, before = 0, [0] * self.num_rows
        for segment in self.main:
            cell = torch.arange(segment.longest)[None, :].expand(self.num_rows, -1)
            unit = max(segment.unit, self.page)
            paged = [min(max(p - b, 0), n) for p, b, n in zip(self.paged, before, segment.lengths, strict=True)]
            bound = [max(s, p) if self.page > 1 else s for s, p in zip(segment.sealed, paged, strict=True)]
            inside = cell < torch.tensor(bound)[:, None]
            ids.append(base + torch.where(inside, cell // unit * unit, cell))
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
                segment.take(part, [spare + n for n in keep[:, end:].sum(1).tolist()])
            else:
                segment.take(part, 0 if trail or index < absorber else spare)
            begin = end
        if trail := self._trail():  # of which there may be more now, since what was shared has been copied
            self.main = self.main[: len(self.main) - len(trail)]
            self.main[-1].absorb(trail, spare)
        if self.apart and self.shift is None:
            self._set_apart(spare)
        self._limit_room()
        self._leave_lane()
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
        """Rotates the kept keys; those that are coded stay where they are."""
        assert self.rotation is not None
        done = [0] * self.num_rows
        for segment in self.main:
            for r, length in enumerate(segment.lengths):
                delta = moves[r][done[r] : done[r] + length]
                done[r] += length
                if bool(delta.any()):
                    keys, _ = segment.writable(r)
                    keys.copy_(self.rotation.rotate(keys, delta[length - len(keys) :]))

    def _set_apart(self, spare: int) -> None:
        """Splits the first ``apart`` positions off into a main segment of their own, whose queries `_turned` turns."""
        (segment,) = self.main
        positions = segment.positions()
        first, valid = positions < self.apart, positions >= 0
        rest = segment.share()
        segment.take(first & valid)
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
            last.set_limits([self.window - 1 + WINDOW_OVERRUN] * self.num_rows)
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

    def fork(self) -> LayerCache:
        """A second layer over the same storages; whatever either of them writes from now on goes elsewhere."""
        other = object.__new__(LayerCache)
        other.__dict__.update(self.__dict__)
        other.main = [segment.share() for segment in self.main]
        other.front = [segment.share() for segment in self.front]
        other.statistics = dict(self.statistics)
        other._lane, other._fresh, other.rest = None, False, 0
        other.seen, other.paged = list(self.seen), list(self.paged)
        other.shift = None if self.shift is None else list(self.shift)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without a lane, which holds addresses."""
        return self.__dict__ | {"_lane": None, "_fresh": False, "rest": 0}

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

    def _held(self, call: AttentionCall, tail: int) -> Iterator[Partial]:
        """Partials over the segments; ``tail`` newest entries of the last one belong to the queries themselves."""
        n = call.query.shape[2]
        query = self._rows(call.query)
        window = call.window
        if window is not None and n == 1 and self.longest < window + (1 if tail else 0):
            window = None
        positions = None
        if window is not None or tail > 1:
            positions = self._positions(n, query.device, call.valid, stored=bool(tail))
        newest = self.main[-1] if self.main else None
        for segment in self.segments:
            if segment.longest:
                own = tail if segment is newest else 0
                ctx = AttendContext(call.scale, call.softcap, window, positions, own, call.face)
                yield segment.attend(self._turned(segment, query, n), ctx)

    def _inside(self, call: AttentionCall) -> Partial:
        """Causal attention of the new tokens to each other, padding left out."""
        batch, q_heads, n, _ = call.query.shape
        outs, lses = [], []
        for b in range(batch):
            keep = slice(None) if call.valid is None else call.valid[b]
            part = flash.causal_grid_attend(
                call.query[b][:, keep],
                call.key[b][:, keep],
                call.value[b][:, keep],
                scale=call.scale,
                softcap=call.softcap,
                window=call.window,
            )
            if call.valid is not None:
                out = part.out.new_zeros(q_heads, n, part.out.shape[-1])
                lse = part.lse.new_full((q_heads, n), float("-inf"))
                out[:, keep], lse[:, keep] = part.out, part.lse
                part = Partial(out, lse)
            outs.append(part.out)
            lses.append(part.lse)
        out, lse = torch.stack(outs), torch.stack(lses)
        return Partial(self._rows(out), lse.reshape(self.num_rows, -1))

    def _join(self, call: AttentionCall, partials: list[Partial]) -> tuple[Tensor, Tensor]:
        batch, q_heads, n, _ = call.query.shape
        if call.sink is not None:
            lse = call.sink.float().view(1, -1, 1).expand(batch, q_heads, n).reshape(self.num_rows, -1)
            partials.append(Partial(torch.zeros_like(partials[0].out), lse))
        joined = merge(partials)
        out = joined.out.to(call.query.dtype).view(batch, q_heads, n, -1)
        return out, joined.lse.view(batch, q_heads, n)

    def _rows(self, query: Tensor) -> Tensor:
        """``[B, Hq, n, D]`` to rows ``[B * Hkv, G * n, D]``."""
        if not self.seen:
            self.start(query.shape[0])
        return query.reshape(self.num_rows, -1, query.shape[-1])

    def _positions(self, n: int, device: torch.device, valid: Tensor | None = None, *, stored: bool = True) -> Tensor:
        """Positions of n query steps per row ``[R, n]``; ``stored`` says that their entries are counted as seen."""
        if valid is None:
            begins = [seen - (n if stored else 0) for seen in self._per_row(self.seen)]
            return ranges(begins, [n] * self.num_rows, device=device).view(self.num_rows, n)
        steps = torch.tensor(self.seen, device=device)[:, None] + valid.long().cumsum(1) - 1
        return steps.repeat_interleave(self.num_kv_heads, dim=0)

    def _turned(self, segment: Segment, query: Tensor, n: int) -> Tensor:
        """Queries for a segment: those for entries set apart see them as if the evicted positions did not exist."""
        if self.shift is None or segment is not self.main[0] or not any(self.shift):
            return query
        assert self.rotation is not None
        delta = -torch.tensor(self.shift, device=query.device).repeat_interleave(self.num_kv_heads)
        return self.rotation.rotate(query, delta[:, None].expand(query.shape[:2]))

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
