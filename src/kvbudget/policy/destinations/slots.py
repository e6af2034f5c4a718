"""Slots: evicted values turn the directions of a few memory slots, by what is new in them alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbudget.policy.destinations.codewords import Codewords

TINY = 1e-6


@dataclass(frozen=True)
class Slots(Codewords):
    """As `Codewords`, with values written as Lattice (arXiv 2504.05646) writes its memory.

    A slot s of direction ``u = s / |s|`` takes a value v by ``u <- normalize(u + g (I - u u^T) v / |s|)``: the part of v that
    lies along u turns nothing. Its length follows the mean of ``v u`` by the same step g, the larger of ``rate`` and of one
    over the entries that the slot stands for. Directions are those at the begin of every ``chunk`` entries (1: one by one).
    With the nearest slot's coefficient 1 and all others 0, writing the error or the value is the same. A slot begins as the
    mean of the values that reach it in its first chunk.
    """

    rate: float = 0.0
    chunk: int = 4

    def _written(self, held: Tensor, number: Tensor, nearest: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for new, at in zip(value.split(self.chunk), nearest.split(self.chunk), strict=True):
            hits = torch.zeros_like(number).index_add(0, at, torch.ones_like(at, dtype=number.dtype))
            fresh, number = number == 0, number + hits
            length = held.norm(dim=-1)
            direction = normalize(held, dim=-1)
            along = (new * direction[at]).sum(-1)
            across = torch.zeros_like(held).index_add(0, at, new - along[:, None] * direction[at])
            step = (1 / number.clamp_min(1)).clamp_min(self.rate).minimum(1 / hits.clamp_min(1))
            turned = normalize(direction + step[:, None] * across / length.clamp_min(TINY)[:, None], dim=-1)
            longer = length + step * (torch.zeros_like(length).index_add(0, at, along) - hits * length)
            begun = torch.zeros_like(held).index_add(0, at, new) / hits.clamp_min(1)[:, None]
            held = torch.where(fresh[:, None], begun, turned * longer.clamp_min(TINY)[:, None])
        return held, number
