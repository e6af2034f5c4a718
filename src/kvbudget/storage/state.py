"""What a cache is between two forwards, as plain numbers and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvbudget.attending import AttentionLayer
from kvbudget.cache import KVCache
from kvbudget.layer import LayerCache
from kvbudget.prefill import Prefilled
from kvbudget.segments.base import Segment
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import Columns, RaggedTable, ranges

Tensors = dict[str, Tensor]
_RECURRENT = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")
_LAYER = ("seen", "prompt", "shift", "capacity", "paged")


def pack(cache: KVCache) -> tuple[dict[str, Any], Tensors]:
    """Numbers (as JSON has them) and tensors of everything that the cache holds."""
    tensors: Tensors = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, AttentionLayer):
            own = _pack_layer(layer.own, str(index), tensors) if layer.own is not None else {}
            layers.append({"columns": layer.columns, **own})
        else:
            layers.append(_pack_recurrent(layer, str(index), tensors))
    state: dict[str, Any] = {
        "layers": layers,
        "measured": cache.enforcer.measured,
        "filled": cache.enforcer.filled,
        "evictions": cache.enforcer.evictions,
        "gaps": cache._gaps,
        "question_visible": cache.question_visible,
        "peak_bytes": cache.peak_bytes,
        "blind": None,
    }
    if cache.prefilled is not None:
        state["blind"], tensors["ids"] = cache.prefilled.blind, cache.prefilled.ids
    return state, tensors


def unpack(cache: KVCache, state: Mapping[str, Any], tensors: Tensors) -> None:
    """Gives a new cache of the same model and policy what `pack` found; ``tensors`` lie where they shall stay."""
    for index, (layer, numbers) in enumerate(zip(cache.layers, state["layers"], strict=True)):
        if isinstance(layer, AttentionLayer):
            shape = cache.geometry.layers[index]
            layer.columns = numbers["columns"]
            if layer.own is None:
                continue
            _unpack_layer(cache, layer.own, (shape.key_head_dim, shape.value_head_dim), numbers, str(index), tensors)
        else:
            _unpack_recurrent(layer, numbers, str(index), tensors)
    cache.enforcer.measured = [list(row) for row in state["measured"]]
    cache.enforcer.filled, cache.enforcer.evictions = state["filled"], state["evictions"]
    cache._gaps, cache.question_visible, cache.peak_bytes = (
        state["gaps"],
        state["question_visible"],
        state["peak_bytes"],
    )
    cache.prefilled = None if state["blind"] is None else Prefilled(tensors["ids"].cpu(), state["blind"])


def _pack_layer(store: LayerCache, at: str, tensors: Tensors) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: getattr(store, name) for name in _LAYER}
    for name, column in store.statistics.items():
        tensors[f"{at}.statistics.{name}"] = column
    for b, marks in enumerate(store.marks):
        tensors[f"{at}.marks.{b}"] = marks
    numbers |= {"statistics": list(store.statistics), "marks": len(store.marks)}
    for part in ("main", "front"):
        segments = getattr(store, part)
        numbers[part] = [_pack_segment(segment, f"{at}.{part}.{i}", tensors) for i, segment in enumerate(segments)]
    return numbers


def _unpack_layer(
    cache: KVCache, store: LayerCache, widths: tuple[int, int], numbers: Mapping[str, Any], at: str, tensors: Tensors
) -> None:
    for name in _LAYER:
        setattr(store, name, numbers[name])
    store.statistics = {name: tensors[f"{at}.statistics.{name}"] for name in numbers["statistics"]}
    store.marks = [tensors[f"{at}.marks.{b}"].cpu() for b in range(numbers["marks"])]
    store.main = [store.make_segment(store.num_rows) for _ in numbers["main"]]
    destination = cache.parts.destination
    if numbers["front"]:
        assert destination is not None
        store.front = [destination.make_segment(store.num_rows, *widths) for _ in numbers["front"]]
    for part in ("main", "front"):
        for i, (segment, each) in enumerate(zip(getattr(store, part), numbers[part], strict=True)):
            _unpack_segment(segment, each, f"{at}.{part}.{i}", tensors)


def _pack_segment(segment: Segment, at: str, tensors: Tensors) -> dict[str, Any]:
    own = [name for name, value in vars(segment).items() if isinstance(value, Tensor)]
    tensors.update({f"{at}.{name}": getattr(segment, name) for name in own})
    tables = [_pack_table(table, f"{at}.{i}", tensors) for i, table in enumerate(segment.tables())]
    sides = {}
    if isinstance(segment, QuantizedSegment):
        for side, store in (("key", segment.key), ("value", segment.value)):
            tensors.update({f"{at}.{side}.{name}": x for name, x in store.state.items()})
            sides[side] = {"started": store.started, "state": list(store.state)}
    return {"own": own, "tables": tables, "sides": sides}


def _unpack_segment(segment: Segment, numbers: Mapping[str, Any], at: str, tensors: Tensors) -> None:
    for name in numbers["own"]:
        setattr(segment, name, tensors[f"{at}.{name}"])
    for side, kept in numbers["sides"].items():
        store = getattr(segment, side)
        store.started = list(kept["started"])
        store.state = {name: tensors[f"{at}.{side}.{name}"] for name in kept["state"]}
    for i, (table, each) in enumerate(zip(segment.tables(), numbers["tables"], strict=True)):
        _unpack_table(table, each, f"{at}.{i}", tensors)


def _pack_table(table: RaggedTable, at: str, tensors: Tensors) -> dict[str, Any]:
    for name in table.columns:
        column = table.flat(name)
        if name == "position" and (runs := _runs(table)).numel() < column.numel():
            tensors[f"{at}.runs"] = runs
        else:
            tensors[f"{at}.{name}"] = column
    return {"lengths": table.lengths, "step": table.step, "limits": table.limits, "columns": list(table.columns)}


def positions_of(tensors: Mapping[str, Tensor], at: str) -> Tensor:
    """The positions ``[N]`` of the table that was packed as ``at``, rows after each other."""
    if f"{at}.runs" not in tensors:
        return tensors[f"{at}.position"]
    runs = tensors[f"{at}.runs"]
    begins, counts = runs.T.tolist()
    return ranges(begins, counts, dtype=torch.int32, device=runs.device)


def _unpack_table(table: RaggedTable, numbers: Mapping[str, Any], at: str, tensors: Tensors) -> None:
    table.step, table.limits = numbers["step"], numbers["limits"]
    table.columns = Columns()
    for name in numbers["columns"]:
        table.columns[name] = positions_of(tensors, at) if name == "position" else tensors[f"{at}.{name}"]
    lengths = list(numbers["lengths"])
    table.lengths, table.capacities = lengths, list(lengths)
    table.starts = [sum(lengths[:r]) for r in range(len(lengths))]


def _runs(table: RaggedTable) -> Tensor:
    """Where runs of consecutive positions begin and how long they are, rows after each other: int32 ``[n, 2]``."""
    position = table.flat("position").cpu()
    begins = torch.ones(len(position), dtype=torch.bool)
    begins[1:] = position[1:] != position[:-1] + 1
    edges = torch.cat([begins.nonzero()[:, 0], torch.tensor([len(position)])])
    return torch.stack([position[edges[:-1]], edges.diff().int()], dim=1)


def _pack_recurrent(layer: LinearAttentionLayer, at: str, tensors: Tensors) -> dict[str, Any]:
    for kind in ("conv_states", "recurrent_states"):
        tensors.update({f"{at}.{kind}.{i}": x for i, x in getattr(layer, kind).items() if x is not None})
    return {name: {str(i): value for i, value in getattr(layer, name).items()} for name in _RECURRENT}


def _unpack_recurrent(layer: LinearAttentionLayer, numbers: Mapping[str, Any], at: str, tensors: Tensors) -> None:
    for name in _RECURRENT:
        getattr(layer, name).update({int(i): value for i, value in numbers[name].items()})
    for kind in ("conv_states", "recurrent_states"):
        states = getattr(layer, kind)
        for i in states:
            if (state := tensors.get(f"{at}.{kind}.{i}")) is not None:
                states[i] = state
                layer.dtype, layer.device = layer.dtype or state.dtype, state.device
