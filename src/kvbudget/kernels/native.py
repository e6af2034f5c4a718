"""The compiled attention kernels: checks tensors and hands their addresses to the extension, without copies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbudget.errors import KVBudgetError
from kvbudget.kernels import _native
from kvbudget.kernels.operands import Operand, packed_width
from kvbudget.kernels.reference import Partial
from kvbudget.kernels.views import BITS, MAX_WIDTH, TYPES, describe


def instruction_set() -> str:
    """Which variant of the kernels runs on this machine: ``generic``, ``avx2`` or ``avx512``."""
    return _native.instruction_set()


def use_instruction_set(name: str) -> None:
    """Switches to another variant, for tests and benchmarks; KVBudgetError where the machine cannot run it."""
    if not _native.use(name):
        raise KVBudgetError(f"this machine cannot run the {name!r} kernels; it runs {_native.instruction_set()!r}")


def thread_shares(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """Entries of each row that each of ``threads`` attends to where rows hold so many: ``[threads][rows]``."""
    return _native.shares(lengths, threads)


def reads(operand: Operand, query: Tensor) -> bool:
    """Whether the extension attends to an operand as it is, with such queries."""
    return query.is_cpu and query.dtype in TYPES and describe(operand) is not None


def _call(
    query: Tensor,
    lengths: Sequence[int],
    scale: float,
    softcap: float | None,
    log_count: Tensor | None,
    positions: Tensor | None,
    entry_starts: Sequence[int] | None,
    query_positions: Tensor | None,
    causal_tail: int,
    window: int | None,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]] | None:
    """The call's other arguments for the extension, and the tensors that must outlive it; None where unsupported."""
    kind = TYPES.get(query.dtype)
    if kind is None or not query.is_cpu or query.dim() != 3:
        return None
    query = query.contiguous()
    rows, queries, _ = query.shape
    steps, wide, count_at, positions_at, query_positions_at = 1, False, 0, 0, 0
    if log_count is not None:
        log_count = log_count.float().contiguous()
        count_at = log_count.data_ptr()
    if query_positions is not None:
        steps = query_positions.shape[1]
    if window is not None:
        assert positions is not None and query_positions is not None
        if positions.dtype is not torch.int32:
            positions = positions.long()
        positions = positions.contiguous()
        query_positions = query_positions.long().contiguous()
        wide = positions.dtype is torch.int64
        positions_at, query_positions_at = positions.data_ptr(), query_positions.data_ptr()
    call = (
        query.data_ptr(),
        kind,
        rows,
        queries,
        steps,
        scale,
        softcap or 0.0,
        lengths,
        entry_starts or (),
        count_at,
        positions_at,
        wide,
        query_positions_at,
        causal_tail,
        window or 0,
    )
    return call, (query, log_count, positions, query_positions)


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
    block: int = 0,
    logits: Tensor | None = None,
) -> Partial | None:
    """`reference.attend` by the extension; None where it cannot serve the operands (other devices and formats).

    ``logits [M * sum(lengths)]`` float32, where given, is filled row after row with ``[M, length]`` for `mass_of_logits`.
    """
    key_view, value_view = describe(key), describe(value)
    call = _call(
        query, lengths, scale, softcap, log_count, positions, entry_starts, query_positions, causal_tail, window
    )
    if key_view is None or value_view is None or call is None:
        return None
    rows, queries, width = query.shape
    if width != key_view[6]:
        raise KVBudgetError(f"queries have head_dim {width}, but keys have {key_view[6]}; pass matching operands")
    out = torch.empty(rows, queries, value_view[6])
    lse = torch.empty(rows, queries)
    kept = 0 if logits is None else logits.data_ptr()
    _native.attend(key_view, value_view, call[0], torch.get_num_threads(), out.data_ptr(), lse.data_ptr(), kept)
    return Partial(out, lse)


