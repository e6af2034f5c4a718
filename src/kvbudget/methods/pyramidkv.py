"""PyramidKV: lower layers keep more entries than upper ones."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.layers import Pyramid
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class PyramidKV(Recipe):
    """Gives layer l an arithmetically falling budget and selects inside it by any scorer (SnapKV where none is named).

    Paper: Cai et al., arXiv 2406.02069, 2024, section 3: with b entries per layer beyond the window on average, the last
    layer selects ``b / beta`` and the first ``2 b - b / beta``. The published code floors its step and overshoots the
    nominal total (by 13% at a budget of 64); here the total is exact and capped layers give their excess to the others.

    Attributes:
        beta: steepness; the last layer selects ``b / beta`` (paper: 20; 1 is uniform).
    """

    name = "pyramidkv"
    aliases = ("pyramid",)
    role = "allocator over layers"
    phase = "wherever the scorer acts"
    paper = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069, 2024"
    prefix_reusable = True

    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise PolicyError(f"pyramidkv: beta={self.beta} must be at least 1 (1 is uniform)")

    def parts(self) -> dict[str, Any]:
        return {"layers": Pyramid(self.beta)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()
