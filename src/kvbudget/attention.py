"""The attention function that transformers calls: ours for caches that carry a handle, sdpa's behavior for all others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvbudget.errors import CacheError
from kvbudget.layer import AttentionCall

NAME = "kvbudget"


class LayerHandle(tuple):
    """Travels through the model in place of a layer's key and value; only our attention function may open it.

    It holds ``(cache, layer, key, value)``: the cache, its layer, and the new keys and values. Models whose layers share
    entries hand it on to the layers that read them.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise CacheError(
            f"something other than kvbudget's attention touched the cached keys (attribute {name!r}): a KVCache holds no "
            "tensor per position. Select its attention with model.set_attn_implementation('kvbudget') after any other "
            "change of the implementation; models that compute on cached keys themselves are not supported"
        )

    def __getitem__(self, item: object) -> NoReturn:
        self.__getattr__(f"[{item!r}]")


class TextLength(int):
    """The length that a KVCache reports to the mask function, which thereby knows that no T x T mask is needed."""


@dataclass
class LazyMask:
    """What the mask function knows of a call that carries a KVCache, in place of a mask."""

    arguments: dict[str, Any]

    def valid(self, columns: int, new: int) -> Tensor | None:
        """Which of the ``new`` tokens after ``columns`` seen ones are not padding: bool ``[B, new]``, None for all."""
        if not self.arguments.get("allow_is_causal_skip", True):
            raise CacheError(
                "this call asks for a mask that is not plainly causal (a prefix, packed sequences or image blocks); "
                "KVCache serves causal text only, use a DynamicCache for it"
            )
        padding = self.arguments.get("attention_mask")
        if padding is None:
            return None
        if padding.shape[-1] < columns + new:
            raise CacheError(
                f"attention_mask covers {padding.shape[-1]} tokens, but the cache has seen {columns} and {new} more come; "
                "pass a mask over the whole text"
            )
        valid = padding[:, columns : columns + new].bool()
        return None if bool(valid.all()) else valid


def mask_function(**arguments: Any) -> LazyMask | Tensor | None:
    """Registered with transformers' mask interface: no mask for a KVCache, sdpa's boolean one for every other call."""
    return LazyMask(arguments) if isinstance(arguments["kv_length"], TextLength) else sdpa_mask(**arguments)


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | LayerHandle,
    value: Tensor | LayerHandle,
    attention_mask: LazyMask | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Registered with transformers' attention interface under ``"kvbudget"``.

    ``query [B, Hq, n, D]``; key and value are handles of a `KVCache`, or tensors ``[B, Hkv, T, D]`` of any other cache.
    Returns ``[B, n, Hq, Dv]`` and no weights.
    """
    if not isinstance(key, LayerHandle):
        assert not isinstance(attention_mask, LazyMask)
        extra = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
        extra = {name: x for name, x in extra.items() if x is not None}
        return _ordinary(module, query, key, value, attention_mask, dropout, scaling, extra | kwargs)
    cache, layer, new_key, new_value = key
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.stepping and s_aux is None:
        answer = cache.step(layer, query, new_key, new_value, scale, softcap)
        if answer is not None:
            return answer, None
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise CacheError(
            "a KVCache is for inference: call model.eval(), and the model under torch.inference_mode() or torch.no_grad()"
        )
    if isinstance(attention_mask, Tensor):
        raise CacheError(
            f"a ready-made mask of shape {tuple(attention_mask.shape)} cannot be used with a KVCache; "
            "pass the 2-D padding mask [batch, tokens] instead"
        )
    call = AttentionCall(query, new_key, new_value, scale, softcap, sliding_window, s_aux)
    index = module.layer_idx if layer.readers else layer.index
    out = cache.attend(index, call, attention_mask, kwargs.get("position_ids"))
    return out.transpose(1, 2), None


def _ordinary(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor | LayerHandle,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model does without kvbudget: sdpa, or its own eager function where it has no sdpa form."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        if mask is None and query.shape[2] > 1:
            # Where nothing is padded sdpa's masks are left out; what it then masks itself is plainly causal.
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
