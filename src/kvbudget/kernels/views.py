"""Operands as the extension reads them: addresses, sizes and lists."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbudget.kernels.atoms import AtomOperand
from kvbudget.kernels.codebook import CodebookOperand
from kvbudget.kernels.corrected import CorrectedOperand
from kvbudget.kernels.gathered import GatheredOperand
from kvbudget.kernels.operands import ChannelQuantOperand, DenseOperand, Operand, TokenQuantOperand, packed_width
from kvbudget.kernels.scalar import ScalarOperand
from kvbudget.kernels.trits import TritOperand
from kvbudget.kernels.turned import TurnedOperand

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_WIDTH = 1024
BITS = (1, 2, 3, 4, 8)
_DENSE, _TOKEN, _CHANNEL, _CODEBOOK, _SCALAR = range(5)


class View(NamedTuple):
    """The fields of an operand in the order in which the extension takes them (module.cpp)."""

    kind: int
    type: int
    data: int
    stride: int
    scale: int
    zero: int
    width: int
    bits: int
    group: int
    starts: Any
    skip: Any = ()
    chosen: int = 0
    index_starts: Any = ()
    book: tuple[Any, ...] = ()
    scalar: tuple[Any, ...] = ()
    correction: tuple[Any, ...] = ()
    turn: tuple[Any, ...] = ()


def describe(operand: Operand) -> View | None:
    """The operand as the extension reads it; None where only the reference kernels can."""
    view = _VIEWS.get(type(operand))
    return None if view is None else view(operand)


def _gathered(operand: GatheredOperand) -> View | None:
    base, index = describe(operand.base), operand.index
    if (
        base is None
        or type(operand.base) not in _GATHERED
        or index.dtype is not torch.int64
        or not index.is_contiguous()
    ):
        return None
    return base._replace(chosen=index.data_ptr(), index_starts=operand.starts)


def _dense(operand: DenseOperand) -> View | None:
    data = operand.data
    kind = TYPES.get(data.dtype)
    if kind is None or not data.is_cpu or data.dim() != 2 or not 0 < data.shape[1] <= MAX_WIDTH:
        return None
    if data.stride(1) != 1:
        return None
    stride = data.stride(0) * data.element_size()
    return View(_DENSE, kind, data.data_ptr(), stride, 0, 0, data.shape[1], 0, 1, operand.starts)


def _integers(operand: TokenQuantOperand | ChannelQuantOperand) -> View | None:
    skip = (operand.skip or ()) if isinstance(operand, ChannelQuantOperand) else ()
    codes, scale, zero = operand.codes, operand.scale, operand.zero
    kind = TYPES.get(scale.dtype)
    if kind is None or zero.dtype is not scale.dtype or operand.bits not in BITS or not codes.is_cpu:
        return None
    if not (codes.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()):
        return None
    token = type(operand) is TokenQuantOperand
    width = scale.shape[-1] * operand.group if token else scale.shape[-1]
    stride = codes.shape[-1]
    if width % 8 or not 0 < width <= MAX_WIDTH or stride != packed_width(width, operand.bits):
        return None
    at = (codes.data_ptr(), stride, scale.data_ptr(), zero.data_ptr())
    return View(_TOKEN if token else _CHANNEL, kind, *at, width, operand.bits, operand.group, operand.starts, skip)


def _trits(operand: TritOperand) -> View | None:
    """Per-channel codes of no whole bits, without a zero."""
    codes, magnitude = operand.codes, operand.magnitude
    kind, width = _kind(magnitude), magnitude.shape[-1]
    if kind is None or not codes.is_cpu or not codes.is_contiguous() or width % 8 or not 0 < width <= MAX_WIDTH:
        return None
    at = (codes.data_ptr(), codes.shape[1], magnitude.data_ptr(), 0)
    return View(_CHANNEL, kind, *at, width, 0, operand.unit, operand.starts, operand.skip)


def _codebook(operand: CodebookOperand) -> View | None:
    codes, words = operand.codes, operand.codebook
    kind = _kind(operand.scale, operand.shift, operand.mean)
    if not codes.is_cpu or codes.dtype not in (torch.uint8, torch.int16) or not codes.is_contiguous():
        return None
    heads, stages, groups, size, coupled = words.shape
    if kind is None or words.dtype is not torch.float32 or words.stride()[3:] != (coupled, 1):
        return None
    width = operand.width
    if width % 8 or not 0 < width <= MAX_WIDTH or codes.shape[2] != operand.columns:
        return None
    book = (
        words.data_ptr(),
        heads,
        stages,
        groups,
        size,
        coupled,
        *words.stride()[:3],
        0 if operand.paired else codes.element_size(),
        _address(operand.mean),
        _address(operand.shift),
        0,
    )
    stride = codes.shape[2] * codes.element_size()
    head = (_CODEBOOK, kind, codes.data_ptr(), stride, _address(operand.scale), 0, width, 0, operand.unit)
    return View(*head, operand.starts, operand.skip or (), book=book)


def _atoms(operand: AtomOperand) -> View | None:
    codes, index, scale, atoms = operand.codes, operand.index, operand.scale, operand.atoms
    kind, (size, width) = _kind(scale), atoms.shape
    wanted = ((codes, torch.int8), (index, torch.int16), (atoms, torch.float32))
    if kind is None or any(x.dtype is not t or not x.is_cpu or not x.is_contiguous() for x, t in wanted):
        return None
    if width % 8 or not 0 < width <= MAX_WIDTH:
        return None
    terms = codes.shape[1]
    book = (atoms.data_ptr(), 1, terms, 1, size, width, 0, 0, 0, 2, 0, 0, codes.data_ptr())
    head = (_CODEBOOK, kind, index.data_ptr(), 2 * terms, scale.data_ptr(), 0, width, 0, 1)
    return View(*head, operand.starts, book=book)


def _scalar(operand: ScalarOperand) -> View | None:
    kind = _kind(operand.scale, operand.zero)
    codes, outliers, places, levels = operand.codes, operand.outliers, operand.places, operand.levels
    floats = (operand.table, operand.spread, operand.offset)
    wanted = [
        (codes, torch.uint8),
        *((x, torch.float32) for x in floats),
        (levels, torch.uint8),
        (operand.at, torch.int64),
    ]
    if any(x is not None and (x.dtype is not t or not x.is_cpu or not x.is_contiguous()) for x, t in wanted):
        return None
    width, count = operand.width, 0
    if kind is None or operand.bits not in BITS or width % 8 or not 0 < width <= MAX_WIDTH:
        return None
    if outliers is not None:
        assert places is not None, "elements set apart have places"
        count = outliers.shape[1]
        if outliers.dtype is not torch.float16 or places.element_size() > 2:
            return None
        if not (outliers.is_contiguous() and places.is_contiguous()):
            return None
    first = operand.spread if operand.spread is not None else operand.offset
    scalar = (
        _address(operand.table),
        operand.centered,
        _address(levels),
        _address(operand.at),
        _address(operand.spread),
        _address(operand.offset),
        *((1, 1) if first is None else first.shape[:2]),
        _address(outliers),
        _address(places),
        count,
        1 if places is None else places.element_size(),
    )
    stride = packed_width(width, operand.bits)
    at = (codes.data_ptr(), stride, _address(operand.scale), _address(operand.zero))
    return View(_SCALAR, kind, *at, width, operand.bits, width, operand.starts, scalar=scalar)


def _corrected(operand: CorrectedOperand) -> View | None:
    base = describe(operand.base)
    projected, directions, index, delta = operand.projected, operand.directions, operand.index, operand.delta
    wanted = ((projected, torch.float16), (directions, torch.float32), (delta, torch.float16))
    if any(x is not None and (x.dtype is not t or not x.is_cpu or not x.is_contiguous()) for x, t in wanted):
        return None
    if base is None or base.correction or base.turn or base.width % 8:
        return None
    if index is not None and (index.element_size() > 2 or not index.is_contiguous()):
        return None
    correction = (
        operand.unit,
        operand.starts,
        operand.skip,
        0 if directions is None else directions.shape[1],
        _address(projected),
        _address(directions),
        0 if index is None else index.shape[1],
        operand.by_entry,
        _address(index),
        1 if index is None else index.element_size(),
        _address(delta),
    )
    return base._replace(correction=correction)


def _turned(operand: TurnedOperand) -> View | None:
    base = describe(operand.base)
    position, frequency, matrix = operand.position, operand.frequency, operand.matrix
    if base is None or base.width % 8 or position.dtype is not torch.int32 or not position.is_contiguous():
        return None
    turn = (
        _address(matrix),
        _address(frequency) if len(frequency) else 0,
        len(frequency),
        operand.factor,
        operand.interleaved,
        position.data_ptr(),
        operand.entries,
    )
    return base._replace(turn=turn)


_VIEWS: dict[type[Operand], Any] = {
    GatheredOperand: _gathered,
    DenseOperand: _dense,
    TokenQuantOperand: _integers,
    ChannelQuantOperand: _integers,
    CodebookOperand: _codebook,
    AtomOperand: _atoms,
    ScalarOperand: _scalar,
    TritOperand: _trits,
    CorrectedOperand: _corrected,
    TurnedOperand: _turned,
}


_GATHERED = (DenseOperand, TokenQuantOperand, ChannelQuantOperand, CodebookOperand)


def _kind(*columns: Tensor | None) -> int | None:
    """The number format that all of some columns share; None where the extension cannot read them."""
    given = [column for column in columns if column is not None]
    kinds = {TYPES.get(column.dtype) for column in given} or {0}
    return kinds.pop() if len(kinds) == 1 and all(column.is_contiguous() for column in given) else None


def _address(column: Tensor | None) -> int:
    return 0 if column is None else column.data_ptr()
