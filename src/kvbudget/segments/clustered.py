"""ClusteredSegment: entries whose keys are held once for several KV heads, and whose values are each head's own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.errors import PolicyError
from kvbudget.kernels.operands import DenseOperand
from kvbudget.kernels.reference import Partial
from kvbudget.segments.base import AttendContext, Segment, Side
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.ragged import RaggedTable


class ClusteredSegment(DenseSegment):
    """KV head h of a sequence reads the keys of head ``owners[h]``, which is its own owner; ``owned`` holds those alone.

    Heads with one owner hold the same entries, so that entry t of a row has the key of its owner's entry t.
    """

    def __init__(self, num_rows: int, owners: Sequence[int]) -> None:
        super().__init__(num_rows)
        self.owners = tuple(owners)
        self.holders = sorted(set(owners))
        self.owned = RaggedTable(num_rows // len(self.owners) * len(self.holders))

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        self.meta.append({"value": value, **meta}, counts)
        rows, held = key.split(list(counts)), self._holding()
        self.owned.step = self.meta.step
        self.owned.append({"key": torch.cat([rows[r] for r in held])}, [counts[r] for r in held])

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        key, value = self._operand("key"), self._operand("value")
        return kernels.attend(query, key, value, self.lengths, **self._bias(ctx))

    def keys(self) -> Tensor:
        return self.owned.padded("key")[self._source()]

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        return self.owned.row("key", self._source()[row])[begin:end]

    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        raise PolicyError("keys that several heads share cannot be written in place")

    def take(self, keep: Tensor, spare: int | Sequence[int] = 0) -> None:
        holding = self._holding()
        self.owned.take(keep[holding], spare if isinstance(spare, int) else [spare[r] for r in holding])
        self.meta.take(keep, spare)

    def gather(self, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[int]]:
        meta, counts = self.meta.gather(keep)
        return self.keys()[keep], meta.pop("value"), meta, counts

    def branch(self, hard: bool) -> Segment:
        return ClusteredSegment(self.num_rows, self.owners) if self.shared else self

    def absorb(self, trail: Sequence[Segment], spare: int = 0) -> None:
        lengths = [sum(rows) + spare for rows in zip(*(s.lengths for s in (self, *trail)), strict=True)]
        self.meta.reserve(lengths)
        self.owned.reserve([lengths[r] for r in self._holding()])
        for segment in trail:
            self.append(*segment.gather(segment.meta.valid()))

    def truncate(self, lengths: Sequence[int]) -> None:
        self.owned.truncate([lengths[r] for r in self._holding()])
        self.meta.truncate(lengths)

    def set_limits(self, limits: Sequence[int] | None) -> None:
        self.meta.limits = None if limits is None else list(limits)
        self.owned.limits = None if limits is None else [limits[r] for r in self._holding()]

    def select_rows(self, rows: Sequence[int]) -> None:
        heads, held = len(self.owners), len(self.holders)
        sequences = [row // heads for row in rows[::heads]]
        self.owned.select_rows([b * held + i for b in sequences for i in range(held)])
        self.meta.select_rows(rows)

    def tables(self) -> list[RaggedTable]:
        return [self.meta, self.owned]

    def sides(self) -> tuple[Side, Side] | None:
        return None

    def parts(self) -> dict[str, int]:
        return super().parts() | {"keys": self.owned.nbytes}

    def check_integrity(self) -> None:
        """Raises AssertionError when tables disagree, or heads that share keys hold different entries."""
        super().check_integrity()
        holding = self._holding()
        for row, source in enumerate(self._source()):
            assert self.lengths[row] == self.owned.lengths[source], "a row and its owner differ in length"
            if self.lengths[row]:
                own, others = (self.meta.row("position", r) for r in (row, holding[source]))
                assert torch.equal(own, others), "heads that share keys hold different entries"

    def _source(self) -> list[int]:
        """For each row, the row of ``owned`` that it reads."""
        slots = [self.holders.index(owner) for owner in self.owners]
        sequences = range(self.num_rows // len(self.owners))
        return [b * len(self.holders) + slot for b in sequences for slot in slots]

    def _holding(self) -> list[int]:
        """For each row of ``owned``, the row whose keys it holds."""
        heads = len(self.owners)
        return [b * heads + h for b in range(self.num_rows // heads) for h in self.holders]

    def _operand(self, name: str) -> DenseOperand:
        if name != "key":
            return super()._operand(name)
        return DenseOperand(self.owned.columns["key"], [self.owned.starts[r] for r in self._source()])
