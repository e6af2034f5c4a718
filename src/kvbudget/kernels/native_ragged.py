"""The compiled kernels that move and pick entries of ragged rows; see kernels/ragged.py for what they do."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbudget.kernels import native
from kvbudget.kernels.ragged import Layout


def scatter(columns: Sequence[tuple[Tensor, Tensor | None]], begins: Sequence[int], counts: Sequence[int]) -> bool:
    """`ragged.scatter` by the extension; False, with nothing written, where it cannot serve the tensors."""
    cells = []
    for to, new in columns:
        if not to.is_cpu or not to.is_contiguous():
            return False
        if new is not None and (not new.is_contiguous() or new.dtype is not to.dtype or not new.is_cpu):
            return False
        cells.append((to.data_ptr(), 0 if new is None else new.data_ptr(), _cell_bytes(to)))
    native._native.scatter(cells, begins, counts)
    return True


def count_kept(keep: Tensor, lengths: Sequence[int], begins: Sequence[int], unit: int) -> list[int]:
    """`ragged.count_kept` by the extension, for a mask in ordinary memory."""
    keep = _dense(keep)
    counts = native._native.count_kept(_flags(keep, begins, unit), lengths)
    assert counts is not None, (
        "mask selects padding" if not begins else "a sealed unit can only be kept or evicted whole"
    )
    return counts


def compact(
    columns: Sequence[Tensor],
    keep: Tensor | None,
    before: Layout,
    after: Layout,
    begins: Sequence[int],
    unit: int,
    in_place: bool,
) -> list[Tensor] | None:
    """`ragged.compact` by the extension; None, with nothing moved, where it cannot serve the tensors."""
    if any(not column.is_cpu or not column.is_contiguous() for column in columns):
        return None
    if keep is not None and not keep.is_cpu:
        return None
    cells = sum(after.capacities)
    moved = list(columns) if in_place else [column.new_empty((cells, *column.shape[1:])) for column in columns]
    pairs = [(to.data_ptr(), x.data_ptr(), _cell_bytes(x)) for to, x in zip(moved, columns, strict=True)]
    keep = None if keep is None else _dense(keep)
    flags = (0, 0, 0, (), 1) if keep is None else _flags(keep, begins, unit)
    native._native.compact(pairs, flags, before[:2], after, torch.get_num_threads())
    return moved


def select(
    scores: Tensor, protected: Tensor, valid: Tensor, counts: Tensor, units: Tensor | None, fill: bool
) -> Tensor | None:
    """`kvbudget.policy.selection.select` by the extension; None where it cannot serve the tensors."""
    if not scores.is_cpu or scores.dtype is not torch.float32 or (units is not None and units.dtype is not torch.int64):
        return None
    tensors = [
        x if x is None or (x.shape == scores.shape and x.is_contiguous()) else x.expand_as(scores).contiguous()
        for x in (scores, protected, valid, units)
    ]
    keep = torch.empty(scores.shape, dtype=torch.bool)
    cells = (counts.numel(), scores.shape[-1], *(0 if x is None else x.data_ptr() for x in tensors), fill)
    return keep if native._native.select(cells, counts.flatten().tolist(), keep.data_ptr()) else None


def _flags(keep: Tensor, begins: Sequence[int], unit: int) -> tuple[Any, ...]:
    return keep.data_ptr(), keep.stride(0), keep.shape[1], begins, unit


def _dense(keep: Tensor) -> Tensor:
    """A mask whose rows, wherever they are, have no gaps."""
    return keep if keep.stride(1) == 1 else keep.contiguous()


def _cell_bytes(column: Tensor) -> int:
    return column.element_size() * math.prod(column.shape[1:])
