"""DynamicKV: the entries of all layers compete, and the layers so far share the budget again after every few layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbudget.budget import solve
from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.base import Recipe

UNITS = 10**6


@dataclass(frozen=True)
class Rounds(GlobalTopK):
    """`GlobalTopK` after every ``every`` layers of a forward, over those so far; none gets more than ``most`` times the mean."""

    every: int = 4
    most: float = 10.0

    def ends_round(self, index: int) -> bool:
        return (index + 1) % self.every == 0

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        known = [0.0 if count is None else count for count in measured]
        if not sum(known):
            return [1.0] * len(known)
        so_far = sum(count is not None for count in measured)
        cap = int(UNITS * max(self.most / len(known), 1 / so_far)) + 1
        return [float(n) for n in solve(UNITS, known, 0, cap)]


@dataclass(frozen=True)
class DynamicKV(Recipe):
    """Lets the scores of the text decide how much each layer keeps, by one ranking over all layers, over any scorer.

    Paper: Zhou et al., arXiv 2412.14838, 2024 (EMNLP 2025). After every ``every`` layers a top-k over the window scores of
    the layers so far counts the winners of each, and these layers share the whole budget by the counts, so that they shrink
    as others arrive; a layer never keeps more than ``most`` times the mean. Scores are compared across layers as they are.
    Beyond the published code, the total is exact (its remainder can make the last layer negative), layers between two
    rounds are not cut, and the competition goes on while decoding. Claim: 1.7% of the cache keeps 85% of the quality on
    LongBench.

    Attributes:
        every: layers per round (paper: 4).
        most: largest multiple of the mean that a layer gets (paper: 10).
    """

    name = "dynamickv"
    role = "allocator over layers"
    phase = "prefill and decode"
    paper = "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs, arXiv 2412.14838, 2024"
    prefix_reusable = True

    every: int = 4
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.every < 1 or self.most < 1:
            raise PolicyError(f"dynamickv: every={self.every} and most={self.most} must be at least 1")

    def parts(self) -> dict[str, Any]:
        return {"layers": Rounds(self.every, self.most)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV(window=8, kernel=7).parts()
