"""KVCache: what the user passes as ``past_key_values``; a transformers cache whose layers stay inside a budget."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvbudget import attention
from kvbudget.assembly import bound, budgeted_layer, check_recipe, checked_spans, laid_out, with_trigger
from kvbudget.attention import LayerHandle, LazyMask, TextLength
from kvbudget.auto import choose
from kvbudget.budget import Budget
from kvbudget.costs import entry_cost, overhead_bytes
from kvbudget.enforcer import Enforcer
from kvbudget.errors import CacheError, PolicyError
from kvbudget.guards import check_positions, check_rope_switch, has_gap, rope_switch
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.methods import parse
from kvbudget.models import CacheGeometry, check_supported
from kvbudget.policy.base import Recipe
from kvbudget.policy.marks import marks_of
from kvbudget.policy.policy import Policy
from kvbudget.policy.view import Queries, View
from kvbudget.recurrent import leave_inference, shorten
from kvbudget.report import CacheReport
from kvbudget.segments import retrospective
from kvbudget.thinning import Survivors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvbudget.prefill import Prefilled
    from kvbudget.storage import Saved


class AttentionLayer(CacheLayerMixin):
    """One attention layer as transformers sees it; the entries are in ``store``, which its ``readers`` share."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: KVCache, index: int, store: LayerCache, *, sliding: bool) -> None:
        super().__init__()
        self.cache, self.index, self.store = cache, index, store
        self.is_sliding = sliding
        self.columns = 0
        self.readers: list[int] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage comes with the first entries."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hands the new keys and values on to the attention function."""
        self.is_initialized = True
        handle = LayerHandle(self.cache, self.index, key_states, value_states)
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
    def batch_size(self) -> int:
        return self.store.batch_size


