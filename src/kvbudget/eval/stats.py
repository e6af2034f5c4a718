"""Bootstrap intervals and paired comparisons over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(values: Sequence[float], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``values`` (one per context) with a percentile interval; NaN without values.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    x = np.asarray(values, dtype=float)
    if not x.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    index = np.random.default_rng(seed).integers(0, x.size, (draws, x.size))
    means = x[index].mean(1)
    tail = (1 - confidence) / 2
    return Interval(float(x.mean()), float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail)))


def bootstrap_over(
    groups: Sequence[Sequence[float]], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean of the groups' means, each group drawn anew from its own values; every group weighs the same.

    >>> bootstrap_over([[1.0, 1.0, 1.0], [0.0]])
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(group, dtype=float) for group in groups]
    means = np.mean([x[rng.integers(0, x.size, (draws, x.size))].mean(1) for x in arrays], axis=0)
    tail = (1 - confidence) / 2
    mean = float(np.mean([x.mean() for x in arrays]))
    return Interval(mean, float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail)))


def compare(
    one: Sequence[float], other: Sequence[float], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[str, Interval]:
    """Paired comparison on the same contexts: ``("lower" | "higher" | "cannot tell", interval of one - other)``.

    >>> compare([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])[0]
    'lower'
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} values cannot be paired; give both on the same contexts")
    difference = bootstrap(
        [a - b for a, b in zip(one, other, strict=True)], confidence=confidence, draws=draws, seed=seed
    )
    if difference.high < 0:
        return "lower", difference
    return ("higher" if difference.low > 0 else "cannot tell"), difference
