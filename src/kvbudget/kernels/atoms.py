"""Entries as short sums of atoms out of a dictionary, attended by one product of each query with the dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvbudget.kernels.operands import Operand


@dataclass
class AtomOperand(Operand):
    """Entry t of row r is ``sum_j codes[u, j] * scale[u] * atoms[index[u, j]]`` with ``u = starts[r] + t``.

    ``codes [N, s]``, ``index [N, s]`` integers, ``scale [N, 1]``, ``atoms [n, D]``. Logits look up ``atoms q``; values sum
    weights per atom first (CSR, arXiv 2412.11741). Stretches with fewer entries than atoms are decoded instead.
    """

    codes: Tensor
    index: Tensor
    scale: Tensor
    atoms: Tensor
    starts: Sequence[int]

    def block(self, row: int, begin: int, end: int) -> Tensor:
        index, coefficients = self._terms(row, begin, end)
        return (coefficients[:, None] @ self.atoms[index])[:, 0]

    def products(self, row: int, begin: int, end: int, query: Tensor) -> Tensor:
        if end - begin < len(self.atoms):
            return super().products(row, begin, end, query)
        index, coefficients = self._terms(row, begin, end)
        table = query.float() @ self.atoms.T
        return (table[:, index.flatten()].unflatten(1, index.shape) * coefficients).sum(-1)

    def weighted(self, row: int, begin: int, end: int, weights: Tensor) -> Tensor:
        if end - begin < len(self.atoms):
            return super().weighted(row, begin, end, weights)
        index, coefficients = self._terms(row, begin, end)
        terms = (weights[:, :, None] * coefficients).flatten(1)
        return weights.new_zeros(len(weights), len(self.atoms)).index_add_(1, index.flatten(), terms) @ self.atoms

    def _terms(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        at = slice(self.starts[row] + begin, self.starts[row] + end)
        return self.index[at].long(), self.codes[at].float() * self.scale[at].float()
