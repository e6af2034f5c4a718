"""The geometry of a model's cache: what each layer stores per token, read from a configuration without weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from kvbudget.errors import UnsupportedModel

LayerKind = Literal["full", "sliding", "chunked", "linear", "conv", "shared", "none", "other"]

# transformers' layer types and what they store; a type that is absent stores something that kvbudget does not know.
_KINDS: dict[str, LayerKind] = {
    "full_attention": "full",
    "hybrid": "full",
    "sliding_attention": "sliding",
    "hybrid_sliding": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "conv": "conv",
}
_ATTENTION_KINDS = ("full", "sliding", "chunked")


@dataclass(frozen=True)
class LayerGeometry:
    """What one layer stores.

    `kind` is "full" (every token stays, the layers that a budget governs), "sliding" or "chunked" (only the last
    `window - 1` tokens stay between two forward calls), "linear" or "conv" (a state of fixed size), "shared" (reads
    what an earlier layer stores), "none" (a layer without attention) or "other" (a kind that kvbudget does not know).
    Head counts and dimensions are 0 where no keys and values are stored. `recurrent` marks every layer with a
    recurrent or convolution state, also one that holds attention beside it. `owner` is the layer that a "shared" one reads
    from, by the model's own map or by a policy's.
    """

    kind: LayerKind
    num_attention_heads: int = 0
    num_kv_heads: int = 0
    key_head_dim: int = 0
    value_head_dim: int = 0
    window: int | None = None
    recurrent: bool = False
    owner: int | None = None

    def reading(self, owner: int) -> "LayerGeometry":
        """The layer as one that stores nothing and reads what layer `owner` stores."""
        return LayerGeometry("shared", self.num_attention_heads, recurrent=self.recurrent, owner=owner)

    def sliding(self, window: int) -> "LayerGeometry":
        """The layer with a sliding window of so many tokens (0: as it is)."""
        return replace(self, kind="sliding", window=window) if window else self

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head (G = Hq / Hkv); 0 where there is no attention."""
        return self.num_attention_heads // self.num_kv_heads if self.num_kv_heads else 0

    def stored_tokens(self, num_tokens: int) -> int:
        """Tokens of one sequence that an unbudgeted cache holds in this layer after `num_tokens` tokens."""
        if self.window is not None:
            return min(num_tokens, self.window - 1)
        return num_tokens if self.kind == "full" else 0

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values, `itemsize` bytes per element; 0 where none are stored."""
        return self.num_kv_heads * (self.key_head_dim + self.value_head_dim) * itemsize


@dataclass(frozen=True)
class CacheGeometry:
    """The geometry of a whole model's cache.

    `layers` has one entry per layer of the cache, `max_positions` is the trained range (None: unlimited or unknown)
    and `dtype` the one that the checkpoint declares (float32 where it declares none).

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    >>> geometry = CacheGeometry.from_config(config)
    >>> geometry.layers[0]  # doctest: +ELLIPSIS
    LayerGeometry(kind='full', num_attention_heads=8, num_kv_heads=2, key_head_dim=8, value_head_dim=8, ...)
    >>> geometry.cache_bytes(1000, itemsize=2)  # 2 layers, 2 KV heads, 8 + 8 elements of 2 bytes
    128000
    """

    layers: tuple[LayerGeometry, ...]
    max_positions: int | None
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "CacheGeometry":
        """Read the geometry from a transformers configuration (of a text model, or of one with a text part).

        The kinds of the layers are those that `DynamicCache(config=...)` builds. Raises UnsupportedModel for
        multi-head latent attention, whose cache holds no keys and values of heads, and for models without attention.
        """
        text = config.get_text_config(decoder=True)
        layer_types, arguments = get_layer_types_and_kwargs(text)
        sharing = getattr(text, "kv_sharing_modes", None) or [None] * len(layer_types)
        layers: list[LayerGeometry] = []
        stored: dict[str, int] = {}
        for i, (own, layer_type, mode, argument) in enumerate(
            zip(text.per_layer_config, layer_types, sharing, arguments, strict=True)
        ):
            if mode == "reuse":  # the last layer of its kind that stores anything, as transformers hands them on
                layers.append(LayerGeometry("shared", own.num_attention_heads, owner=stored[text.layer_types[i]]))
                continue
            stored[layer_type] = i
            layers.append(_layer(own, layer_type, argument.get("sliding_window")))
        dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32
        return cls(
            layers=tuple(layers),
            max_positions=getattr(text, "max_position_embeddings", None),
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        )

    @property
    def num_layers(self) -> int:
        """Layers of the cache, those without attention included."""
        return len(self.layers)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the attention layers (the largest number, where layers differ)."""
        return max((layer.num_attention_heads for layer in self.layers), default=0)

    @property
    def budgeted_layers(self) -> tuple[int, ...]:
        """Indices of the layers that a budget governs: full attention."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind == "full")

    def replaced(self, layers: Mapping[int, LayerGeometry]) -> "CacheGeometry":
        """The geometry with some of its layers replaced."""
        return replace(self, layers=tuple(layers.get(i, layer) for i, layer in enumerate(self.layers)))

    @property
    def has_recurrent_state(self) -> bool:
        """Whether some layer holds a recurrent or convolution state, which `cache_bytes` does not count."""
        return any(layer.recurrent for layer in self.layers)

    def bytes_per_token(self, itemsize: int | None = None) -> int:
        """Bytes by which one more token grows the budgeted layers of one sequence.

        `itemsize` is the bytes per element, that of `dtype` by default.
        """
        size = self.dtype.itemsize if itemsize is None else itemsize
        return sum(self.layers[i].bytes_per_token(size) for i in self.budgeted_layers)

    def floor_bytes(self, num_tokens: int, itemsize: int | None = None) -> int:
        """Bytes of one sequence that no budget governs, after `num_tokens` tokens: sliding and chunked layers."""
        size = self.dtype.itemsize if itemsize is None else itemsize
        return sum(
            layer.stored_tokens(num_tokens) * layer.bytes_per_token(size)
            for layer in self.layers
            if layer.window is not None
        )

    def cache_bytes(self, num_tokens: int, itemsize: int | None = None) -> int:
        """Bytes of the keys and values of an unbudgeted cache after `num_tokens` tokens of one sequence."""
        return self.bytes_per_token(itemsize) * num_tokens + self.floor_bytes(num_tokens, itemsize)


def _layer(config: Any, layer_type: str, window: int | None) -> LayerGeometry:
    """The geometry of one layer from its own configuration (`config.per_layer_config[i]`)."""
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModel(
            f"{config.model_type} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}), whose cache "
            "holds no keys and values of heads; use a model with multi-head or grouped-query attention"
        )
    if layer_type == "dummy":
        return LayerGeometry("none")
    kind = _KINDS.get(layer_type, "other")
    recurrent = layer_type in ("linear_attention", "conv", "hybrid", "hybrid_sliding")
    if kind not in _ATTENTION_KINDS:
        return LayerGeometry(kind, recurrent=recurrent)
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:
        raise UnsupportedModel(f"{config.model_type} declares no attention heads, so it has no KV cache")
    # GPT-BigCode and DBRX spell the number of KV heads in their own ways.
    nested = getattr(config, "attn_config", None)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or getattr(nested, "kv_n_heads", None) or num_heads
    if getattr(config, "multi_query", False):
        num_kv_heads = 1
    if config.model_type == "mimo_v2_flash" and kind == "sliding":
        num_kv_heads *= 2  # written in its modeling code, not in its configuration
    head_dim = (
        getattr(config, "attention_head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // num_heads
    )
    return LayerGeometry(
        kind=kind,
        num_attention_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_head_dim=head_dim,
        value_head_dim=getattr(config, "v_head_dim", None) or head_dim,
        window=window,
        recurrent=recurrent,
    )
