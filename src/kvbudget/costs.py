"""Costs: bytes of one kept entry, and of what a sequence holds outside of the layers that a budget governs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from kvbudget.errors import UnsupportedModel
from kvbudget.models import CacheGeometry
from kvbudget.policy.base import LookingBack, Parts
from kvbudget.policy.clusters import HeadClusters
from kvbudget.segments.entries import WINDOW_OVERRUN


@dataclass(frozen=True)
class EntryCost:
    """Bytes of one kept entry of one KV head, and bytes per sequence and KV head that do not depend on its entries.

    ``aside`` are the bytes of an entry in the destination's own segments (0: it holds none that count).
    """

    per_entry: float
    fixed: float = 0.0
    aside: float = 0.0


def entry_cost(geometry: CacheGeometry, parts: Parts, dtype: torch.dtype) -> EntryCost:
    """Cost of an entry under a policy: payload or codes, position and states, and full-precision tails."""
    if not geometry.budgeted_layers:
        return EntryCost(0.0)
    shape = geometry.layers[geometry.budgeted_layers[0]]
    item = dtype.itemsize
    widths = (shape.key_head_dim, shape.value_head_dim)
    looks_back = parts.selector if isinstance(parts.selector, LookingBack) else None
    per_entry = 4.0 * (1 + len(parts.states))
    fixed = 0.0 if parts.scorer is None else parts.scorer.fixed_bytes(shape.key_head_dim, shape.group_size)
    fixed += 0.0 if looks_back is None else looks_back.fixed_bytes(shape.value_head_dim, shape.group_size)
    apart = parts.protect.sinks if parts.position_mode == "cache" else 0  # with a tail and states of their own
    if parts.sharing is not None and parts.sharing.merges:
        held, once = parts.sharing.entry_bytes(geometry, item, apart)
        if parts.jury:  # in which every layer counts
            layers = len(parts.sharing.together(geometry, geometry.budgeted_layers[0]))
            held, once = held / layers, once / layers
        per_entry, fixed = per_entry + held, fixed + once
    elif parts.codec is None:
        per_entry += item * sum(widths)
    else:
        for codec, width in zip(parts.codec, widths, strict=True):
            per_entry += codec.bytes_per_entry(width)
            tail = codec.longest_tail + codec.sinks + apart + (codec.unit if codec.unit > 1 else 0)
            once = codec.state_bytes(width) * (2 if apart else 1)
            fixed += tail * item * width + codec.unit * codec.bytes_per_entry(width) + once
    if isinstance(parts.projection, HeadClusters):
        # Here too: a layer whose entries cost more than the mean may be the one that holds one more of them.
        spared = item * shape.key_head_dim * (1 - parts.projection.key_share(geometry))
        per_entry, fixed = per_entry - spared, fixed + spared
    aside = 0.0
    if parts.destination is not None:
        fixed += parts.destination.fixed_bytes(*widths, item)
        aside = parts.destination.entry_bytes(*widths)
    return EntryCost(per_entry, fixed, aside)


def overhead_bytes(config: PreTrainedConfig, dtype: torch.dtype, geometry: CacheGeometry | None = None) -> int:
    """Bytes per sequence of what no budget can shrink: sliding windows, convolution and recurrent states.

    ``geometry`` is that of the configuration, or what a policy's sharing map makes of it.
    """
    geometry = geometry or CacheGeometry.from_config(config)
    total = 0
    for shape in geometry.layers:
        if shape.kind == "sliding" and shape.window:
            room = shape.window - 1 + WINDOW_OVERRUN
            total += room * (shape.bytes_per_token(dtype.itemsize) + 4 * shape.num_kv_heads)
    return total + (state_bytes(config, dtype) if geometry.has_recurrent_state else 0)


def state_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes per sequence of convolution and recurrent states, found by one token through the model without weights.

    Raises:
        UnsupportedModel: when the model cannot be run on the meta device.
    """
    # bfloat16 on the meta device is what every operator has a shape rule for; states of that type follow the model's.
    config = copy.deepcopy(config)
    cache = DynamicCache(config=config)
    try:
        with torch.device("meta"), torch.inference_mode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    except Exception as error:
        raise UnsupportedModel(
            f"the size of the recurrent states of {config.model_type} cannot be found: {error}"
        ) from error
    total = 0
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            for state in (*layer.conv_states.values(), *layer.recurrent_states.values()):
                if state is not None:
                    item = dtype.itemsize if state.dtype == torch.bfloat16 else state.dtype.itemsize
                    total += state.numel() * item
    return total
