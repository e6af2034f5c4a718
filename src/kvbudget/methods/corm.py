"""CORM: entries leave that none of the recent queries found important."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.demand import ByDemand
from kvbudget.policy.base import Protect, Recipe, Scorer, Trigger
from kvbudget.policy.view import View


@dataclass(frozen=True)
class LastImportant(Scorer):
    """Steps that an entry still has before ``window`` queries in a row found it unimportant; below 0 it has none left.

    Query t finds an entry important when it pays it at least ``strength / t`` of its attention, t entries being visible to
    it in the whole text; one query head of the group is enough. The position of the last such query says all that the
    paper's bits of the last ``window`` queries say.
    """

    states: ClassVar[tuple[str, ...]] = ("important",)

    window: int = 256
    strength: float = 1.0

    def observe(self, view: View) -> None:
        last = view.state("important").clone()
        for weights, steps in view.attention_rows(self.window):
            least = (self.strength / (steps + 1).clamp_min(1))[:, None, None, :, None]
            important = ((weights >= least) & (weights > 0)).any(2)
            torch.maximum(last, (important * (steps + 1)[:, None, :, None]).amax(2), out=last)
        view.set_state("important", last)

    def score(self, view: View) -> Tensor:
        # The state is one more than the query's position, so that 0 is "never".
        seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
        return view.state("important") - 1 - (seen - self.window)


@dataclass(frozen=True)
class Corm(Recipe):
    """Drops an entry once all of the last ``window`` queries found it unimportant; needs no budget.

    Paper: Dai et al., arXiv 2404.15949, 2024. A key is important to query t when it gets at least 1 / t of its attention (t
    the length of the text so far, also after evictions; that reading is not verified); the newest ``recent`` entries always
    stay. Heads differ in size, and the size follows from the text. Over a GQA group one head's vote is enough (the paper is
    MHA). With a budget the heads get what they ask for in proportion, entries that were important longest ago leave first,
    and the newest that always stay are half of it at most. Claim: up to 70% of the cache gone with no notable loss on
    LongBench. No official code.

    Attributes:
        window: queries that vote (paper: 256).
        recent: newest entries that always stay (paper: 256; 0: as many as the window).
        strength: the vote's threshold is this over t (paper: 1; 0 never drops anything).
        every: decode steps between two evictions (paper: 1).
    """

    name = "corm"
    role = "scorer and threshold"
    phase = "prefill and decode"
    paper = "CORM: Cache Optimization with Recent Message for Large Language Model Inference, arXiv 2404.15949, 2024"
    needs = ("queries",)
    lossless_when_fits = False

    window: int = 256
    recent: int = 0
    strength: float = 1.0
    every: int = 16

    def __post_init__(self) -> None:
        if self.window < 1 or self.every < 1:
            raise PolicyError(f"corm: window={self.window} and every={self.every} must be at least 1")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": LastImportant(self.window, self.strength),
            "heads": ByDemand(),
            "threshold": 0.0,
            "protect": Protect(recent=self.recent or self.window, most=0.5),
            "trigger": Trigger(every=self.every),
        }
