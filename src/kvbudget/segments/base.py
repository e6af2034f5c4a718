"""The contract of a segment: a place where entries live and from which a query can be answered."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.codecs.base import Asked
from kvbudget.kernels.operands import DenseOperand, Operand
from kvbudget.kernels.reference import Partial
from kvbudget.segments.ragged import RaggedTable


@dataclass(frozen=True)
class AttendContext:
    """What a segment needs to know besides the queries.

    ``scale`` multiplies the logits; ``softcap`` caps them; ``window`` is the sliding window in positions;
    ``query_positions [R, n]`` are the positions of the n query steps; ``causal_tail`` is how many of the newest entries
    belong to the query steps themselves (0: all entries precede every query). ``face`` says which of the layers asks, where a
    segment serves two.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    query_positions: Tensor | None = None
    causal_tail: int = 0
    face: int = 0


class RotatesKeys(Protocol):
    """What a layer needs of a rotation: moving vectors ``[..., D]`` by position deltas that broadcast to ``[...]``."""

    def rotate(self, x: Tensor, delta: Tensor) -> Tensor:
        """Rotates by ``delta`` positions."""


class Side(NamedTuple):
    """Keys or values of a segment as kernels read them: sealed ``cells`` of ``unit`` entries each, then a dense tail.

    ``sealed`` reads the cells from each row's first entry on (None: nothing is sealed), ``tail`` the entries in ``table``.
    """

    sealed: Operand | None
    unit: int
    cells: RaggedTable | None
    tail: DenseOperand
    table: RaggedTable

    @property
    def operands(self) -> tuple[Operand | None, int, DenseOperand]:
        """Without the tables."""
        return self.sealed, self.unit, self.tail


