"""Locret: trained retaining heads score a token when it comes, and chunks are cut as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.gates import Gated, RetainingGate


@dataclass(frozen=True)
class Locret(Recipe):
    """Keeps the newest ``recent`` entries and, per KV head, those that a trained head expects to be attended to later.

    Paper: Huang et al., arXiv 2410.01805, 2024, section 3. ``score = act([q; k; v] W1) W2`` per layer, from a token's own
    projections before RoPE, trained on the logarithm of the highest attention that it gets from what follows. It does not
    change later, so chunks of the prompt can be evicted one after the other. The newest entries ("stabilizers") always
    stay. ``kvbudget calibrate locret --model M`` trains it. Projections are scaled to a root mean square of 1 first, and
    the head is narrower than the paper's 1024. Claim: 20 times smaller caches, 128k tokens on one consumer GPU. The
    reference numbers positions inside the cache (``positions="cache"``).

    Attributes:
        recent: newest entries that always stay (paper: 2500 after each chunk, 100 of the prompt in the end).
        positions: ``original`` or ``cache``.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "locret"
    role = "scorer"
    phase = "prefill and decode"
    paper = (
        "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads, arXiv 2410.01805, 2024"
    )
    needs = ("queries", "keys", "calibration")
    prefix_reusable = True

    recent: int = 64
    positions: Literal["original", "cache"] = "original"
    file: str = ""
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": Gated(RetainingGate(), self.weights),
            "protect": Protect(recent=self.recent),
            "position_mode": "moved" if self.positions == "cache" else "original",
        }

    def bind(self, fingerprint: str) -> "Locret":
        return replace(self, weights=Artifact.load(self.name, fingerprint, self.file).tensors)
