"""SCOPE: the prompt and the answer have pools of their own, and decoding never displaces the prompt."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.base import Protect, Recipe, Stages, Trigger
from kvbudget.policy.scorers.received import HeadNewestAttention


@dataclass(frozen=True)
class Scope(Recipe):
    """Gives the prompt a share of the budget, compressed by any scorer, and the generated entries the rest.

    Paper: Wu et al., arXiv 2412.13649, 2024 (ACL 2025), section 4. The prompt is cut to its pool once and stays as it is;
    of what is generated, the ``recent`` newest entries and those that the newest query attends to most stay (softmax over
    everything held). With ``length=0`` the pool has its whole size from the start (the paper's slide); else it grows to that
    over so many tokens, ``recent + t * (pool - recent) / (length - recent)`` (adaptive), and ``every`` puts evictions off
    (discontinuous). Works over any scorer, SnapKV where none is named. The prompt is what the first forward or prefill
    brings; later turns belong to the answer. Since room is kept for an answer, a prompt is cut even where it would fit.
    Claim: near the full cache on long answers at 35% of it (unverified).

    Attributes:
        prompt: share of the budget for the prompt (paper: 320 of 1344 entries to 2048 of 3072).
        recent: newest entries that always stay (paper: 128 or 256).
        length: tokens of the answer over which its pool grows (0: at once).
        every: decode steps between two evictions.
    """

    name = "scope"
    role = "pools for prompt and answer"
    phase = "prefill and decode"
    paper = "SCOPE: Optimizing Key-Value Cache Compression in Long-context Generation, arXiv 2412.13649, 2024"
    needs = ("queries",)
    lossless_when_fits = False

    prompt: float = 0.5
    recent: int = 32
    length: int = 0
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.prompt < 1 or self.every < 1:
            raise PolicyError(
                f"scope: prompt={self.prompt} must lie between 0 and 1, and every={self.every} must be at least 1"
            )

    def parts(self) -> dict[str, Any]:
        return {
            "stages": Stages(HeadNewestAttention(), self.prompt, self.recent, self.length),
            "protect": Protect(recent=self.recent),
            "trigger": Trigger(every=self.every),
        }

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()
