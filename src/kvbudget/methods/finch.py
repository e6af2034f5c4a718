"""Finch: the text is read in chunks, and the question chooses after each what stays."""

from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.plans import QuestionChunks
from kvbudget.policy.scorers.question import LayerQuestionAttention, QuestionAttention
from kvbudget.policy.scoring import check_window


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
