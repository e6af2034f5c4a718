"""Allocators over layers and heads by a table of what each KV head deserves."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbudget.budget import solve
from kvbudget.policy.base import HeadAllocator, LayerAllocator


@dataclass(frozen=True)
class LayerTable(LayerAllocator):
    """Layers share the budget in proportion to ``shares``, one for each layer that a budget governs (none: equally)."""

    shares: tuple[float, ...] = ()

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return list(self.shares) or [1.0] * len(measured)


@dataclass(frozen=True)
class HeadTable(HeadAllocator):
    """KV heads of layer l share its entries in proportion to ``shares[l]``, over all layers of the model (none: equally).

    Every head keeps what is protected in it, and the shares are those of the rest.
    """

    shares: tuple[tuple[float, ...], ...] = ()
    layer_idx: int = 0

    def of_layer(self, layer_idx: int) -> "HeadTable":
        return HeadTable(self.shares, layer_idx)

    def split(
        self, scores: Tensor, protected: Tensor, valid: Tensor, total: int, hint: Tensor | None = None
    ) -> list[int]:
        least = (protected & valid).sum(-1).tolist()
        room = [held - fixed for held, fixed in zip(valid.sum(-1).tolist(), least, strict=True)]
        shares = self.shares[self.layer_idx][: len(least)] if self.shares else [1.0] * len(least)
        rest = solve(max(total - sum(least), 0), shares, 0, room)
        return [fixed + more for fixed, more in zip(least, rest, strict=True)]
