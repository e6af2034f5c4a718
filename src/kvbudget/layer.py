"""LayerCache: what one attention layer holds, and the data path of its attention calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked
from kvbudget.kernels import flash, merge
from kvbudget.kernels.reference import Partial
from kvbudget.segments import retrospective, selective
from kvbudget.segments.base import AttendContext, Segment
from kvbudget.segments.entries import WINDOW_OVERRUN, LayerEntries
from kvbudget.segments.lane import Lane, Sum
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import ranges

# Up to this many new tokens are stored first and then attended with the rest; more are attended as a block of their own.
FEW_TOKENS = 8
# While drafts are verified, a forward of up to so many tokens is taken for drafts: transformers proposes 20 or less by itself.
MOST_DRAFTS = 32
_NEXT = (1).__add__


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


class LayerCache(LayerEntries):
    """A layer's entries and how its attention calls are answered from them.

    A ``selector`` says what queries read of the entries held (extra passes of a plan and of measurements read everything);
    ``reads`` says it where queries are answered again. While ``spills``, a token that finds the rows full may stay in a segment
    of its own until the eviction that follows: where shares of layers move, none may follow. ``sums`` are what the scorer
    adds to states after a token of each sequence (None: it has to look itself), and ``summed`` says that the newest token's
    have been added. While ``verifying``, forwards of up to `MOST_DRAFTS` tokens bring drafts of what would come one by one.
    """

    def __init__(
        self,
        layer_idx: int,
        num_kv_heads: int,
        *,
        selector: selective.Selects | None = None,
        reads: retrospective.Reads | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_idx, num_kv_heads, **options)
        self.selector = selector
        self.reads = reads
        self.spills = self.verifying = False
        self.sums: Sequence[Sum] | None = ()
        self._lane: Lane | None = None
        self._fresh = self.summed = False

    @property
    def most_decoded(self) -> int:
        """The most tokens of a sequence that a forward may bring and still count as decoding, not as a prompt."""
        return MOST_DRAFTS if self.verifying else FEW_TOKENS

    @property
    def rests(self) -> bool:
        """Whether the newest token came by `step` and leaves nothing to be evicted or sealed."""
        return self._fresh and self.rest >= 0

    def forward(self, call: AttentionCall, *, add: bool = False) -> tuple[Tensor, Tensor]:
        """Attends the call's queries to everything held and to the new tokens, which are then held too.

        With ``add``, a lane that serves the call may add the layer's `sums`. Returns ``out [B, Hq, n, Dv]`` in the query's
        dtype and ``lse [B, Hq, n]`` float32.
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
        self._fresh = self.summed = False
        if few:
            if call.query.shape[2] == 1 and (answer := self._step(call, add)) is not None:
                return answer
            self.append(call.key, call.value, None)
            return self._join(call, list(self._held(call, tail=call.query.shape[2])))
        out, lse, _ = self.probe(call)
        self.append(call.key, call.value, call.valid, call.steps)
        return out, lse

    def answer(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """As `forward`, but the new tokens are stored later."""
        selected = None if self.selector is None else self._selected(call, self.selector, stored=False)
        return self.probe(call)[:2] if selected is None else selected

    def _step(self, call: AttentionCall, add: bool) -> tuple[Tensor, Tensor] | None:
        """`forward` of one token as a `step`; None, with nothing done, where that cannot be."""
        batch, heads, _, _ = call.query.shape
        if call.sink is not None or call.face or not call.query.is_cpu:
            return None
        out, lse = call.query.new_empty(batch, 1, heads, call.value.shape[-1]), torch.empty(batch, heads, 1)
        done = self.step(call.query, call.key, call.value, call.scale, call.softcap, out, lse, add=add)
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
        *,
        add: bool = False,
    ) -> bool:
        """One token of each sequence by the prepared lane; False, with nothing done, where that cannot be.

        The answer goes to ``out [B, 1, Hq, Dv]``, heads behind the token, and to ``lse [B, Hq, 1]`` float32. With ``add``,
        the layer's `sums` may be added, too (`summed`).
        """
        lane, main, seen, window = self._lane, self.main, self.seen, self.window
        if lane is None or lane.handle is None or lane.main != main or lane.front != self.front:
            lane = self._prepared(query)
            if lane is None:
                return False
        rest = self.rest - 1
        add = add and lane.can_add
        if not lane.step(query, key, value, seen, scale, softcap, window, out, lse, add=add):
            spills = self.spills and len(main) == 1 and window is None and not self.apart
            apart = lane.apart(key, value, seen) if spills else None
            if apart is None and not (lane.grow() and (lane := self._prepared(query)) is not None):
                return False
            if not lane.step(
                query, key, value, seen, scale, softcap, window, out, lse, apart, add=add and apart is None
            ):
                return False
            rest = -1
            if apart is not None:
                main.append(apart)
                add = False
        self.seen, self.rest, self._fresh, self.summed = list(map(_NEXT, seen)), rest, True, add
        return True

    def _prepared(self, query: Tensor) -> Lane | None:
        """The lane over what is held now; None where no lane can serve it."""
        lane, main, front = self._lane, self.main, self.front
        if self.shift is not None or self.selector is not None or self.reads is not None or not main:
            return None
        if lane is None or lane.moved or lane.main != main or lane.front != front:
            group = query.shape[1] // self.num_kv_heads
            lane = self._lane = Lane(front, main, group, lane is not None and lane.wanted, self.sums)
        return None if lane.handle is None else lane

    def _leave_lane(self) -> None:
        """Forgets a lane over segments that have been replaced, and what it set apart, which it would keep alive."""
        lane = self._lane
        if lane is not None:
            lane.spilled = None
            if lane.main != self.main or lane.front != self.front:
                lane.leave()

    def _selected(
        self, call: AttentionCall, selector: selective.Selects, *, stored: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """As `forward` (not ``stored``: `answer`), but a selector says what queries read; None where all read everything."""
        whole = None
        if not selector.prefill:
            new = call.query.shape[2] if call.valid is None else call.valid.sum(1)
            whole = torch.as_tensor(new, device=call.query.device).expand(call.query.shape[0]) > self.most_decoded
            if bool(whole.all()):
                return None
        seen = torch.tensor(self.seen or [0] * call.query.shape[0], device=call.query.device)[:, None]
        if call.valid is None:
            steps = seen + torch.arange(call.query.shape[2], device=seen.device)
        else:
            steps = seen + call.valid.long().cumsum(1) - 1
        fresh = self if stored else LayerEntries(self.layer_idx, self.num_kv_heads)
        fresh.seen = list(self.seen)
        fresh.append(call.key, call.value, call.valid)
        segments = self.segments if stored else self.segments + fresh.main
        out, lse = selective.attend(
            selector, self.layer_idx, self.depth, segments, call.query, steps,
            scale=call.scale, softcap=call.softcap, sink=call.sink, whole=whole,
        )  # fmt: skip
        return out.to(call.query.dtype), lse

    def probe(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, but leaves the new tokens out of the cache; also returns what held entries do not add to the lse."""
        self._fresh = self.summed = False
        inside = self._inside(call)
        out, lse = self._join(call, [*self._held(call, tail=0), inside])
        own = inside.lse.view(lse.shape)
        return out, lse, own if call.sink is None else torch.logaddexp(own, call.sink.float()[:, None])

    def finish_forward(self, asked: Asked | None = None) -> None:
        """Ends a forward: drops what the layer's own window no longer covers, and compresses full-precision tails.

        ``asked`` are its queries, for codecs that look at them.
        """
        if self.rests:
            return
        if self.window is not None:
            self._slide()
        # A token that waited for an eviction which did not come counts among those that a codec awaits.
        if (
            self._lane is not None
            and self._lane.spilled in self.main[1:]
            and isinstance(self.main[-2], QuantizedSegment)
        ):
            self.main[-2].absorb([self.main.pop()])
        for segment in self.segments:
            segment.seal(asked)
        self._leave_lane()
        if self.page > 1:
            self.paged = [length // self.page * self.page for length in self._lengths(self.main)]
        self.rest = min((segment.rest for segment in self.segments), default=0) if self.page == 1 else 0
        if self.window is not None:
            self.rest = min(self.rest, self.window - 1 + WINDOW_OVERRUN - self.longest)

    def evict(self, keep: Tensor, spare: int = 0) -> None:
        """As `LayerEntries.evict`; a lane over segments that have been replaced is forgotten."""
        super().evict(keep, spare)
        self._leave_lane()

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

    def fork(self) -> LayerCache:
        """As `LayerEntries.fork`, without the lane, which holds addresses."""
        other = super().fork()
        other._lane, other._fresh, other.summed, other.rest = None, False, False, 0
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without a lane, which holds addresses."""
        return self.__dict__ | {"_lane": None, "_fresh": False, "summed": False, "rest": 0}

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
