"""The driver of policies whose answers are revised: the newest tokens go through the model again with each new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.policy.base import LookingBack


@contextmanager
def revising(model: PreTrainedModel, cache: KVCache) -> Iterator[None]:
    """Inside of it, a forward of one new token per sequence carries the tokens generated just before it once more.

    As many as the window of the cache's policy has beside the new token, as far as they were fed in here one at a time; their
    hidden states, keys and values are computed anew in every layer. The model then returns logits of all of them, the new
    token's last, as ``model.generate`` expects. Policies that do not look back, other caches and forwards of more tokens
    are left alone. The model is hooked until the end of the block and never changed.
    """
    looks_back = cache.parts.selector
    if not isinstance(looks_back, LookingBack) or looks_back.window < 2:
        yield
        return
    most = looks_back.window - 1
    known = 0

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        nonlocal known
        ids = given.get("input_ids", args[0] if args else None)
        if given.get("past_key_values") is not cache or cache.probing is not None:
            return None
        trail = cache.trail if cache.get_seq_length() == known else None
        if ids is None or ids.shape[1] != 1 or cache.recording:
            cache.trail = None
            return None
        if trail is not None and trail.shape[1] and cache.revisit(trail.shape[1]):
            given = dict(given)
            if (positions := given.get("position_ids")) is not None:
                back = torch.arange(-trail.shape[1], 1, device=positions.device)
                given["position_ids"] = positions + back
            ids = torch.cat([trail, ids], dim=1)
            if "input_ids" in given:
                given["input_ids"] = ids
            else:
                args = (ids, *args[1:])
        cache.trail = ids[:, -most:].clone()
        known = cache.get_seq_length() + ids.shape[1]
        return args, given

    cache.trail = None
    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        cache.trail = None
