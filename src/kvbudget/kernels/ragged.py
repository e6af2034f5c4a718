"""Moves entries of ragged rows in plain torch: what the native extension does faster, and in place."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where rows lie in a flat column: row r has ``lengths[r]`` cells, room for ``capacities[r]``, from ``starts[r]`` on."""

    starts: Sequence[int]
    lengths: Sequence[int]
    capacities: Sequence[int]


def scatter(columns: Sequence[tuple[Tensor, Tensor | None]], begins: Sequence[int], counts: Sequence[int]) -> None:
    """Writes new cells into flat columns: ``counts[r]`` cells of each row r from cell ``begins[r]`` of a column on.

    ``columns`` are pairs of a column and its new cells ``[sum(counts), *tail]``, row after row (None: zeros).
    """
    where = _places(begins, counts, columns[0][0].device)
    for column, cells in columns:
        if cells is None:
            column.index_fill_(0, where, 0)
        else:
            column.index_copy_(0, where, cells)


def count_kept(keep: Tensor, lengths: Sequence[int], begins: Sequence[int], unit: int) -> list[int]:
    """Cells of each row that stay: cell t of row r does where ``keep [R, width]`` is set at ``begins[r] + unit * t``.

    The ``unit`` flags of a cell agree. Without ``begins`` the rows of the mask are the rows of cells, and their padding is
    not set.

    Raises:
        AssertionError: where that is not so.
    """
    kept = kept_cells(keep, lengths, begins, unit)
    counts = kept.sum(1).tolist()
    assert begins or int(keep.sum()) == sum(counts), "mask selects padding"
    return counts


def kept_cells(keep: Tensor, lengths: Sequence[int], begins: Sequence[int], unit: int) -> Tensor:
    """Which cells stay (see `count_kept`): bool ``[R, longest]``."""
    longest = max(lengths, default=0)
    if not keep.numel():
        return keep.new_zeros(len(lengths), longest)
    begin = torch.tensor(list(begins) or [0] * len(lengths), device=keep.device)[:, None]
    index = begin + torch.arange(longest * unit, device=keep.device)
    end = begin + torch.tensor(lengths, device=keep.device)[:, None] * unit
    flags = keep.gather(1, index.clamp_max(keep.shape[1] - 1)) & (index < end)
    flags = flags.view(len(lengths), longest, unit)
    assert unit == 1 or bool((flags == flags[..., :1]).all()), "a sealed unit can only be kept or evicted whole"
    return flags[..., 0]


def compact(
    columns: Sequence[Tensor], keep: Tensor | None, before: Layout, after: Layout, begins: Sequence[int], unit: int
) -> list[Tensor]:
    """Columns ``[sum(after.capacities), *tail]`` with the cells that stay (see `count_kept`; None: all), in order.

    Spare room is zero. The native kernel can move the cells inside of the columns that are given, where these have as many
    cells as are needed; the spare room then holds anything.
    """
    if keep is None:
        index = _places(before.starts, before.lengths, columns[0].device if columns else None)
    else:
        row, cell = kept_cells(keep, before.lengths, begins, unit).nonzero(as_tuple=True)
        index = torch.tensor(before.starts, device=row.device)[row] + cell
    moved = []
    for column in columns:
        out = column.new_zeros((sum(after.capacities), *column.shape[1:]))
        places = _places(after.starts, after.lengths, column.device)
        moved.append(out.index_copy_(0, places, column.index_select(0, index.to(column.device))))
    return moved


def _places(begins: Sequence[int], counts: Sequence[int], device: torch.device | None) -> Tensor:
    """The numbers ``begins[r] .. begins[r] + counts[r] - 1`` of all rows after each other."""
    sizes = torch.tensor(counts, dtype=torch.long, device=device)
    offsets = torch.tensor(begins, dtype=torch.long, device=device) - sizes.cumsum(0) + sizes
    return torch.arange(sum(counts), device=device) + offsets.repeat_interleave(sizes)
