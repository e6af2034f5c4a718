"""EvolKV: layers share the budget by a table that was searched for a user's own task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.table import LayerTable
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class Searched(LayerTable):
    """`LayerTable` with a share per ``tie`` neighboring layers, that refuses a model with another number of layers."""

    tie: int = 1

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        tied = -(-len(measured) // self.tie)
        if self.shares and len(self.shares) != tied:
            raise PolicyError(
                f"evolkv: {len(self.shares)} weights for the {len(measured)} layers that the budget governs, where tie="
                f"{self.tie} needs {tied}; run kvbudget tune for this model"
            )
        shares = super().weights([None] * tied, mean, floor)
        return [shares[i // self.tie] for i in range(len(measured))]


@dataclass(frozen=True)
class EvolKV(Recipe):
    """Gives each layer the share of the budget that an evolutionary search found best for one task, over any scorer.

    Paper: Yu and Chai, arXiv 2509.08315, 2025 (EMNLP Findings), whose constants are *unverified*. ``kvbudget tune --task T
    --budget B`` searches the weights by CMA-ES, group after group of layers from the bottom up while the others stay as
    they are best so far, and writes a policy file for ``kvbudget run --policy``. The paper completes a candidate's budgets
    to the nominal total in proportion and rewards those below it; here every candidate has exactly the total, so the reward
    would be the same for all. Weights found at one budget may be used at others. Claim: up to 7 points on GSM8K over fixed
    rules, and a better result than the full cache at 1.5% on code completion.

    Attributes:
        weights: of the layers that the budget governs, of what no layer protects; only ratios matter (none: equal).
        tie: neighboring layers that share a weight.
    """

    name = "evolkv"
    role = "allocator over layers"
    phase = "wherever the scorer acts"
    paper = "EvolKV: Evolutionary KV Cache Compression for LLM Inference, arXiv 2509.08315, 2025"
    prefix_reusable = True

    weights: tuple[float, ...] = ()
    tie: int = 1

    def __post_init__(self) -> None:
        if self.tie < 1:
            raise PolicyError(f"evolkv: tie={self.tie} must be at least 1")
        if self.weights and not any(self.weights):
            raise PolicyError("evolkv: all weights are 0; give at least one above")

    def parts(self) -> dict[str, Any]:
        return {"layers": Searched(tuple(map(float, self.weights)), self.tie)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV(kernel=7, pooling="max").parts()
