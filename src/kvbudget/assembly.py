"""Assembly: what a policy makes of a model's layers, and which of its combinations cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kvbudget.budget import Budget
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.jury import Juror
from kvbudget.layer import LayerCache
from kvbudget.models import CacheGeometry, Rotation, fingerprint, rotation_of
from kvbudget.policy.base import Granularity, LookingBack, Parts, Span, Trigger
from kvbudget.policy.clusters import HeadClusters
from kvbudget.policy.policy import Policy
from kvbudget.segments.base import Segment
from kvbudget.segments.dense import DenseSegment
from kvbudget.segments.joint import Group
from kvbudget.segments.quantized import QuantizedSegment


def check_recipe(policy: Policy, parts: Parts, budget: Budget, geometry: CacheGeometry) -> None:
    """Refuses policies that cannot keep this kind of budget on this model."""
    evicts = parts.scorer is not None
    window = max(layer.window or 0 for layer in geometry.layers)
    small = budget.kind == "fraction" or (budget.kind == "tokens" and budget.amount < window)
    if evicts and small and not geometry.budgeted_layers:
        raise BudgetError(
            f"every layer of this model is a sliding window of {window} tokens, which no policy shrinks to "
            f"{budget}; give at least {window} tokens, or bytes"
        )
    if budget.kind == "bytes" and policy.prefill_peak == "full_prompt":
        raise PolicyError(
            f"{policy} must hold the whole prompt before anything can leave, so the byte budget {budget} "
            "cannot hold during the prefill; give tokens or a fraction (budget=1024, budget='25%'), or use a method "
            "whose prefill is bounded (kvbudget methods)"
        )
    if budget.kind == "bytes" and parts.trigger.after_prefill and evicts:
        raise BudgetError(
            f"when='after_prefill' lets the cache grow while decoding, so the byte budget {budget} cannot hold; "
            "use when='over_budget', or give tokens or a fraction"
        )
    if isinstance(parts.selector, LookingBack) and (evicts or parts.codec is not None or parts.sharing is not None):
        raise PolicyError(
            f"{policy}: queries that are answered again need every entry as it was, so no method that evicts or codes goes "
            "with this selector; use it alone"
        )
    shares = any(layer.owner is not None for layer in geometry.layers)
    if shares and parts.selector is not None and not parts.jury:
        raise PolicyError(f"{policy}: what shared layers hold is read whole; use shared layers or the selector")
    if parts.sharing is not None and parts.sharing.merges:
        check_merged(policy, parts)
    if isinstance(parts.projection, HeadClusters):
        others = (
            parts.layers,
            parts.heads,
            parts.refinement,
            parts.selector,
            parts.destination,
            parts.codec,
            parts.sharing,
        )
        own = parts.granularity != Granularity() or parts.position_mode != "original"
        if own or any(part is not None for part in others):
            raise PolicyError(
                f"{policy}: heads that share keys hold the same entries in full precision, as many in all layers; use clusters "
                "of heads with a scorer alone, without codecs, allocators, destinations, selectors, units and moved positions"
            )
    elif parts.projection is not None:
        fitted = [recipe.name for recipe in policy.recipes if "calibration" in recipe.needs]
        if parts.position_mode != "original" or (parts.scorer is not None and parts.scorer.rotates) or len(fitted) > 1:
            raise PolicyError(
                f"{policy}: the heads that are held are mixtures of the model's, so what turns keys, or was fitted to the "
                "model's own heads, does not go with them; use another scorer, with original positions"
            )
    if parts.thinning and any(layer.kind not in ("full", "shared") for layer in geometry.layers):
        raise PolicyError(
            f"{policy} leaves tokens out of the layers above, which layers with sliding windows or recurrent states need; "
            "use another method, such as pyramidkv"
        )
    if parts.thinning and (shares or parts.projection is not None):
        raise PolicyError(
            f"{policy} leaves tokens out of the layers above; use it without shared layers and projected heads"
        )
    bounded = parts.plan is not None or parts.threshold is not None
    bounded = bounded or (parts.heads is not None and parts.heads.bounded)
    if evicts and budget.kind == "none" and not bounded:
        raise BudgetError(f"{policy} needs a budget: bytes ('16MiB'), tokens (1024) or a fraction ('25%')")


def check_merged(policy: Policy, parts: Parts) -> None:
    """Refuses what heads or layers that hold their entries together cannot do."""
    assert parts.sharing is not None
    others = parts.destination is not None or parts.codec is not None
    if not parts.sharing.aligned:
        if others or parts.layers is not None or parts.position_mode != "original":
            raise PolicyError(
                f"{policy}: merged layers hold the same entries, as they are; allocators over layers, codecs, destinations and "
                "moved positions do not go with that; use a scorer alone, at positions='original'"
            )
    elif parts.codec is not None:
        raise PolicyError(f"{policy}: what one codec has coded, another one cannot code again; use one of the codecs")
    elif parts.jury and parts.position_mode == "cache":
        raise PolicyError(
            f"{policy}: positions inside the cache keep sinks and the newest entries in all layers, which have nothing to vote on "
            "where they are coded together; leave allocators and destinations out, or use positions='original'"
        )


def laid_out(geometry: CacheGeometry, parts: Parts) -> CacheGeometry:
    """What the layers hold under a policy: fewer heads where it projects them, nothing where they read another layer's."""
    if parts.projection is not None:
        geometry = parts.projection.layout(geometry)
    if parts.sharing is None:
        return geometry
    if any(layer.owner is not None for layer in geometry.layers):
        raise PolicyError(
            "this model's layers share entries by a map of its own, which another map, and a codec over several layers or "
            "heads, cannot follow; leave them out"
        )
    return parts.sharing.layout(geometry)


