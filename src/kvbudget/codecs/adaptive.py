"""As many bits per entry as an error bound on attention asks for, with outliers apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Place
from kvbudget.codecs.levels import Levels, pack_levels, unpack_levels
from kvbudget.codecs.sparse import index_type
from kvbudget.errors import PolicyError
from kvbudget.kernels.encode import HALF_MAX
from kvbudget.kernels.scalar import ScalarOperand

QUERY_NORM = 300.0
"""The norm of a query that QAQ's bound on keys assumes for every token."""


@dataclass(frozen=True)
class AdaptiveQuant(Levels):
    """Bits per entry from a bound on the error of the attention (QAQ, arXiv 2403.04643, section 3).

    The largest error of an element may be ``e_K = sqrt(12 / 300 ln(T^3 / (T - 1) eps^2 + 1))`` in keys and
    ``e_V = sqrt(12 / T) eps / A`` in values, where A is the most attention that the entry gets from one of the newest
    ``window`` queries and T the length of the text. ``b = ceil(log2(range / (2 e) + 1))``, from ``low`` to ``high``, without
    the ``share`` of the elements that lie farthest from the mean and are kept in half precision. Then
    ``c = round((x - mean) / s)`` in ``-2^(b - 1) .. 2^(b - 1) - 1`` with ``s = range / 2^b``; no bits keep the mean alone.
    The newest ``window - 1`` entries, which not all of these queries have seen, get ``high``; so do values without queries
    (the end of a plan).
    """

    judges: ClassVar[bool] = True

    low: int = 2
    eps: float = 1.0
    window: int = 1
    share: float = 0.01
    side: Literal["keys", "values"] = "keys"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 4:
            raise PolicyError(f"bits from {self.low} to {self.high} are not possible; give 0 <= least <= most <= 4")

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        steps = (asked.steps[row] >= 0).nonzero()[:, 0][-self.window :]
        newest = positions > asked.steps[row].max() - (self.window - 1)
        return asked.weights(row, steps, keys, positions).amax((0, 1)).masked_fill(newest, torch.inf)

    def bits(self, spread: Tensor, salience: Tensor | None, length: Tensor) -> Tensor:
        """Bits ``[N]`` uint8 of entries whose elements span ``spread [N]``, in texts of ``length [N]`` tokens."""
        length = length.float().clamp_min(2)
        if self.side == "keys":
            error = (12 / QUERY_NORM * torch.log1p(length**3 / (length - 1) * self.eps**2)).sqrt()
            newest = torch.zeros_like(length, dtype=torch.bool) if salience is None else salience.isinf()
        else:
            attention = torch.full_like(length, torch.inf) if salience is None else salience
            error = (12 / length).sqrt() * self.eps / attention.clamp_min(1e-12)
            newest = attention.isinf()
        found = torch.log2(spread / (2 * error).clamp_min(1e-12) + 1).ceil().clamp(self.low, self.high)
        return found.masked_fill(newest, self.high).to(torch.uint8)

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None and place.positions is not None
        x = x.float().clamp(-HALF_MAX, HALF_MAX)
        index = (x - x.mean(-1, keepdim=True)).abs().topk(self._count(x.shape[-1]), dim=-1).indices
        outliers = x.gather(-1, index)
        inside = torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False)
        mean = ((x * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_min(1)).half()
        spread = x.masked_fill(~inside, -torch.inf).amax(-1) - x.masked_fill(~inside, torch.inf).amin(-1)
        bits = self.bits(spread, place.salience, _lengths(place))
        scale = (spread / 2.0 ** bits.float()).clamp(max=HALF_MAX).half()[:, None]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        half = (2.0 ** (bits.float() - 1)).floor()[:, None]
        codes = ((x - mean.float()) / scale.float()).round().clamp(-half, (half - 1).clamp_min(0)) + half
        columns = {"bits": bits, "mean": mean, "scale": scale, "payload": pack_levels(codes.to(torch.uint8), bits)}
        if index.shape[-1]:
            columns |= {"outliers": outliers.half(), "outlier_index": index.to(index_type(x.shape[-1]))}
        return columns

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        bits = columns["bits"]
        half = (2.0 ** (bits.float() - 1)).floor()[:, None]
        codes = unpack_levels(columns["payload"], bits, place.width).float() - half
        dense = codes * columns["scale"].float() * (bits > 0)[:, None] + columns["mean"].float()
        if "outliers" in columns:
            dense = dense.scatter(-1, columns["outlier_index"].long(), columns["outliers"].float())
        return dense

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        found = self.scalar(columns, starts, skip)
        found.centered, found.scale, found.zero = True, columns["scale"], columns["mean"]
        if "outliers" in columns:
            found.outliers, found.places = columns["outliers"], columns["outlier_index"]
        return found

    def bytes_per_entry(self, width: int) -> float:
        return math.ceil(width * self.high / 8) + 5 + self._count(width) * (2 + index_type(width).itemsize)

    def _count(self, width: int) -> int:
        return max(1, round(self.share * width)) if self.share else 0


def _lengths(place: Place) -> Tensor:
    """Length of the text that each unit's row has reached ``[N]``."""
    assert place.positions is not None
    most = torch.zeros(int(place.rows.max()) + 1 if len(place.rows) else 0, device=place.rows.device)
    most = most.scatter_reduce(0, place.rows, place.positions.float(), "amax")
    return most[place.rows] + 1
