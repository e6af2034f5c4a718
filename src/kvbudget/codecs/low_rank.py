"""A low-rank term for what a codec misses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Place, Stage
from kvbudget.codecs.sparse import corrected
from kvbudget.kernels.operands import Operand


@dataclass(frozen=True)
class LowRank(Stage):
    """Adds the projection of the residual of ``base`` onto ``rank`` directions (GEAR, arXiv 2403.05527, section 3).

    The directions ``P [D, r]`` are the row's state: the best ones for the residual of its first entries (the paper iterates
    towards them from random ones). Each entry keeps ``q = P^T e`` in half precision and decodes to ``x^ + P q``.
    """

    rank: int = 4

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        state = self.base.start(x, row, asked)
        rows = torch.zeros(len(x) // self.unit, dtype=torch.long, device=x.device)
        own = Place(rows, {name: column[None] for name, column in state.items()}, x.shape[-1])
        residual = (x.float() - self.base.decode(self.base.encode(x, own), own)).double()
        basis = torch.linalg.eigh(residual.T @ residual).eigenvectors[:, -self.rank :]
        return state | {"basis": basis.half()}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        columns = self.base.encode(x, place)
        residual = (x.float() - self.base.decode(columns, place)).unflatten(0, (-1, self.unit))
        return columns | {"projected": (residual @ place.of("basis").float()).half()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        added = columns["projected"].float() @ place.of("basis").float().mT
        return self.base.decode(columns, place) + added.flatten(0, 1)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand | None:
        found = corrected(self.base, columns, starts, skip)
        directions = columns["basis"].float().mT.contiguous()
        return None if found is None else replace(found, projected=columns["projected"], directions=directions)

    def state_bytes(self, width: int) -> float:
        return self.base.state_bytes(width) + 2 * width * self.rank

    def bytes_per_entry(self, width: int) -> float:
        return self.base.bytes_per_entry(width) + 2 * self.rank
