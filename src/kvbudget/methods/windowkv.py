"""WindowKV: windows of neighboring tokens stay together, and groups of layers keep the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.layers import Pyramid
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.granularity import Windows
from kvbudget.policy.scorers.windowed import LayerWindowAttention, WindowPeaks
from kvbudget.policy.scoring import check_window


@dataclass(frozen=True)
class PyramidOfGroups(Pyramid):
    """A linear ramp over groups of ``group`` layers, which keep what their first one chooses."""

    group: int = 8

    def leader(self, index: int) -> int:
        return index // self.group * self.group

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        groups = -(-len(measured) // self.group)
        ramp = super().weights([None] * groups, mean, floor)
        return [ramp[index // self.group] for index in range(len(measured))]


@dataclass(frozen=True)
class WindowKV(Recipe):
    """Keeps the newest ``window`` entries and whole windows of ``width`` positions; one layer chooses for its group.

    Paper: Zuo et al., arXiv 2503.17922, 2025. The last queries of the prompt judge: a window scores the mean over heads and
    tokens of the attention that it receives (``average``, for summaries and other aggregation), or the mean over heads of
    its better half (``max``, for questions that are answered at one place); the published classifier that tells these tasks
    apart is a parameter here. Heads are KV heads (the paper is MHA). Entries beyond the newest fall over groups of layers
    from ``(2 - group / beta)`` to ``group / beta`` of the mean; attention is looked at in the first layer of each group only.
    Beyond the paper the votes go on while decoding. Claim: the full cache's LongBench scores with 12% of it.

    Attributes:
        strategy: ``average`` or ``max``.
        window: queries that judge, and newest entries that always stay (paper: 16 for average, 32 for max).
        width: positions per window (paper: 8).
        group: layers that share their selection (paper: 8).
        beta: steepness over groups (paper: 14; at most ``group`` is uniform).
    """

    name = "windowkv"
    role = "scorer, granularity and allocator over layers"
    phase = "prefill, goes on in decode"
    paper = "WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference, arXiv 2503.17922, 2025"
    needs = ("queries",)

    strategy: Literal["average", "max"] = "average"
    window: int = 16
    width: int = 8
    group: int = 8
    beta: float = 14.0

    def __post_init__(self) -> None:
        check_window(self.window)
        if min(self.width, self.group, self.beta) < 1:
            raise PolicyError(
                f"windowkv: width={self.width}, group={self.group} and beta={self.beta} must be at least 1"
            )

    def parts(self) -> dict[str, Any]:
        peaks = WindowPeaks(self.window, 0, "none", width=self.width)
        return {
            "scorer": peaks if self.strategy == "max" else LayerWindowAttention(self.window, 0, "none"),
            "granularity": Windows(width=self.width),
            "layers": PyramidOfGroups(max(1.0, self.beta / self.group), self.group),
            "protect": Protect(recent=self.window),
        }
