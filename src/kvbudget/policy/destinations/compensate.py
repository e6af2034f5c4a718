"""Compensate: evicted entries live on as one mean entry per KV head that counts as many as it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.policy.base import Destination, Evicted
from kvbudget.segments.dense import DenseSegment

if TYPE_CHECKING:
    from kvbudget.layer import LayerCache


@dataclass(frozen=True)
class Compensate(Destination):
    """Keeps the mean key and the mean value of all evicted entries of a head, with their number as a log-count logit bias.

    RazorAttention (arXiv 2407.15891, section 3.3): attention over the ``N`` dropped entries becomes
    ``N exp(q k^) v^`` in numerator and denominator, which is exact when they are all equal. The means run in float32, since
    the ten-thousandth member of a mean would be lost in half precision.
    """

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return 4.0 * (key_dim + value_dim) + 4 + 4  # position and count

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        number = torch.tensor(evicted.counts, device=evicted.key.device, dtype=torch.float32)
        key, value = _sums(evicted.key, evicted.counts), _sums(evicted.value, evicted.counts)
        newest = torch.stack(
            [row.amax() if len(row) else row.new_tensor(-1) for row in evicted.position.split(evicted.counts)]
        )
        if layer.front:
            table = layer.front[0].meta
            held = [row for row, length in enumerate(table.lengths) if length]
            count = table.flat("count")
            key[held] += table.flat("key") * count[:, None]
            value[held] += table.flat("value") * count[:, None]
            number[held] += count
            newest[held] = torch.maximum(newest[held], table.flat("position"))
        some = number > 0
        segment = DenseSegment(layer.num_rows)
        counts = some.int().tolist()
        segment.set_limits(counts)
        meta = {"position": newest[some], "count": number[some]}
        segment.append(key[some] / number[some, None], value[some] / number[some, None], meta, counts)
        layer.front = [segment]


def _sums(x: Tensor, counts: list[int]) -> Tensor:
    """Sums of a flat ragged ``[N, D]`` over each row: float32 ``[R, D]``."""
    row = torch.repeat_interleave(torch.arange(len(counts), device=x.device), torch.tensor(counts, device=x.device))
    return torch.zeros(len(counts), x.shape[-1], device=x.device).index_add_(0, row, x.float())
