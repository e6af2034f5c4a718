"""cache.prefill: drives a prompt through the model as the policy plans it, and remembers what the cache has seen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionLayer

from kvbudget.errors import CacheError, KVBudgetError, PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.policy.base import Plan, Span
from kvbudget.policy.plans import Chunked, Reconstruct
from kvbudget.policy.view import Queries, View

if TYPE_CHECKING:
    from kvbudget.cache import KVCache

BOUNDED_CHUNK = 512
"""Tokens per forward under a byte budget, so that the prefill's peak is bounded too."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Prefilled:
    """The token ids that a cache has been filled with, int32 ``[B, columns]`` (padding included), to check what follows.

    They are the text itself, not the cache: 4 bytes a token of ordinary memory, outside of the budget. What `generate` adds
    by itself is not among them. ``blind`` says that entries were evicted before the last chunk came, so that its tokens
    had no say in it.
    """

    ids: Tensor
    blind: bool = False

    @classmethod
    def of(cls, ids: Tensor, blind: bool = False) -> Prefilled:
        """Remembers a copy of ``ids``."""
        return cls(ids.to("cpu", torch.int32, copy=True), blind)

    def check(self, ids: Tensor) -> None:
        """Raises CacheError unless ``ids [B, T]`` begin as remembered, naming the first position that differs."""
        known = self.ids.shape[1]
        differs = (ids[:, :known].cpu() != self.ids).nonzero()
        if len(differs):
            b, position = differs[differs[:, 1].argmin()].tolist()
            where = f" of sequence {b}" if len(ids) > 1 else ""
            raise CacheError(
                f"input_ids{where} have token {int(ids[b, position])} at position {position}, where the cache has seen token "
                f"{int(self.ids[b, position])}; a continuation must begin with the {known} tokens seen (text that is tokenized "
                "again can differ). Start over with cache.reset(), or go on from a fork made before"
            )

    def first(self, columns: int) -> Prefilled:
        """What remains after a crop to ``columns``."""
        return replace(self, ids=self.ids[:, :columns])

    def select(self, index: Sequence[int]) -> Prefilled:
        """Sequence i goes on from the former sequence ``index[i]``."""
        return replace(self, ids=self.ids[list(index)])


