"""Turns scores into the set of entries that stay: protection, units, groups and exact counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbudget import kernels
from kvbudget.policy.base import Protect


def protected_entries(
    positions: Tensor,
    seen: Sequence[int],
    protect: Protect,
    spans: Sequence[tuple[int, int]],
    means: Sequence[float] | None = None,
) -> Tensor:
    """Entries that must stay: bool, shape of ``positions [B, Hkv, T]`` (-1 marks empty cells).

    ``spans`` are half-open ranges of positions that the user has marked; ``means [B]`` is what a head keeps (None: all).
    """
    if protect.recent:
        means = means or [float("inf")] * len(seen)
        marked = sum(end - start for start, end in spans)
        first = [max(0, length - protect.window(mean, marked)) for length, mean in zip(seen, means, strict=True)]
        even = len(set(first)) == 1
        mask = positions >= (first[0] if even else torch.tensor(first, device=positions.device)[:, None, None])
    else:
        mask = torch.zeros_like(positions, dtype=torch.bool)
    for start, end in [(0, protect.sinks), *spans] if protect.sinks else spans:
        mask |= (positions >= start) & (positions < end)
    return mask


def newest(positions: Tensor, counts: Tensor) -> Tensor:
    """The ``counts [B, Hkv]`` newest entries of each row: bool ``[B, Hkv, T]``."""
    held = positions >= 0
    return select(positions.float(), torch.zeros_like(held), held, counts)


def select(
    scores: Tensor, protected: Tensor, valid: Tensor, counts: Tensor, units: Tensor | None = None, *, fill: bool = False
) -> Tensor:
    """Which entries stay: the ``counts [B, Hkv]`` best of each row, protected ones first; bool ``[B, Hkv, T]``.

    ``units [B, Hkv, T]`` names the unit of each cell; cells of one unit are judged by their mean score, are protected
    together and stay or go together, in order of their means up to the first that does not fit, or with ``fill`` past it (a
    row may then keep up to a unit less than its count). Equal scores keep the older entry. Protected entries stay even where
    they are more than the count.
    """
    keep = kernels.select(scores.float(), protected, valid, counts, units, fill)
    return plain_select(scores, protected, valid, counts, units, fill) if keep is None else keep


def plain_select(
    scores: Tensor, protected: Tensor, valid: Tensor, counts: Tensor, units: Tensor | None, fill: bool
) -> Tensor:
    """`select` in torch."""
    scores = scores.float().masked_fill(~valid, float("-inf"))
    scores = scores.masked_fill(protected & valid, float("inf"))
    if units is None:
        keep = rank(scores) < torch.maximum(counts, (protected & valid).sum(-1))[..., None]
        return keep & valid
    cells = valid.float()
    size = _spread(cells, units)
    mean = _spread(scores.masked_fill(~valid, 0.0), units) / size.clamp_min(1.0)
    fixed = _spread((protected & valid).float(), units) > 0
    mean = mean.masked_fill(fixed, float("inf")).masked_fill(~valid, float("-inf"))
    counts = torch.maximum(counts, (fixed & valid).sum(-1))
    keep = (rank(mean) < counts[..., None]) & valid
    keep &= _spread(keep.float(), units) == size
    room = counts - keep.sum(-1)
    while fill and bool((fits := valid & ~keep & (size <= room[..., None])).any()):
        # Units that score -inf come before those that do not fit.
        best = mean.clamp_min(torch.finfo(mean.dtype).min).masked_fill(~fits, float("-inf")).argmax(-1, keepdim=True)
        keep |= (units == units.gather(-1, best)) & fits
        room = counts - keep.sum(-1)
    return keep


def votes(scores: Tensor, protected: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """How much heads want each entry, where all of them hold the same ones: the same float32 in all, ``[B, Hkv, T]``.

    The highest of the heads' votes counts: ``c / (1 + r)`` for the entry of rank r beyond the protected ones in a head that
    may keep c beyond them. So it is at least 1 where a head would keep the entry by itself, and ``1 / x`` where the first one
    does when all heads may keep x times as many.
    """
    fixed = (protected & valid).sum(-1, keepdim=True)
    scores = scores.float().masked_fill(protected, float("inf")).masked_fill(~valid, float("-inf"))
    place = (rank(scores) - fixed).clamp_min(0)
    found = (counts[..., None] - fixed).clamp_min(0) / (place + 1)
    return found.amax(1, keepdim=True).expand_as(scores)


def best_of_units(scores: Tensor, units: Tensor, count: int) -> Tensor:
    """The mean of the ``count`` highest scores of each cell's unit (of all, where it has fewer), shape of ``scores``."""
    top = (rank_in_group(scores, units) < count).to(scores.dtype)
    return _spread(scores * top, units) / _spread(top, units)


def rank(scores: Tensor) -> Tensor:
    """Rank of each cell in descending order along the last dimension, ties by index."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """Rank of each cell among those of its row with the same ``group`` number, in descending order, ties by index.

    >>> rank_in_group(torch.tensor([1.0, 5.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1])).tolist()
    [1, 0, 0, 1]
    """
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    order = order.gather(-1, torch.argsort(group.gather(-1, order), dim=-1, stable=True))
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    sorted_group = group.gather(-1, order)
    first = torch.searchsorted(sorted_group.contiguous(), sorted_group.contiguous())
    return torch.empty_like(order).scatter_(-1, order, place - first)


def _spread(x: Tensor, units: Tensor) -> Tensor:
    """Sum of x over each unit, given back to every cell of the unit."""
    if not units.numel():
        return x
    sums = x.new_zeros((*x.shape[:-1], int(units.max()) + 1)).scatter_add_(-1, units, x)
    return sums.gather(-1, units)
