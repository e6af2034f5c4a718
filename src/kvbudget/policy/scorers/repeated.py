"""Scores from a pass that a plan runs on top of the cache: the highest attention that an entry receives in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer, Span
from kvbudget.policy.judging import Support, log_weights, of_head, unjudged_newest, write
from kvbudget.policy.scoring import Reduction, reduce_group
from kvbudget.policy.view import View


@dataclass(frozen=True)
class HighestAttention(Scorer):
    """Maximum over a pass's queries of the attention that an entry receives, reduced over the GQA group, in float32.

    ``support`` is what the softmax runs over (`log_weights`); Entries that no
    pass has judged, such as generated ones, rank above all others, newer ones first.
    """

    states: ClassVar[tuple[str, ...]] = ("score",)

    support: Support = "chunk"
    sinks: int = 4
    reduction: Reduction = "max"

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        heads = view.num_kv_heads
        for b, span in enumerate(spans):
            if span[0] < span[1]:
                found = self.combined([self._judged(view, b, h, span) for h in range(heads)])
                for h, scores in enumerate(found):
                    write(view.layer, b * heads + h, span, "score", scores)

    def score(self, view: View) -> Tensor:
        return unjudged_newest(view, "score")

    def combined(self, found: list[Tensor]) -> list[Tensor]:
        """The scores of one sequence's heads, given what each has found by itself."""
        return found

    def _judged(self, view: View, b: int, h: int, span: Span) -> Tensor:
        assert view.queries is not None
        members = view.queries.query.shape[1] // view.num_kv_heads
        row = b * view.num_kv_heads + h
        queries = of_head(view.queries, b, h, view.num_kv_heads)
        rows = len(queries.query) // members
        best: list[Tensor | None] = [None] * members
        for at, logits in log_weights(view.layer, row, queries, span, self.support, self.sinks):
            for begin in range(at.start // rows * rows, min(at.stop, rows * members), rows):
                part = logits[max(0, begin - at.start) : begin + rows - at.start].amax(0)
                known = best[begin // rows]
                best[begin // rows] = part if known is None else torch.maximum(known, part)
        found = torch.stack([highest for highest in best if highest is not None]).exp()
        return reduce_group(found, self.reduction, 0)
