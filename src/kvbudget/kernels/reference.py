"""Attention over flat ragged rows in plain torch: the truth that every faster kernel is tested against.

Rows: row ``r = b * Hkv + h`` holds the entries of sequence b in KV head h. Queries of one row are the ``M = G * n`` query
rows of its GQA group, query head major: ``m = g * n + i`` for query step ``i`` of ``n``. Flat columns hold row r at
``starts[r] : starts[r] + lengths[r]``. Softmax and accumulation run in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand


class Partial(NamedTuple):
    """Attention over a part of the entries: ``out [R, M, Dv]`` (float32 or the query's dtype), ``lse [R, M]`` float32.

    ``lse`` is the log-sum-exp of the scaled logits over this part's entries; -inf (and ``out = 0``) where it has none.
    """

    out: Tensor
    lse: Tensor


def merge(partials: Sequence[Partial]) -> Partial:
    """Joins partial attentions over disjoint entries; exact softmax over their union.

    >>> one = Partial(torch.ones(1, 1, 2), torch.zeros(1, 1))
    >>> merge([one, Partial(3 * torch.ones(1, 1, 2), torch.zeros(1, 1))]).out.tolist()
    [[[2.0, 2.0]]]
    """
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([p.lse for p in partials])
    total = torch.logsumexp(lse, dim=0)
    weight = torch.exp(lse - total.nan_to_num(neginf=0.0))
    out = sum(p.out.float() * w[..., None] for p, w in zip(partials, weight, strict=True))
    return Partial(out, total)


def visible(
    positions: Tensor,
    index: Tensor,
    length: int,
    query_positions: Tensor,
    *,
    causal_tail: int = 0,
    window: int | None = None,
) -> Tensor:
    """Which entries a query step may see: bool ``[n, T']`` for entries at in-row ``index [T']`` with ``positions [T']``.

    The last ``causal_tail`` entries of the row belong to the query steps themselves: step i sees all but those after it.
    With a ``window``, step i sees positions above ``query_positions[i] - window`` only.
    """
    n = query_positions.shape[0]
    allowed = torch.ones(n, index.shape[0], dtype=torch.bool, device=positions.device)
    if causal_tail > 1:
        step = torch.arange(n, device=positions.device)[:, None]
        allowed &= index[None, :] <= length - causal_tail + step
    if window is not None:
        allowed &= positions[None, :] > query_positions[:, None] - window
    return allowed


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under a soft cap: ``cap * tanh(x / cap)``; as they are without one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def row_logits(
    query: Tensor,
    key: Operand,
    row: int,
    begin: int,
    end: int,
    length: int,
    *,
    scale: float,
    softcap: float | None = None,
    log_count: Tensor | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    causal_tail: int = 0,
    window: int | None = None,
) -> Tensor:
    """Scaled, capped, biased and masked logits ``[M, end - begin]`` float32 of one row's queries ``[M, D]``.

    ``log_count``, ``positions``: per entry of this row ``[T]``; ``query_positions [n]``.
    """
    logits = capped(key.products(row, begin, end, query) * scale, softcap)
    if log_count is not None:
        logits = logits + log_count[begin:end].float()
    if causal_tail > 1 or window is not None:
        assert positions is not None and query_positions is not None
        index = torch.arange(begin, end, device=logits.device)
        allowed = visible(positions[begin:end], index, length, query_positions, causal_tail=causal_tail, window=window)
        groups = logits.shape[0] // allowed.shape[0]
        logits = logits.masked_fill(~allowed.repeat(groups, 1), float("-inf"))
    return logits


def whole_row(query: Tensor, key: Operand, row: int, length: int, **options: Any) -> Tensor:
    """`row_logits` of all entries of a row ``[M, length]``, of which no more are decoded at a time than may be."""
    block = min(_block_size(query.shape[0]), key.most)
    parts = [
        row_logits(query, key, row, begin, min(begin + block, length), length, **options)
        for begin in range(0, length, block)
    ]
    return torch.cat(parts, 1) if parts else query.new_zeros((query.shape[0], 0), dtype=torch.float32)


def options_of_row(
    row: int,
    length: int,
    entry_starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    log_count: Tensor | None = None,
    positions: Tensor | None = None,
    **same: Any,
) -> dict[str, Any]:
    """A call's options as `row_logits` takes them for one row."""
    steps = None if query_positions is None else query_positions[row]
    return {
        "query_positions": steps,
        **_of_row(row, length, entry_starts, log_count=log_count, positions=positions),
        **same,
    }


def _of_row(row: int, length: int, starts: Sequence[int] | None, **columns: Tensor | None) -> dict[str, Tensor | None]:
    """Cuts flat per-entry columns down to one row's entries."""
    if starts is None:
        return dict.fromkeys(columns)
    at = slice(starts[row], starts[row] + length)
    return {name: None if column is None else column[at] for name, column in columns.items()}


def _block_size(query_rows: int) -> int:
    """Entries per block such that a block's float32 logits stay near 4 MiB."""
    return max(64, 2**20 // max(query_rows, 1))


def attend(
    query: Tensor,
    key: Operand,
    value: Operand,
    lengths: Sequence[int],
    *,
    scale: float,
    softcap: float | None = None,
    log_count: Tensor | None = None,
    positions: Tensor | None = None,
    entry_starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    causal_tail: int = 0,
    window: int | None = None,
    block: int | None = None,
) -> Partial:
    """Decode attention of ``query [R, M, D]`` over ragged rows, in blocks of entries with a running softmax.

    ``log_count [C]`` and ``positions [C]`` are flat with ``entry_starts``; ``query_positions [R, n]``. Rows without
    entries give ``out = 0`` and ``lse = -inf``. Returns float32 ``out [R, M, Dv]`` and ``lse [R, M]``.
    """
    block = min(block or _block_size(query.shape[1]), key.most, value.most)
    outs, lses = [], []
    for row, length in enumerate(lengths):
        q = query[row]
        per_entry = _of_row(row, length, entry_starts, log_count=log_count, positions=positions)
        parts = []
        for begin in range(0, length, block):
            end = min(begin + block, length)
            logits = row_logits(
                q, key, row, begin, end, length,
                scale=scale, softcap=softcap, causal_tail=causal_tail, window=window,
                query_positions=None if query_positions is None else query_positions[row], **per_entry,
            )  # fmt: skip
            lse = torch.logsumexp(logits, dim=-1)
            weight = torch.exp(logits - lse.nan_to_num(neginf=0.0)[:, None])
            parts.append(Partial(value.weighted(row, begin, end, weight), lse))
        if not parts:
            width = value.block(row, 0, 0).shape[-1]
            parts.append(
                Partial(
                    torch.zeros(q.shape[0], width, device=q.device),
                    torch.full((q.shape[0],), float("-inf"), device=q.device),
                )
            )
        joined = merge(parts)
        outs.append(joined.out)
        lses.append(joined.lse)
    return Partial(torch.stack(outs), torch.stack(lses))


def _weight_blocks(
    query: Tensor,
    key: Operand,
    lengths: Sequence[int],
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    log_count: Tensor | None = None,
    positions: Tensor | None = None,
    entry_starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    causal_tail: int = 0,
    window: int | None = None,
    block: int | None = None,
) -> Iterator[tuple[int, slice, int, Tensor]]:
    """Yields a row, a block of its entries, a first step and the weights ``[G, n - first, T']`` of the steps from it on.

    Earlier steps do not see the block at all.
    """
    block = min(block or _block_size(query.shape[1]), key.most)
    steps = 1 if query_positions is None else query_positions.shape[1]
    for row, length in enumerate(lengths):
        per_entry = _of_row(row, length, entry_starts, log_count=log_count, positions=positions)
        members = query[row].unflatten(0, (-1, steps))
        bound = lse[row].nan_to_num(neginf=float("inf")).unflatten(0, (-1, steps))
        for begin in range(0, length, block):
            end = min(begin + block, length)
            first = max(0, begin - (length - causal_tail)) if causal_tail > 1 else 0
            logits = row_logits(
                members[:, first:].flatten(0, 1), key, row, begin, end, length,
                scale=scale, softcap=softcap, causal_tail=causal_tail - first, window=window,
                query_positions=None if query_positions is None else query_positions[row, first:], **per_entry,
            )  # fmt: skip
            logits = logits.unflatten(0, (len(members), -1))
            yield row, slice(begin, end), first, torch.exp(logits - bound[:, first:, None])


def mass(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor]:
    """Attention weights' sum over query rows, per row ``[T_r]`` float32, against the merged ``lse [R, M]``.

    The column sums are those of the softmax over *all* parts, not only this one: ``sum_m exp(logit[m, t] - lse[m])``.
    Queries that are not to be counted carry ``lse = +inf``, those that see nothing may carry -inf. Options as in `attend`.
    """
    sums = [torch.zeros(length, device=query.device) for length in lengths]
    for row, entries, _, found in _weight_blocks(query, key, lengths, lse, **options):
        sums[row][entries] = found.sum((0, 1))
    return sums


def weights(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor]:
    """What `mass` sums up: attention weights per row ``[M, T_r]`` float32, for a window of few query steps."""
    found = [torch.zeros(query.shape[1], length, device=query.device) for length in lengths]
    for row, entries, first, block in _weight_blocks(query, key, lengths, lse, **options):
        found[row].unflatten(0, (len(block), -1))[:, first:, entries] = block
    return found


def causal_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    block: int = 256,
) -> Partial:
    """Causal attention inside one chunk, in blocks of queries: ``query [Hkv, G, n, D]``, ``key, value [Hkv, n, D]``.

    Returns ``out [Hkv, G * n, Dv]``, ``lse [Hkv, G * n]`` in float32; never holds more than ``block * n`` weights per head.
    """
    heads, groups, n, _ = query.shape
    outs, lses = [], []
    for begin in range(0, n, block):
        end = min(begin + block, n)
        low = 0 if window is None else max(0, begin - window + 1)
        logits = torch.einsum("hgid,htd->hgit", query[:, :, begin:end].float(), key[:, low:end].float()) * scale
        logits = capped(logits, softcap)
        step = torch.arange(begin, end, device=query.device)[:, None]
        column = torch.arange(low, end, device=query.device)[None, :]
        allowed = column <= step
        if window is not None:
            allowed &= column > step - window
        logits = logits.masked_fill(~allowed, float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        outs.append(torch.einsum("hgit,htd->hgid", torch.exp(logits - lse[..., None]), value[:, low:end].float()))
        lses.append(lse)
    return Partial(torch.cat(outs, 2).reshape(heads, groups * n, -1), torch.cat(lses, 2).reshape(heads, groups * n))
