"""Attention that answers again: what a query reads also completes the stored answers of the queries before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvbudget.kernels.reference import capped

if TYPE_CHECKING:
    from kvbudget.layer import AttentionCall, LayerCache

OUTPUTS, SUMS, RETURNED = "past outputs", "past sums", "returned"
LOADED = "loaded"
"""State of an entry: one more than the position of the newest query that has read it, 0 for none."""


class Reads(Protocol):
    """What a layer needs of a selector that looks back."""

    @property
    def window(self) -> int:
        """Queries, the newest included, that share what is read."""

    def read(self, layer_idx: int, query: Tensor, keys: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Which entries each query reads: bool ``[B, Hkv, n, T]`` among the ``visible`` ones.

        ``query [B, Hkv, G, n, D]`` and ``keys [B, Hkv, T, D]`` in float32, ``positions [B, Hkv, T]`` (-1: an empty cell).
        """


def take_back(layer: LayerCache, tokens: int) -> None:
    """Takes the newest entries out, to be stored anew by the next forward, which answers their queries again."""
    if OUTPUTS in layer.statistics:
        last = layer.main[-1]
        read = [last.meta.row(LOADED, r)[length - tokens :] for r, length in enumerate(last.lengths)]
        layer.statistics[RETURNED] = torch.stack(read)
    layer.truncate(tokens)


def attend(layer: LayerCache, reads: Reads, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of ``call.query [B, Hq, n, D]``, whose first tokens may be those that `take_back` has taken out.

    Each query reads what it and the ``window - 1`` queries after it select, as far as they are here and it may look at it;
    one that is answered again keeps its stored answer and adds what it has not read before, by the log-sum-exp. Answers of
    the last ``window - 1`` queries stay as ``layer.statistics``. Returns ``out [B, Hq, n, Dv]`` float32, lse ``[B, Hq, n]``.
    """
    outputs, sums, returned = (layer.statistics.pop(name, None) for name in (OUTPUTS, SUMS, RETURNED))
    layer.append(call.key, call.value, None)
    batch, heads, n = call.key.shape[:3]
    again = 0 if returned is None else returned.shape[1]
    last = layer.main[-1]
    if returned is not None:
        last.meta.own(LOADED)
        for r, length in enumerate(last.lengths):
            last.meta.row(LOADED, r)[length - n : length - n + again] = returned[r]

    def joined(columns: list[Tensor]) -> Tensor:
        return torch.cat(columns, dim=1).unflatten(0, (batch, heads))

    held = [segment for segment in layer.main if segment.longest]
    keys = joined([segment.keys() for segment in held]).float()
    values = joined([segment.values() for segment in held]).float()
    positions = joined([segment.positions() for segment in held])
    loaded = joined([segment.meta.padded(LOADED) for segment in held])
    steps = torch.tensor(layer.seen, device=keys.device)[:, None] - n + torch.arange(n, device=keys.device)
    query = call.query.unflatten(1, (heads, -1)).float()
    visible = (positions[:, :, None] <= steps[:, None, :, None]) & (positions >= 0)[:, :, None]
    chosen = torch.zeros_like(visible)
    chosen[:, :, again:] = reads.read(layer.layer_idx, query[:, :, :, again:], keys, positions, visible[:, :, again:])
    read = torch.stack([chosen[:, :, i : i + reads.window].any(2) for i in range(n)], dim=2) & visible
    read[:, :, :again] &= loaded[:, :, None] <= steps[:, None, :again, None]
    logits = capped(torch.einsum("bhgnd,bhtd->bhgnt", query, keys) * call.scale, call.softcap)
    logits = logits.masked_fill(~read[:, :, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    if call.sink is not None:
        fresh = torch.logaddexp(lse[..., again:], call.sink.float().view(1, heads, -1, 1))
        lse = torch.cat([lse[..., :again], fresh], dim=-1)
    out = torch.einsum("bhgnt,bhtd->bhgnd", (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp(), values)
    if again:
        assert outputs is not None and sums is not None
        before = outputs.unflatten(0, (batch, heads))[..., -again:, :], sums.unflatten(0, (batch, heads))[..., -again:]
        total = torch.logaddexp(before[1], lse[..., :again])
        old, new = (before[1] - total).exp(), (lse[..., :again] - total).exp()
        merged = old[..., None] * before[0] + new[..., None] * out[..., :again, :]
        out, lse = torch.cat([merged, out[..., again:, :]], dim=3), torch.cat([total, lse[..., again:]], dim=-1)
    _mark(layer, chosen, steps, again)
    if reads.window > 1:
        layer.statistics[OUTPUTS] = out[..., 1 - reads.window :, :].flatten(0, 1).clone()
        layer.statistics[SUMS] = lse[..., 1 - reads.window :].flatten(0, 1).clone()
    return out.flatten(1, 2), lse.flatten(1, 2)


def forget(layer: LayerCache) -> None:
    """Drops the stored answers."""
    for name in (OUTPUTS, SUMS, RETURNED):
        layer.statistics.pop(name, None)


def _mark(layer: LayerCache, chosen: Tensor, steps: Tensor, again: int) -> None:
    """Notes which query was the newest to read each entry."""
    newest = (chosen[:, :, again:] * (steps[:, None, again:, None] + 1)).amax(2).flatten(0, 1).float()
    begin = 0
    for segment in layer.main:
        if segment.longest:
            seen = segment.meta.padded(LOADED)
            segment.meta.write_padded(LOADED, torch.maximum(seen, newest[:, begin : begin + segment.longest]))
            begin += segment.longest
