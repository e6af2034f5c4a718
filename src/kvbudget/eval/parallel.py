"""Tensor parallelism with ragged heads, simulated: placements from measured lengths, judged on texts they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.eval.texts import passages
from kvbudget.placement import Placement, balance, balanced, contiguous

Kept = list[list[float]]


@dataclass(frozen=True)
class Simulation:
    """Heads on ``devices`` by measured lengths: one row per placement, plain tensor parallelism first.

    ``rows[i]`` is (name, copies per layer on average, efficiency on the profiled texts, efficiency on the others), efficiency
    being mean load over the load of the slowest device, layer by layer. ``spread`` is the mean over layers of the longest
    head over the mean head.
    """

    devices: int
    heads: int
    layers: int
    spread: float
    rows: list[tuple[str, float, float, float]]
    placements: list[list[list[int]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``placements[l][p]`` are the heads of device p by the placement with most copies."""
        names = ("placement", "copies", "profiled", "other_texts")
        return {**vars(self), "rows": [dict(zip(names, row, strict=True)) for row in self.rows]}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: str,
    budget: str,
    context: int,
    count: int,
    seed: int = 0,
    text: str | None = None,
) -> list[Kept]:
    """Entries that each layer and KV head keeps, for each of ``count`` texts of ``context`` tokens."""
    found = []
    for ids in passages(tokenizer, context, count, seed, text):
        cache = KVCache(model, policy, budget, max_length=context)
        cache.prefill(model, ids[None].to(model.device), tokenizer=tokenizer)
        found.append([[float(n) for n in layer[0]] for layer in cache.report().kept])
    return found


def simulate(kept: Sequence[Kept], devices: int, copies: Sequence[int] = (1, 2, 4)) -> Simulation:
    """Places heads by the mean lengths of the first half of the texts, and judges the placements on both halves."""
    half = max(1, len(kept) // 2)
    profile = _mean(kept[:half])
    layers, heads = len(profile), len(profile[0])
    rows, placements = [], []
    for extra in (None, 0, *copies):
        placements = [
            contiguous(heads, devices) if extra is None else balanced(entries, devices, extra) for entries in profile
        ]
        added = sum(sum(map(len, placement.heads)) - heads for placement in placements) / layers
        name = "plain" if extra is None else f"balanced, up to {extra} copies" if extra else "balanced"
        rows.append((name, added, _efficiency(placements, kept[:half]), _efficiency(placements, kept[half:] or kept)))
    spread = sum(max(entries) * heads / max(sum(entries), 1e-30) for entries in profile) / layers
    return Simulation(devices, heads, layers, spread, rows, [[list(own) for own in p.heads] for p in placements])


def _mean(kept: Sequence[Kept]) -> Kept:
    return [[sum(values) / len(kept) for values in zip(*heads, strict=True)] for heads in zip(*kept, strict=True)]


def _efficiency(placements: Sequence[Placement], kept: Sequence[Kept]) -> float:
    """Over all texts: what perfect balance needs over what the slowest devices need."""
    found = [balance(placements, one) for one in kept]
    return sum(b.mean for b in found) / sum(b.slowest for b in found)
