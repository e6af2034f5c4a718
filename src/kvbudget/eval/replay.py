"""Replay: one recorded prefill feeds the caches of many policies, as if each had prefilled the prompt in one pass."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.attending import AttentionLayer
from kvbudget.cache import KVCache
from kvbudget.errors import CacheError
from kvbudget.jury import Juror
from kvbudget.layer import AttentionCall, LayerCache
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

    def first(self, tokens: int) -> Recording:
        """What was asked of the layers up to that token, which what follows has no part in; the logits are not its own."""
        calls = {
            index: replace(
                call, query=call.query[:, :, :tokens], key=call.key[:, :, :tokens], value=call.value[:, :, :tokens]
            )
            for index, call in self.calls.items()
        }
        lse = {index: sums[:, :, :tokens] for index, sums in self.lse.items()}
        return Recording(self.ids[:, :tokens], calls, lse, self.logits)


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


@dataclass
class Observed:
    """A policy's layers with their statistics, before anything has left, and the ``seconds`` that these took.

    Caches of the policy that differ in their budgets alone may share it: the first fills it, the others begin from it.
    ``sizes`` are the bytes of a layer's entries with the spare room that a fork gives back.
    """

    layers: dict[int, LayerCache] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


@torch.inference_mode()
def replay(recording: Recording, cache: KVCache, observed: Observed | None = None) -> KVCache:
    """Fills an empty cache from a recording; it then stands where a one-pass prefill would have left it.

    Under a sharing map that holds entries together too, and a model's own map, though not where a policy lets layers read
    another's.
    """
    new = recording.ids.shape[1]
    cache.enforcer.check(1)
    cache.enforcer.admit([new])
    for index, layer in enumerate(cache.layers):
        own = layer.own
        if own is None:
            layer.columns = new
            continue
        call, begin = recording.calls[index], time.perf_counter()
        known = None if observed is None else observed.layers.get(index)
        if known is None:
            held = (index, *layer.readers) if cache._merges and layer.owns else (index,)
            calls = [recording.calls[i] for i in held]
            key, value = (torch.cat([getattr(each, name) for each in calls], dim=-1) for name in ("key", "value"))
            own.append(key, value, None)
            layer.columns = new
        else:
            own = adopt(cache, index, known)
        spare = 0 if observed is None or known is None else observed.sizes[index] - own.nbytes()
        cache.peak_bytes = max(cache.peak_bytes, cache.nbytes + spare)
        if index in cache._at:
            view = View(own, Queries(call.query, recording.lse[index], call.scale, call.softcap))
            if known is None:
                size = own.nbytes()
                cache.enforcer.observe(cache._at[index], view)
                if observed is not None:
                    observed.sizes[index] = size
                    observed.layers[index] = own.fork()
                    observed.seconds += time.perf_counter() - begin
            cache.enforcer.act(cache._at[index], view)
        else:
            own.finish_forward()
    cache.enforcer.filled = True
    return cache


def adopt(cache: KVCache, index: int, store: LayerCache) -> LayerCache:
    """Lets layer ``index`` of a cache begin from a fork of what another cache of the same policy holds there."""
    layer = cache.layers[index]
    twin = store.beside(layer.store) if isinstance(store, Juror) else store.fork()
    twin.hard, layer.columns = layer.store.hard, twin.seen[0]
    if isinstance(twin, Juror):
        layer.juror = twin
    else:
        for at in (index, *layer.readers):
            cache.layers[at].store = twin
    if index in cache._at:
        cache.enforcer.layers[cache._at[index]] = twin
    return twin
