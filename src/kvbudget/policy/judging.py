"""How the queries of a plan's extra pass weigh the entries of one KV head, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kvbudget.kernels.reference import capped
from kvbudget.layer import LayerCache
from kvbudget.policy.base import Span
from kvbudget.policy.view import Queries, View

Support = Literal["all", "chunk", "held"]

SMALLEST = 1e-30
"""Least score of an entry that a pass has judged: 0 marks those that none has judged yet."""
BLOCK = 2**18
"""Logits that are held at a time, per KV head."""


def unjudged_newest(view: View, state: str) -> Tensor:
    """A state of judged entries as scores: those that no pass has judged rank above all others, newer ones first.

    Judged scores must not exceed 2.
    """
    scores = view.state(state)
    return torch.where(scores > 0, scores, 2.0 + view.positions.float() * 2.0**-22)


def of_head(queries: Queries, b: int, h: int, heads: int) -> Queries:
    """The queries of one sequence's GQA group ``[G * n, D]``, padding left out."""
    assert queries.own is not None
    groups = queries.query.shape[1] // heads
    at = slice(h * groups, (h + 1) * groups)
    real = slice(None) if queries.valid is None else queries.valid[b]
    query, lse, own = (x[b, at][:, real].flatten(0, 1) for x in (queries.query, queries.lse, queries.own))
    return Queries(query, lse, queries.scale, queries.softcap, own=own)


def log_weights(
    layer: LayerCache, row: int, queries: Queries, span: Span, support: Support = "all", sinks: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Log attention weights of the entries of one row at positions inside ``span``, for blocks of the pass's queries.

    ``queries`` are those of the row's head (`of_head`). The softmax runs over everything visible to a query (``all``), over
    the first ``sinks`` entries, the span and the pass's own tokens (``chunk``), or over the span alone (``held``). Yields
    which of the ``G * n`` queries a block holds, and ``[m, entries]`` float32.
    """
    first, _ = cut(layer, row, (0, min(sinks, span[0])))
    chunk, _ = cut(layer, row, span)
    if support == "chunk" and len(first) + len(chunk) == sum(segment.lengths[row] for segment in layer.segments):
        support = "all"
    size = max(1, BLOCK // max(1, len(chunk)))
    assert queries.own is not None
    for begin in range(0, len(queries.query), size):
        at = slice(begin, begin + size)
        query = queries.query[at].float() * queries.scale
        logits = capped(query @ chunk.T, queries.softcap)
        lse = queries.lse[at]
        if support != "all":
            lse = torch.logsumexp(logits, -1)
        if support == "chunk":
            before = capped(query @ first.T, queries.softcap)
            lse = torch.stack([queries.own[at], torch.logsumexp(before, -1), lse]).logsumexp(0)
        yield at, logits.sub_(lse[:, None])


def write(layer: LayerCache, row: int, span: Span, state: str, scores: Tensor) -> None:
    """Sets a state column of a row's entries inside ``span``; scores of judged entries are never 0."""
    _, cells = cut(layer, row, span)
    for segment, begin, end in cells:
        segment.meta.own(state)
        segment.meta.row(state, row)[begin:end] = scores[: end - begin].clamp_min(SMALLEST)
        scores = scores[end - begin :]


def cut(layer: LayerCache, row: int, span: Span) -> tuple[Tensor, list[tuple[Any, int, int]]]:
    """Keys ``[n, D]`` in float32 of a row's entries at positions inside ``span``, and their cells by segment."""
    cells, keys = [], []
    for segment in layer.main:
        if segment.lengths[row]:
            position = segment.meta.row("position", row)
            bounds = torch.tensor(span, dtype=position.dtype, device=position.device)
            begin, end = torch.searchsorted(position, bounds).tolist()
            if begin < end:
                cells.append((segment, begin, end))
            keys.append(segment.row_keys(row, begin, end))
    return torch.cat(keys).float(), cells
