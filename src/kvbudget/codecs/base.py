"""The contract of a codec: how the keys or the values of kept entries are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand
from kvbudget.kernels.reference import capped


@dataclass(frozen=True)
class Asked:
    """The queries of the forward under way, by rows: ``query [R, G, n, D]`` (post-RoPE), ``lse [R, G, n]`` float32.

    ``steps [R, n]`` are the positions of the queries, -1 for padding; ``scale`` and ``softcap`` those of the logits.
    """

    query: Tensor
    lse: Tensor
    steps: Tensor
    scale: float
    softcap: float | None = None

    def weights(self, row: int, steps: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Attention weights ``[G, len(steps), T]`` of some query steps (indices) for ``keys [T, D]`` at ``positions [T]``.

        They are those of the softmax over everything that the row held, so a row of them sums to at most one.
        """
        logits = capped(self.query[row][:, steps].float() @ keys.float().T * self.scale, self.softcap)
        at = self.steps[row][steps]
        hidden = (positions[None, :] > at[:, None]) | (at < 0)[:, None]
        return torch.exp(logits - self.lse[row][:, steps, None]).masked_fill(hidden, 0.0)


@dataclass(frozen=True)
class Place:
    """Whose units a call codes: ``rows [N]`` int64 is the row of each, ``state`` holds what rows keep, ``[R, ...]`` each.

    Row r is KV head ``r % Hkv``; ``width`` are the channels of an entry. When entries are encoded, ``positions [N * unit]``
    are theirs and ``salience [N * unit]`` float32 is what `Codec.judge` found, if anything.
    """

    rows: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)
    width: int = 0
    positions: Tensor | None = None
    salience: Tensor | None = None

    def of(self, name: str) -> Tensor:
        """What the row of each unit keeps under this name ``[N, ...]``; ``[1, ...]`` where all are of one row."""
        rows = self.rows
        if len(rows) and bool((rows == rows[0]).all()):
            rows = rows[:1]
        return self.state[name][rows]


@dataclass(frozen=True)
class Codec(ABC):
    """Encodes units of `unit` consecutive entries of one row into named flat columns, a cell per unit.

    ``residual`` newest entries stay in full precision: with ``cyclic`` the tail runs from 0 to ``residual - 1`` entries and
    is encoded all at once when it is full, else the last ``residual`` entries always stay, and `lump` more are awaited, so
    that a decode step does not pay for an encoding each. The ``sinks`` oldest entries of a row, when it is first encoded,
    stay in full precision too (entries by themselves only: ``unit=1``). With ``before_rope`` keys are coded as they were
    before their rotation and turned again when they are read. What a query finds among coded keys of a row is mapped
    linearly so that its highest logit falls by ``lowered`` and the lowest stays.

    What a row keeps as long as it lives (a scale, a basis) is its state, found by `start` from the first entries that are
    encoded. What a calibration found belongs to the model: `at` takes a layer's part of it.
    """

    calibrated: ClassVar[str] = ""
    """The method whose calibration the codec needs, if any."""
    scope: ClassVar[str] = "KV head"
    """What is coded by itself."""
    judges: ClassVar[bool] = False
    """Whether `judge` wants to see which entries the queries look at."""
    variable: ClassVar[bool] = False
    """Whether units differ in size: ``encode`` then also gives their bytes, one after the other, as column ``payload``."""

    placed: ClassVar[bool] = True
    """Whether `encode` looks at its place."""

    unit: int = 1
    residual: int = 0
    cyclic: bool = False
    sinks: int = 0
    before_rope: bool = False
    lowered: float = 0.0

    @property
    def lump(self) -> int:
        """Entries that are encoded together at least: an eighth of the residual, no more than 16, whole units."""
        if self.cyclic:
            return max(self.unit, self.residual)
        return -(-max(1, min(16, self.residual // 8)) // self.unit) * self.unit

    @property
    def longest_tail(self) -> int:
        """Full-precision entries that a forward of one token may hold before it encodes what is due."""
        return self.residual + self.sinks + (1 if self.cyclic else self.lump)

    @property
    def asks(self) -> bool:
        """Whether `start` or `judge` looks at the queries of the forward."""
        return self.judges

    def at(self, layer_idx: int) -> Codec:
        """This codec with what a calibration found for one layer of the model."""
        return self

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        """State of a row, from the first entries ``x [T, D]`` that it encodes; each tensor of the same shape in all rows."""
        return {}

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Salience ``[T]`` of the entries of a row that are about to be encoded, from their post-RoPE ``keys [T, D]``."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        """Encodes ``x [N * unit, D]`` into columns ``[N, ...]``; codecs without state need no place."""

    @abstractmethod
    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        """Decodes columns ``[N, ...]`` into float32 ``[N * unit, D]``."""

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        """What kernels read: rows begin at unit ``starts[r]``, and entry ``skip[r]`` of a row comes first.

        ``columns`` holds what rows keep too, ``[R, ...]``, under the names of the state.
        None where there is no fused form: blocks of entries are then decoded inside the attention.
        """
        return None

    def sizes(self, columns: Mapping[str, Tensor], width: int) -> Tensor:
        """Bytes of each unit of ``width`` channels in the payload of a `variable` codec: int64 ``[N]``."""
        raise NotImplementedError

    def payload_bytes(self, width: int) -> int:
        """Most bytes that a unit may have in the payload of a `variable` codec."""
        return 0

    def state_bytes(self, width: int) -> float:
        """Bytes of the state of a row."""
        return 0.0

    @abstractmethod
    def bytes_per_entry(self, width: int) -> float:
        """Stored bytes per entry of ``width`` channels, scales and zeros included (the most, for a `variable` codec)."""


@dataclass(frozen=True)
class Stage(Codec):
    """A step around another codec (a rotation before it, a correction of what it misses), with the same units and tail.

    Its columns and its state stand beside those of ``base``; every stage names its own.
    """

    base: Codec = field(kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(Codec):
            object.__setattr__(self, item.name, getattr(self.base, item.name))

    @property
    def asks(self) -> bool:
        return self.base.asks

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        return self.base.start(x, row, asked)

    def state_bytes(self, width: int) -> float:
        return self.base.state_bytes(width)


def alone(codec: Codec, x: Tensor, asked: Asked | None = None) -> Place:
    """The place of ``x [N * unit, D]`` as the first units of a single row."""
    state = {name: found[None] for name, found in codec.start(x, 0, asked).items()}
    rows = torch.zeros(len(x) // codec.unit, dtype=torch.long, device=x.device)
    return Place(rows, state, x.shape[-1], torch.arange(len(x), device=x.device))
