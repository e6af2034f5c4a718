"""Demote: evicted entries stay in the cache, in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.codecs.integer import TokenQuant
from kvbudget.policy.base import Destination, Evicted
from kvbudget.policy.selection import select
from kvbudget.segments.quantized import QuantizedSegment

if TYPE_CHECKING:
    from kvbudget.costs import EntryCost
    from kvbudget.layer import LayerCache
    from kvbudget.policy.view import View

SMALLEST = 1e-5
"""Channel maxima below this count as this, so that dead channels do not blow up the balance."""
QUERY_MAXIMA = "query maxima"


@dataclass(frozen=True)
class Demote(Destination):
    """Codes evicted entries in ``bits`` per element, entry by entry, in a segment in front (MiKV, arXiv 2402.18096, section 4).

    ``group`` channels share a scale (0: half a head). With ``balanced``, keys are multiplied by
    ``sqrt(max |q| / max |k|)`` per KV head and channel before coding and queries divided by it, which leaves logits as they
    are; the maxima run over the GQA group and all tokens seen until a head demotes its first entries, and stay from then on.

    Under a byte budget as many entries stay in place as leave room for all others in few bits. Where that would be less
    than ``share`` of what is held, entries with the lowest scores are dropped instead, and ``share`` of the rest stay.
    """

    bits: int = 4
    group: int = 0
    balanced: bool = True
    share: float = 0.2

    def entry_bytes(self, key_dim: int, value_dim: int) -> float:
        payload = self._codec(key_dim).bytes_per_entry(key_dim) + self._codec(value_dim).bytes_per_entry(value_dim)
        return payload + 4 + 4  # position and score

    def fixed_bytes(self, key_dim: int, value_dim: int, itemsize: int) -> float:
        return 2 * 4 * key_dim if self.balanced else 0.0  # the balance, and query maxima until it is known

    def main_entries(self, nbytes: float, cost: EntryCost, seen: int, floor: int) -> float:
        held = nbytes / (self.share * cost.per_entry + (1 - self.share) * cost.aside)
        if held >= seen:
            spread = cost.per_entry - cost.aside
            in_place = (nbytes - seen * cost.aside) / spread if spread > 0 else seen
        else:
            in_place = self.share * held
        return max(in_place, min(floor, seen))

    def observe(self, view: View) -> None:
        layer = view.layer
        if not self.balanced or view.queries is None:
            return
        coded = layer.front[0].lengths if layer.front else [0] * layer.num_rows
        if all(coded):
            layer.statistics.pop(QUERY_MAXIMA, None)
            return
        query = view.queries.query.float().abs()
        if view.queries.valid is not None:
            query = query * view.queries.valid[:, None, :, None]
        maxima = query.unflatten(1, (layer.num_kv_heads, -1)).amax((2, 3)).flatten(0, 1)
        if QUERY_MAXIMA in layer.statistics:
            maxima = torch.maximum(maxima, layer.statistics[QUERY_MAXIMA])
        waiting = torch.tensor([n == 0 for n in coded], device=maxima.device)
        layer.statistics[QUERY_MAXIMA] = maxima * waiting[:, None]

    def receive(self, layer: LayerCache, evicted: Evicted) -> None:
        if not layer.front:
            widths = evicted.key.shape[-1], evicted.value.shape[-1]
            layer.front.append(self.make_segment(layer.num_rows, *widths, device=evicted.key.device))
        (segment,) = layer.front
        assert isinstance(segment, QuantizedSegment)
        first = [n > 0 and held == 0 for n, held in zip(evicted.counts, segment.lengths, strict=True)]
        if segment.balance is not None and any(first):
            chosen = torch.tensor(first, device=segment.balance.device)[:, None]
            segment.balance = torch.where(chosen, self._balance(layer, evicted), segment.balance)
        meta = {"position": evicted.position, "score": evicted.score.float()}
        segment.append(evicted.key, evicted.value, meta, evicted.counts)
        segment.seal()

    def limit(self, layer: LayerCache, counts: Sequence[int]) -> None:
        for segment in layer.front:
            scores = segment.meta.padded("score")
            valid = segment.meta.valid(scores.device)
            most = torch.tensor(counts, device=scores.device)
            segment.take(select(scores, torch.zeros_like(valid), valid, most))

    def make_segment(
        self, num_rows: int, key_dim: int, value_dim: int, device: torch.device | None = None
    ) -> QuantizedSegment:
        balance = torch.ones(num_rows, key_dim, device=device) if self.balanced else None
        segment = QuantizedSegment(num_rows, self._codec(key_dim), self._codec(value_dim), balance)
        segment.set_limits([0] * num_rows)  # appended rarely and in bulk: no room ahead of need
        return segment

    def _codec(self, width: int) -> TokenQuant:
        return TokenQuant(bits=self.bits, group=self.group or max(1, width // 2))

    def _balance(self, layer: LayerCache, evicted: Evicted) -> Tensor:
        """``sqrt(max |q| / max |k|)`` per row and channel ``[R, D]``; without any query its maxima count as 1."""
        rows = evicted.key.float().abs().split(evicted.counts)
        width = evicted.key.shape[-1]
        keys = torch.stack([row.amax(0) if len(row) else row.new_zeros(width) for row in rows])
        for segment in layer.main:
            if segment.longest:
                kept = segment.keys()
                keys = torch.maximum(keys, torch.maximum(kept.amax(1), -kept.amin(1)).float())
        queries = layer.statistics.get(QUERY_MAXIMA, torch.ones_like(keys))
        return (queries.clamp_min(SMALLEST) / keys.clamp_min(SMALLEST)).sqrt()
