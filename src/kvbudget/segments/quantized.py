"""QuantizedSegment: keys and values behind a codec each, with full-precision tails of their own lengths."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.codecs.base import Codec
from kvbudget.kernels.reference import DenseOperand, Operand, Partial
from kvbudget.segments.base import AttendContext, Segment, Side
from kvbudget.segments.ragged import RaggedTable


class CodecStore:
    """One side (keys or values) of a segment: sealed units behind a codec, then a full-precision tail."""

    def __init__(self, num_rows: int, codec: Codec) -> None:
        self.codec = codec
        self.sealed = RaggedTable(num_rows, step=-(-64 // codec.unit))
        self.tail = RaggedTable(num_rows)
        self.tail.limits = [codec.longest_tail] * num_rows

    @property
    def num_sealed(self) -> list[int]:
        """Sealed entries per row."""
        return [units * self.codec.unit for units in self.sealed.lengths]

    @property
    def lengths(self) -> list[int]:
        return [s + t for s, t in zip(self.num_sealed, self.tail.lengths, strict=True)]

    def append(self, x: Tensor, counts: Sequence[int]) -> None:
        self.tail.append({"data": x}, counts)

    def seal(self) -> None:
        """Encodes what the tail holds beyond its residual."""
        codec = self.codec
        if self.tail.longest < codec.lump + (0 if codec.cyclic else codec.residual):
            return
        due = []
        for length in self.tail.lengths:
            over = length if codec.cyclic else max(0, length - codec.residual)
            due.append(over // codec.lump * codec.lump)
        if not any(due):
            return
        stays = len(set(due)) == 1 and due[0] < self.tail.lengths[0]
        if stays and self.tail.uniform and self.tail.capacities[0] <= codec.longest_tail:
            oldest = self.tail.grid("data")[:, : due[0]].flatten(0, 1)
            self.sealed.append(codec.encode(oldest), [n // codec.unit for n in due])
            self.tail.drop(due[0])
            return
        index = torch.arange(self.tail.longest)
        oldest = index[None, :] < torch.tensor(due)[:, None]
        columns, _ = self.tail.gather(oldest)
        self.sealed.append(codec.encode(columns["data"]), [n // codec.unit for n in due])
        self.tail.take(~oldest & self.tail.valid())

    def padded(self) -> Tensor:
        """All entries decoded, in the tail's dtype: ``[R, longest, D]``."""
        lengths = self.lengths
        tail = self.tail.columns["data"]
        out = tail.new_zeros((len(lengths), max(lengths), tail.shape[-1]))
        units = [slice(s, s + n) for s, n in zip(self.sealed.starts, self.sealed.lengths, strict=True)]
        for r, (at, sealed) in enumerate(zip(units, self.num_sealed, strict=True)):
            if sealed:
                cells = {name: column[at] for name, column in self.sealed.columns.items()}
                out[r, :sealed] = self.codec.decode(cells).to(out.dtype)
            out[r, sealed : lengths[r]] = self.tail.row("data", r)
        return out

    def take(self, keep: Tensor, spare: int) -> None:
        units = torch.zeros(self.sealed.num_rows, self.sealed.longest, dtype=torch.bool)
        tail = torch.zeros(self.tail.num_rows, self.tail.longest, dtype=torch.bool)
        for r, sealed in enumerate(self.num_sealed):
            whole = keep[r, :sealed].unflatten(0, (-1, self.codec.unit))
            assert bool((whole == whole[:, :1]).all()), "a sealed unit can only be kept or evicted whole"
            units[r, : whole.shape[0]] = whole[:, 0]
            tail[r, : self.tail.lengths[r]] = keep[r, sealed : sealed + self.tail.lengths[r]]
        if self.sealed.columns:
            self.sealed.take(units, -(-spare // self.codec.unit))
        self.tail.take(tail)

    def operand(self, begin: Sequence[int], sealed: bool) -> Operand:
        """Rows from entry ``begin[r]`` on, which all lie in the sealed part or all in the tail."""
        if sealed:
            return self.codec.operand(self.sealed.columns, self.sealed.starts, begin)
        offsets = [s + b - n for s, b, n in zip(self.tail.starts, begin, self.num_sealed, strict=True)]
        return DenseOperand(self.tail.columns["data"], offsets)

    def side(self) -> Side:
        """Both parts for a lane."""
        codes, tail = self.sealed, DenseOperand(self.tail.columns["data"], self.tail.starts)
        sealed = self.codec.operand(codes.columns, codes.starts, [0] * codes.num_rows) if codes.columns else None
        return Side(sealed, self.codec.unit, codes if codes.columns else None, tail, self.tail)

    def share(self) -> "CodecStore":
        other = object.__new__(CodecStore)
        other.codec, other.sealed, other.tail = self.codec, self.sealed.share(), self.tail.share()
        return other


class QuantizedSegment(Segment):
    """Keys and values behind codecs that may differ in bits, axis and residual window (KIVI's two tails).

    ``balance [R, D]``, if given, multiplies keys before coding and divides queries (MiKV's channel balancer): logits are
    unchanged but for the coding error.
    """

    def __init__(self, num_rows: int, key_codec: Codec, value_codec: Codec, balance: Tensor | None = None) -> None:
        self.meta = RaggedTable(num_rows)
        self.key = CodecStore(num_rows, key_codec)
        self.value = CodecStore(num_rows, value_codec)
        self.unit = max(key_codec.unit, value_codec.unit)
        self.balance = balance

    @property
    def sealed(self) -> list[int]:
        keys = self.key.num_sealed if self.key.codec.unit > 1 else [0] * self.num_rows
        values = self.value.num_sealed if self.value.codec.unit > 1 else [0] * self.num_rows
        return [max(k, v) for k, v in zip(keys, values, strict=True)]

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        if self.balance is not None:
            factor = self.balance.repeat_interleave(torch.tensor(counts, device=key.device), dim=0)
            key = key * factor.to(key.dtype)
        self.meta.append(meta, counts)
        self.key.append(key, counts)
        self.value.append(value, counts)

    def seal(self) -> None:
        self.key.seal()
        self.value.seal()

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        query = self._balanced(query)
        partials = [
            kernels.attend(query, key, value, lengths, **bias) for key, value, lengths, bias in self._ranges(ctx)
        ]
        return kernels.merge(partials)

    def mass(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        query = self._balanced(query)
        pieces = [kernels.mass(query, key, lengths, lse, **bias) for key, _, lengths, bias in self._ranges(ctx)]
        return [torch.cat(row) for row in zip(*pieces, strict=True)]

    def keys(self) -> Tensor:
        keys = self.key.padded()
        return keys if self.balance is None else keys / self.balance[:, None].to(keys.dtype)

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
        if self.balance is not None:
            self.balance = self.balance[list(rows)]

    def take(self, keep: Tensor, spare: int = 0) -> None:
        self.meta.take(keep, spare)
        keep = keep.cpu()
        self.key.take(keep, spare)
        self.value.take(keep, spare)

    def truncate(self, lengths: Sequence[int]) -> None:
        for store in (self.key, self.value):
            store.tail.truncate([n - s for n, s in zip(lengths, store.num_sealed, strict=True)])
        self.meta.truncate(lengths)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return all(n >= max(k, v) for n, k, v in zip(lengths, self.key.num_sealed, self.value.num_sealed, strict=True))

    def branch(self, hard: bool) -> Segment:
        """What is coded on both sides stays shared; the rest, full-precision tails included, moves to the branch."""
        coded = [
            min(k, v) // self.unit * self.unit for k, v in zip(self.key.num_sealed, self.value.num_sealed, strict=True)
        ]
        if hard or not self.shared or not any(coded):
            return self
        other = self.share()
        first = torch.arange(self.longest) < torch.tensor(coded)[:, None]
        other.take(~first & self.meta.valid())
        self.meta.truncate(coded)
        for store in (self.key, self.value):
            store.sealed.truncate([n // store.codec.unit for n in coded])
            store.tail.take(torch.zeros(self.num_rows, store.tail.longest, dtype=torch.bool))
        return other

    def absorb(self, trail: Sequence[Segment], spare: int = 0) -> None:
        for segment in trail:
            assert isinstance(segment, QuantizedSegment) and not self.key.tail.total and not self.value.tail.total
            self.meta.append({name: segment.meta.flat(name) for name in segment.meta.columns}, segment.lengths)
            for mine, theirs in ((self.key, segment.key), (self.value, segment.value)):
                codes = theirs.sealed
                mine.sealed.append({name: codes.flat(name) for name in codes.columns}, codes.lengths)
                mine.tail = theirs.tail

    def set_limits(self, limits: Sequence[int] | None) -> None:
        self.meta.limits = None if limits is None else list(limits)
        for store in (self.key, self.value):
            store.sealed.limits = None if limits is None else [-(-n // store.codec.unit) for n in limits]

    def tables(self) -> list[RaggedTable]:
        return [self.meta, self.key.sealed, self.key.tail, self.value.sealed, self.value.tail]

    def tensors(self) -> list[Tensor]:
        return super().tensors() + ([] if self.balance is None else [self.balance])

    def sides(self) -> tuple[Side, Side] | None:
        if self.balance is not None or "count" in self.meta.columns or not self.meta.columns:
            return None
        return self.key.side(), self.value.side()

    def parts(self) -> dict[str, int]:
        parts = {"keys": 0, "values": 0, "codec metadata": 0, "tails": self.key.tail.nbytes + self.value.tail.nbytes}
        for side, store in (("keys", self.key), ("values", self.value)):
            for name, column in store.sealed.columns.items():
                parts[side if name == "codes" else "codec metadata"] += column.untyped_storage().nbytes()
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

    def _ranges(self, ctx: AttendContext) -> Iterator[tuple[Operand, Operand, list[int], dict]]:
        """Cuts the entries where the storage of keys or values changes: both sealed, one sealed, both in the tail."""
        keys, values, lengths = self.key.num_sealed, self.value.num_sealed, self.lengths
        lower = [min(k, v) for k, v in zip(keys, values, strict=True)]
        upper = [max(k, v) for k, v in zip(keys, values, strict=True)]
        key_end = [max(k, low) for k, low in zip(keys, lower, strict=True)]
        cuts = [
            ([0] * len(lower), lower, True, True, 0),
            (lower, key_end, True, False, 0),
            (key_end, upper, False, True, 0),
            (upper, lengths, False, False, ctx.causal_tail),
        ]
        table = self.meta
        empty = True
        for begin, end, key_sealed, value_sealed, causal_tail in cuts:
            sizes = [e - b for b, e in zip(begin, end, strict=True)]
            if not any(sizes):
                continue
            empty = False
            yield (
                self.key.operand(begin, key_sealed),
                self.value.operand(begin, value_sealed),
                sizes,
                {
                    "scale": ctx.scale,
                    "softcap": ctx.softcap,
                    "window": ctx.window,
                    "causal_tail": causal_tail,
                    "query_positions": ctx.query_positions,
                    "positions": table.columns["position"],
                    "log_count": table.columns["count"].clamp_min(1e-30).log() if "count" in table.columns else None,
                    "entry_starts": [s + b for s, b in zip(table.starts, begin, strict=True)],
                },
            )
        if empty:
            raise AssertionError("an empty segment was asked to attend")
