"""Dictionaries of atoms whose short sums are a model's keys and values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import SIDES, CacheSamples, by_head, over_layers
from kvbudget.codecs.dictionary import RIDGE, pursue
from kvbudget.errors import PolicyError


@dataclass(frozen=True)
class Dictionaries(CacheSamples):
    """A dictionary per layer for keys and one for values, shared by the KV heads (CSR, arXiv 2412.11741).

    The artifact holds ``key`` and ``value [L, n, D]`` in float16, unit rows, and ``before_rope``. The paper learns them by
    gradient descent as the weights of a small network; here sparse codes and the best dictionary for them (method of optimal
    directions, Engan et al., 1999) take turns, and atoms that nobody uses become the vectors that are coded worst.

    Attributes:
        atoms: of a dictionary (Lexico: 4096).
        terms: atoms of a sum while fitting.
        steps: turns.
        before_rope: whether keys are coded before RoPE (unverified; after it, queries meet the dictionary once per step).
    """

    method: ClassVar[str] = "csr"

    atoms: int = 1024
    terms: int = 4
    steps: int = 5
    before_rope: bool = True

    @property
    def strips(self) -> bool:
        return self.before_rope

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not 0 < self.terms <= self.atoms <= 32767:
            raise PolicyError(
                f"csr: atoms={self.atoms} must be at least terms={self.terms} and at most 32767, which an index can name"
            )
        tensors = {"before_rope": torch.tensor(self.before_rope)}
        for side in SIDES:
            samples, layers, number = by_head(model, state[side])
            found = torch.stack([self._fit(x.flatten(0, 1)) for x in samples])
            tensors[side] = over_layers(found.half(), layers, number)
        return tensors

    def _fit(self, x: Tensor) -> Tensor:
        """Atoms ``[n, D]`` for vectors ``[N, D]``, the same for the same vectors."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        atoms = normalize(x[order.repeat(-(-self.atoms // len(x)))[: self.atoms]])
        for _ in range(self.steps):
            index, coefficients = pursue(x, atoms, self.terms)
            codes = torch.zeros(len(x), self.atoms).scatter_(1, index, coefficients)
            error = (x - codes @ atoms).square().sum(1)
            gram = codes.T @ codes
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(self.atoms)
            atoms = torch.linalg.solve(gram + ridge, codes.T @ x)
            unused = (gram.diagonal() == 0).nonzero()[:, 0][: len(x)]
            atoms[unused] = x[error.argsort(descending=True)[: len(unused)]]
            atoms = normalize(atoms)
        return atoms
