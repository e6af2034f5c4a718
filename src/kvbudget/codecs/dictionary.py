"""Sparse codes: an entry as a short sum of atoms out of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Codec, Place
from kvbudget.kernels.atoms import AtomOperand
from kvbudget.kernels.operands import Operand

BLOCK = 2048
"""Vectors that are decomposed at a time."""


def pursue(x: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: indices and coefficients ``[N, count]`` of ``atoms [n, D]`` with a sum near ``x [N, D]``.

    Each step takes the atom that correlates most with what is left, and fits all coefficients anew (Pati et al., 1993).

    >>> index, coefficients = pursue(torch.tensor([[3.0, 0.0, -1.0]]), torch.eye(3), 2)
    >>> index.tolist(), [[round(c, 3) for c in row] for row in coefficients.tolist()]
    ([[0, 2]], [[3.0, -1.0]])
    """
    found = [_pursue(part, atoms, count) for part in x.split(BLOCK)] or [(x.new_zeros(0, count).long(), x[:, :count])]
    index, coefficients = zip(*found, strict=True)
    return torch.cat(index), torch.cat(coefficients)


def _pursue(x: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    left, taken = x, torch.zeros(len(x), len(atoms), dtype=torch.bool, device=x.device)
    index = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    coefficients = x.new_zeros(len(x), 0)
    for step in range(count):
        best = (left @ atoms.T).abs().masked_fill(taken, -1.0).argmax(1, keepdim=True)
        taken.scatter_(1, best, True)
        index = torch.cat([index, best], 1)
        chosen = atoms[index]
        gram = chosen @ chosen.mT + RIDGE * torch.eye(step + 1, device=x.device)
        coefficients = torch.linalg.solve(gram, (chosen @ x[..., None]))[..., 0]
        left = x - (coefficients[:, None] @ chosen)[:, 0]
    return index, coefficients


RIDGE = 1e-5


@dataclass(frozen=True)
class Sparse(Codec):
    """``terms`` atoms of the layer's dictionary per entry: their 2-byte indices, 1-byte coefficients and a scale in half precision.

    ``atoms [L, n, D]`` over all layers of the model, with unit rows, shared by the KV heads; `at` takes a layer's.
    """

    calibrated: ClassVar[str] = "csr"

    terms: int = 4
    atoms: Tensor | None = field(default=None, repr=False, compare=False)

    def at(self, layer_idx: int) -> Sparse:
        return self if self.atoms is None else replace(self, atoms=self.atoms[layer_idx])

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        index, coefficients = pursue(x.float(), self._atoms(x.device), self.terms)
        scale = (coefficients.abs().amax(1, keepdim=True) / 127).clamp_max(65504.0).half()
        codes = (coefficients / scale.float().clamp_min(1e-20)).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "index": index.to(torch.int16), "scale": scale}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        coefficients = columns["codes"].float() * columns["scale"].float()
        chosen = self._atoms(coefficients.device)[columns["index"].long()]
        return (coefficients[:, None] @ chosen)[:, 0]

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        atoms = self._atoms(columns["codes"].device)
        return AtomOperand(columns["codes"], columns["index"], columns["scale"], atoms, first)

    def bytes_per_entry(self, width: int) -> float:
        return 3 * self.terms + 2

    def _atoms(self, device: torch.device) -> Tensor:
        assert self.atoms is not None, "dictionaries come from a calibration"
        return self.atoms.to(device)
