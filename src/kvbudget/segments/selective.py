"""Attention in which a policy says what each query reads of the entries held, and with what weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvbudget.kernels.reference import capped
from kvbudget.segments.base import Segment

BLOCK = 2**22
"""Logits that are held at a time."""


@dataclass(frozen=True)
class Reading:
    """What a selector sees of one attention call: n queries of B sequences and the T cells of each KV head.

    ``logits [B, Hkv, G, n, T]`` float32, -inf where a query may not look; ``lse [B, Hkv, G, n]`` is their log-sum-exp over all
    entries (a sink logit of the model included), against which weights after the softmax are taken. ``query [B, Hkv, G, n, D]``,
    ``keys [B, Hkv, T, D]`` and ``values [B, Hkv, T, Dv]`` in float32; ``visible [B, Hkv, n, T]`` bool. ``layer_idx`` is that of
    the model, and ``depth`` runs from 0 in the first layer that a budget governs to 1 in the last. ``steps [B, n]`` are the
    positions of the queries and ``positions [B, Hkv, T]`` those of the entries, -1 for an empty cell. ``states`` are what the
    selector keeps with the entries, ``[B, Hkv, T]`` each.
    """

    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    lse: Tensor
    visible: Tensor
    depth: float = 0.0
    steps: Tensor | None = None
    positions: Tensor | None = None
    states: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def probabilities(self) -> Tensor:
        """The weights of full attention ``[B, Hkv, G, n, T]``."""
        return torch.exp(self.logits - self.lse.nan_to_num(neginf=0.0)[..., None])


@dataclass(frozen=True)
class Chosen:
    """``weights [B, Hkv, G, n, T]`` of the values, 0 where they are not read; ``mean_weight [B, Hkv, G, n]`` is the weight of
    the mean of all values that the query may look at (None: 0)."""

    weights: Tensor
    mean_weight: Tensor | None = None


class Selects(Protocol):
    """What the data path needs of a selector."""

    @property
    def prefill(self) -> bool:
        """Whether sequences to which a forward brings many tokens are selected too."""

    @property
    def states(self) -> tuple[str, ...]:
        """Float32 columns that it keeps with the entries; 0 for an entry that it has not met yet."""

    def meet(self, layer_idx: int, keys: Tensor, positions: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fills in the ``states [B, Hkv, T]`` of new entries, from ``keys [B, Hkv, T, D]`` at ``positions [B, Hkv, T]``."""

    def select(self, reading: Reading) -> Chosen:
        """What the queries read."""


def attend(
    selector: Selects,
    layer_idx: int,
    depth: float,
    segments: Sequence[Segment],
    query: Tensor,
    steps: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    whole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``query [B, Hq, n, D]`` at positions ``steps [B, n]`` over segments that hold the new entries too.

    Sequences where ``whole [B]`` is set read everything. Returns ``out [B, Hq, n, Dv]`` float32 and the log-sum-exp over
    everything ``[B, Hq, n]``.
    """
    batch, query_heads = query.shape[:2]
    held = [segment for segment in segments if segment.longest]

    def joined(columns: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(columns), dim=1).unflatten(0, (batch, -1))

    keys = joined([segment.keys() for segment in held]).float()
    values = joined([segment.values() for segment in held]).float()
    positions = joined([segment.positions() for segment in held])
    states = _states(selector, layer_idx, held, keys, positions) if selector.states else {}
    if any("count" in segment.meta.columns for segment in held):
        counts = [
            s.meta.padded("count") if "count" in s.meta.columns else torch.ones_like(s.positions(), dtype=torch.float32)
            for s in held
        ]
        states["count"] = joined(counts)
    if len(held) > 1:  # rows that differ in length have empty cells between segments, which selectors do not expect
        order = (positions < 0).argsort(dim=-1, stable=True)
        keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in (keys, values))
        positions, states = positions.gather(-1, order), {name: x.gather(-1, order) for name, x in states.items()}
    count = states.pop("count", None)
    log_count = None if count is None else count.clamp_min(1e-30).log()[:, :, None, None]
    grouped = query.unflatten(1, (keys.shape[1], -1)).float()
    size = max(1, BLOCK // (batch * query_heads * keys.shape[2]))
    outs, sums = [], []
    for begin in range(0, steps.shape[1], size):
        at = slice(begin, begin + size)
        logits = capped(torch.einsum("bhgnd,bhtd->bhgnt", grouped[:, :, :, at], keys) * scale, softcap)
        if log_count is not None:
            logits = logits + log_count
        visible = (positions[:, :, None] <= steps[:, None, at, None]) & (positions >= 0)[:, :, None]
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.float().view(1, keys.shape[1], -1, 1))
        reading = Reading(
            layer_idx, grouped[:, :, :, at], keys, values, logits, lse, visible, depth, steps[:, at], positions, states
        )
        chosen = selector.select(reading)
        weights, mean_weight = chosen.weights, chosen.mean_weight
        if whole is not None:
            weights = torch.where(whole[:, None, None, None, None], reading.probabilities, weights)
            mean_weight = None if mean_weight is None else mean_weight.masked_fill(whole[:, None, None, None], 0.0)
        out = torch.einsum("bhgnt,bhtd->bhgnd", weights, values)
        if mean_weight is not None:
            share = visible.float() / visible.sum(-1, keepdim=True).clamp_min(1)
            out = out + mean_weight[..., None] * (share @ values)[:, :, None]
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, dim=3).flatten(1, 2), torch.cat(sums, dim=3).flatten(1, 2)


def _states(
    selector: Selects, layer_idx: int, held: Sequence[Segment], keys: Tensor, positions: Tensor
) -> dict[str, Tensor]:
    """The selector's columns ``[B, Hkv, T]`` once it has met all entries; kept where a segment has room for them."""
    states = {}
    for name in selector.states:
        columns = [s.meta.padded(name) if name in s.meta.columns else torch.zeros(s.num_rows, s.longest) for s in held]
        states[name] = torch.cat([column.to(keys.device) for column in columns], 1).unflatten(0, keys.shape[:2])
    before = {name: column.clone() for name, column in states.items()}
    selector.meet(layer_idx, keys, positions, states)
    for name, column in states.items():
        parts = [x.flatten(0, 1).split([segment.longest for segment in held], 1) for x in (before[name], column)]
        for segment, old, new in zip(held, *parts, strict=True):
            if name in segment.meta.columns and not torch.equal(old, new):
                segment.meta.write_padded(name, new)
    return states
