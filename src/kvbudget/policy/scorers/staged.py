"""One scorer for the prompt and another for what comes after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer, Span
from kvbudget.policy.view import View

ABOVE = 1e30
"""Score of the prompt's entries while something else is judged."""


@dataclass(frozen=True)
class Staged(Scorer):
    """``prompt`` judges until the whole prompt is there; from then on its entries rank first and ``answer`` judges the rest."""

    prompt: Scorer
    answer: Scorer

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys((*self.prompt.states, *self.answer.states)))

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        return self.prompt.aligned and self.answer.aligned

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        return self.prompt.rotates or self.answer.rotates

    @property
    def uses_marks(self) -> bool:  # type: ignore[override]
        return self.prompt.uses_marks or self.answer.uses_marks

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return self.prompt.fixed_bytes(key_dim, group) + self.answer.fixed_bytes(key_dim, group)

    def observe(self, view: View) -> None:
        self.prompt.observe(view)
        self.answer.observe(view)

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        self.prompt.probe(view, spans)

    def score(self, view: View) -> Tensor:
        prompt, seen = (torch.tensor(n, device=view.positions.device)[:, None, None] for n in (view.prompt, view.seen))
        later = self.answer.score(view).masked_fill(view.positions < prompt, ABOVE)
        return torch.where(seen > prompt, later, self.prompt.score(view))
