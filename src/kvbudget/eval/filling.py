"""Filling: the caches of one context, with everything done once that neither policy nor budget changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.eval.replay import Observed, Recording, adopt, replay
from kvbudget.passes import Prefill
from kvbudget.planned import run
from kvbudget.policy.base import Span
from kvbudget.prefill import Prefilled


@dataclass
class Filler:
    """Fills empty caches from a recording, as `KVCache.prefill` in one pass would.

    A policy's statistics, and what its plan's passes find before anything leaves, go from one cache to the next of the same
    policy, whatever the budgets; another policy starts over.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recording: Recording
    _policy: str = ""
    _known: dict[Any, Observed] = field(default_factory=dict)
    _saved: float = 0.0

    def fill(self, cache: KVCache) -> float:
        """Fills a cache; returns the seconds that it took, those included that other caches have spared it."""
        parts, ids = cache.parts, self.recording.ids
        if str(cache.policy) != self._policy:
            self._policy, self._known = str(cache.policy), {}
        begin, self._saved = time.perf_counter(), 0.0
        if parts.uses_marks:
            cache.mark(ids, None, self.tokenizer)
        if parts.plan is None:
            self.feed(cache, ids.shape[1])
        else:
            cache.prefilled = Prefilled.of(ids[:, :0])
            cache.enforcer.declared = [ids.shape[1]]
            with torch.no_grad():
                run(parts.plan, _Replayed(cache, self.model, ids, None, None, None, self.tokenizer, None, filler=self))
            cache.enforcer.declared = None
        return time.perf_counter() - begin + self._saved

    def feed(self, cache: KVCache, tokens: int) -> None:
        """Replays the first ``tokens`` of the recording into an empty cache."""
        # Without a scorer there are no statistics, and what is coded at once is better not shared.
        observed = self._shared((tokens,)) if cache.parts.scorer is not None else None
        replay(self.recording.first(tokens), cache, observed)
        if cache.enforcer.suspended and observed is not None:
            # Nothing has left; what is shared since has given its spare room back.
            own = [(layer.index, layer.own) for layer in cache.layers if layer.own is not None]
            cache.peak_bytes = sum(observed.sizes.get(index, store.nbytes()) for index, store in own)

    def known(self, trail: tuple[Any, ...], cache: KVCache) -> bool:
        """Lets a cache begin from what is known after the steps of ``trail``, if they have been gone before."""
        if trail not in self._known:
            return False
        for index, store in self._shared(trail).layers.items():
            adopt(cache, index, store)
        return True

    def learn(self, trail: tuple[Any, ...], cache: KVCache, seconds: float) -> None:
        """Keeps what a cache holds after the steps of ``trail``, the last of which took some ``seconds``."""
        stores = {layer.index: layer.own.fork() for layer in cache.layers if layer.own is not None}
        self._known[trail] = Observed(stores, seconds=seconds)

    def _shared(self, trail: tuple[Any, ...]) -> Observed:
        found = self._known.setdefault(trail, Observed())
        self._saved += found.seconds
        return found


@dataclass
class _Replayed(Prefill):
    """A plan's prefill that takes its first forward from the recording, and shares its passes up to the first eviction.

    ``trail`` are the steps gone so far, as long as the budget has had no part in what they find.
    """

    filler: Filler | None = None
    trail: tuple[Any, ...] | None = ()

    def feed(self, size: int = 0, until: int | None = None) -> Tensor:
        if self.trail != () or self.cache.get_seq_length():
            self.trail = None
            return super().feed(size, until)
        assert self.filler is not None and self.cache.prefilled is not None
        stop = self.ids.shape[1] if until is None else until
        self.filler.feed(self.cache, stop)
        self.cache.prefilled = self.cache.prefilled.of(self.ids[:, :stop])
        self.trail = (stop,)
        return self.filler.recording.logits

    def probe(self, rows: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
        assert self.filler is not None
        if self.trail is None:
            super().probe(rows, spans)
            return
        self.trail = (*self.trail, tuple(map(tuple, rows)), tuple(spans))
        if not self.filler.known(self.trail, self.cache):
            begin = time.perf_counter()
            super().probe(rows, spans)
            self.filler.learn(self.trail, self.cache, time.perf_counter() - begin)

    def settle(self, granted: Sequence[float] | None = None) -> None:
        self.trail = None
        super().settle(granted)
