"""Attention kernels over ragged rows: the native extension where it was built, else plain torch.

``KVBUDGET_KERNELS=reference`` or ``native`` forces one of the two. The functions have the signatures, shapes and
meaning of `kvbudget.kernels.reference`, which is what the native ones are tested against.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbudget.errors import KVBudgetError, nearest
from kvbudget.kernels import apart, encode, ragged, reference
from kvbudget.kernels.apart import FEW_QUERIES, SummedOperand
from kvbudget.kernels.atoms import AtomOperand
from kvbudget.kernels.codebook import CodebookOperand
from kvbudget.kernels.corrected import CorrectedOperand
from kvbudget.kernels.gathered import GatheredOperand
from kvbudget.kernels.operands import (
    ChannelQuantOperand,
    DenseOperand,
    Operand,
    TokenQuantOperand,
    pack,
    packed_width,
    unpack,
)
from kvbudget.kernels.ragged import Layout
from kvbudget.kernels.reference import Partial, causal_attend
from kvbudget.kernels.scalar import ScalarOperand
from kvbudget.kernels.turned import TurnedOperand

__all__ = [
    "AtomOperand",
    "Backend",
    "ChannelQuantOperand",
    "CodebookOperand",
    "CorrectedOperand",
    "DenseOperand",
    "GatheredOperand",
    "Layout",
    "Operand",
    "Partial",
    "ScalarOperand",
    "SummedOperand",
    "TokenQuantOperand",
    "TurnedOperand",
    "attend",
    "attend_keeping_logits",
    "backend",
    "causal_attend",
    "compact",
    "count_kept",
    "encode_tokens",
    "encode_units",
    "extremes",
    "lane",
    "mass",
    "mass_of_logits",
    "merge",
    "pack",
    "packed_width",
    "scatter",
    "select",
    "unpack",
    "weights",
]

_log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """Which kernels run (``native`` or ``reference``) and why, for `kvbudget info`."""

    name: str
    reason: str


@functools.cache
def backend() -> Backend:
    """Chooses the kernels once per process; raises KVBudgetError where a forced choice cannot be met."""
    forced = os.environ.get("KVBUDGET_KERNELS", "")
    if forced == "reference":
        return Backend("reference", "KVBUDGET_KERNELS=reference")
    if forced not in ("", "native"):
        raise KVBudgetError(
            f"KVBUDGET_KERNELS={forced!r} is not a kernel set{nearest(forced, ['native', 'reference'])}"
        )
    try:
        from kvbudget.kernels import native
    except ImportError as error:
        if forced:
            raise KVBudgetError(
                f"KVBUDGET_KERNELS=native, but the extension cannot be loaded ({error}); install a C++17 compiler and "
                "reinstall kvbudget, or unset the variable"
            ) from error
        _log.warning("native kernels are not available (%s); the slower torch reference kernels serve", error)
        return Backend("reference", f"the native extension cannot be loaded: {error}")
    return Backend("native", f"instruction set {native.instruction_set()}")


def attend(query: Tensor, key: Operand, value: Operand, lengths: Sequence[int], **options: Any) -> Partial:
    """Decode attention over ragged rows; see `reference.attend`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        partial = native.attend(query, key, value, lengths, **options)
        if partial is not None:
            return partial
    if _few(query, lengths, options):
        return apart.attend(query, key, value, lengths, _kernels(query), **_unblocked(options))
    return reference.attend(query, key, value, lengths, **options)


def _few(query: Tensor, lengths: Sequence[int], options: dict[str, Any]) -> bool:
    """Whether a call goes in two steps, where the extension cannot serve it as a whole."""
    return query.shape[1] <= FEW_QUERIES and options.get("softcap") is None and all(lengths)


def _unblocked(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name != "block"}


def _kernels(query: Tensor) -> apart.Kernels:
    """The extension as the two steps need it; it reads nothing where it is missing or knows no such queries."""
    if backend().name != "native":
        return apart.Kernels(lambda operand: False, attend, attend_keeping_logits)
    from kvbudget.kernels import native

    return apart.Kernels(lambda operand: native.reads(operand, query), attend, attend_keeping_logits)


def merge(partials: Sequence[Partial]) -> Partial:
    """Joins partial attentions over disjoint entries; see `reference.merge`."""
    if len(partials) > 1 and backend().name == "native":
        from kvbudget.kernels import native

        joined = native.merge(partials)
        if joined is not None:
            return joined
    return reference.merge(partials)