def prefill(
    cache: KVCache,
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    question_ids: Tensor | None = None,
    chunk_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Drives ``input_ids [B, T]`` through the model by the plan of the cache's policy; `KVCache.prefill` calls it.

    Only the tokens that the cache has not seen are fed, so the ids of a growing conversation can be passed whole. Without
    a plan they go in one pass, or in nearly equal chunks of at most ``chunk_size``, with evictions after each; under a
    byte budget the chunks default to 512 tokens, so that the peak is bounded too. A fractional budget without a
    ``max_length`` refers to the whole prompt from the first chunk on. To go on with ``generate(ids)``, leave its last
    tokens to it: it feeds what the cache has not seen, and needs at least one token.

    Args:
        attention_mask: ``[B, T]`` over the whole text, for batches that are padded on the left.
        question_ids: ``[B, Q]`` what will be asked, for policies whose plan looks at it (others refuse it).
        chunk_size: tokens per forward at most.
        tokenizer: lets a plan word its own instructions (kvzip), and tells what kinds of tokens the text has (fastgen).
        progress: called with tokens done and in total, extra passes included.

    Returns:
        The last token's logits ``[B, V]``.

    Raises:
        CacheError: when the text does not begin as what the cache has seen, naming the first position that differs; when
            nothing is new; when the padding is not on the left.
        PolicyError: for ``question_ids`` that the policy does not look at.

    An exception between two chunks leaves the cache at the end of the last chunk, from where another call goes on; one inside
    of a forward, or of a plan that has not judged the prompt yet, marks the cache as broken until `KVCache.reset`.
    """
    plan = cache.parts.plan or Chunked()
    if question_ids is not None and not plan.uses_question:
        raise PolicyError(
            f"{cache.policy} does not look at question_ids; append them to input_ids to let it see the question"
        )
    if chunk_size is not None and chunk_size < 1:
        raise PolicyError(f"chunk_size={chunk_size} must be at least 1")
    ids, mask = _checked(cache, input_ids, attention_mask)
    job = Prefill(cache, model, ids, mask, question_ids, chunk_size, tokenizer, progress)
    if cache.parts.uses_marks and tokenizer is not None:
        cache.mark(ids, mask, tokenizer)
    before, cache.prefilled = cache.prefilled, cache.prefilled or Prefilled.of(ids[:, :0])
    cache.enforcer.declared = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    try:
        with torch.no_grad():
            return run(plan, job)
    finally:
        cache.enforcer.declared = None
        if not cache.get_seq_length():
            cache.prefilled = before


@dataclass
class Prefill:
    """One prefill under way: what plans can do with the model and the cache."""

    cache: KVCache
    model: PreTrainedModel
    ids: Tensor
    mask: Tensor | None
    question_ids: Tensor | None
    chunk_size: int | None
    tokenizer: PreTrainedTokenizerBase | None
    progress: Progress | None
    done: int = 0
    total: int = 0

    def begin(self, extra: int = 0) -> None:
        """Announces the work: all tokens not seen yet, and ``extra`` ones of passes on top."""
        self.total = self.ids.shape[1] - self.cache.get_seq_length() + extra
        self._advance(0)

    def feed(self, size: int = 0) -> Tensor:
        """Feeds everything that the cache has not seen, in nearly equal chunks of at most ``size`` (0: one)."""
        cache = self.cache
        seen, end = cache.get_seq_length(), self.ids.shape[1]
        count = -(-(end - seen) // size) if size else 1
        bounds = [seen + (end - seen) * i // count for i in range(count + 1)]
        evictions, after_prefill = cache.enforcer.evictions, cache.parts.trigger.after_prefill
        blind = False
        for start, stop in pairwise(bounds):
            if after_prefill:
                # The prefill as a whole counts, not the first of its chunks.
                cache.enforcer.filled = stop < end
            blind = cache.enforcer.evictions > evictions
            logits = self._forward(self.model, start, stop, **self._only_last()).logits[:, -1]
            assert cache.prefilled is not None
            cache.prefilled = Prefilled.of(self.ids[:, :stop], blind)
            self._advance(stop - start)
        return logits

    def probe(self, rows: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
        """Runs ``rows[b]`` on top of what sequence b has seen and lets the scorer judge ``spans[b]``; keeps nothing of it.

        Only the decoder stack up to the last budgeted layer is run.
        """
        cache, scorer = self.cache, self.cache.parts.scorer
        assert scorer is not None
        last = max(cache._at)

        def watch(index: int, call: AttentionCall, lse: Tensor, own: Tensor) -> None:
            if index in cache._at:
                queries = Queries(call.query, lse, call.scale, call.softcap, call.valid, own)
                scorer.probe(View(cache.layers[index].store, queries), spans)
            if index == last:
                raise _Judged

        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.ids.device)
        real = torch.zeros(len(rows), width, dtype=torch.bool, device=self.ids.device)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.tensor(row, dtype=torch.long)
            real[b, : len(row)] = True
        other = copy.copy(self)
        seen = cache.get_seq_length()
        other.ids = torch.cat([self.ids[:, :seen], ids], dim=1)
        if self.mask is not None or not bool(real.all()):
            past = torch.ones_like(other.ids[:, :seen], dtype=torch.bool) if self.mask is None else self.mask[:, :seen]
            other.mask = torch.cat([past, real], dim=1)
        cache.probing = watch
        try:
            with _recurrent_states_aside(cache):
                other._forward(self.model.get_decoder(), seen, seen + width)
        except _Judged:
            pass
        finally:
            cache.probing = cache.broken = cache._valid = None
        self._advance(int(real.sum()) // len(rows))

    def _forward(self, module: Any, start: int, stop: int, **options: Any) -> Any:
        positions = None
        if self.mask is not None:
            positions = (self.mask[:, :stop].long().cumsum(1) - 1).clamp_min(0)[:, start:]
            options["attention_mask"] = self.mask[:, :stop].long()
        return module(
            input_ids=self.ids[:, start:stop],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )

    def _only_last(self) -> dict[str, int]:
        """Asks for the last token's logits alone, where the model can be asked."""
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def _advance(self, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Judged(Exception):
    """Ends a probing pass after the last layer that a scorer watches."""


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
    cache = job.cache
    passes = list(_repetitions(plan, job, cache.seen or [0] * len(job.ids)))
    job.begin(sum(sum(map(len, rows)) // len(rows) for rows, _ in passes))
    cache.enforcer.suspended = True
    try:
        logits = job.feed(job.chunk_size or 0)
        for rows, spans in passes:
            job.probe(rows, spans)
        with torch.inference_mode():
            cache.enforcer.settle_all()
            for layer in cache.enforcer.layers:
                layer.finish_forward()
    except BaseException:
        cache.broken = cache.broken or f"the plan of {cache.policy}"
        raise
    finally:
        cache.enforcer.suspended = False
    return logits


def _repetitions(plan: Reconstruct, job: Prefill, seen: Sequence[int]) -> Iterator[tuple[list[list[int]], list[Span]]]:
    """Token ids and judged positions per sequence of each pass; sequences are cut up on their own."""
    first, later, turn = _instructions(plan, job.tokenizer)
    texts = [row.tolist() for row in job.ids] if job.mask is None else [
        row[real].tolist() for row, real in zip(job.ids, job.mask, strict=True)
    ]  # fmt: skip
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


def _checked(cache: KVCache, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Refuses ids and masks that do not go on from what the cache has seen; drops a mask without padding."""
    if ids.ndim != 2 or not ids.numel():
        raise KVBudgetError(f"input_ids of shape {list(ids.shape)} hold no text; give token ids [batch, tokens]")
    columns = cache.get_seq_length()
    if columns and len(ids) != len(cache.seen):
        raise CacheError(f"the cache holds {len(cache.seen)} sequences, but input_ids hold {len(ids)}")
    if ids.shape[1] <= columns:
        raise CacheError(
            f"the cache has seen {columns} tokens and input_ids hold {ids.shape[1]}, so nothing is new; pass the whole text, "
            "longer than what has been seen, or start over with cache.reset()"
        )
    if cache.prefilled is not None:
        cache.prefilled.check(ids)
    if mask is None:
        if columns and any(seen != columns for seen in cache.seen):
            raise CacheError(f"the {columns} tokens seen hold padding; pass the attention_mask of the whole text")
        return ids, None
    mask = mask.bool()
    if mask.shape != ids.shape:
        raise CacheError(f"attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}")
    if not bool(mask[:, -1].all()):
        raise CacheError("attention_mask ends in padding; pad on the left (tokenizer.padding_side = 'left')")
    if columns and mask[:, :columns].sum(1).tolist() != cache.seen:
        raise CacheError(f"attention_mask disagrees with the {cache.seen} tokens that the cache has seen")
    return ids, None if bool(mask.all()) else mask


@contextmanager
def _recurrent_states_aside(cache: KVCache) -> Iterator[None]:
    """Lets a probing pass change copies of the convolution and recurrent states, which it cannot help changing."""
    states = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer)}
    for i, layer in states.items():
        cache.layers[i] = copy.deepcopy(layer)
    try:
        yield
    finally:
        for i, layer in states.items():
            cache.layers[i] = layer
