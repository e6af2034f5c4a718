"""Any second look, for policies in which heads of a layer hold the same entries."""

from dataclasses import dataclass

from torch import Tensor

from kvbudget.policy.base import Refinement
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class SharedLook(Refinement):
    """What ``refinement`` makes of scores, averaged over KV heads; what depends on scores and positions alone stays as it is."""

    refinement: Refinement

    @property
    def uses_marks(self) -> bool:  # type: ignore[override]
        return self.refinement.uses_marks

    def refine(self, view: View, scores: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        return by_layer(self.refinement.refine(view, scores, protected, counts))