def attend_keeping_logits(
    query: Tensor, key: Operand, value: Operand, lengths: Sequence[int], **options: Any
) -> tuple[Partial, Tensor]:
    """`attend`, and the logits ``[M * sum(lengths)]`` float32 (row after row ``[M, length]``) for `mass_of_logits`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        logits = torch.empty(query.shape[1] * sum(lengths), device=query.device)
        partial = native.attend(query, key, value, lengths, logits=logits, **options)
        if partial is not None:
            return partial, logits
    plain = _unblocked(options)
    if _few(query, lengths, options):
        rows = apart.logits(query, key, lengths, _kernels(query), **plain)
        partial = apart.weighted(rows, value, lengths, _kernels(query))
    else:
        rows = [
            reference.whole_row(query[row], key, row, n, **reference.options_of_row(row, n, **plain))
            for row, n in enumerate(lengths)
        ]
        partial = reference.attend(query, key, value, lengths, **options)
    return partial, torch.cat([row.flatten() for row in rows])


def mass_of_logits(logits: Tensor, lengths: Sequence[int], lse: Tensor) -> list[Tensor]:
    """`mass` from kept logits against the merged ``lse [R, M]``: no second pass over the keys."""
    if backend().name == "native" and logits.is_cpu:
        from kvbudget.kernels import native

        return native.mass_of_logits(logits, lengths, lse)
    rows = logits.split([lse.shape[1] * length for length in lengths])
    lse = lse.nan_to_num(neginf=0.0)  # a query that sees nothing has logits of -inf only: it adds nothing
    return [torch.exp(row.view(lse.shape[1], -1) - lse[r][:, None]).sum(0) for r, row in enumerate(rows)]


def mass(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor]:
    """Attention weights' sum over query rows against a merged lse; see `reference.mass`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        sums = native.mass(query, key, lengths, lse, **options)
        if sums is not None:
            return sums
    return reference.mass(query, key, lengths, lse, **options)


def weights(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor]:
    """Attention weights of a window of queries against a merged lse; see `reference.weights`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        found = native.weights(query, key, lengths, lse, **options)
        if found is not None:
            return found
    return reference.weights(query, key, lengths, lse, **options)


def extremes(query: Tensor, key: Operand, lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest scaled logit of each query over all entries of its row, ``[R, M]`` float32 each; 0 without entries."""
    if _few(query, lengths, {}):
        found = [logits.aminmax(dim=1) for logits in apart.logits(query, key, lengths, _kernels(query), scale=scale)]
        return torch.stack([row.min for row in found]), torch.stack([row.max for row in found])
    low, high = (torch.zeros(query.shape[:2], device=query.device) for _ in range(2))
    for row, length in enumerate(lengths):
        blocks = range(0, length, 512)
        found = [(key.products(row, b, min(b + 512, length), query[row]) * scale).aminmax(dim=1) for b in blocks]
        if found:
            low[row] = torch.stack([block.min for block in found]).amin(0)
            high[row] = torch.stack([block.max for block in found]).amax(0)
    return low, high


def lane(*arguments: Any) -> Any:
    """A prepared decode step over segments (`native.Lane`); None where the extension cannot serve them. See `native.lane`."""
    if backend().name != "native":
        return None
    from kvbudget.kernels import native

    return native.lane(*arguments)


def encode_tokens(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integer codes with a scale and a zero per entry and group of channels; see `encode.encode_tokens`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        coded = native.encode(x, bits, group, False)
        if coded is not None:
            return coded
    return encode.encode_tokens(x, bits, group)


def encode_units(x: Tensor, bits: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integer codes with a scale and a zero per channel and unit of entries; see `encode.encode_units`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        coded = native.encode(x, bits, unit, True)
        if coded is not None:
            return coded
    return encode.encode_units(x, bits, unit)


def scatter(columns: Sequence[tuple[Tensor, Tensor | None]], begins: Sequence[int], counts: Sequence[int]) -> None:
    """Writes new cells into flat columns; see `ragged.scatter`."""
    if backend().name == "native":
        from kvbudget.kernels import native_ragged

        if native_ragged.scatter(columns, begins, counts):
            return
    ragged.scatter(columns, begins, counts)


def count_kept(keep: Tensor, lengths: Sequence[int], begins: Sequence[int] = (), unit: int = 1) -> list[int]:
    """Cells that a mask keeps of each row; see `ragged.count_kept`."""
    if backend().name == "native" and keep.is_cpu:
        from kvbudget.kernels import native_ragged

        return native_ragged.count_kept(keep, lengths, begins, unit)
    return ragged.count_kept(keep, lengths, begins, unit)


def compact(
    columns: Sequence[Tensor],
    keep: Tensor | None,
    before: Layout,
    after: Layout,
    begins: Sequence[int] = (),
    unit: int = 1,
    *,
    in_place: bool = False,
) -> list[Tensor]:
    """Brings the cells that a mask keeps to their places in another layout; see `ragged.compact`."""
    if backend().name == "native":
        from kvbudget.kernels import native_ragged

        moved = native_ragged.compact(columns, keep, before, after, begins, unit, in_place)
        if moved is not None:
            return moved
    return ragged.compact(columns, keep, before, after, begins, unit)


def select(
    scores: Tensor, protected: Tensor, valid: Tensor, counts: Tensor, units: Tensor | None, fill: bool
) -> Tensor | None:
    """What `kvbudget.policy.selection.select` keeps, by the extension; None where it cannot serve the tensors."""
    if backend().name != "native":
        return None
    from kvbudget.kernels import native_ragged

    return native_ragged.select(scores, protected, valid, counts, units, fill)