class KVCache(Cache):
    """A cache for ``generate(past_key_values=...)`` that stays inside a budget by a policy.

    Args:
        model: the model that it will serve; its attention implementation is set to ``"kvbudget"``, which behaves like
            sdpa for every other cache.
        policy: a text such as ``"snapkv(window=64)+adakv"``, a YAML file, a recipe or a `Policy`; ``"auto"`` picks one.
        budget: bytes of the whole batch (``"16MiB"``), entries per sequence and KV head (``1024``), a fraction of the text
            (``"25%"``) or None for no limit.
        max_length: the length of text, in tokens, that a fraction refers to; without it, what has been seen so far.
        protect: half-open ranges of positions ``[(start, end), ...]`` that always stay (one list for all sequences).
        when: ``over_budget`` (default), ``after_prefill``, ``chunk`` (after each forward) or ``every(n)`` small steps.

    Raises:
        UnsupportedModel: the model cannot be served rightly.
        BudgetError, PolicyError: the budget or the policy cannot work, with the smallest budget that would.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | Recipe | str | Path = "full",
        budget: Budget | str | float | None = None,
        *,
        max_length: int | None = None,
        protect: Sequence[tuple[int, int]] = (),
        when: str | None = None,
    ) -> None:
        check_supported(model)
        self.geometry = CacheGeometry.from_config(model.config)
        self.budget = Budget.parse(budget)
        self.reason: str | None = None
        if policy == "auto":
            choice = choose(model, self.budget, length=max_length)
            policy, self.reason = choice.policy, choice.reason
        self.policy = bound(parse(policy), model)
        self.parts = with_trigger(self.policy.parts(), when)
        layout = laid_out(self.geometry, self.parts)
        check_recipe(self.policy, self.parts, self.budget, layout)
        self.dtype = model.dtype
        stores: list[LayerCache] = []
        layers: list[AttentionLayer | LinearAttentionLayer] = []
        for index, shape in enumerate(layout.layers):
            if shape.owner is not None:
                owner = layers[shape.owner]
                assert isinstance(owner, AttentionLayer)
                owner.readers.append(index)
                layers.append(AttentionLayer(self, index, owner.store, sliding=owner.is_sliding))
                continue
            if shape.kind not in ("full", "sliding"):
                layers.append(LinearAttentionLayer())
                continue
            if shape.kind == "sliding":
                store = LayerCache(index, shape.num_kv_heads, window=shape.window)
            else:
                store = budgeted_layer(model, index, layout, self.parts, self.budget)
                stores.append(store)
            layers.append(AttentionLayer(self, index, store, sliding=shape.kind == "sliding"))
        super().__init__(layers=layers)
        spans = checked_spans(protect)
        cost = entry_cost(layout, self.parts, self.dtype)
        overhead = overhead_bytes(model.config, self.dtype, layout) if self.budget.kind == "bytes" else 0
        self.enforcer = Enforcer(str(self.policy), self.parts, self.budget, stores, cost, overhead, max_length, spans)
        self.enforcer.check()
        self.question_visible: bool | None = None
        self._record(False)
        self.broken: str | None = None
        self.probing: Any = None
        self.peak_bytes = 0
        self._at = {store.layer_idx: i for i, store in enumerate(stores)}
        self._first = next(i for i, layer in enumerate(layers) if isinstance(layer, AttentionLayer))
        self._last = max(i for i, layer in enumerate(layers) if isinstance(layer, AttentionLayer))
        self._valid: Tensor | None = None
        self._calls: dict[int, AttentionCall] = {}
        self._ready: dict[int, Queries] = {}
        self._due: list[int] = []
        self._survivors: Survivors | None = None
        self._recorded: dict[int, Queries] = {}
        self._gaps = False
        self.trail: Tensor | None = None
        self._phi3 = hasattr(model.config, "original_max_position_embeddings")
        self._rope_switch = rope_switch(model.config)
        self.prefilled: Prefilled | None = None
        self._model = weakref.ref(model)
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)

    # -- what the attention function calls -----------------------------------------------------------------------------

    def attend(self, index: int, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> Tensor:
        """Attention of one layer: statistics, eviction and codecs follow the answer. Returns ``[B, Hq, n, Dv]``."""
        if torch.is_inference_mode_enabled():
            return self._attend(index, call, mask, position_ids)
        with torch.inference_mode():
            return self._attend(index, call, mask, position_ids)

    def _attend(self, index: int, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> Tensor:
        layer = self.layers[index]
        if index == self._first:
            self._begin(call, mask, position_ids)
        call.window, call.valid = layer.store.window, self._valid
        owner, asked = self.layers[layer.store.layer_idx], call
        projection = self.parts.projection if layer.store.layer_idx in self._at else None
        if projection is not None:
            call = projection.enter(owner.index, call)
        merges = self.parts.sharing is not None and self.parts.sharing.merges
        if index != owner.index and merges:
            call.face = 1 + owner.readers.index(index)
            self._calls[index] = call
        elif index != owner.index:
            call = replace(call, key=self._calls[owner.index].key, value=self._calls[owner.index].value)
        elif owner.readers:
            self._calls[index] = call
        if self.probing is not None:
            out, lse, own = layer.store.probe(call)
            self.probing(index, call, lse, own)
            if index == self._last:
                self._valid, self._calls = None, {}
            return out if projection is None else projection.leave(owner.index, out, asked)
        self._enter(index)
        width, thinned = call.query.shape[2], self._survivors
        big = width > self.parts.trigger.every
        if self.parts.thinning and big and thinned is None and not self.recording:
            seen = layer.store.seen or [0] * call.query.shape[0]
            self._survivors = Survivors.all(seen, width, call.valid, call.query.device)
        if thinned is not None:
            call = thinned.take(call)
        out, lse = layer.store.forward(call) if not owner.readers else layer.store.probe(call)[:2]
        queries = Queries(call.query, lse, call.scale, call.softcap, call.valid, steps=call.steps)
        layer.columns += width
        if big:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        if self.parts.sharing is not None:
            self._ready.setdefault(owner.index, queries)
            if index == (owner.readers or [index])[-1]:
                self._answered(owner.index, owner.readers if merges else ())
        elif self.recording:
            self._recorded[index] = queries
        else:
            self._finish(index, queries)
        if self._survivors is not None:
            self._survivors = self._survivors.after(layer.store)
        if index == self._last:
            self._end(big)
        if thinned is not None:
            return thinned.spread(out, width)
        return out if projection is None else projection.leave(owner.index, out, asked)

    def _answered(self, index: int, others: Sequence[int]) -> None:
        """What follows under a sharing map when a layer that holds entries, and all that read them, have been answered.

        ``others`` are the layers above whose entries lie beside its own.
        """
        own = self._calls.pop(index, None)
        if own is not None:
            calls = [own, *(self._calls.pop(i) for i in others)]
            key, value = (torch.cat([getattr(call, name) for call in calls], dim=-1) for name in ("key", "value"))
            self.layers[index].store.append(key, value, own.valid)
        if self.recording:
            self._recorded[index] = self._ready.pop(index)
            return
        # Owners that others read for long would be finished late, and allocators rely on the order of the layers.
        while self._due and self._due[0] in self._ready and self._due[0] not in self._calls:
            at = self._due.pop(0)
            self._finish(at, self._ready.pop(at))

    def _finish(self, index: int, queries: Queries | None) -> None:
        """What follows the attention of a layer: statistics, evictions and codecs."""
        store = self.layers[index].store
        if index in self._at and queries is not None:
            self.enforcer.after_attention(self._at[index], View(store, queries))
        else:
            store.finish_forward()

    def _enter(self, index: int) -> None:
        """From here until the last layer is done, a forward that stops leaves layers that hold different texts."""
        done = index == len(self.layers) - 1 and index != self._last
        self.broken = None if done else f"layer {index} of {len(self.layers)}"

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
        if self.parts.sharing is not None:
            self._calls, self._ready = {}, {}
            self._due = [store.layer_idx for store in self.stores]

    def _end(self, big: bool) -> None:
        if self._last == len(self.layers) - 1:
            self.broken = None
        self._valid = self._survivors = None
        if not self.recording:
            self.enforcer.filled = True
        if big or not self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def _commit(self, removed: int) -> None:
        """Carries out what was put off while the newest tokens of a recorded forward could still be taken back."""
        recorded, self._recorded = self._recorded, {}
        for index, queries in sorted(recorded.items()):
            self._finish(index, queries.without_newest(removed))
        self.enforcer.filled = True

    # -- what transformers calls ---------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """True, but for models of the Phi-3 family: their generate() drops a cache that is true and starts another."""
        return not self._phi3

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """What the mask function gets to know; a model asks for it at the start of every forward."""
        self._usable()
        if self.pending:
            # A recorded forward that nobody cropped: what follows is ordinary decoding.
            self.crop(0)
            self._record(False)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent layer's convolution state, which the model may change in place."""
        self._enter(layer_idx)
        if not torch.is_inference_mode_enabled():
            leave_inference(self.layers[layer_idx])
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Takes a recurrent layer's new convolution state."""
        if not self.get_seq_length():
            self.broken = None  # nothing is held yet that a refusal could leave incomplete
            self.enforcer.check(conv_states.shape[0])
        self._enter(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    @property
    def pending(self) -> bool:
        """Whether `crop` may still take back the last forward, which nothing has been evicted after."""
        return bool(self._recorded)

    def activate_past_recording(self) -> None:
        """Speculation begins: statistics and evictions wait until `crop` says which tokens stay."""
        self._record(True)

    def _record(self, active: bool) -> None:
        self.recording = active
        for store in self.enforcer.layers:
            store.spills = not active and self.parts.layers is None
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.record_past = active

    @torch.inference_mode()
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back (a negative number, as transformers passes it; 0 commits a speculation).

        Raises:
            CacheError: when an eviction, a merge or a codec has already touched them; nothing is changed then.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove, such as crop(-1)")
        self._usable()
        tokens = -tokens_to_remove
        obstacle = self._obstacle(tokens) if tokens else None
        if obstacle is not None:
            raise CacheError(
                f"the newest {tokens} tokens cannot be taken back: {obstacle}; "
                "fork the cache before going ahead (cache.fork()), or give a budget that holds the whole text"
            )
        for store in self.stores:
            store.truncate(tokens)
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.columns -= tokens
            elif self.pending:
                shorten(layer, tokens)
        if self.prefilled is not None:
            self.prefilled = self.prefilled.first(self.get_seq_length())
        if self.pending:
            self._commit(tokens)

    def _obstacle(self, tokens: int) -> str | None:
        """Why the newest ``tokens`` cannot be taken back, or None."""
        if tokens > min(self.seen, default=0):
            return f"only {min(self.seen, default=0)} have been seen"
        if self._gaps:
            return "padding follows the tokens of a sequence"
        recorded = min((queries.query.shape[2] for queries in self._recorded.values()), default=0)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, AttentionLayer):
                if not layer.store.can_truncate(tokens):
                    return f"layer {index} has already evicted, merged or compressed them, or what came before"
            elif not layer.is_croppable or tokens > recorded:
                return f"the recurrent state of layer {index} has absorbed them"
        return None

    @torch.inference_mode()
    def revisit(self, tokens: int) -> bool:
        """Lets the newest ``tokens`` come again, with those after them, for a policy that answers their queries anew.

        False, and nothing is changed, where they are no longer held as they came.
        """
        self._usable()
        if self.recording or self.pending or self._obstacle(tokens) is not None:
            return False
        for layer in self.layers:
            assert isinstance(layer, AttentionLayer)
            layer.columns -= tokens
        for store in self.stores:
            retrospective.take_back(store, tokens)
        return True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from the former sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @torch.inference_mode()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the sequences ``indices``; more of them share what the budget holds.

        Raises:
            BudgetError: when the budget is too small for that many; nothing is changed then.
        """
        index = indices.tolist()
        grows = 0 < len(self.seen) < len(index)
        if grows:
            self.enforcer.check(len(index))
            self.enforcer.admit_texts(max(self.seen[b] for b in index), len(index))
        for store in self.stores:
            store.select_sequences(index)
        for layer in self.layers:
            if not isinstance(layer, AttentionLayer):
                layer.reorder_cache(indices)
        self.enforcer.select_sequences(index)
        self.trail = None if self.trail is None else self.trail[index]
        if grows and self.budget.kind == "bytes" and self.parts.scorer is not None:
            self.enforcer.settle_all()
        if self.prefilled is not None:
            self.prefilled = self.prefilled.select(index)

    def reset(self) -> None:
        """Forgets everything; policy and budget stay."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, AttentionLayer):
                store = layer.store
                store.main, store.front, store.seen, store.shift, store.paged = [], [], [], None, []
                store.statistics, store.marks, store.prompt = {}, [], []
                layer.columns = 0
            else:
                self.layers[index] = LinearAttentionLayer()
        self.enforcer.reset()
        self._recorded, self._gaps, self._valid, self.trail = {}, False, None, None
        self.broken, self.peak_bytes, self.prefilled = None, 0, None
        self._record(False)

    # -- what the user calls -------------------------------------------------------------------------------------------

    def prefill(self, model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
        """Drives a prompt through the model as the policy plans it; returns the last token's logits ``[B, V]``.

        See `kvbudget.prefill.prefill` for the options.
        """
        from kvbudget.prefill import prefill

        return prefill(self, model, input_ids, **options)

    def mark(self, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tells a policy that judges by the text (fastgen, sablock) what kinds of tokens it has; `prefill` does it by itself.

        ``input_ids [B, T]`` from the beginning on, ``attention_mask [B, T]`` where they are padded.
        """
        marks = marks_of(input_ids, tokenizer)
        rows = list(marks) if attention_mask is None else [
            row[real] for row, real in zip(marks, attention_mask.bool().cpu(), strict=True)
        ]  # fmt: skip
        for layer in self.enforcer.layers:
            layer.marks = list(rows)

    def fork(self) -> KVCache:
        """A cache that goes on from the same text on its own; entries are shared until one of the two changes them."""
        if self.broken is not None:
            raise CacheError(f"a broken cache (an earlier call stopped in {self.broken}) cannot be forked")
        other = copy.copy(self)
        other.layers = []
        stores: dict[int, LayerCache] = {}
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                twin = copy.copy(layer)
                twin.cache, owner = other, layer.store.layer_idx
                if owner not in stores:
                    stores[owner] = layer.store.fork()
                twin.store = stores[owner]
            else:
                twin = copy.deepcopy(layer)
            other.layers.append(twin)
        other._recorded = dict(self._recorded)
        other.enforcer = self.enforcer.fork([stores[store.layer_idx] for store in self.enforcer.layers])
        return other

    def save(self, path: str | Path, codec: str = "raw", **options: Any) -> Saved:
        """Writes what the cache holds to a file: without loss (``raw``), or transform-coded (``kvtc``).

        See `kvbudget.storage.save` for the options.
        """
        from kvbudget.storage import save

        return save(self, path, codec, **options)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, **options: Any) -> KVCache:
        """The cache that `save` wrote, for a model with the same weights; see `kvbudget.storage.load`."""
        from kvbudget.storage import load

        return load(path, model, **options)

    @property
    def model(self) -> PreTrainedModel:
        """The model that the cache serves, which it does not keep alive.

        Raises:
            CacheError: when the model is gone.
        """
        model = self._model()
        if model is None:
            raise CacheError("the model that this cache served is gone; keep it while the cache is in use")
        return model

    @property
    def seen(self) -> list[int]:
        """Tokens seen per sequence, padding left out."""
        return list(self.layers[self._first].store.seen)

    @property
    def stores(self) -> list[LayerCache]:
        """What holds the entries of the attention layers, each once where several layers read the same."""
        return [layer.store for layer in self.layers if isinstance(layer, AttentionLayer) and layer.owns]

    @property
    def nbytes(self) -> int:
        """Bytes of every resident tensor of the cache, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tensors(self) -> Iterable[Tensor]:
        """Every resident tensor of the cache."""
        for store in self.stores:
            yield from store.tensors()
        for layer in self.layers:
            if not isinstance(layer, AttentionLayer):
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                yield from (state for state in states if state is not None)

    def report(self) -> CacheReport:
        """What is kept and what it costs."""
        return CacheReport.of(self)

    def check_integrity(self) -> None:
        """Raises AssertionError when layers, segments, lengths or the byte budget disagree."""
        columns = {layer.columns for layer in self.layers if isinstance(layer, AttentionLayer)}
        assert len(columns) == 1 or self.broken, f"layers have seen different lengths: {columns}"
        for store in self.stores:
            store.check_integrity()
        if self.budget.kind == "bytes" and not (self.pending or self.enforcer.suspended):
            assert self.nbytes <= self.budget.amount, f"{self.nbytes} bytes in a budget of {self.budget.amount}"
