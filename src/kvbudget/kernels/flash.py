"""Attention through torch's own CPU flash kernel, where it applies: many query rows, no soft cap, no window.

It returns the log-sum-exp that the public ``scaled_dot_product_attention`` hides, reads a KV head once per GQA group and
never holds a T x T tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbudget.kernels.reference import Partial, causal_attend

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def applies(query: Tensor, value: Tensor) -> bool:
    """Whether torch's CPU flash kernel can serve these tensors (CPU, one dtype, equal key and value width)."""
    return query.device.type == "cpu" and query.dtype == value.dtype and query.shape[-1] == value.shape[-1]


def grid_attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, log_count: Tensor | None = None) -> Partial:
    """Unmasked attention of ``query [R, M, D]`` over rows of one length ``key, value [R, T, D]``, T >= 1.

    ``log_count [R, T]`` is added to the logits of every query row. Returns ``out [R, M, D]`` in the query's dtype.
    """
    bias = None if log_count is None else log_count[:, None, None, :].to(query.dtype)
    out, lse = _flash(query[:, None], key[:, None], value[:, None], 0.0, False, attn_mask=bias, scale=scale)
    return Partial(out[:, 0], lse[:, 0])


def ragged_attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float,
    log_count: Sequence[Tensor] | None = None,
) -> Partial:
    """As `grid_attend` for rows of different lengths: ``query [R, M, D]``, ``keys[r], values[r] [T_r, D]``, T_r >= 1."""
    rows = [
        grid_attend(
            query[r, None],
            key[None],
            value[None],
            scale=scale,
            log_count=None if log_count is None else log_count[r][None],
        )
        for r, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    return Partial(torch.cat([row.out for row in rows]), torch.cat([row.lse for row in rows]))


def causal_grid_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Partial:
    """Causal attention inside a chunk: ``query [Hq, n, D]``, ``key, value [Hkv, n, D]`` of one sequence.

    Returns ``out [Hq, n, Dv]``, ``lse [Hq, n]``; soft caps and windows shorter than the chunk use the blocked reference.
    """
    n = query.shape[1]
    if n == 0:  # torch's kernel divides by the number of queries
        return Partial(query.new_zeros(query.shape[0], 0, value.shape[-1]), query.new_zeros(query.shape[0], 0).float())
    if softcap is None and (window is None or window >= n) and applies(query, value):
        out, lse = _flash(query[None], key[None], value[None], 0.0, True, scale=scale)
        return Partial(out[0], lse[0])
    grouped = query.unflatten(0, (key.shape[0], -1))
    part = causal_attend(grouped, key, value, scale=scale, softcap=softcap, window=window)
    return Partial(part.out.reshape(*query.shape[:2], -1).to(query.dtype), part.lse.reshape(query.shape[:2]))
