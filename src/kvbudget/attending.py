"""Attending: how a cache answers the attention calls of a model's forward, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvbudget.attention import LayerHandle, LazyMask, TextLength
from kvbudget.enforcer import Enforcer
from kvbudget.errors import CacheError, PolicyError
from kvbudget.guards import check_positions, check_rope_switch, has_gap
from kvbudget.jury import Juror
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.base import Parts
from kvbudget.policy.policy import Policy
from kvbudget.policy.view import Queries, View
from kvbudget.thinning import Survivors

if TYPE_CHECKING:
    from kvbudget.prefill import Prefilled


class AttentionLayer(CacheLayerMixin):
    """One attention layer as transformers sees it; the entries are in ``store``, which its ``readers`` share.

    ``at`` is its number among the layers that the budget governs, None for a sliding window of the model's own; ``label``
    names it in messages. ``juror`` judges entries for a layer that reads those of an earlier one, where all of them vote.
    """

    is_compileable = False
    is_croppable = True

    is_initialized = True

    def __init__(self, cache: Attending, index: int, store: LayerCache, *, sliding: bool) -> None:
        super().__init__()
        self.cache, self.index, self.store = cache, index, store
        self.is_sliding = sliding
        self.columns = 0
        self.readers: list[int] = []
        self.juror: Juror | None = None
        self.at: int | None = None
        self.label = ""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage comes with the first entries."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hands the new keys and values on to the attention function."""
        handle = LayerHandle((self.cache, self, key_states, value_states))
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole text counts: masks are never built for this cache."""
        return TextLength(self.columns + query_length), 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum: the text may be longer than what is kept."""
        return -1

    @property
    def owns(self) -> bool:
        """Whether the entries are its own, not those of an earlier layer."""
        return self.store.layer_idx == self.index

    @property
    def own(self) -> LayerCache | None:
        """What holds entries, or states of them, for this layer alone."""
        return self.store if self.owns else self.juror

    @property
    def batch_size(self) -> int:
        return self.store.batch_size


