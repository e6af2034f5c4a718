"""EpiCache's layer budgets: more for layers whose keys move when the text is seen in blocks."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.importance import ByShift
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class EpiCacheLayers(Recipe):
    """Gives more of the budget to layers whose keys change most when a text is processed with little to look back at.

    Paper: Kim et al., arXiv 2509.17396, 2025, its layer budgets, for any scorer (``snapkv+epicache_layers``) and for
    `epicache` itself. ``kvbudget calibrate epicache_layers --model M`` compares the keys of full attention with those of
    blocks that see sinks and a window; a layer whose mean cosine is x, brought to [0, 1] over the layers, gets a share of ``(1
    - x)^alpha``. The published code raises small shares to a quarter of the mean after the sum is fixed, and so exceeds it;
    here the total is exact. The text and the blocks are shorter here (*the code*: 16000 tokens in blocks of 4096).

    Attributes:
        alpha: the larger, the more layers differ (code: 1.1 for Llama 3, 1.3 for Qwen; 0 is uniform).
        least: share of the mean that every layer gets (code: 0.25).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "epicache_layers"
    aliases = ("epicache_alloc",)
    role = "allocator over layers"
    phase = "wherever the scorer acts"
    paper = "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering, arXiv 2509.17396, 2025"
    needs = ("calibration",)
    prefix_reusable = True

    alpha: float = 1.1
    least: float = 0.25
    file: str = ""
    similarity: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.alpha < 0 or not 0 <= self.least <= 1:
            raise PolicyError(
                f"epicache_layers: alpha={self.alpha} must be at least 0, and least={self.least} from 0 to 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"layers": ByShift(self.similarity, self.alpha, self.least)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()

    def bind(self, fingerprint: str) -> "EpiCacheLayers":
        found = Artifact.load(self.name, fingerprint, self.file).tensors["similarity"]
        return replace(self, similarity=tuple(found.tolist()))
