"""LaCache: each layer keeps other tokens of a stretch, so that all layers together remember more of it."""

from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.position import Ladder


@dataclass(frozen=True)
class LaCache(Recipe):
    """Keeps sinks, the newest entries, and of older ones a staircase over layers that thins out with age.

    Paper: Shi et al., arXiv 2507.14204, 2025 (ICML), section 3. With L layers, a span of S layers per token and an overlap O,
    ``before = 1 + ceil((L - S) / (S - O))`` tokens become ``after = min(ceil(S / (S - O)), before)`` in each layer: S=16,
    O=0, L=32 gives 2 and 1; S=8, O=4 gives 7 and 2. Where a rung is, layers start one token later each, modulo
    ``before - after + 1`` (as the published code; the figure shows a straight ladder), so that together they hold all of it.
    The paper sweeps a cursor over the cache and starts over with a longer stride at its end; here every pass repeats the
    ladder on what the last one left, oldest first, while ``recent_share`` of the cache stays whole. No attention scores are
    needed. Claim: better perplexity than StreamingLLM at the same size, without end. The paper numbers positions inside the
    cache (``positions="cache"``).

    Attributes:
        sinks: first entries that always stay (paper: 4, 128 for needles).
        before, after: tokens of a rung, and how many of them a layer keeps.
        recent_share: part of the budget that is spent on the newest entries.
        positions: ``original`` or ``cache``.
    """

    name = "lacache"
    role = "scorer, different in each layer"
    phase = "prefill and decode"
    paper = "LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of LLMs, arXiv 2507.14204, 2025"
    prefix_reusable = True

    sinks: int = 4
    before: int = 2
    after: int = 1
    recent_share: float = 0.5
    positions: Literal["original", "cache"] = "original"

    def __post_init__(self) -> None:
        if not 1 <= self.after < self.before:
            raise PolicyError(
                f"lacache: after={self.after} must be at least 1 and below before={self.before}, or nothing could leave"
            )
        if not 0 <= self.recent_share <= 1:
            raise PolicyError(f"lacache: recent_share={self.recent_share} must be from 0 to 1 (1 is a sliding window)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": Ladder(self.sinks, self.before, self.after),
            "protect": Protect(sinks=self.sinks, recent_share=self.recent_share),
            "position_mode": "moved" if self.positions == "cache" else "original",
        }
