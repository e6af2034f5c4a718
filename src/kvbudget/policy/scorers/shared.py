"""Any scorer, for policies in which heads of a layer hold the same entries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbudget.policy.base import Scorer, Span
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Shared(Scorer):
    """Scores of ``scorer``, averaged over KV heads, for policies that need the same entries in all of them."""

    aligned: ClassVar[bool] = True

    scorer: Scorer

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.scorer.states

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        return self.scorer.rotates

    @property
    def by_position(self) -> bool:  # type: ignore[override]
        return self.scorer.by_position

    @property
    def uses_marks(self) -> bool:  # type: ignore[override]
        return self.scorer.uses_marks

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return self.scorer.fixed_bytes(key_dim, group)

    def observe(self, view: View) -> None:
        self.scorer.observe(view)

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        self.scorer.probe(view, spans)

    def score(self, view: View) -> Tensor:
        return by_layer(self.scorer.score(view))


@dataclass(frozen=True)
class Following(Shared):
    """Scores of ``scorer``, in which KV head h of layer l has those of head ``owners[l][h]``."""

    aligned: ClassVar[bool] = False

    owners: tuple[tuple[int, ...], ...] = ()

    def score(self, view: View) -> Tensor:
        return self.scorer.score(view)[:, list(self.owners[view.layer_idx])]
