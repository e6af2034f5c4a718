"""Scores by the attention of a question that a plan asks on top of the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer, Span
from kvbudget.policy.judging import log_weights, of_head, unjudged_newest, write
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class QuestionAttention(Scorer):
    """Mean over the question's queries of the attention to an entry, the mean over the GQA group, per KV head.

    The softmax runs over everything that a query sees, the question so far included. With ``normalize``, query i counts
    ``(entries visible to it) / (entries visible to the last one)``, so that later ones are not at a disadvantage. Entries
    that no question has judged rank above all others.
    """

    states: ClassVar[tuple[str, ...]] = ("score",)

    normalize: bool = True

    def probe(self, view: View, spans: Sequence[Span]) -> None:
        assert view.queries is not None
        heads = view.num_kv_heads
        members = view.queries.query.shape[1] // heads
        held = view.layer.kept()
        for b, span in enumerate(spans):
            for h in range(heads if span[0] < span[1] else 0):
                row = b * heads + h
                queries = of_head(view.queries, b, h, heads)
                count = len(queries.query) // members
                visible = held[b][h] + torch.arange(1, count + 1, device=queries.query.device)
                share = visible / visible[-1] if self.normalize else torch.ones_like(visible).float()
                share = (share / len(queries.query)).repeat(members)
                score = sum(share[at] @ weights.exp() for at, weights in log_weights(view.layer, row, queries, span))
                assert isinstance(score, Tensor)
                write(view.layer, row, span, "score", score)

    def score(self, view: View) -> Tensor:
        return unjudged_newest(view, "score")


@dataclass(frozen=True)
class LayerQuestionAttention(QuestionAttention):
    """`QuestionAttention` averaged over the heads of a layer, which then all keep the same entries."""

    aligned: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return by_layer(super().score(view))
