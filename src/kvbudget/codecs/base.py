"""The contract of a codec: how the keys or the values of kept entries are stored."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbudget.kernels.reference import Operand


@dataclass(frozen=True)
class Codec(ABC):
    """Encodes units of `unit` consecutive entries of one row into named flat columns, a cell per unit.

    ``residual`` newest entries stay in full precision: with ``cyclic`` the tail runs from 0 to ``residual - 1`` entries and
    is encoded all at once when it is full, else the last ``residual`` entries always stay, and `lump` more are awaited, so
    that a decode step does not pay for an encoding each.
    """

    unit: int
    residual: int
    cyclic: bool

    @property
    def lump(self) -> int:
        """Entries that are encoded together at least: an eighth of the residual, no more than 16, whole units."""
        if self.cyclic:
            return max(self.unit, self.residual)
        return -(-max(1, min(16, self.residual // 8)) // self.unit) * self.unit

    @property
    def longest_tail(self) -> int:
        """Full-precision entries that a forward of one token may hold before it encodes what is due."""
        return self.residual + (1 if self.cyclic else self.lump)

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Encodes ``x [N * unit, D]`` into columns ``[N, ...]``."""

    @abstractmethod
    def decode(self, columns: dict[str, Tensor]) -> Tensor:
        """Decodes columns ``[N, ...]`` into float32 ``[N * unit, D]``."""

    @abstractmethod
    def operand(self, columns: dict[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        """What kernels read: rows begin at unit ``starts[r]``, and entry ``skip[r]`` of a row comes first."""

    @abstractmethod
    def bytes_per_entry(self, width: int) -> float:
        """Stored bytes per entry of ``width`` channels, scales and zeros included."""
