"""Replay: one recorded prefill feeds the caches of many policies, as if each had prefilled the prompt in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import AttentionLayer, KVCache
from kvbudget.errors import CacheError
from kvbudget.layer import AttentionCall
from kvbudget.policy.view import Queries, View


@dataclass(frozen=True)
class Recording:
    """What the attention layers of a model were asked in one pass over a prompt ``[1, T]``.

    ``calls[l]`` holds queries ``[1, Hq, T, D]``, keys and values ``[1, Hkv, T, D]`` (post-RoPE) of layer l and ``lse[l]``
    ``[1, Hq, T]``; ``logits [1, V]`` are those of the last token. Memory: ``(Hq + 2 Hkv) * D`` elements per token and layer.
    """

    ids: Tensor
    calls: dict[int, AttentionCall]
    lse: dict[int, Tensor]
    logits: Tensor


@torch.inference_mode()
def record(model: PreTrainedModel, ids: Tensor) -> Recording:
    """Runs the prompt ``ids [1, T]`` once with full attention and keeps every layer's queries, keys and values.

    Raises:
        CacheError: for models with recurrent layers, whose state a recording does not hold.
    """
    cache = KVCache(model, "full")
    if any(not isinstance(layer, AttentionLayer) for layer in cache.layers):
        raise CacheError(
            f"{type(model).__name__} has recurrent layers, which a recording cannot replay; prefill each policy"
        )
    calls: dict[int, AttentionCall] = {}
    lse: dict[int, Tensor] = {}

    def keep(index: int, call: AttentionCall, sums: Tensor, own: Tensor) -> None:
        calls[index], lse[index] = call, sums

    cache.probing = keep
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return Recording(ids, calls, lse, logits)


@torch.inference_mode()
def replay(recording: Recording, cache: KVCache) -> KVCache:
    """Fills an empty cache from a recording; it then stands where a one-pass prefill would have left it."""
    new = recording.ids.shape[1]
    cache.enforcer.check(1)
    cache.enforcer.admit([new])
    for index, layer in enumerate(cache.layers):
        call = recording.calls[index]
        layer.store.append(call.key, call.value, None)
        layer.columns = new
        cache.peak_bytes = max(cache.peak_bytes, cache.nbytes)
        if index in cache._at:
            queries = Queries(call.query, recording.lse[index], call.scale, call.softcap)
            cache.enforcer.after_attention(cache._at[index], View(layer.store, queries))
        else:
            layer.store.finish_forward()
    cache.enforcer.filled = True
    return cache