class Attending(Cache):
    """The part of a `kvbudget.KVCache` that the attention function calls.

    ``broken`` says in which layer a forward is under way, or stopped. While ``recording`` (speculation), statistics and
    evictions wait in ``_recorded``; ``probing`` watches extra passes of a plan, whose tokens are not held. ``stepping`` says
    that a forward of one plain token is under way, which `step` serves in the layers between the first and the last.
    """

    def __init__(
        self,
        layers: list[AttentionLayer | LinearAttentionLayer],
        policy: Policy,
        parts: Parts,
        enforcer: Enforcer,
        rope_switch: int | None,
    ) -> None:
        super().__init__(layers=layers)
        self.policy, self.parts, self.enforcer = policy, parts, enforcer
        self.recording = self.stepping = False
        self.broken: str | None = None
        self.probing: Callable[[int, AttentionCall, Tensor, Tensor], None] | None = None
        self.prefilled: Prefilled | None = None
        self.peak_bytes = 0
        attending = [layer for layer in layers if isinstance(layer, AttentionLayer)]
        self._at = {store.layer_idx: i for i, store in enumerate(enforcer.layers)}
        for layer in attending:
            layer.at = self._at.get((layer.juror or layer.store).layer_idx)
            layer.label = f"layer {layer.index} of {len(layers)}"
        for at, store in enumerate(enforcer.layers):
            store.sums = enforcer.sums(at)
        self._first, self._last = attending[0].index, attending[-1].index
        self._shares = parts.sharing is not None or any(layer.readers for layer in attending)
        self._special = self._shares or parts.projection is not None or parts.thinning
        self._rope_switch = rope_switch
        self._valid: Tensor | None = None
        self._calls: dict[int, AttentionCall] = {}
        self._ready: dict[int, Queries] = {}
        self._due: list[int] = []
        self._survivors: Survivors | None = None
        self._recorded: dict[int, Queries] = {}
        self._gaps = False
        self._outs: Sequence[Tensor] = ()
        self._lses: Sequence[Tensor | None] = ()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hands a layer's new keys and values on to the attention function."""
        handle = LayerHandle((self, self.layers[layer_idx], key_states, value_states))
        return handle, handle

    def step(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor | None:
        """`attend` by the shortest way, for one token ``query [B, Hq, 1, D]``: ``[B, 1, Hq, Dv]``; None where there is none."""
        index, store = layer.index, layer.store
        if not self._first < index < self._last:
            return None
        self.broken = layer.label
        out, lse = self._outs[index], self._lses[index]
        if not store.step(query, key, value, scale, softcap, out, lse, add=True):
            return None
        layer.columns += 1
        if not store.summed or store.rest < 0:
            queries = None if lse is None or layer.at is None else Queries(query, lse, scale, softcap)
            if torch.is_inference_mode_enabled():
                self._finish(layer, queries)
            else:
                with torch.inference_mode():
                    self._finish(layer, queries)
        return out

    def attend(self, index: int, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> Tensor:
        """Attention of one layer: statistics, eviction and codecs follow the answer. Returns ``[B, Hq, n, Dv]``."""
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return Attending.attend(self, index, call, mask, position_ids)
        layer = self.layers[index]
        if index == self._first:
            self._begin(call, mask, position_ids)
        call.window, call.valid = layer.store.window, self._valid
        if self._special or self.probing is not None:
            return self._attend_specially(layer, call)
        self.broken = layer.label
        out, lse = layer.store.forward(call, add=self.stepping)
        self._follow(layer, call, lse, call.query.shape[2])
        return out

    def _attend_specially(self, layer: AttentionLayer, call: AttentionCall) -> Tensor:
        """As `attend`, where layers share entries, keys are projected, tokens drop out of the prompt, or a pass is extra."""
        index, owner, asked = layer.index, self.layers[layer.store.layer_idx], call
        projection = self.parts.projection if layer.at is not None else None
        if projection is not None:
            call = projection.enter(owner.index, call)
        if index != owner.index and self._merges:
            call.face = 1 + owner.readers.index(index)
            self._calls[index] = call
        elif index != owner.index:
            call = replace(call, key=self._calls[owner.index].key, value=self._calls[owner.index].value)
        elif owner.readers:
            self._calls[index] = call
        store = layer.juror or layer.store
        if self.probing is not None:
            out, lse, own = store.probe(call)
            self.probing(index, call, lse, own)
            if index == self._last:
                self._valid, self._calls = None, {}
            return out if projection is None else projection.leave(owner.index, out, asked)
        self.broken = layer.label
        width, thinned = call.query.shape[2], self._survivors
        if self.parts.thinning and width > self.parts.trigger.small and thinned is None and not self.recording:
            seen = layer.store.seen or [0] * call.query.shape[0]
            self._survivors = Survivors.all(seen, width, call.valid, call.query.device)
        if thinned is not None:
            call = thinned.take(call)
        out, lse = store.forward(call) if not owner.readers else store.answer(call)
        self._follow(layer, call, lse, width)
        if thinned is not None:
            return thinned.spread(out, width)
        return out if projection is None else projection.leave(owner.index, out, asked)

    def _follow(self, layer: AttentionLayer, call: AttentionCall, lse: Tensor, width: int) -> None:
        """What follows the answer to a call of ``width`` tokens."""
        layer.columns += width
        big = width > self.parts.trigger.small
        if big:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        if not self.recording and not self.enforcer.watches and not self._shares:
            self._finish(layer, None)
        else:
            queries = Queries(call.query, lse, call.scale, call.softcap, call.valid, steps=call.steps)
            if self._shares:
                self._shared(layer, queries)
            elif self.recording:
                self._recorded[layer.index] = queries
            else:
                self._finish(layer, queries)
        if self._survivors is not None:
            self._survivors = self._survivors.after(layer.store)
        if layer.index == self._last:
            self._end(big)

    @property
    def _merges(self) -> bool:
        """Whether layers that share entries hold those of all of them side by side."""
        return self.parts.sharing is not None and self.parts.sharing.merges

    def _shared(self, layer: AttentionLayer, queries: Queries) -> None:
        """What follows where layers share entries, when a layer that holds entries, and all that read them, have been answered."""
        index = layer.store.layer_idx
        readers = self.layers[index].readers
        if layer.own is not None:
            self._ready[layer.index] = queries
        if layer.index != (readers or [index])[-1]:
            return
        own = self._calls.pop(index, None)
        if own is not None:
            calls = [own, *(self._calls.pop(i) for i in readers if self._merges)]
            key, value = (torch.cat([getattr(call, name) for call in calls], dim=-1) for name in ("key", "value"))
            layer.store.append(key, value, own.valid)
            for juror, call in zip([self.layers[i].juror for i in readers], calls[1:], strict=False):
                if juror is not None:
                    juror.append(call.key, call.value, own.valid)
            if key.shape[2] > self.parts.trigger.small:
                self.peak_bytes = max(self.peak_bytes, self.nbytes)
        judges = [index, *(i for i in readers if i in self._ready)]
        if self.recording:
            self._recorded |= {i: self._ready.pop(i) for i in judges}
            return
        # Owners that others read for long would be finished late, and allocators rely on the order of the layers.
        while self._due and self._due[0] in self._ready and self._due[0] not in self._calls:
            at = self._due.pop(0)
            for i in (at, *self.layers[at].readers):
                if i in self._ready:
                    self._finish(self.layers[i], self._ready.pop(i))

    def _finish(self, layer: AttentionLayer, queries: Queries | None) -> None:
        """What follows the attention of a layer: statistics, evictions and codecs."""
        if layer.at is not None and queries is not None:
            self.enforcer.after_attention(layer.at, View(layer.juror or layer.store, queries))
        elif layer.at is None or not self.enforcer.suspended:
            layer.store.finish_forward()

    def _usable(self) -> None:
        if self.broken is not None:
            raise CacheError(
                f"this cache is broken: an earlier call stopped in {self.broken}, so what it holds is incomplete; "
                "call cache.reset() and start over, or go on from a fork made before"
            )

    def _begin(self, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> None:
        columns = self.get_seq_length()
        batch, _, new, _ = call.query.shape
        store = self.layers[self._first].store
        if store.seen and store.batch_size != batch:
            raise CacheError(
                f"the cache holds {store.batch_size} sequences, but {batch} came; beams and several answers from a warm "
                "cache need cache.batch_repeat_interleave(n) first"
            )
        valid = None if mask is None else mask.valid(columns, new)
        counts = [new] * batch if valid is None else valid.sum(1).tolist()
        if self.parts.plan is not None and not store.seen and self.prefilled is None:
            raise PolicyError(
                f"{self.policy} judges the whole prompt in passes of its own, which a bare forward or generate() does not run; "
                "call cache.prefill(model, input_ids) first, then generate() with ids that go on from there"
            )
        if self.probing is None:
            check_positions(position_ids, valid, columns, store.seen or [0] * batch)
            if not store.seen:
                self.enforcer.check(batch)
            check_rope_switch(self._rope_switch, store.seen, counts)
            self.enforcer.admit(counts)
            self._gaps = self._gaps or (valid is not None and has_gap(valid, store.seen))
        self._valid, self._survivors = valid, None
        plain = new == 1 and valid is None and self.probing is None and call.query.is_cpu
        self.stepping = plain and not (self._special or self.recording)
        if self.stepping:
            # Of all layers at once, since an allocation costs more than the lane's own work.
            size, heads = (len(self.layers), batch), call.query.shape[1]
            self._outs = call.query.new_empty(*size, 1, heads, call.value.shape[-1]).unbind()
            self._lses = torch.empty(*size, heads, 1).unbind() if self.enforcer.watches else [None] * size[0]
        if self._shares:
            self._calls, self._ready = {}, {}
            self._due = [layer.index for layer in self.layers if isinstance(layer, AttentionLayer) and layer.owns]

    def _end(self, big: bool) -> None:
        if self._last == len(self.layers) - 1:
            self.broken = None
        self._valid = self._survivors = None
        self.stepping, self._outs, self._lses = False, (), ()
        if not self.recording:
            self.enforcer.filled = True
        if big or not self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def _commit(self, removed: int) -> None:
        """Carries out what was put off while the newest tokens of a recorded forward could still be taken back."""
        recorded, self._recorded = self._recorded, {}
        for index, queries in sorted(recorded.items()):
            self._finish(self.layers[index], queries.without_newest(removed))
        self.enforcer.filled = True
        for store in self.enforcer.layers:  # the first forward that is recorded may bring a prompt, too
            store.verifying = self.recording

    @property
    def stores(self) -> list[LayerCache]:
        """What holds the entries of the attention layers, each once where several layers read the same, and their jurors."""
        found = [layer.own for layer in self.layers if isinstance(layer, AttentionLayer)]
        return [store for store in found if store is not None]

    def tensors(self) -> Iterable[Tensor]:
        """Every resident tensor of the cache."""
        for store in self.stores:
            yield from store.tensors()
        for layer in self.layers:
            if not isinstance(layer, AttentionLayer):
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                yield from (state for state in states if state is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of every resident tensor of the cache, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())
