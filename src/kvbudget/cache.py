"""KVCache: what the user passes as ``past_key_values``; a transformers cache whose layers stay inside a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvbudget import attention
from kvbudget.attention import LayerHandle, LazyMask
from kvbudget.budget import Budget
from kvbudget.costs import entry_cost, overhead_bytes
from kvbudget.enforcer import Enforcer
from kvbudget.errors import BudgetError, CacheError, PolicyError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.methods import parse
from kvbudget.models import CacheGeometry, check_supported, fingerprint, rotation_of
from kvbudget.policy.base import Parts, Recipe, Trigger
from kvbudget.policy.policy import Policy
from kvbudget.policy.view import Queries, View
from kvbudget.report import CacheReport
from kvbudget.segments.base import Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.quantized import QuantizedSegment

if TYPE_CHECKING:
    from kvbudget.prefill import Prefilled


class AttentionLayer(CacheLayerMixin):
    """One attention layer as transformers sees it; the entries are in ``store``."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: KVCache, index: int, store: LayerCache, *, sliding: bool) -> None:
        super().__init__()
        self.cache, self.index, self.store = cache, index, store
        self.is_sliding = sliding
        self.columns = 0

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
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum: the text may be longer than what is kept."""
        return -1

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
        self.policy = _bound(parse(policy), model)
        self.parts = _with_trigger(self.policy.parts(), when)
        self._check_recipe()
        self.dtype = model.dtype
        stores: list[LayerCache] = []
        layers: list[AttentionLayer | LinearAttentionLayer] = []
        for index, shape in enumerate(self.geometry.layers):
            if shape.kind not in ("full", "sliding"):
                layers.append(LinearAttentionLayer())
                continue
            if shape.kind == "sliding":
                store = LayerCache(index, shape.num_kv_heads, window=shape.window)
            else:
                store = self._budgeted_layer(model, index)
                stores.append(store)
            layers.append(AttentionLayer(self, index, store, sliding=shape.kind == "sliding"))
        super().__init__(layers=layers)
        spans = _checked_spans(protect)
        cost = entry_cost(self.geometry, self.parts, self.dtype)
        overhead = overhead_bytes(model.config, self.dtype)
        self.enforcer = Enforcer(str(self.policy), self.parts, self.budget, stores, cost, overhead, max_length, spans)
        self.enforcer.check()
        self.question_visible: bool | None = None
        self.recording = False
        self.pending = False
        self.broken: str | None = None
        self.probing: Any = None
        self.peak_bytes = 0
        self._at = {store.layer_idx: i for i, store in enumerate(stores)}
        self._first = next(i for i, layer in enumerate(layers) if isinstance(layer, AttentionLayer))
        self._last = max(i for i, layer in enumerate(layers) if isinstance(layer, AttentionLayer))
        self._valid: tuple[Any, Tensor | None] = (None, None)
        self.prefilled: Prefilled | None = None
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)

    # -- what the attention function calls -----------------------------------------------------------------------------

    def attend(self, index: int, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> Tensor:
        """Attention of one layer: statistics, eviction and codecs follow the answer. Returns ``[B, Hq, n, Dv]``."""
        layer = self.layers[index]
        if index == self._first:
            self._begin(call, mask, position_ids)
        call = AttentionCall(
            call.query, call.key, call.value, call.scale, call.softcap, layer.store.window and call.window, call.sink,
            self._valid[1],
        )  # fmt: skip
        if self.probing is not None:
            out, lse = layer.store.probe(call)
            self.probing(index, call, lse)
            return out
        self.broken = f"layer {index} of {len(self.layers)}"
        out, lse = layer.store.forward(call)
        queries = Queries(call.query, lse, call.scale, call.softcap, call.valid)
        layer.columns += call.query.shape[2]
        big = call.query.shape[2] > self.parts.trigger.every
        if big:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        if index in self._at:
            self._after(index, View(layer.store, queries))
        elif not self.recording:
            layer.store.finish_forward()
        if index == self._last:
            self._end(big)
        return out

    def _after(self, index: int, view: View) -> None:
        self.enforcer.suspended, before = self.enforcer.suspended or self.recording, self.enforcer.suspended
        try:
            self.enforcer.after_attention(self._at[index], view, finish=not self.recording)
        finally:
            self.enforcer.suspended = before

    def _begin(self, call: AttentionCall, mask: LazyMask | None, position_ids: Tensor | None) -> None:
        if self.broken is not None:
            raise CacheError(
                f"this cache is broken: an earlier forward stopped in {self.broken}, so its layers hold different texts; "
                "call cache.reset() and start over, or go on from a fork made before"
            )
        if self.pending:
            # A recorded forward that nobody cropped: what follows is ordinary decoding.
            self.recording = False
            self._commit()
        columns = self.get_seq_length()
        batch, _, new, _ = call.query.shape
        store = self.layers[self._first].store
        if store.seen and store.batch_size != batch:
            raise CacheError(
                f"the cache holds {store.batch_size} sequences, but {batch} came; beams and several answers from a warm "
                "cache need cache.batch_repeat_interleave(n) first"
            )
        valid = None if mask is None else mask.valid(columns, new)
        self._valid = (mask, valid)
        counts = [new] * batch if valid is None else valid.sum(1).tolist()
        if self.probing is None:
            self._check_positions(position_ids, valid, columns, store.seen or [0] * batch)
            if not store.seen:
                self.enforcer.check(batch)
            self.enforcer.admit(counts)
            self.pending = self.recording

    def _end(self, big: bool) -> None:
        self.broken = None
        self._valid = (None, None)
        if not self.recording:
            self.enforcer.filled = True
        if big or not self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def _check_positions(
        self, position_ids: Tensor | None, valid: Tensor | None, columns: int, seen: Sequence[int]
    ) -> None:
        """Refuses text that the cache has seen already: its positions would start over."""
        if position_ids is None or position_ids.ndim != 2 or not columns:
            return
        if valid is None:
            first = position_ids[:, 0].tolist()
        else:
            column = valid.int().argmax(1).cpu()
            rows = position_ids.expand(valid.shape[0], -1).cpu()
            first = rows.gather(1, column[:, None])[:, 0].tolist()
            columns += int(column.max())
        for b, position in enumerate(first):
            held = seen[min(b, len(seen) - 1)]
            if not held <= position <= columns:
                raise CacheError(
                    f"the new tokens start at position {position}, but the cache has seen {held} tokens of this text; pass "
                    "only new tokens, or the full ids with a full attention_mask, and not the same text twice"
                )

    def _commit(self) -> None:
        """Carries out what was put off while a speculation could still be taken back."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, AttentionLayer):
                continue
            if index in self._at and self.parts.scorer is not None and not self.enforcer.suspended:
                self.enforcer.settle(layer.store, View(layer.store))
            layer.store.finish_forward()
        self.pending = False
        self.enforcer.filled = True

    # -- what transformers calls ---------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Speculation begins: evictions wait until `crop` says which tokens stay."""
        self.recording = True
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back (a negative number, as transformers passes it; 0 commits a speculation).

        Raises:
            CacheError: when an eviction, a merge or a codec has already touched them; nothing is changed then.
        """
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove, such as crop(-1)")
        tokens = -tokens_to_remove
        stores = [layer.store for layer in self.layers if isinstance(layer, AttentionLayer)]
        stuck = [store.layer_idx for store in stores if not store.can_truncate(tokens)]
        linear = [layer for layer in self.layers if isinstance(layer, LinearAttentionLayer)]
        if stuck or (tokens and linear and not self.recording):
            where = f"layer {stuck[0]}" if stuck else "a recurrent layer"
            raise CacheError(
                f"the newest {tokens} tokens cannot be taken back: {where} has already evicted, merged or compressed them; "
                "fork the cache before going ahead (cache.fork()), or give a budget that holds the whole text"
            )
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.store.truncate(tokens)
                layer.columns -= tokens
            elif self.recording:
                layer.crop(tokens_to_remove)
        if self.pending:
            self._commit()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from the former sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the sequences ``indices``."""
        index = indices.tolist()
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.store.select_sequences(index)
            else:
                layer.reorder_cache(indices)
        self.enforcer.select_sequences(index)

    def reset(self) -> None:
        """Forgets everything; policy and budget stay."""
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                store = layer.store
                store.main, store.front, store.seen, store.shift, store.paged = [], [], [], None, []
                layer.columns = 0
            else:
                layer.reset()
        self.enforcer.reset()
        self.broken, self.pending, self.recording, self.peak_bytes, self.prefilled = None, False, False, 0, None

    # -- what the user calls -------------------------------------------------------------------------------------------

    def prefill(self, model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
        """Drives a prompt through the model as the policy plans it; see `kvbudget.prefill.prefill`."""
        from kvbudget.prefill import prefill

        return prefill(self, model, input_ids, **options)

    def fork(self) -> KVCache:
        """A cache that goes on from the same text on its own; entries are shared until one of the two changes them."""
        if self.broken is not None:
            raise CacheError(f"a broken cache (an earlier forward stopped in {self.broken}) cannot be forked")
        other = copy.copy(self)
        other.layers = []
        stores = {}
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                twin = copy.copy(layer)
                twin.cache, twin.store = other, layer.store.fork()
                stores[twin.store.layer_idx] = twin.store
            else:
                twin = copy.deepcopy(layer)
            other.layers.append(twin)
        other.enforcer = self.enforcer.fork([stores[store.layer_idx] for store in self.enforcer.layers])
        return other

    @property
    def seen(self) -> list[int]:
        """Tokens seen per sequence, padding left out."""
        return list(self.layers[self._first].store.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of every resident tensor of the cache, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tensors(self) -> Iterable[Tensor]:
        """Every resident tensor of the cache."""
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                yield from layer.store.tensors()
            else:
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                yield from (state for state in states if state is not None)

    def report(self) -> CacheReport:
        """What is kept and what it costs."""
        return CacheReport.of(self)

    def check_integrity(self) -> None:
        """Raises AssertionError when layers, segments, lengths or the byte budget disagree."""
        columns = {layer.columns for layer in self.layers if isinstance(layer, AttentionLayer)}
        assert len(columns) == 1 or self.broken, f"layers have seen different lengths: {columns}"
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.store.check_integrity()
        if self.budget.kind == "bytes" and not (self.pending or self.enforcer.suspended):
            assert self.nbytes <= self.budget.amount, f"{self.nbytes} bytes in a budget of {self.budget.amount}"

    # -- construction --------------------------------------------------------------------------------------------------

    def _check_recipe(self) -> None:
        evicts = self.parts.scorer is not None
        if self.budget.kind == "bytes" and self.policy.prefill_peak == "full_prompt":
            raise PolicyError(
                f"{self.policy} must hold the whole prompt before anything can leave, so the byte budget {self.budget} "
                "cannot hold during the prefill; give tokens or a fraction (budget=1024, budget='25%'), or use a method "
                "whose prefill is bounded (kvbudget methods)"
            )
        if self.budget.kind == "bytes" and self.parts.trigger.after_prefill and evicts:
            raise BudgetError(
                f"when='after_prefill' lets the cache grow while decoding, so the byte budget {self.budget} cannot hold; "
                "use when='over_budget', or give tokens or a fraction"
            )
        if evicts and self.budget.kind == "none" and self.parts.plan is None:
            raise BudgetError(f"{self.policy} needs a budget: bytes ('16MiB'), tokens (1024) or a fraction ('25%')")

    def _budgeted_layer(self, model: PreTrainedModel, index: int) -> LayerCache:
        shape = self.geometry.layers[index]
        parts = self.parts
        scorer_states = () if parts.scorer is None else parts.scorer.states
        extra = () if parts.destination is None else parts.destination.columns
        rotation = rotation_of(model, index) if parts.position_mode == "cache" else None
        layer = LayerCache(
            index,
            shape.num_kv_heads,
            make_segment=_segment_maker(parts),
            states=(*scorer_states, *extra),
            rotation=rotation,
        )
        layer.page = parts.granularity.size
        layer.apart = parts.protect.sinks if parts.position_mode == "cache" else 0
        return layer


def _segment_maker(parts: Parts) -> Any:
    if parts.codec is None:
        return DenseSegment
    key_codec, value_codec = parts.codec

    def make(num_rows: int) -> Segment:
        return QuantizedSegment(num_rows, key_codec, value_codec)

    return make


def _bound(policy: Policy, model: PreTrainedModel) -> Policy:
    """Lets recipes that need a calibration load it for this model."""
    if "calibration" not in policy.needs:
        return policy
    mark = fingerprint(model)
    return Policy(tuple(recipe.bind(mark) for recipe in policy.recipes))


def _with_trigger(parts: Parts, when: str | None) -> Parts:
    if when is None or when == "over_budget":
        return parts
    if when == "after_prefill":
        trigger = Trigger(after_prefill=True)
    elif when == "chunk":
        trigger = Trigger(every=1)
    elif when.startswith("every(") and when.endswith(")") and when[6:-1].isdigit() and int(when[6:-1]) > 0:
        trigger = Trigger(every=int(when[6:-1]))
    else:
        raise PolicyError(f"when={when!r} is not a trigger; give over_budget, after_prefill, chunk or every(n)")
    return Parts(**{**parts.__dict__, "trigger": trigger})


def _checked_spans(protect: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    for start, end in protect:
        if not 0 <= start < end:
            raise PolicyError(
                f"protect=({start}, {end}) is not a range of positions; give (start, end) with start < end"
            )
    return [(int(start), int(end)) for start, end in protect]
