"""Attention kernels over ragged rows: the native extension where it was built, else plain torch.

``KVBUDGET_KERNELS=reference`` or ``native`` forces one of the two. The functions have the signatures, shapes and
meaning of `kvbudget.kernels.reference`, which is what the native ones are tested against.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvbudget.errors import KVBudgetError, nearest
from kvbudget.kernels import reference
from kvbudget.kernels.reference import (
    ChannelQuantOperand,
    DenseOperand,
    Operand,
    Partial,
    TokenQuantOperand,
    causal_attend,
    merge,
    pack,
    packed_width,
    unpack,
)

__all__ = [
    "Backend",
    "ChannelQuantOperand",
    "DenseOperand",
    "Operand",
    "Partial",
    "TokenQuantOperand",
    "attend",
    "backend",
    "causal_attend",
    "mass",
    "merge",
    "pack",
    "packed_width",
    "unpack",
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
    return reference.attend(query, key, value, lengths, **options)


def mass(query: Tensor, key: Operand, lengths: Sequence[int], lse: Tensor, **options: Any) -> list[Tensor]:
    """Attention weights' sum over query rows against a merged lse; see `reference.mass`."""
    if backend().name == "native":
        from kvbudget.kernels import native

        sums = native.mass(query, key, lengths, lse, **options)
        if sums is not None:
            return sums
    return reference.mass(query, key, lengths, lse, **options)
