"""MiKV: evicted entries are not dropped, but kept in few bits."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.integer import check_bits
from kvbudget.errors import PolicyError
from kvbudget.methods.h2o import H2O
from kvbudget.policy.base import Recipe
from kvbudget.policy.destinations.demote import Demote


@dataclass(frozen=True)
class MiKV(Recipe):
    """Keeps important entries in full precision and demotes the others to ``bits`` per element instead of dropping them.

    Paper: Yang et al., arXiv 2402.18096, 2024, section 4. Any scorer decides what is important (H2O where none is named:
    accumulated attention, half heavy hitters, half recent). Demotion goes one way. Keys and values are coded entry by entry
    with one scale and zero per ``group`` channels; outlier channels are first balanced between queries and keys by
    ``b = sqrt(max |q| / max |k|)``. Important entries may be coded too: ``mikv+kivi(bits=8)``. Claim: 20 to 25% of the cache
    without loss, where eviction collapses.

    A budget in tokens or a fraction counts what stays in full precision, as the paper does; demoted entries come on top. A
    byte budget holds everything: full precision goes to as many entries as leave room for all others in few bits, and
    where that leaves less than ``share`` to them, the demoted entries with the lowest scores are dropped after all.

    Attributes:
        bits: of demoted entries (1, 2, 3, 4 or 8; paper: 2 to 4, where 2 is for models with many KV heads).
        group: channels per scale (0: half a head, as the paper's sub-vectors).
        balance: balance the channels of queries and keys (paper: needed at 2 bits).
        share: least share of the held entries that stays in full precision under a byte budget (paper: 20 to 50%).
    """

    name = "mikv"
    role = "destination"
    phase = "wherever the scorer acts"
    paper = (
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization, "
        "arXiv 2402.18096, 2024"
    )
    needs = ("queries",)
    prefix_reusable = True

    bits: int = 4
    group: int = 0
    balance: bool = True
    share: float = 0.2

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.share <= 1:
            raise PolicyError(f"mikv: share={self.share} must be above 0 and at most 1")
        if self.group < 0:
            raise PolicyError(f"mikv: group={self.group} must be a number of channels, or 0 for half a head")

    def parts(self) -> dict[str, Any]:
        return {"destination": Demote(self.bits, self.group, self.balance, self.share)}

    def defaults(self) -> dict[str, Any]:
        return H2O().parts()
