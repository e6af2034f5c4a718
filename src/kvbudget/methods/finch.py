"""Finch: the text is read in chunks, and the question chooses after each what stays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbudget.policy.base import Protect, Recipe, Scorer, Span
from kvbudget.policy.judging import log_weights, of_head, unjudged_newest, write
from kvbudget.policy.plans import QuestionChunks
from kvbudget.policy.scoring import by_layer, check_window
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


@dataclass(frozen=True)
class Finch(Recipe):
    """Keeps what the question attends to, chunk by chunk, so that texts beyond the model's window can be read.

    Paper: Corallo and Papotti, arXiv 2408.00167, 2024 (TACL), section 3. After each chunk the question runs on top of the
    cache, and ``sum over heads and question tokens of softmax(q k)`` is the score of every entry held, earlier chunks
    included; rows are weighted by the number of keys that they see (the published code computes that factor and then
    does not use it). The budget granted grows with the text and leaves room for the question, which comes last; the paper's
    integer compression ratio loses up to half of the budget, here the total is exact. Keys move to the positions that they
    have inside the cache: kept ones turn by the number of evicted ones behind them, which RoPE cannot tell from
    renumbering everything, next query included; entries that a codec has coded stay where they are. In the paper all heads
    keep the same entries; ``shared=False`` lets each choose (kvpress). Generated entries leave last. Claim: up to 93x
    compression on question answering.

    Run it by ``cache.prefill(model, context, question_ids=question)``, or with the question at the end of the prompt.

    Attributes:
        chunk: tokens per chunk (0: as many as the budget holds entries).
        window: tokens at the end of the prompt that stand for the question where none is given.
        shared: all heads of a layer keep the same entries.
        normalize: weight question tokens by the number of keys that they see.
        positions: ``cache`` (paper) or ``original``.
    """

    name = "finch"
    role = "scorer and plan"
    phase = "prefill, in chunks"
    paper = "Finch: Prompt-guided Key-Value Cache Compression, arXiv 2408.00167, 2024"
    needs = ("plan", "queries")

    chunk: int = 0
    window: int = 32
    shared: bool = True
    normalize: bool = True
    positions: Literal["cache", "original"] = "cache"

    def __post_init__(self) -> None:
        check_window(self.window)

    def parts(self) -> dict[str, Any]:
        kind = LayerQuestionAttention if self.shared else QuestionAttention
        return {
            "scorer": kind(self.normalize),
            "plan": QuestionChunks(self.chunk, self.window),
            "protect": Protect(),
            "position_mode": "moved" if self.positions == "cache" else "original",
        }
