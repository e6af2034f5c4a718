"""Guards: what a forward must not do to a cache that holds a text, found before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvbudget.errors import CacheError


def check_positions(position_ids: Tensor | None, valid: Tensor | None, columns: int, seen: Sequence[int]) -> None:
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
        if valid is not None and not bool(valid[b].any()):
            continue
        held = seen[min(b, len(seen) - 1)]
        if not held <= position <= columns:
            raise CacheError(
                f"the new tokens start at position {position}, but the cache has seen {held} tokens of this text; pass "
                "only new tokens, or the full ids with a full attention_mask, and not the same text twice"
            )


def check_rope_switch(switch: int | None, seen: Sequence[int], new: Sequence[int]) -> None:
    """Refuses to go on where longrope begins to rotate the whole text differently, cached keys included."""
    if switch is None or not seen:
        return
    before, after = max(seen), max(s + n for s, n in zip(seen, new, strict=True))
    if 0 < before <= switch < after:
        raise CacheError(
            f"{after - before} tokens after {before} lead beyond {switch}, where this model's longrope rotates "
            "all keys differently, so the cached ones would be wrong; feed a longer prompt in one forward (no "
            f"prefill_chunk_size), or stay within {switch} tokens"
        )


def rope_switch(config: PreTrainedConfig) -> int | None:
    """The length of text beyond which longrope rotates all positions by other factors, if the model has it."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return parameters["original_max_position_embeddings"]


def has_gap(valid: Tensor, seen: Sequence[int]) -> bool:
    """Whether padding ``valid [B, n]`` follows tokens of its sequence, of which ``seen[b]`` came earlier."""
    begun = valid.int().cummax(1).values.bool()
    if seen:
        begun |= torch.tensor([s > 0 for s in seen], device=valid.device)[:, None]
    return bool((begun & ~valid).any())
