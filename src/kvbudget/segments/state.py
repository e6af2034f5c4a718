"""StateSegment: a state of constant size that answers queries through learned feature maps instead of keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.kernels.reference import Partial
from kvbudget.segments.base import AttendContext, Side
from kvbudget.segments.dense import DenseSegment

Features = Callable[[Tensor], Tensor]
TINY = 1e-6
"""Weights of the state below this count as this in logarithms."""


class StateSegment(DenseSegment):
    """R slots per row: ``value [R * rows, Dv]`` holds sums H and ``mass`` their normalizers z, both float32.

    A query's weight of slot i is ``phi_i(q) z_i`` and its answer ``sum_i phi_i(q) H_i / sum_i phi_i(q) z_i``, which joins the
    softmax over other segments by its logarithm. ``features`` maps queries ``[rows, M, D]`` to ``phi [rows, M, R]``.
    """

    def __init__(self, num_rows: int, features: Features) -> None:
        super().__init__(num_rows)
        self.features = features

    def attend(self, query: Tensor, ctx: AttendContext) -> Partial:
        phi = self.features(query)
        norm = torch.einsum("rms,rs->rm", phi, self.meta.grid("mass"))
        out = torch.einsum("rms,rsd->rmd", phi, self.meta.grid("value")) / norm.clamp_min(TINY)[..., None]
        return Partial(out, norm.clamp_min(TINY).log().masked_fill(norm <= 0, float("-inf")))

    def sides(self) -> tuple[Side, Side] | None:
        return None

    def keys(self) -> Tensor:
        raise PolicyError("a learned state has no keys that a selector could read; use the state or the selector")