class Segment(ABC):
    """Entries of all rows (sequence, KV head) of one layer in one storage format.

    ``meta`` holds what every format has per entry: ``position`` (int32), running score states (float32) and, for merged
    entries, ``count`` (float32).
    Queries are ``[R, M, D]`` as in `kvbudget.kernels.reference`.
    """

    meta: RaggedTable
    unit: int = 1

    @property
    def num_rows(self) -> int:
        return self.meta.num_rows

    @property
    def lengths(self) -> list[int]:
        """Entries per row."""
        return self.meta.lengths

    @property
    def longest(self) -> int:
        return self.meta.longest

    @property
    def shared(self) -> bool:
        """Whether a fork reads some of the same storages."""
        return any(table.borrowed for table in self.tables())

    @property
    def sealed(self) -> list[int]:
        """Per row, how many of its oldest entries can only be kept or evicted in whole units of `unit` entries."""
        return [0] * self.num_rows

    @abstractmethod
    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        """Appends flat ``key [N, D]``, ``value [N, Dv]`` and meta columns ``[N]``; ``counts[r]`` entries to row r."""

    @abstractmethod
    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        """Answers the queries from this segment's entries alone."""

    @abstractmethod
    def mass(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        """Attention weight that each entry receives, summed over query rows, against the merged ``lse [R, M]``."""

    def weights(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        """What `mass` sums up, per row ``[M, T_r]``: for a window of queries only, since nothing is summed."""
        keys = self.keys()
        rows, longest = keys.shape[:2]
        starts = [row * longest for row in range(rows)]
        count = self.meta.padded("count").clamp_min(1e-30).log() if "count" in self.meta.columns else None
        return kernels.weights(
            query,
            DenseOperand(keys.reshape(-1, keys.shape[-1]), starts),
            self.lengths,
            lse,
            scale=ctx.scale,
            softcap=ctx.softcap,
            window=ctx.window,
            causal_tail=ctx.causal_tail,
            query_positions=ctx.query_positions,
            positions=self.positions().flatten(),
            log_count=None if count is None else count.flatten(),
            entry_starts=starts,
        )

    @abstractmethod
    def keys(self) -> Tensor:
        """Keys in full precision, padded: ``[R, longest, D]``."""

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        """Keys in full precision of the entries ``begin:end`` of one row: ``[end - begin, D]``."""
        return self.keys()[row, begin:end]

    @abstractmethod
    def values(self) -> Tensor:
        """Values in full precision, padded: ``[R, longest, Dv]``."""

    @abstractmethod
    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys ``[n, D]`` and values ``[n, Dv]`` of a row's newest n entries, as views that may be written in place.

        Those are all that lie in full precision on both sides; storages that a fork reads too are copied first.
        """

    def move(self, row: int, delta: Tensor, rotation: RotatesKeys) -> None:
        """Moves the keys of a row by ``delta [T_r]`` positions; those that are coded stay where they are."""
        if bool(delta.any()):
            keys, _ = self.writable(row)
            keys.copy_(rotation.rotate(keys, delta[len(delta) - len(keys) :]))

    @abstractmethod
    def take(self, keep: Tensor, spare: int = 0) -> None:
        """Keeps the entries where ``keep [R, longest]`` is set and frees the others' memory."""

    @abstractmethod
    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the newest entries of each row."""

    @abstractmethod
    def can_truncate(self, lengths: Sequence[int]) -> bool:
        """Whether `truncate` to these lengths gives the state before the newest entries came."""

    @abstractmethod
    def tables(self) -> list[RaggedTable]:
        """Every table whose storages are resident."""

    def sides(self) -> tuple[Side, Side] | None:
        """Keys and values for a `Lane`; None where attention needs more than to read them."""
        return None

    def seal(self, asked: Asked | None = None) -> None:  # noqa: B027 - without a full-precision tail nothing is to do
        """Compresses whatever is due for it; called after the attention of a forward (with its queries), never before."""

    @property
    def rest(self) -> int:
        """After how many more entries in each row `seal` still has nothing to do."""
        return sys.maxsize

    def set_limits(self, limits: Sequence[int] | None) -> None:
        """Bounds the entries per row for which appending may reserve room ahead of need."""
        for table in self.tables():
            table.limits = None if limits is None else list(limits)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of the former row ``rows[i]``."""
        for table in self.tables():
            table.select_rows(rows)

    def gather(self, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[int]]:
        """Flat full-precision keys, values and meta of the entries where ``keep [R, longest]`` is set, and counts."""
        meta, counts = self.meta.gather(keep)
        return self.keys()[keep], self.values()[keep], meta, counts

    def positions(self) -> Tensor:
        """Positions, padded with -1: int32 ``[R, longest]``."""
        return self.meta.padded("position", -1)

    def tensors(self) -> list[Tensor]:
        """Every resident tensor, spare capacity included."""
        return [tensor for table in self.tables() for tensor in table.tensors()]

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Resident bytes by what they hold (keys, values, metadata of a codec, positions, states)."""

    def branch(self, hard: bool) -> "Segment":
        """The segment that new entries go to: this one, or one beside it where appending would copy what a fork shares.

        ``hard`` forbids to hold anything twice.
        """
        return self

    def absorb(self, trail: Sequence["Segment"], spare: int = 0) -> None:
        """Takes over the entries of branches that follow, with room for ``spare`` more entries in each row."""
        raise AssertionError("a segment that never branches has nothing to absorb")

    def share(self) -> "Segment":
        """A second segment over the same storages; whichever of the two writes to one copies it first."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name, member in self.__dict__.items():
            if hasattr(member, "share"):
                setattr(other, name, member.share())
        return other

    def add_to_state(self, name: str, values: Sequence[Tensor], decay: Sequence[float], factor: float = 1.0) -> None:
        """Running update of a state column: ``state <- decay[r] * state + factor * values[r]`` for each row r."""
        self.meta.own(name)
        if self.meta.uniform and len(set(decay)) == 1:
            grid = self.meta.grid(name)
            if decay[0] != 1.0:
                grid.mul_(decay[0])
            grid.add_(torch.stack(list(values)), alpha=factor)
            return
        for r, (row, fading) in enumerate(zip(values, decay, strict=True)):
            self.meta.row(name, r).mul_(fading).add_(row, alpha=factor)

    def check_integrity(self) -> None:
        """Raises AssertionError when tables disagree."""
        for table in self.tables():
            table.check_integrity()
