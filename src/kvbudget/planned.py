"""How each plan is executed: the order of forwards, judging passes and evictions in a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import PolicyError
from kvbudget.passes import Prefill, bounds
from kvbudget.policy.base import Plan, Span
from kvbudget.policy.plans import Chunked, Episode, Lookahead, QuestionChunks, Reconstruct, Reread
from kvbudget.policy.view import View

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


@run.register
def _(plan: Reread, job: Prefill) -> Tensor:
    seen = job.cache.seen or [0] * len(job.ids)
    rows = [text[start:] for text, start in zip(job.texts(), seen, strict=True)]
    job.begin(sum(map(len, rows)) // len(rows))
    with job.judging():
        logits = job.feed(job.chunk_size or 0)
        job.probe(rows, [(start, start + len(row)) for start, row in zip(seen, rows, strict=True)])
        job.settle()
    return logits


@run.register
def _(plan: Lookahead, job: Prefill) -> Tensor:
    scorer = job.cache.parts.scorer
    assert scorer is not None
    job.begin(plan.tokens)
    with job.judging(), torch.inference_mode():
        logits = job.feed(job.chunk_size or 0)
        drafted = job.draft(logits, plan)
        for layer in job.cache.enforcer.layers:
            # A draft that ends at once has no queries, and the votes of the prompt's end alone remain.
            if drafted:
                scorer.probe(View(layer, drafted[layer.layer_idx]), [(0, n) for n in layer.seen])
        job.settle()
    return logits


@run.register
def _(plan: QuestionChunks, job: Prefill) -> Tensor:
    begin, end = job.cache.get_seq_length(), job.ids.shape[1]
    if job.question_ids is not None:
        questions = job.question_ids.expand(len(job.ids), -1).tolist()
    else:
        end = max(begin, end - plan.window)
        questions = job.texts(end)
    room = job.entries()
    size = job.chunk_size or plan.chunk or int(min([*room, end]))
    pieces = bounds(begin, end, max(1, size)) if begin < end else []
    job.begin(len(pieces) * sum(map(len, questions)) // len(questions))
    before = job.held()
    with job.judging():
        for _, stop in pieces:
            logits = job.feed(until=stop)
            job.probe(questions, [(0, n) for n in job.cache.seen])
            read, all_of_it = job.tokens(begin, stop), job.tokens(begin, end)
            rows = zip(room, before, questions, read, all_of_it, strict=True)
            job.settle([_granted(mean - len(asked), held, done, total) for mean, held, asked, done, total in rows])
    if end < job.ids.shape[1]:
        logits = job.feed()
    return logits


def _granted(mean: float, held: float, done: int, total: int) -> float:
    """Entries that a sequence may hold after ``done`` of ``total`` new tokens, from what it held before on."""
    return held + max(0.0, mean - held) * done / total if 0 < done < total else mean if done else held


@run.register
def _(plan: Episode, job: Prefill) -> Tensor:
    from kvbudget.episodes import Clusters

    asked = [None] * len(job.ids) if job.question_ids is None else job.question_ids.expand(len(job.ids), -1).tolist()
    spoken = []
    for text, question in zip(job.texts(), asked, strict=True):
        alone = question is None and plan.only is None
        clusters = Clusters.of(job.model, text, plan, 1 if alone else plan.episodes)
        which = plan.only or 0 if question is None else clusters.nearest(job.model, question)
        spoken.append(clusters.texts[which])
    pieces = bounds(job.cache.get_seq_length(), job.ids.shape[1], job.chunk_size or plan.block)
    job.begin(len(pieces) * sum(map(len, spoken)) // len(spoken))
    with job.judging():
        for _, stop in pieces:
            logits = job.feed(until=stop)
            job.probe(spoken, [(0, n) for n in job.cache.seen])
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
