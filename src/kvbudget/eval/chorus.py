"""Chorus: several caches of one text are asked the same in one forward, which reads the model's weights once for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from kvbudget.attending import AttentionLayer
from kvbudget.attention import LazyMask
from kvbudget.cache import KVCache
from kvbudget.errors import CacheError
from kvbudget.layer import AttentionCall


class Chorus(Cache):
    """A cache for a batch whose row b goes through a fork of ``caches[b]``, each of one sequence; the caches stay as they were.

    Raises:
        CacheError: for models with recurrent layers.
    """

    stepping = False

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.members = [cache.fork() for cache in caches]
        layers = [copy.copy(layer) for layer in caches[0].layers]
        for layer in layers:
            if not isinstance(layer, AttentionLayer):
                raise CacheError("recurrent layers hold one state for a whole batch; ask the caches one by one")
            layer.cache = self
        super().__init__(layers=layers)

    def attend(self, index: int, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> Tensor:
        """Attention of one layer, row by row; `KVCache.attend` for each. Returns ``[B, Hq, n, Dv]``."""
        rows = []
        for b, member in enumerate(self.members):
            query, key, value = (x[b : b + 1] for x in (call.query, call.key, call.value))
            positions = position_ids if position_ids is None or len(position_ids) == 1 else position_ids[b : b + 1]
            own = replace(call, query=query, key=key, value=value)
            rows.append(member.attend(index, own, mask, positions))
        self.layers[index].columns += call.query.shape[2]
        return torch.cat(rows)
