"""cache.prefill: drives a prompt through the model as the policy plans it, and remembers what the cache has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.errors import CacheError, KVBudgetError, PolicyError
from kvbudget.passes import Prefill, Progress
from kvbudget.planned import run
from kvbudget.policy.plans import Chunked

if TYPE_CHECKING:
    from kvbudget.cache import KVCache

__all__ = ["Prefilled", "Progress", "prefill", "run"]


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
    _check_vocabulary(model, input_ids, question_ids, torch.tensor(getattr(plan, "instruction_ids", ())))
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


def _check_vocabulary(model: PreTrainedModel, *texts: Tensor | None) -> None:
    """Refuses token ids that the model has no embedding for."""
    count = model.get_input_embeddings().weight.shape[0]
    for ids in texts:
        if ids is not None and ids.numel() and bool(((ids < 0) | (ids >= count)).any()):
            worst = int(ids.max()) if int(ids.max()) >= count else int(ids.min())
            raise KVBudgetError(
                f"token id {worst} is none of the model's, which run from 0 to {count - 1}; encode the text again"
            )


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
