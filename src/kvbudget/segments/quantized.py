"""QuantizedSegment: keys and values behind a codec each, with full-precision tails of their own lengths."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.codecs.base import Asked, Codec
from kvbudget.kernels.operands import Operand
from kvbudget.kernels.reference import Partial
from kvbudget.models import Rotation
from kvbudget.segments.base import AttendContext, Segment, Side
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.ragged import RaggedTable
from kvbudget.segments.store import FIRST, SEALED, TAIL, CodecStore


class QuantizedSegment(Segment):
    """Keys and values behind codecs that may differ in bits, axis and residual window (KIVI's two tails).

    ``balance [R, D]``, if given, multiplies keys before coding and divides queries (MiKV's channel balancer): logits are
    unchanged but for the coding error. ``rotation`` is the layer's, for codecs of keys before RoPE.
    """

    def __init__(
        self,
        num_rows: int,
        key_codec: Codec,
        value_codec: Codec,
        balance: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        assert rotation is not None or not key_codec.before_rope, "keys before RoPE need the layer's rotation"
        self.meta = RaggedTable(num_rows)
        self.key = CodecStore(num_rows, key_codec, self.meta, rotation if key_codec.before_rope else None)
        self.value = CodecStore(num_rows, value_codec, self.meta)
        self.unit = max(key_codec.unit, value_codec.unit)
        self.balance = balance

    @property
    def sealed(self) -> list[int]:
        keys = self.key.coded if self.key.codec.unit > 1 else [0] * self.num_rows
        values = self.value.coded if self.value.codec.unit > 1 else [0] * self.num_rows
        return [max(k, v) for k, v in zip(keys, values, strict=True)]

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        if self.balance is not None:
            factor = self.balance.repeat_interleave(torch.tensor(counts, device=key.device), dim=0)
            key = key * factor.to(key.dtype)
        self.meta.append(meta, counts)
        self.key.append(key, counts)
        self.value.append(value, counts)

    def seal(self, asked: Asked | None = None) -> None:
        salience = self._salience(asked) if asked is not None else None
        self.key.seal(asked, salience)
        self.value.seal(asked, salience)

    @property
    def rest(self) -> int:
        return min(self.key.rest, self.value.rest)

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        partials = []
        for asked, shift, key, value, lengths, bias in self._questions(query, ctx):
            out, lse = kernels.attend(asked, key, value, lengths, **bias)
            partials.append(Partial(out if value.basis is None else out.float() @ value.basis.mT, lse + shift))
        return kernels.merge(partials)

    def mass(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        asking = self._questions(query, ctx)
        pieces = [kernels.mass(asked, key, n, lse - shift, **bias) for asked, shift, key, _, n, bias in asking]
        return [torch.cat(row) for row in zip(*pieces, strict=True)]

    def weights(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        asking = self._questions(query, ctx)
        pieces = [kernels.weights(asked, key, n, lse - shift, **bias) for asked, shift, key, _, n, bias in asking]
        return [torch.cat(row, -1) for row in zip(*pieces, strict=True)]

    def keys(self) -> Tensor:
        keys = self.key.padded()
        return keys if self.balance is None else keys / self.balance[:, None].to(keys.dtype)

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        keys = self.key.rows(row, begin, end)
        return keys if self.balance is None else keys / self.balance[row].to(keys.dtype)

    def values(self) -> Tensor:
        return self.value.padded()

    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        assert self.balance is None, "balanced keys are not the model's keys"
        plain = min(self.key.tail.lengths[row], self.value.tail.lengths[row])
        for store in (self.key, self.value):
            store.tail.own("data")
        key, value = (store.tail.row("data", row) for store in (self.key, self.value))
        return key[len(key) - plain :], value[len(value) - plain :]

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self.key.select_rows(rows)
        self.value.select_rows(rows)
        if self.balance is not None:
            self.balance = self.balance[list(rows)]

    def take(self, keep: Tensor, spare: int | Sequence[int] = 0) -> None:
        """As of any segment; ``spare`` may differ from row to row."""
        before = self.lengths
        self._take(keep, spare)
        for store in (self.key, self.value):
            lost = zip(store.thinned, self.lengths, before, strict=True)
            store.thinned = [thinned or now < then for thinned, now, then in lost]

    def _take(self, keep: Tensor, spare: int | Sequence[int] = 0) -> None:
        self.meta.take(keep, spare)
        keep = keep.cpu()
        most = spare if isinstance(spare, int) else max(spare)
        self.key.take(keep, most)
        self.value.take(keep, most)

    def truncate(self, lengths: Sequence[int]) -> None:
        for store in (self.key, self.value):
            store.tail.truncate([n - s for n, s in zip(lengths, store.coded, strict=True)])
        self.meta.truncate(lengths)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return all(n >= max(k, v) for n, k, v in zip(lengths, self.key.coded, self.value.coded, strict=True))

    def branch(self, hard: bool) -> Segment:
        """What is coded on both sides stays shared; the rest, full-precision tails included, moves to the branch."""
        coded = [min(k, v) // self.unit * self.unit for k, v in zip(self.key.coded, self.value.coded, strict=True)]
        if hard or not self.shared or not any(coded):
            return self
        other = self.share()
        assert isinstance(other, QuantizedSegment)
        first = torch.arange(self.longest) < torch.tensor(coded)[:, None]
        other._take(~first & self.meta.valid())
        self.meta.truncate(coded)
        for store in (self.key, self.value):
            units = [(n - f) // store.codec.unit for n, f in zip(coded, store.first.lengths, strict=True)]
            store.keep_sealed(units)
        return other

    def absorb(self, trail: Sequence[Segment], spare: int = 0) -> None:
        for segment in trail:
            if isinstance(segment, DenseSegment):
                columns = {name: segment.meta.flat(name) for name in segment.meta.columns}
                self.append(columns.pop("key"), columns.pop("value"), columns, segment.lengths)
                continue
            assert isinstance(segment, QuantizedSegment) and not self.key.tail.total and not self.value.tail.total
            self.meta.append({name: segment.meta.flat(name) for name in segment.meta.columns}, segment.lengths)
            for mine, theirs in ((self.key, segment.key), (self.value, segment.value)):
                mine.absorb(theirs)

    def set_limits(self, limits: Sequence[int] | None) -> None:
        self.meta.limits = None if limits is None else list(limits)
        for store in (self.key, self.value):
            store.set_limits(limits)

    def tables(self) -> list[RaggedTable]:
        return [self.meta, *self.key.tables, *self.value.tables]

    def tensors(self) -> list[Tensor]:
        states = [*self.key.state.values(), *self.value.state.values()]
        return super().tensors() + states + ([] if self.balance is None else [self.balance])

    def share(self) -> Segment:
        other = super().share()
        assert isinstance(other, QuantizedSegment)
        other.key.meta = other.value.meta = other.meta
        return other

    def sides(self) -> tuple[Side, Side] | None:
        if self.balance is not None or "count" in self.meta.columns or not self.meta.columns:
            return None
        key, value = self.key.side(), self.value.side()
        return None if key is None or value is None else (key, value)

    def parts(self) -> dict[str, int]:
        tails = [table.nbytes for store in (self.key, self.value) for table in (store.first, store.tail)]
        parts = {"keys": 0, "values": 0, "codec metadata": 0, "tails": sum(tails)}
        for side, store in (("keys", self.key), ("values", self.value)):
            for name, column in store.sealed.columns.items():
                parts[side if name == "codes" else "codec metadata"] += column.untyped_storage().nbytes()
            parts[side] += store.payload.nbytes
            parts["codec metadata"] += sum(column.untyped_storage().nbytes() for column in store.state.values())
        if self.balance is not None:
            parts["codec metadata"] += self.balance.untyped_storage().nbytes()
        for name, column in self.meta.columns.items():
            label = {"position": "positions", "count": "counts"}.get(name, "states")
            parts[label] = parts.get(label, 0) + column.untyped_storage().nbytes()
        return parts

    def check_integrity(self) -> None:
        super().check_integrity()
        assert self.key.lengths == self.lengths == self.value.lengths, "keys, values and positions differ in length"

    def _balanced(self, query: Tensor) -> Tensor:
        return query if self.balance is None else query / self.balance[:, None].to(query.dtype)

    def _salience(self, asked: Asked) -> Tensor | None:
        """What the first codec that judges says of the entries that are due, which are the same for keys and values."""
        judges = [store.codec for store in (self.key, self.value) if store.codec.judges]
        due = self.key.due()
        if not judges or not any(due):
            return None
        assert due == self.value.due(), "a codec that judges needs the same tails for keys and values"
        found = []
        for r, count in enumerate(due):
            begin = self.key.coded[r] + (0 if self.key.started[r] else self.key.codec.sinks)
            positions = self.meta.row("position", r)[begin : begin + count]
            keys = self.row_keys(r, begin, begin + count)
            found.append(judges[0].judge(asked, r, keys, positions) if count else keys.new_zeros(0).float())
        return torch.cat(found)

    def _questions(
        self, query: Tensor, ctx: AttendContext
    ) -> Iterator[tuple[Tensor, Tensor | float, Operand, Operand, list[int], dict]]:
        """What each of the `_ranges` is asked, and by how much its logits are shifted then ``[R, M]``.

        A map of logits ``a l + c`` is a query times a, whose log-sum-exp is c more; it stands before a soft cap.
        """
        query = self._balanced(query)
        mapped: tuple[Tensor, Tensor] | None = None
        for part, key, value, lengths, bias in self._ranges(ctx):
            asked = _turned(query, key)
            shift: Tensor | float = 0.0
            if part == SEALED and self.key.codec.lowered:
                mapped = mapped or self._lowered(query, ctx.scale)
                asked, shift = asked.float() * mapped[0][..., None], mapped[1]
            yield asked, shift, key, value, lengths, bias

    def _lowered(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Factor and shift of the logits of coded keys ``[R, M]``, so that the highest of each query falls (CalibQuant)."""
        key = self.key.operand([0] * self.num_rows, SEALED)
        low, high = kernels.extremes(_turned(query, key), key, self.key.num_sealed, scale)
        spread = (high - low).clamp_min(1e-20)
        factor = (1 - self.key.codec.lowered / spread).clamp_min(0.0)
        return factor, low * (1 - factor)

    def _ranges(self, ctx: AttendContext) -> Iterator[tuple[int, Operand, Operand, list[int], dict]]:
        """Cuts the entries where the storage of keys or values changes, in order: parts of the keys by parts of the values.

        Yields the part of the keys, both operands, entries per row, and the kernels' options.
        """
        table = self.meta
        empty = True
        for key_part, value_part in product((FIRST, SEALED, TAIL), repeat=2):
            rows = list(zip(self.key.bounds(key_part), self.value.bounds(value_part), strict=True))
            begin = [max(k[0], v[0]) for k, v in rows]
            sizes = [max(0, min(k[1], v[1]) - b) for (k, v), b in zip(rows, begin, strict=True)]
            if not any(sizes):
                continue
            empty = False
            key_begin = [b - k[0] if n else 0 for (k, _), b, n in zip(rows, begin, sizes, strict=True)]
            value_begin = [b - v[0] if n else 0 for (_, v), b, n in zip(rows, begin, sizes, strict=True)]
            yield (
                key_part,
                self.key.operand(key_begin, key_part),
                self.value.operand(value_begin, value_part),
                sizes,
                {
                    "scale": ctx.scale,
                    "softcap": ctx.softcap,
                    "window": ctx.window,
                    "causal_tail": ctx.causal_tail if key_part == value_part == TAIL else 0,
                    "query_positions": ctx.query_positions,
                    "positions": table.columns["position"],
                    "log_count": table.columns["count"].clamp_min(1e-30).log() if "count" in table.columns else None,
                    "entry_starts": [s + min(b, n) for s, b, n in zip(table.starts, begin, table.lengths, strict=True)],
                },
            )
        if empty:
            raise AssertionError("an empty segment was asked to attend")


def _turned(query: Tensor, key: Operand) -> Tensor:
    """Queries as the rows of an operand ask for them."""
    return query if key.basis is None else query.float() @ key.basis