def lane(
    rows: int,
    queries: int,
    portions: Sequence[tuple[Any, ...]],
    room: tuple[Sequence[int], ...],
    states: Sequence[Tensor],
    dtype: torch.dtype,
    first: int,
    sums: list[tuple[Sequence[int], float, float]],
) -> Any:
    """The extension's prepared decode step (lane.h) of ``queries`` query heads per row; None where it cannot serve the segments.

    ``portions`` are ``((sealed, unit, tail) of keys, the same of values, starts of the entries, positions)`` per segment,
    ``room`` the capacities per row of the last one's entries, key tail and value tail, ``states`` its float32 columns.
    ``sums`` are what steps may add to columns of the segments from ``first`` on: addresses, decay and factor. What comes back
    holds addresses and no tensors.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    described = []
    for keys, values, starts, positions in portions:
        sides = []
        for sealed, unit, tail in (keys, values):
            views = [() if x is None else describe(x) for x in (sealed, tail)]
            if any(view is None or (view and view.correction) for view in views):
                return None
            sides.append((views[0], unit, views[1]))
        if positions.dtype is not torch.int32:
            return None
        described.append((*sides, starts, positions.data_ptr()))
    if any(state.dtype is not torch.float32 or state.dim() != 1 for state in states):
        return None
    zeroed = [state.data_ptr() for state in states]
    return _native.Lane(rows, queries, described, room, zeroed, TYPES[dtype], first, sums)


def mass(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor] | None:
    """`reference.mass` by the extension; None where it cannot serve the operand."""
    return _weighted(query, key, lengths, lse, False, **options)


def weights(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor] | None:
    """`reference.weights` by the extension; None where it cannot serve the operand."""
    return _weighted(query, key, lengths, lse, True, **options)


def _weighted(
    query: Tensor,
    key: Operand,
    lengths: Sequence[int],
    lse: Tensor,
    apart: bool,
    *,
    scale: float,
    softcap: float | None = None,
    log_count: Tensor | None = None,
    positions: Tensor | None = None,
    entry_starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    causal_tail: int = 0,
    window: int | None = None,
    block: int = 0,
) -> list[Tensor] | None:
    """Weights of all queries, apart ``[M, T_r]`` or summed ``[T_r]``."""
    key_view = describe(key)
    call = _call(
        query, lengths, scale, softcap, log_count, positions, entry_starts, query_positions, causal_tail, window
    )
    if key_view is None or call is None:
        return None
    queries, width = query.shape[1:]
    if width != key_view[6]:
        raise KVBudgetError(f"queries have head_dim {width}, but keys have {key_view[6]}; pass matching operands")
    lse = lse.float().contiguous()
    found = torch.empty(sum(lengths) * (queries if apart else 1))
    to = (0, found.data_ptr()) if apart else (found.data_ptr(), 0)
    _native.mass(key_view, call[0], torch.get_num_threads(), lse.data_ptr(), *to)
    if apart:
        return [row.view(queries, -1) for row in found.split([queries * length for length in lengths])]
    return list(found.split(list(lengths)))


def encode(x: Tensor, bits: int, group: int, by_units: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """`encode.encode_units` or `encode.encode_tokens` by the extension; None where it cannot serve the tensor."""
    kind = TYPES.get(x.dtype)
    if kind is None or not x.is_cpu or x.dim() != 2 or bits not in BITS or (len(x) and x.stride(1) != 1):
        return None
    entries, width = x.shape
    if width % 8 or not 0 < width <= MAX_WIDTH:
        return None
    count = entries // group if by_units else entries
    shape = (count, group) if by_units else (count,)
    codes = torch.empty(*shape, packed_width(width, bits), dtype=torch.uint8)
    scale, zero = (torch.empty(count, width if by_units else width // group, dtype=torch.float16) for _ in range(2))
    at = (codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    stride = x.stride(0) * x.element_size()
    _native.encode(x.data_ptr(), kind, stride, width, by_units, bits, group, count, torch.get_num_threads(), *at)
    return codes, scale, zero


def mass_of_logits(logits: Tensor, lengths: Sequence[int], lse: Tensor) -> list[Tensor]:
    """`reference.mass` from the logits that `attend` has kept: no second pass over the keys."""
    lse = lse.float().contiguous()
    sums = torch.empty(sum(lengths))
    threads = torch.get_num_threads()
    _native.mass_of_logits(lengths, lse.shape[1], threads, logits.data_ptr(), lse.data_ptr(), sums.data_ptr())
    return list(sums.split(list(lengths)))


def merge(partials: Sequence[Partial]) -> Partial | None:
    """`reference.merge` by the extension; None where it cannot serve the tensors."""
    for tensor in (tensor for partial in partials for tensor in partial):
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    out, lse = torch.empty_like(partials[0].out), torch.empty_like(partials[0].lse)
    outs, lses = ([tensor.data_ptr() for tensor in side] for side in zip(*partials, strict=True))
    _native.merge(outs, lses, lse.numel(), out.shape[-1], out.data_ptr(), lse.data_ptr())
    return Partial(out, lse)
