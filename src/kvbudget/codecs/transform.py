"""Transform coding of vectors: principal components, bits shared out by dynamic programming, and an entropy coder.

KV cache transform coding (kvtc, arXiv 2511.01815): rows that join what all layers and heads hold of a token are turned into
their principal components; consecutive components form groups, and each group gets a step of the uniform quantizer, or is
dropped, so that the expected squared error is least within a number of bits. The paper packs codes of fixed width and runs
DEFLATE over them; here the choice is by the entropy of the codes, which a range coder then really attains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbudget.errors import CacheError

STEPS = (math.inf, *(4 * 2 ** (-i / 2) for i in range(25)))
"""Quantizer steps in standard deviations of a component; the first drops a group. The last are 1/1024 fine."""
UNITS = 4096
"""Resolution of the dynamic program: units that the bits of a row are counted in."""
MEASURED = STEPS.index(0.5)
"""Down to this step rates are measured; below it each halving costs one more bit, as it does for every smooth density."""

COUNTED = 32
"""Codes per symbol from which on a group's symbols are counted."""


def groups(rank: int) -> list[int]:
    """Sizes of the groups of components: single ones first, later an eighth of what came before.

    >>> groups(20)
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    """
    sizes: list[int] = []
    while (done := sum(sizes)) < rank:
        sizes.append(min(max(1, done // 8), rank - done))
    return sizes


@dataclass(frozen=True, eq=False)
class Transform:
    """Principal components of rows ``[n, p]``, and what coding them costs and loses.

    ``mean [p]``; ``basis [r, p]`` with orthonormal rows, by falling variance; ``scale [r]``, their standard deviations;
    ``rate`` and ``loss [G, len(STEPS)]``: bits and squared error per row of each group at each step.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    rate: Tensor
    loss: Tensor

    @classmethod
    def fit(cls, rows: Tensor, rank: int, *, seed: int = 0) -> Transform:
        """From rows ``[n, p]``; the last eighth of them is left out of the decomposition, and measures rates and losses.

        The decomposition is a randomized one (Halko et al., arXiv 0909.4061) with a fixed seed.
        """
        held = max(1, len(rows) // 8)
        known, rest = rows[:-held].float(), rows[-held:].float()
        mean = known.mean(0)
        rank = min(rank, *known.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            basis = torch.svd_lowrank(known - mean, q=rank, niter=2)[2].T.contiguous()
        z = (rest - mean) @ basis.T
        scale = z.square().mean(0).sqrt().clamp_min(1e-6)
        rate, loss = [], []
        for part, size in zip((z / scale).split(groups(rank), 1), scale.split(groups(rank)), strict=True):
            rates, losses = _measure(part, size)
            rate.append(rates)
            loss.append(losses)
        return cls(mean, basis, scale, torch.stack(rate), torch.stack(loss))

    @cached_property
    def sizes(self) -> list[int]:
        """Components of each group."""
        return groups(len(self.scale))

    def plan(self, bits: float) -> list[int]:
        """Index into `STEPS` of each group's step: the least expected squared error within ``bits`` per row."""
        return allocate(self.rate, self.loss, bits)

    def quantize(self, rows: Tensor, plan: Sequence[int]) -> list[Tensor]:
        """Codes of rows ``[n, p]``: one int32 ``[n, size]`` for each group that is not dropped."""
        z = ((rows.float() - self.mean) @ self.basis.float().T / self.scale).split(self.sizes, 1)
        return [(part / STEPS[step]).round().int() for part, step in zip(z, plan, strict=True) if step]

    def restore(self, codes: Sequence[Tensor], plan: Sequence[int], count: int) -> Tensor:
        """Rows ``[count, p]`` float32 from their codes."""
        given = iter(codes)
        z = [
            next(given) * STEPS[step] if step else torch.zeros(count, size)
            for size, step in zip(self.sizes, plan, strict=True)
        ]
        return (torch.cat(z, 1) * self.scale) @ self.basis.float() + self.mean


def allocate(rate: Tensor, loss: Tensor, bits: float) -> list[int]:
    """One option per group, of ``rate, loss [G, S]``, with the least loss in all among those within ``bits``.

    A dynamic program over `UNITS` units of bits, each rate rounded up. The first option of a group must cost nothing.

    >>> allocate(torch.tensor([[0.0, 1.0, 2.0]] * 2), torch.tensor([[9.0, 3.0, 1.0], [2.0, 1.0, 0.5]]), 2.0)
    [2, 0]
    """
    cost = (
        (rate / bits * UNITS).ceil().long().tolist()
        if bits > 0
        else [[0, *[UNITS + 1] * (rate.shape[1] - 1)]] * len(rate)
    )
    best = torch.zeros(UNITS + 1)
    chosen = []
    for costs, losses in zip(cost, loss, strict=True):
        tried = torch.full((len(costs), UNITS + 1), math.inf)
        for option, (units, lost) in enumerate(zip(costs, losses, strict=True)):
            if units <= UNITS:
                tried[option, units:] = best[: UNITS + 1 - units] + lost
        best, taken = tried.min(0)
        chosen.append(taken)
    plan, left = [], UNITS
    for costs, taken in zip(reversed(cost), reversed(chosen), strict=True):
        plan.append(int(taken[left]))
        left -= costs[plan[-1]]
    return plan[::-1]


def pack(codes: Sequence[Tensor]) -> dict[str, Tensor]:
    """An entropy-coded stream of groups of codes, and the models of their symbols, by which `unpack` reads it.

    A group with many codes of each symbol is coded by its counts, another one by a normal distribution.

    Raises:
        CacheError: when the package constriction is not installed.
    """
    coder = _constriction()
    encoder = coder.stream.queue.RangeEncoder()
    symbols: list[tuple[int, int, bool]] = []
    normal: list[tuple[float, float]] = []
    counts: list[Tensor] = []
    for group in codes:
        flat = group.flatten()
        low, high = int(flat.min()), int(flat.max())
        mean, deviation = float(flat.float().mean()), float(flat.float().std(correction=0))
        found = None
        if (high - low + 1) * COUNTED <= flat.numel():
            found = torch.bincount(flat - low)
            counts.append(found.int())
        symbols.append((low, high, found is not None))
        normal.append((mean, deviation))
        if high > low:
            encoder.encode((flat - low).numpy(), _model(coder, high - low, found, mean - low, deviation))
    words = np.ascontiguousarray(encoder.get_compressed()).view(np.int32)
    return {
        "stream": torch.from_numpy(words.copy()),
        "symbols": torch.tensor(symbols, dtype=torch.int32).reshape(-1, 3),
        "normal": torch.tensor(normal, dtype=torch.float64).reshape(-1, 2),
        "counts": torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int32),
    }


def unpack(packed: dict[str, Tensor], sizes: Sequence[int], count: int) -> list[Tensor]:
    """Inverse of `pack` for groups of these ``sizes`` and ``count`` rows."""
    coder = _constriction()
    decoder = coder.stream.queue.RangeDecoder(packed["stream"].numpy().view(np.uint32))
    codes: list[Tensor] = []
    counts = packed["counts"]
    for size, (low, high, counted), (mean, deviation) in zip(
        sizes, packed["symbols"].tolist(), packed["normal"].tolist(), strict=True
    ):
        found = None
        if counted:
            found, counts = counts[: high - low + 1], counts[high - low + 1 :]
        flat = torch.zeros(size * count, dtype=torch.int32)
        if high > low:
            model = _model(coder, high - low, found, mean - low, deviation)
            flat = torch.from_numpy(decoder.decode(model, size * count))
        codes.append((flat + low).view(count, size))
    return codes


def _measure(z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and squared error per row of one group's normalized coefficients ``[n, size]`` at each step."""
    size = z.shape[1]
    rates, losses = [0.0], [float((z * scale).square().sum(1).mean())]
    for index, step in enumerate(STEPS[1:], 1):
        codes = (z / step).round()
        losses.append(float(((codes * step - z) * scale).square().sum(1).mean()))
        if index > MEASURED:
            rates.append(rates[MEASURED] + size * math.log2(STEPS[MEASURED] / step))
            continue
        found = np.bincount((codes - codes.min()).flatten().int().numpy())
        share = found[found > 0] / codes.numel()
        rates.append(float(-(share * np.log2(share)).sum()) * size)
    return torch.tensor(rates), torch.tensor(losses)


def _model(coder: Any, high: int, counts: Tensor | None, mean: float, deviation: float) -> Any:
    """The probabilities of symbols from 0 to ``high``."""
    if counts is None:
        return coder.stream.model.QuantizedGaussian(0, high, mean, deviation)
    return coder.stream.model.Categorical((counts.double() / counts.sum()).float().numpy(), perfect=False)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise CacheError(
            "kvtc needs the entropy coder of constriction; run: pip install 'kvbudget[storage]'"
        ) from error
    return constriction
