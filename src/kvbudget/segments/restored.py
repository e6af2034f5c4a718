"""RestoredSegment: segments that make plain keys and values of their entries before they answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from kvbudget import kernels
from kvbudget.kernels.operands import DenseOperand
from kvbudget.kernels.reference import Partial
from kvbudget.segments.base import AttendContext, Segment


class RestoredSegment(Segment):
    """Entries of several layers, ``keys [N, F D]`` and ``values [N, F Dv]`` side by side, in a form that attention cannot read.

    Attention is for one layer of them, `AttendContext.face`; whoever judges entries sees the lowest one's.
    """

    @abstractmethod
    def restored(self, face: int) -> tuple[Tensor, Tensor]:
        """Keys ``[R, longest, D]`` and values ``[R, longest, Dv]`` of one of the layers."""

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        starts = self._starts()
        key, value = (DenseOperand(x.reshape(-1, x.shape[-1]), starts) for x in self.restored(ctx.face))
        return kernels.attend(query, key, value, self.lengths, **self._options(ctx))

    def mass(self, query: Tensor, lse: Tensor, ctx: AttendContext) -> list[Tensor]:
        keys = self.keys()
        operand = DenseOperand(keys.reshape(-1, keys.shape[-1]), self._starts())
        return kernels.mass(query, operand, self.lengths, lse, **self._options(ctx))

    def keys(self) -> Tensor:
        return self.restored(0)[0]

    def values(self) -> Tensor:
        return self.restored(0)[1]

    def _starts(self) -> Sequence[int]:
        return [row * self.longest for row in range(self.num_rows)]

    def _options(self, ctx: AttendContext) -> dict:
        count = self.meta.padded("count").clamp_min(1e-30).log().flatten() if "count" in self.meta.columns else None
        return {
            "scale": ctx.scale, "softcap": ctx.softcap, "window": ctx.window, "causal_tail": ctx.causal_tail,
            "query_positions": ctx.query_positions, "positions": self.positions().flatten(), "entry_starts": self._starts(),
            "log_count": count,
        }  # fmt: skip
