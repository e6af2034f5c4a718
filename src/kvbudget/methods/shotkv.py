"""ShotKV: examples in the prompt stay or go as a whole, and the answer has a pool of its own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Span, Stages
from kvbudget.policy.granularity import Spans, Windows, checked_spans
from kvbudget.policy.scorers.received import NewestAttention
from kvbudget.policy.scorers.staged import ABOVE
from kvbudget.policy.scorers.windowed import LayerWindowAttention
from kvbudget.policy.view import View


@dataclass(frozen=True)
class ShotAttention(LayerWindowAttention):
    """Window votes of the layer; what lies outside of the shots (instructions, the question) ranks above them."""

    shots: tuple[Span, ...] = ()

    def score(self, view: View) -> Tensor:
        votes = super().score(view)
        return torch.where(Spans(spans=self.shots).inside(view), votes, ABOVE) if self.shots else votes


@dataclass(frozen=True)
class ShotKV(Recipe):
    """Keeps whole few-shot examples of the prompt, those that are attended to most on average, and single generated entries.

    Paper: Liu et al., arXiv 2502.01941, 2025. ``score(shot) = mean over its tokens, sum over heads of the attention that they
    receive``; shots are taken in this order until the prompt's share of the budget is full, those skipped that do not fit
    any more; what lies outside of shots stays. Then the prompt is frozen, and of what is generated the entries stay that the
    newest query attends to most, the same in all heads of a layer. There is no public code: the queries behind the prompt's
    scores are taken to be the last ``window`` ones (unverified). Without ``shots`` every ``size`` positions are one, as
    sentences are for documents. Claim: 9 to 18% better on long generation; keeps chains of examples intact.

    Attributes:
        shots: ranges of positions, ``((start, end), ...)``.
        size: positions per unit where no shots are given.
        prompt: share of the budget for the prompt.
        window: queries that judge the prompt, and newest entries that always stay.
    """

    name = "shotkv"
    role = "scorer, granularity and pools for prompt and answer"
    phase = "prefill and decode"
    paper = "Can LLMs Maintain Fundamental Abilities under KV Cache Compression?, arXiv 2502.01941, 2025"
    needs = ("queries",)
    lossless_when_fits = False

    shots: tuple[tuple[int, int], ...] = ()
    size: int = 16
    prompt: float = 0.5
    window: int = 16

    def __post_init__(self) -> None:
        checked_spans(self.shots, "shotkv: shots")
        if not 0 < self.prompt < 1 or min(self.size, self.window) < 1:
            raise PolicyError(
                f"shotkv: prompt={self.prompt} must lie between 0 and 1, size={self.size} and window={self.window} be at "
                "least 1"
            )

    def parts(self) -> dict[str, Any]:
        shots = checked_spans(self.shots, "shotkv: shots")
        return {
            "scorer": ShotAttention(self.window, 0, "none", shots=shots),
            "granularity": Spans(spans=shots) if shots else Windows(width=self.size, prompt_only=True),
            "stages": Stages(NewestAttention(), self.prompt),
            "protect": Protect(recent=self.window),
        }
