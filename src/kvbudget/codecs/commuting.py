"""Additive vector codes of keys whose codebooks commute with RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Codec, Place
from kvbudget.kernels.codebook import CodebookOperand, paired

WORDS = 64
"""Vectors of a table; a stage's code names two of them, so it has 12 bits."""
BLOCK = 256
"""Vectors whose distances to all pairs of words are held at a time: 4 MiB, which a cache holds."""


def stages_of(bits: float, width: int) -> int:
    """Stages of 12 bits that come nearest to this many bits per channel: 11 and 21 for 1 and 2 bits of 128 channels.

    >>> [stages_of(bits, 128) for bits in (1, 2)]
    [11, 21]
    """
    return max(1, round(bits * width / 12))


def turned(z: Tensor) -> Tensor:
    """Turns each pair ``(z[i], z[i + D / 2])`` of ``[..., D]`` by 90 degrees, as RoPE turns by any angle.

    >>> turned(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [-3.0, -4.0, 1.0, 2.0]
    """
    first, second = z.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def scores(x: Tensor, table: Tensor) -> Tensor:
    """``x c - |c|^2 / 2`` for the centers ``c = v_a + J v_b`` of a table: ``x [N, D]``, ``table [64, D]`` to ``[N, 64, 64]``.

    The nearest center has the highest score.
    """
    other, half = turned(table), table.square().sum(-1) / 2
    pair = half[:, None] + half[None, :] + table @ other.T
    return (x @ table.T)[:, :, None] + (x @ other.T)[:, None, :] - pair


def assign(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest center of each ``x [N, D]``: indices a and b, int64 ``[N]``."""
    best = [scores(part, table).flatten(1).argmax(1) for part in x.split(BLOCK)]
    code = torch.cat(best) if best else torch.zeros(0, dtype=torch.long)
    return code // WORDS, code % WORDS


def centers(table: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``v_a + J v_b`` for indices ``[N]``: ``[N, D]``."""
    return table[a] + turned(table[b])


def laid_out(tables: Tensor, order: Tensor) -> Tensor:
    """What the codes a and b of every stage stand for, channels in their own places.

    ``tables [..., R, 64, D]`` in the ``order [D]`` of `Commuting` to ``[..., 2 R, 1, 64, D]`` float32.
    """
    *before, stages, _, width = tables.shape
    found = torch.empty(*before, 2 * stages, WORDS, width)
    found[..., 0::2, :, order.long()] = tables.float()
    found[..., 1::2, :, order.long()] = turned(tables.float())
    return found.unsqueeze(-3)


def fitted(x: Tensor, stages: int, *, steps: int = 10, seed: int = 0) -> Tensor:
    """Tables ``[stages, 64, D]`` for vectors ``[N, D]`` by expectation maximization, each for what those before leave.

    Soft assignments by ``softmax(-|x - c|^2 / t)``, where t falls from 1e-3 to 1e-5 of the mean squared norm, alternate with
    the least squares of the tables under their structure: with ``N[a, b]`` the weight of a center, as complex numbers,
    ``(diag(N 1 + N^T 1) + i (N - N^T)) v = W_a^T x - i W_b^T x`` (CommVQ, arXiv 2506.18879, section 3.3 and its code).
    """
    left = x.float()
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for _ in range(stages):
        start = torch.randint(len(left), (WORDS,), generator=generator)
        table = left[start] / 2**0.5
        for step in range(steps):
            temperature = float(left.square().sum(1).mean()) * 10 ** (-3 - 2 * step / max(1, steps - 1))
            table = _maximized(left, table, temperature)
        tables.append(table)
        left = left - centers(table, *assign(left, table))
    return torch.stack(tables)


def _maximized(x: Tensor, table: Tensor, temperature: float) -> Tensor:
    """One expectation and one maximization."""
    joint = torch.zeros(WORDS, WORDS)
    width = x.shape[-1]
    target = torch.zeros(WORDS, width)
    for part in x.split(BLOCK):
        logits = scores(part, table) * (2 / max(temperature, 1e-30))
        weight = logits.flatten(1).softmax(1).unflatten(1, (WORDS, WORDS))
        joint += weight.sum(0)
        target += weight.sum(2).T @ part - turned(weight.sum(1).T @ part)
    diagonal = (joint.sum(0) + joint.sum(1)).clamp_min(1e-6)
    system = torch.complex(diagonal.diag(), joint - joint.T)
    # The smallest part of an entry's weight keeps entries without any where they are.
    kept = 1e-4 * diagonal.mean()
    system = system + kept * torch.eye(WORDS)
    target = target + kept * table
    first, second = target.chunk(2, dim=-1)
    solved = torch.linalg.solve(system, torch.complex(first, second))
    return torch.cat([solved.real, solved.imag], dim=-1)


@dataclass(frozen=True)
class Commuting(Codec):
    """The norm of an entry in half precision, and its direction as a sum of ``stages`` centers with 12-bit codes.

    A center is ``v_a + J v_b`` with two vectors of the stage's table and J the turn by 90 degrees of every pair that RoPE
    turns. ``vectors [L, H, 2 R, 1, 64, D]`` are those of all layers of the model and KV heads (`laid_out`), for R stages or
    more; `at` takes a layer's. ``order [D]`` names the first elements of all pairs, then the second ones.
    """

    calibrated: ClassVar[str] = "commvq"

    stages: int = 11
    vectors: Tensor | None = field(default=None, repr=False, compare=False)
    order: Tensor | None = field(default=None, repr=False, compare=False)

    def at(self, layer_idx: int) -> Commuting:
        return self if self.vectors is None else replace(self, vectors=self.vectors[layer_idx])

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        vectors, order = self._vectors(x.device)
        norm = x.float().norm(dim=-1, keepdim=True).clamp_max(65504.0)
        left = (x.float() / norm.clamp_min(1e-20))[:, order]
        codes = torch.zeros(len(x), 2 * self.stages, dtype=torch.long, device=x.device)
        heads = self._heads(place, len(x), x.device)
        for head in heads.unique().tolist():
            own = (heads == head).nonzero()[:, 0]
            rest = left[own]
            for stage in range(self.stages):
                table = vectors[head, 2 * stage, 0][:, order]
                a, b = assign(rest, table)
                codes[own, 2 * stage], codes[own, 2 * stage + 1] = a, b
                rest = rest - centers(table, a, b)
        return {"codes": paired(codes), "norm": norm.half()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        heads = self._heads(place, len(columns["codes"]), columns["codes"].device)
        width = self._vectors(heads.device)[0].shape[-1]
        out = columns["norm"].new_zeros(len(heads), width, dtype=torch.float32)
        for head in heads.unique().tolist():
            own = (heads == head).nonzero()[:, 0]
            out[own] = self.operand(columns, [0] * (head + 1), [0] * (head + 1)).chosen(head, own)
        return out

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> CodebookOperand:
        codes = columns["codes"][:, None]
        vectors, _ = self._vectors(codes.device)
        return CodebookOperand(codes, vectors, starts, skip, columns["norm"], paired=True)

    def bytes_per_entry(self, width: int) -> float:
        return self.stages + (self.stages + 1) // 2 + 2

    def _vectors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.vectors is not None and self.order is not None, "tables come from a calibration"
        return self.vectors[:, : 2 * self.stages].to(device), self.order.to(device).long()

    def _heads(self, place: Place | None, count: int, device: torch.device) -> Tensor:
        if place is None:
            return torch.zeros(count, dtype=torch.long, device=device)
        return place.rows % len(self._vectors(device)[0])
