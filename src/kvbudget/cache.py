"""KVCache: what the user passes as ``past_key_values``; a transformers cache whose layers stay inside a budget."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from kvbudget import attention
from kvbudget.assembly import bound, budgeted_layer, check_recipe, checked_spans, juror, laid_out, with_trigger
from kvbudget.attending import Attending, AttentionLayer
from kvbudget.auto import choose
from kvbudget.budget import Budget
from kvbudget.costs import entry_cost, overhead_bytes
from kvbudget.enforcer import Enforcer
from kvbudget.errors import CacheError
from kvbudget.guards import rope_switch
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from kvbudget.models import CacheGeometry, check_supported
from kvbudget.policy.base import Recipe
from kvbudget.policy.marks import marks_of
from kvbudget.policy.policy import Policy
from kvbudget.recurrent import leave_inference, shorten
from kvbudget.report import CacheReport
from kvbudget.segments import retrospective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvbudget.storage import Saved


class KVCache(Attending):
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
                layers.append(reader := AttentionLayer(self, index, owner.store, sliding=owner.is_sliding))
                if self.parts.jury:
                    reader.juror = juror(model, index, layout, self.parts, owner.store)
                    stores.append(reader.juror)
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
        cost = entry_cost(layout, self.parts, self.dtype)
        overhead = overhead_bytes(model.config, self.dtype, layout) if self.budget.kind == "bytes" else 0
        enforcer = Enforcer(
            str(self.policy), self.parts, self.budget, stores, cost, overhead, max_length, checked_spans(protect)
        )
        enforcer.check()
        super().__init__(layers, self.policy, self.parts, enforcer, rope_switch(model.config))
        self._record(False)
        self.question_visible: bool | None = None
        self.trail: Tensor | None = None
        self._phi3 = hasattr(model.config, "original_max_position_embeddings")
        self._model = weakref.ref(model)
        if model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)

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

    def _enter(self, index: int) -> None:
        """From a recurrent layer until the last one is done, a forward that stops leaves layers that hold different texts."""
        self.broken = None if index == len(self.layers) - 1 else f"layer {index} of {len(self.layers)}"

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
            store.verifying = False
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
        for store in self.stores:
            store.main, store.front, store.seen, store.shift, store.paged = [], [], [], None, []
            store.statistics, store.marks, store.prompt = {}, [], []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, AttentionLayer):
                layer.columns = 0
            else:
                self.layers[index] = LinearAttentionLayer()
        self.enforcer.reset()
        self._recorded, self._gaps, self._valid, self.trail = {}, False, None, None
        self.broken, self.peak_bytes, self.prefilled = None, 0, None
        self.stepping = False
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
                if layer.juror is not None:
                    twin.juror = stores[layer.index] = layer.juror.beside(twin.store)
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
