"""Recurrence: evicted entries are absorbed by a learned low-rank state of constant size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kvbudget.policy.base import Destination, Evicted
from kvbudget.segments.state import StateSegment

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache

WEIGHTS = ("query_in", "query_out", "key_in", "key_out", "key_mix", "key_scale", "mix_scale")


def query_features(query: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """``phi(q) = |gelu(gelu(q A) B)|`` for ``query [..., Hq, n, D]``: ``[..., Hq, n, R]``."""
    return gelu(gelu(query @ weights["query_in"]) @ weights["query_out"]).abs()


def key_features(key: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """``psi(k) = |p + (p C) t|`` with ``p = |s| gelu(gelu(k A) B)`` for ``key [..., Hkv, n, D]``: ``[..., Hkv, n, R]``."""
    plain = gelu(gelu(key @ weights["key_in"]) @ weights["key_out"]) * weights["key_scale"].abs()[..., None, :]
    return (plain + (plain @ weights["key_mix"]) * weights["mix_scale"][..., None, :]).abs()


@dataclass(frozen=True)
class Recurrence(Destination):
    """Adds ``psi(k) v`` and ``psi(k)`` of evicted entries to sums that queries read through ``phi`` (LESS, arXiv 2402.09398).

    Attention becomes ``(phi(q) H + sum_kept exp(q k) v) / (phi(q) z + sum_kept exp(q k))``, under one normalizer. ``weights``
    hold the feature maps by name, stacked over the layers of the model: ``query_in [L, Hq, D, h]``, ``query_out [L, Hq, h,
    R]``, ``key_in``, ``key_out``, ``key_mix [L, Hkv, R, R]``, ``key_scale`` and ``mix_scale [L, Hkv, R]``.
    """

    rank: int = 8
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return self.rank * (4.0 * value_dim + 4 + 4)  # normalizer and position

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        weights = {name: x[layer.layer_idx].to(evicted.key.device) for name, x in self.weights.items()}
        heads, rank = layer.num_kv_heads, weights["key_scale"].shape[-1]
        keys, values = evicted.key.float().split(evicted.counts), evicted.value.float().split(evicted.counts)
        sums, mass = [], []
        for row, (key, value) in enumerate(zip(keys, values, strict=True)):
            own = {name: x[row % heads] for name, x in weights.items() if not name.startswith("query")}
            psi = key_features(key, own)
            sums.append(psi.mT @ value)
            mass.append(psi.sum(0))
        total, norm = torch.stack(sums), torch.stack(mass)
        newest = torch.tensor([int(row.max()) if len(row) else -1 for row in evicted.position.split(evicted.counts)])
        if layer.front:
            table = layer.front[0].meta
            total, norm = total + table.grid("value"), norm + table.grid("mass")
            newest = torch.maximum(newest.to(norm.device), table.grid("position")[:, 0])
        features = partial(_phi, weights={name: weights[name] for name in ("query_in", "query_out")}, heads=heads)
        segment = StateSegment(layer.num_rows, features)
        segment.set_limits([rank] * layer.num_rows)
        position = newest.to(norm.device, torch.int32).repeat_interleave(rank)
        columns = {"value": total.flatten(0, 1), "mass": norm.flatten(), "position": position}
        segment.meta.append(columns, [rank] * layer.num_rows)
        layer.front = [segment]


def _phi(query: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """Features of a layer's query rows ``[B * Hkv, G * n, D]``: ``[B * Hkv, G * n, R]``."""
    members = len(weights["query_in"]) // heads
    grouped = query.float().unflatten(1, (members, -1)).unflatten(0, (-1, heads)).flatten(1, 2)
    return query_features(grouped, weights).unflatten(1, (heads, members)).flatten(0, 1).flatten(1, 2)
