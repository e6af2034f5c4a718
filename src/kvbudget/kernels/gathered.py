"""Subsets of entries that a retrieval method has selected, attended where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbudget.kernels.codebook import CodebookOperand
from kvbudget.kernels.operands import ChannelQuantOperand, DenseOperand, Operand, TokenQuantOperand, unpack


@dataclass
class GatheredOperand(Operand):
    """The entries of another operand that an index list per row names, without a copy of them.

    Entry t of row r is entry ``index[starts[r] + t]`` (int64, in-row) of the base operand's row r; ``lengths`` of a call
    count the selected entries, and its ``log_count`` and ``positions`` are those of the selection.
    """

    base: Operand
    index: Tensor
    starts: Sequence[int]

    def block(self, row: int, begin: int, end: int) -> Tensor:
        chosen = self.index[self.starts[row] + begin : self.starts[row] + end]
        base = self.base
        start = base.starts[row]
        if isinstance(base, DenseOperand):
            return base.data[start + chosen]
        if isinstance(base, TokenQuantOperand):
            at = start + chosen
            rows = TokenQuantOperand(base.codes[at], base.scale[at], base.zero[at], base.bits, base.group, [0])
            return rows.block(0, 0, len(chosen))
        if isinstance(base, ChannelQuantOperand):
            slot = chosen + (0 if base.skip is None else base.skip[row])
            group = start + slot // base.group
            codes = unpack(base.codes[group, slot % base.group], base.bits, base.scale.shape[-1]).float()
            return codes * base.scale[group].float() + base.zero[group].float()
        if isinstance(base, CodebookOperand):
            return base.chosen(row, chosen)
        raise TypeError(f"entries of a {type(base).__name__} cannot be gathered; give a dense or quantized operand")
