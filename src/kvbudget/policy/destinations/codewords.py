"""Codewords: evicted entries live on as sums over those that share a codeword."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.policy.base import Destination, Evicted
from kvbudget.policy.clustering import kmeans
from kvbudget.segments.dense import DenseSegment

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache


@dataclass(frozen=True)
class Codewords(Destination):
    """Replaces an evicted key by the nearest of at most ``codes`` codewords of its KV head; equal keys then count as one entry.

    Transformer-VQ (arXiv 2309.16354, section 3): the entries of codeword c are held as their number ``n_c`` and the mean of
    their values, and take part with the logit ``q c + ln n_c``, which is the softmax over the quantized keys itself. A
    codebook begins with evicted keys, as long as it has room for all of them, and with the centers of a k-means where more
    come at once; once full it stays as it is, and later keys join the nearest one. The means run in float32.
    """

    codes: int = 64

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return self.codes * (4.0 * (key_dim + value_dim) + 4 + 4)  # position and count

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        keys, values = evicted.key.float().split(evicted.counts), evicted.value.float().split(evicted.counts)
        positions = evicted.position.split(evicted.counts)
        rows = []
        for row, new in enumerate(zip(keys, values, positions, strict=True)):
            held = None
            if layer.front and layer.front[0].lengths[row]:
                table = layer.front[0].meta
                held = tuple(table.row(name, row) for name in ("key", "value", "position", "count"))
            rows.append(self._joined(held, *new))
        segment = DenseSegment(layer.num_rows)
        counts = [len(row[0]) for row in rows]
        segment.set_limits(counts)
        key, value, position, count = (torch.cat(column) for column in zip(*rows, strict=True))
        segment.append(key, value, {"position": position, "count": count}, counts)
        layer.front = [segment]

    def _joined(
        self, held: tuple[Tensor, ...] | None, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, ...]:
        """Codewords, mean values, newest positions and numbers of one row after some entries have come."""
        empty = (key[:0], value[:0], position[:0], key.new_zeros(0))
        codes, mean, newest, number = empty if held is None else held
        if len(key):
            codes = torch.cat([codes, self._fresh(key, self.codes - len(codes))])
            more = len(codes) - len(mean)
            mean = torch.cat([mean, mean.new_zeros(more, mean.shape[-1])])
            newest, number = torch.cat([newest, newest.new_zeros(more)]), torch.cat([number, number.new_zeros(more)])
            nearest = torch.cdist(key, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            mean, number = self._written(mean, number, nearest, value)
            newest = newest.scatter_reduce(0, nearest, position, "amax")
            used = number > 0
            codes, mean, newest, number = codes[used], mean[used], newest[used], number[used]
        return codes, mean, newest, number

    def _written(self, held: Tensor, number: Tensor, nearest: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What codewords hold ``[c, Dv]`` for how many entries ``[c]``, after ``value [n, Dv]`` has come to the ``nearest``."""
        total = (held * number[:, None]).index_add(0, nearest, value)
        number = number.index_add(0, nearest, torch.ones_like(nearest, dtype=number.dtype))
        return total / number.clamp_min(1.0)[:, None], number

    def _fresh(self, key: Tensor, room: int) -> Tensor:
        """Codewords that join a codebook with room for so many."""
        if len(key) <= room:
            return key
        return kmeans(key, room, restarts=1)[0] if room > 0 else key[:0]
