"""Scores from the queries of a drafted answer and of the prompt's end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvbudget.policy.base import Span
from kvbudget.policy.judging import log_weights, of_head, write
from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.scoring import reduce_group
from kvbudget.policy.view import View
from kvbudget.segments.lane import Sum


@dataclass(frozen=True)
class LookaheadAttention(WindowAttention):
    """Votes of a draft's queries and of the prompt's last ``window``, pooled (arXiv 2505.20334, section 3).

    Draft queries see all held entries, and nothing else is in their softmax. Until a draft has been judged the votes are
    those of the last ``first`` queries, which a copy is compressed by; afterwards they run on as in `WindowAttention`. The
    newest ``window`` entries score 0 and have to be protected.
    """

    states: ClassVar[tuple[str, ...]] = ("votes", "late")

    first: int = 32

    def __post_init__(self) -> None:
        if self.window:
            super().__post_init__()

    def sums(self, new: int) -> tuple[Sum, ...]:
        windows = (("votes", self.first), ("late", self.window))
        return tuple(Sum(name, max(0.0, 1.0 - new / n), n, self.reduction) for name, n in windows if n)

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        assert view.queries is not None
        heads = view.num_kv_heads
        members = view.queries.query.shape[1] // heads
        late = view.state("late")
        for b, span in enumerate(spans):
            for h in range(heads):
                queries = of_head(view.queries, b, h, heads)
                blocks = [weights.exp() for _, weights in log_weights(view.layer, b * heads + h, queries, span, "held")]
                rows = torch.cat(blocks).unflatten(0, (members, -1)).sum(1)
                votes = reduce_group(rows, self.reduction, 0)
                write(view.layer, b * heads + h, span, "votes", votes + late[b, h, view.valid[b, h]])
