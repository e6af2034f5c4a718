"""What a plan can do with a model and a cache: feed the prompt, ask in passes that leave nothing behind, evict."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionLayer

from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry
from kvbudget.policy.base import Span
from kvbudget.policy.plans import Lookahead
from kvbudget.policy.view import Queries, View

if TYPE_CHECKING:
    from kvbudget.cache import KVCache

Progress = Callable[[int, int], None]


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

    def feed(self, size: int = 0, until: int | None = None) -> Tensor:
        """Feeds everything that the cache has not seen, in nearly equal chunks of at most ``size`` (0: one).

        ``until`` stops at a column of the prompt instead of its end. Returns the last token's logits ``[B, V]``.
        """
        cache = self.cache
        seen, end = cache.get_seq_length(), self.ids.shape[1] if until is None else until
        evictions, after_prefill = cache.enforcer.evictions, cache.parts.trigger.after_prefill
        assert cache.prefilled is not None
        for start, stop in bounds(seen, end, size):
            if after_prefill:
                # The prefill as a whole counts, not the first of its chunks.
                cache.enforcer.filled = stop < self.ids.shape[1]
            blind = cache.enforcer.evictions > evictions
            logits = self._forward(self.model, start, stop, **self._only_last()).logits[:, -1]
            cache.prefilled = cache.prefilled.of(self.ids[:, :stop], blind)
            self._advance(stop - start)
        return logits

    def texts(self, begin: int = 0, end: int | None = None) -> list[list[int]]:
        """Token ids of each sequence between two columns, padding left out."""
        ids = self.ids[:, begin:end]
        if self.mask is None:
            return [row.tolist() for row in ids]
        return [row[real].tolist() for row, real in zip(ids, self.mask[:, begin:end], strict=True)]

    def tokens(self, begin: int = 0, end: int | None = None) -> list[int]:
        """Tokens of each sequence between two columns."""
        if self.mask is None:
            return [self.ids[:, begin:end].shape[1]] * len(self.ids)
        return self.mask[:, begin:end].sum(1).tolist()

    def entries(self) -> list[float]:
        """Entries per layer and KV head that the budget buys each sequence for the whole prompt."""
        return [self.cache.enforcer.mean_entries(n, len(self.ids)) for n in self.tokens()]

    def held(self) -> list[float]:
        """Entries that each sequence holds, on average over layers and KV heads."""
        counts = [[sum(row) for row in layer.evictable()] for layer in self.cache.enforcer.layers]
        heads = sum(layer.num_kv_heads for layer in self.cache.enforcer.layers)
        return [sum(rows) / heads for rows in zip(*counts, strict=True)] if counts[0] else [0.0] * len(self.ids)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Nothing is evicted or coded but by `settle`; an exception marks the cache as broken."""
        cache = self.cache
        cache.enforcer.suspended = True
        try:
            yield
        except BaseException:
            cache.broken = cache.broken or f"the plan of {cache.policy}"
            raise
        finally:
            cache.enforcer.suspended, cache.enforcer.granted = False, None

    def settle(self, granted: Sequence[float] | None = None) -> None:
        """Evicts down to the budget, or to ``granted[b]`` entries per layer and KV head where that is less, and codes."""
        enforcer = self.cache.enforcer
        enforcer.granted = None if granted is None else list(granted)
        with torch.inference_mode():
            enforcer.settle_all()
            for layer in enforcer.layers:
                layer.finish_forward()

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
                scorer.probe(View(cache.enforcer.layers[cache._at[index]], queries), spans)
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

    def draft(self, logits: Tensor, plan: Lookahead) -> dict[int, Queries]:
        """Decodes greedily from ``logits [B, V]`` on a copy of the cache that the plan compresses; its queries by layer.

        Empty where every sequence ends with the first token, or the model's positions with the prompt. Queries ``[B, Hq, n, D]``
        carry no lse: they are for a softmax over held entries alone.
        """
        copied = self.cache.fork()
        copied.parts = replace(self.cache.parts, scorer=plan.draft, protect=plan.protect, plan=None)
        copied.enforcer.parts, copied.enforcer.suspended = copied.parts, False
        copied.enforcer.settle_all()
        other = replace(self, cache=copied, progress=None)
        ends = self.model.generation_config.eos_token_id
        stop = torch.tensor([] if ends is None else ends, device=logits.device).flatten()
        going = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        found: dict[int, list[Queries]] = {}
        valid = []
        positions = CacheGeometry.from_config(self.model.config).max_positions
        tokens = plan.tokens if positions is None else min(plan.tokens, max(0, positions - copied.get_seq_length()))
        for _ in range(tokens):
            token = logits.argmax(-1)
            going = going & ~torch.isin(token, stop)
            if not bool(going.any()):
                break
            valid.append(going)
            seen = copied.get_seq_length()
            other.ids = torch.cat([other.ids[:, :seen], token[:, None]], dim=1)
            if other.mask is not None:
                other.mask = torch.cat([other.mask[:, :seen], torch.ones_like(token, dtype=torch.bool)[:, None]], dim=1)
            copied.activate_past_recording()
            logits = other._forward(self.model, seen, seen + 1).logits[:, -1]
            for index, queries in copied._recorded.items():
                found.setdefault(index, []).append(queries)
            copied.crop(0)
        self._advance(plan.tokens)
        joined = {}
        for index, steps in found.items():
            query = torch.cat([step.query for step in steps], dim=2)
            unknown = query.new_zeros(query.shape[:3])
            joined[index] = replace(steps[0], query=query, lse=unknown, valid=torch.stack(valid, dim=1), own=unknown)
        return joined

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


def bounds(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """Cuts a range into nearly equal pieces of at most ``size`` (0: one piece).

    >>> bounds(2, 12, 4)
    [(2, 5), (5, 8), (8, 12)]
    """
    count = -(-(end - begin) // size) if size else 1
    edges = [begin + (end - begin) * i // count for i in range(count + 1)]
    return list(pairwise(edges))


class _Judged(Exception):
    """Ends a probing pass after the last layer that a scorer watches."""


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
