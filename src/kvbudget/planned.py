"""How each plan is executed: the order of forwards, judging passes and evictions in a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import PolicyError
from kvbudget.passes import Prefill
from kvbudget.policy.base import Plan, Span
from kvbudget.policy.plans import Chunked, Reconstruct

BOUNDED_CHUNK = 512
"""Tokens per forward under a byte budget, so that the prefill's peak is bounded too."""


@singledispatch
def run(plan: Plan, job: Prefill) -> Tensor:
    """Executes a plan; returns the last token's logits ``[B, V]``."""
    raise PolicyError(f"no way to execute the plan {plan!r} is known")


@run.register
def _(plan: Chunked, job: Prefill) -> Tensor:
    bounded = BOUNDED_CHUNK if job.cache.budget.kind == "bytes" else 0
    job.begin()
    return job.feed(job.chunk_size or plan.size or bounded)


@run.register
def _(plan: Reconstruct, job: Prefill) -> Tensor:
    passes = list(_repetitions(plan, job, job.cache.seen or [0] * len(job.ids)))
    job.begin(sum(sum(map(len, rows)) // len(rows) for rows, _ in passes))
    with job.judging():
        logits = job.feed(job.chunk_size or 0)
        for rows, spans in passes:
            job.probe(rows, spans)
        job.settle()
    return logits


def _repetitions(plan: Reconstruct, job: Prefill, seen: Sequence[int]) -> Iterator[tuple[list[list[int]], list[Span]]]:
    """Token ids and judged positions per sequence of each pass; sequences are cut up on their own."""
    first, later, turn = _instructions(plan, job.tokenizer)
    texts = job.texts()
    counts = [-(-(len(text) - start) // plan.chunk) for text, start in zip(texts, seen, strict=True)]
    for c in range(max(counts)):
        rows, spans = [], []
        for text, start, count in zip(texts, seen, counts, strict=True):
            new = len(text) - start
            begin, end = (start + new * min(i, count) // max(count, 1) for i in (c, c + 1))
            overlap = text[max(0, begin - plan.overlap) : begin]
            asked = [*(later if overlap else first), *overlap, *turn]
            rows.append([*asked, *text[begin:end]] if begin < end else [])
            spans.append((begin, end))
        yield rows, spans


def _instructions(
    plan: Reconstruct, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Token ids of the first and the later instruction, and of the end of the user's turn."""
    if tokenizer is None:
        return plan.instruction_ids, plan.instruction_ids, ()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    turn: list[int] = []
    if getattr(tokenizer, "chat_template", None):
        mark = "kvbudget"
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        turn = encode(shown[shown.rindex(mark) + len(mark) :])
    if plan.instruction_ids:
        return plan.instruction_ids, plan.instruction_ids, turn
    return encode(plan.first), encode(plan.later), turn


