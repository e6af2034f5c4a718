"""A second, plain budgeted cache: one sequence, float64 softmax over lists of entries, rules written from the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d
from transformers import PreTrainedModel

from kvbudget.attending import AttentionLayer
from kvbudget.cache import KVCache
from kvbudget.layer import AttentionCall


@dataclass
class Head:
    """The entries of one KV head: positions, keys, values and whatever a rule remembers per entry."""

    positions: Tensor
    keys: Tensor
    values: Tensor
    memory: Tensor

    def take(self, index: Tensor) -> None:
        self.positions, self.keys, self.values, self.memory = (
            column[index] for column in (self.positions, self.keys, self.values, self.memory)
        )


@dataclass
class Step:
    """What a rule sees after the attention of a forward: the heads with the new entries, and the softmax weights.

    ``weights[h] [G, n, T]`` are those of the n new queries over the entries of head h; ``seen`` tokens in all.
    """

    heads: list[Head]
    weights: list[Tensor]
    seen: int

    @property
    def new(self) -> int:
        return self.weights[0].shape[1]


Rule = Callable[[Step, int], Sequence[Tensor]]
"""Updates the heads' memory and returns, per head, the indices to keep when at most ``limit`` entries may stay."""


@dataclass
class Brute:
    """Replays recorded attention calls with a rule and checks outputs and kept positions against the cache's."""

    rule: Rule
    limit: int | Sequence[int]
    every: int = 1
    layers: dict[int, list[Head]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def forward(self, index: int, call: AttentionCall) -> Tensor:
        """Attention, then the rule, then eviction. Returns ``[Hq, n, Dv]``."""
        query, key, value = (x[0].double() for x in (call.query, call.key, call.value))
        first, new = self.seen.get(index, 0), key.shape[1]
        steps = torch.arange(first, first + new)
        heads = self.layers.setdefault(index, [])
        if not heads:
            empty = torch.zeros(0, key.shape[2]).double()
            heads += [
                Head(steps[:0], empty, torch.zeros(0, value.shape[2]).double(), torch.zeros(0).double()) for _ in key
            ]
        outs, weights = [], []
        for h, (head, grouped) in enumerate(zip(heads, query.unflatten(0, (len(heads), -1)), strict=True)):
            head.positions = torch.cat([head.positions, steps])
            head.keys, head.values = torch.cat([head.keys, key[h]]), torch.cat([head.values, value[h]])
            head.memory = torch.cat([head.memory, torch.zeros(new).double()])
            logits = grouped @ head.keys.T * call.scale
            logits = logits.masked_fill(head.positions > steps[:, None], float("-inf"))
            weights.append(torch.softmax(logits, dim=-1))
            outs.append(weights[-1] @ head.values)
        self.seen[index] = first + new
        limit = self.limit if isinstance(self.limit, int) else self.limit[index]
        every = min(self.every, max(1, limit // 8))
        slack = every if new <= every > 1 else 0
        lost = len(heads[0].positions) < self.seen[index]
        over = len(heads[0].positions) > limit - (1 if slack and lost else 0)
        target = limit - slack
        kept = self.rule(Step(heads, weights, first + new), target)
        for head, chosen in zip(heads, kept, strict=True):
            if over:
                head.take(chosen.sort().values)
        return torch.cat(outs)


def kept_positions(cache: KVCache, layer: int, b: int = 0) -> list[list[int]]:
    """Positions held per KV head of sequence b, read from the segments."""
    store = cache.enforcer.layers[layer]
    rows = []
    for h in range(store.num_kv_heads):
        held = [segment.meta.row("position", b * store.num_kv_heads + h) for segment in store.main]
        rows.append(torch.cat(held).tolist())
    return rows


def run(
    model: PreTrainedModel, cache: KVCache, ids: Tensor, sizes: Sequence[int], brute: Brute | None = None
) -> Tensor:
    """Feeds ``ids [B, T]`` in forwards of these sizes; checks the cache (and the brute force) after each; logits."""
    assert sum(sizes) == ids.shape[1]
    calls: list[tuple[int, AttentionCall, Tensor]] = []
    attend, step = cache.attend, cache.step

    def recorded(index: int, call: AttentionCall, *args: object) -> Tensor:
        out = attend(index, call, *args)
        calls.append((index, call, out))
        return out

    def stepped(layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, *args: float) -> Tensor | None:
        out = step(layer, query, key, value, *args)
        if out is not None:
            calls.append((layer.index, AttentionCall(query, key, value, *args), out.transpose(1, 2)))
        return out

    cache.attend, cache.step = recorded, stepped  # type: ignore[method-assign]
    logits, begin = [], 0
    for size in sizes:
        calls.clear()
        with torch.inference_mode():
            logits.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
        cache.check_integrity()
        if brute is None:
            continue
        for index, call, out in calls:
            torch.testing.assert_close(out[0].double(), brute.forward(index, call), atol=2e-5, rtol=1e-4)
        for index, heads in brute.layers.items():
            expected = [head.positions.tolist() for head in heads]
            assert kept_positions(cache, index) == expected, f"layer {index} after {begin} tokens"
    del cache.attend, cache.step
    return torch.cat(logits, dim=1)


def chunks(length: int, size: int) -> list[int]:
    """Sizes of the forwards that feed ``length`` tokens, at most ``size`` at a time."""
    return [min(size, length - begin) for begin in range(0, length, size)]


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores; ties go to the older entry."""
    return scores.argsort(descending=True, stable=True)[:count]


def with_newest(scores: Tensor, positions: Tensor, first: int, count: int) -> Tensor:
    """The ``count`` best entries when all positions from ``first`` on are among them."""
    return best(scores.masked_fill(positions >= first, float("inf")), count)


def distinct_text(length: int, seed: int = 0) -> Tensor:
    """Ids ``[1, length]`` below 1024, each used once: equal tokens would have equal key norms in the first layer."""
    return torch.randperm(1023, generator=torch.Generator().manual_seed(seed))[None, :length] + 1


def running_votes(window: int, kernel: int = 5, pooling: str = "avg", reduction: str = "mean") -> Rule:
    """SnapKV's rule with running votes; the newest ``window`` entries are in the denominator, but neither pooled nor judged."""
    pool = avg_pool1d if pooling == "avg" else max_pool1d

    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for head, weights in zip(step.heads, step.weights, strict=True):
            rows = weights[:, -window:].sum(1)
            fresh = rows.mean(0) if reduction == "mean" else rows.max(0).values
            head.memory = max(0.0, 1 - step.new / window) * head.memory + fresh
            older = head.memory[head.positions < step.seen - window]
            if len(older):
                older = pool(older[None], kernel, stride=1, padding=kernel // 2)[0]
            scores = torch.cat([older, torch.zeros(len(head.memory) - len(older))])
            kept.append(with_newest(scores, head.positions, step.seen - window, limit))
        return kept

    return rule
