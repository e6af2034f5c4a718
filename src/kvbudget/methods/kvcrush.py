"""KVCrush: besides the important entries a few representatives of the rejected ones stay."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.base import Recipe
from kvbudget.policy.refinements.representatives import Anchor, Representatives


@dataclass(frozen=True)
class KVCrush(Recipe):
    """Keeps the best entries of any scorer (SnapKV of 16 queries by default) and, for diversity, representatives of others.

    Paper: Jha et al., arXiv 2503.00022, 2025 (ACML), after two implementations (OpenVINO, vLLM). Entries are told apart by
    which heads find them important, one bit per KV head; ``share`` of the budget goes to rejected entries taken evenly over
    their Hamming distance to one anchor, which takes linear time where clustering would not. Token form (the published
    page form sums scores over a page); votes are pooled as SnapKV's are, and ``snapkv(window=16, kernel=1)+kvcrush`` scores as
    the vLLM port does. Each head's representatives come from what that head rejected, so that none is kept twice. What always
    stays is up to the scorer (vLLM: the first 32 and the newest 128 entries). Claim: a quarter of the LongBench cache with
    less than 1% accuracy lost, better than H2O or SnapKV alone.

    Attributes:
        share: part of the budget beyond the protected entries that goes to representatives (vLLM: 0.25; 0 is the scorer).
        anchor: alternating, random, mean (majority of each bit), inverse (of that), zeros or ones.
        seed: of the random anchor.
    """

    name = "kvcrush"
    role = "refinement"
    phase = "wherever the scorer acts"
    paper = "KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour, arXiv 2503.00022, 2025"
    prefix_reusable = True

    share: float = 0.25
    anchor: Anchor = "alternating"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PolicyError(f"kvcrush: share={self.share} must be from 0 to 1")

    def parts(self) -> dict[str, Any]:
        return {"refinement": Representatives(self.share, self.anchor, self.seed)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV(window=16).parts()