def budgeted_layer(
    model: PreTrainedModel, index: int, geometry: CacheGeometry, parts: Parts, budget: Budget
) -> LayerCache:
    """Layer ``index`` with the segments, states and rotation that the policy's parts ask for."""
    shape = geometry.layers[index]
    looks_back = parts.selector if isinstance(parts.selector, LookingBack) else None
    rotation = rotation_for(model, index, parts)
    before_rope = parts.codec is not None and parts.codec[0].before_rope
    maker = segment_maker(parts, index, rotation_of(model, index) if before_rope else None)
    sharing = parts.sharing
    if sharing is not None and sharing.merges:
        layers = sharing.together(geometry, index)
        rotations = tuple(rotation_of(model, i) for i in layers) if sharing.aligned else ()
        turns = None if rotation is None or parts.position_mode != "cache" else rotation.inv_freq
        if turns is not None and not all(torch.equal(turns, other.inv_freq) for other in rotations):
            raise PolicyError(
                "the layers of this model turn their keys differently, so positions inside the cache are not the same in all "
                'that are coded together; use positions="original"'
            )
        if sharing.aligned or len(layers) > 1:
            maker = partial(sharing.segment, group=Group(layers, shape.num_kv_heads, rotations))
    layer = LayerCache(
        index,
        shape.num_kv_heads,
        make_segment=maker,
        states=parts.states,
        rotation=rotation,
        selector=None if isinstance(parts.selector, LookingBack) else parts.selector,
        reads=looks_back,
    )
    if sharing is not None and sharing.merges:
        layer.together = sharing.together(geometry, index)
    layer.depth = geometry.budgeted_layers.index(index) / max(1, len(geometry.budgeted_layers) - 1)
    layer.page = parts.granularity.size
    layer.hard = budget.kind == "bytes"
    layer.moving = parts.position_mode == "moved"
    layer.apart = parts.protect.sinks if parts.position_mode == "cache" else 0
    return layer


def juror(model: PreTrainedModel, index: int, geometry: CacheGeometry, parts: Parts, owner: LayerCache) -> Juror:
    """Layer ``index`` as one that judges what ``owner`` holds for it."""
    states = tuple(name for name in parts.states if name not in parts.moves)  # only the owner's keys are moved
    rotation = rotation_for(model, index, parts)
    layer = Juror(index, owner, states=states, rotation=rotation, selector=owner.selector)
    layer.depth = owner.together.index(index) / max(1, len(owner.together) - 1)
    layer.page, layer.hard = owner.page, owner.hard
    return layer


def rotation_for(model: PreTrainedModel, index: int, parts: Parts) -> Rotation | None:
    """How a layer turns its keys, where the policy asks for it."""
    rotates = parts.position_mode != "original" or (parts.scorer is not None and parts.scorer.rotates)
    return rotation_of(model, index) if rotates else None


def segment_maker(parts: Parts, index: int, rotation: Rotation | None = None) -> Any:
    """What makes a segment of a number of rows of layer ``index``: dense, clustered, or behind the policy's codecs.

    ``rotation`` is what codecs need that code keys before RoPE.
    """
    if isinstance(clusters := parts.projection, HeadClusters):
        return lambda num_rows: clusters.segment(index, num_rows)
    if parts.codec is None:
        return DenseSegment
    key_codec, value_codec = (codec.at(index) for codec in parts.codec)

    def make(num_rows: int) -> Segment:
        return QuantizedSegment(num_rows, key_codec, value_codec, rotation=rotation)

    return make


def bound(policy: Policy, model: PreTrainedModel) -> Policy:
    """Lets recipes that go by a calibration load it for this model."""
    if not any(recipe.calibrated for recipe in policy.recipes):
        return policy
    mark = fingerprint(model)
    return Policy(tuple(recipe.bind(mark) if recipe.calibrated else recipe for recipe in policy.recipes))


def with_trigger(parts: Parts, when: str | None) -> Parts:
    """The parts with the trigger that ``when`` names (None: as they are)."""
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
    return replace(parts, trigger=trigger)


def checked_spans(protect: Sequence[tuple[int, int]]) -> list[Span]:
    """The ranges in order, with those joined that overlap or touch, so that no entry counts twice."""
    spans: list[Span] = []
    for start, end in sorted(protect):
        if not 0 <= start < end:
            raise PolicyError(
                f"protect=({start}, {end}) is not a range of positions; give (start, end) with start < end"
            )
        if spans and start <= spans[-1][1]:
            start, end = spans[-1][0], max(spans.pop()[1], end)
        spans.append((int(start), int(end)))
    return spans
