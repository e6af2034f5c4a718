"""A plain second execution of plans with judging passes: one sequence, float64, lists of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from brute import Head, kept_positions
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache

Judge = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""From logits ``[G, n, T]`` of the pass's queries over the held entries of each head, and over the pass's own tokens
``[G, n, n]`` (-inf where not causal), to scores ``[T]`` of each head."""


@dataclass
class PlanBrute:
    """Watches a prefill; after each eviction, every head must hold its best entries by ``judge`` and nothing else.

    ``joint`` lets the heads of a layer compete. How many entries a layer holds is taken from the cache; ``counts`` collects
    them as ``[eviction][layer][head]``.
    """

    judge: Judge
    joint: bool = False

    def run(self, model: PreTrainedModel, cache: KVCache, ids: Tensor, **options: object) -> list[list[list[int]]]:
        layers: dict[int, list[Head]] = {}
        scores: dict[int, list[Tensor]] = {}
        seen: dict[int, int] = {}
        counts = []
        attend, settle = cache.attend, cache.enforcer.settle_all

        def watched(index: int, call, *rest):
            probing, out, ended = cache.probing, None, None
            try:
                out = attend(index, call, *rest)
            except Exception as error:  # a pass ends after the last layer that judges
                ended = error
            query, key, value = (x[0].double() for x in (call.query, call.key, call.value))
            first, n = seen.get(index, 0), key.shape[1]
            heads = layers.setdefault(index, [])
            if not heads:
                nothing = torch.zeros(0).double()
                heads += [Head(torch.arange(0), key[0, :0], value[0, :0], nothing) for _ in key]
            held, own, outs = [], [], []
            for h, (head, asked) in enumerate(zip(heads, query.unflatten(0, (len(heads), -1)), strict=True)):
                held.append(asked @ head.keys.T * call.scale)
                future = torch.ones(n, n, dtype=torch.bool).triu(1)
                own.append((asked @ key[h].T * call.scale).masked_fill(future, float("-inf")))
                weights = torch.cat([held[-1], own[-1]], dim=-1).softmax(-1)
                outs.append(weights @ torch.cat([head.values, value[h]]))
                if probing is None:
                    head.positions = torch.cat([head.positions, torch.arange(first, first + n)])
                    head.keys, head.values = torch.cat([head.keys, key[h]]), torch.cat([head.values, value[h]])
            if out is not None:
                torch.testing.assert_close(out[0].double(), torch.cat(outs), atol=2e-5, rtol=1e-4)
            if probing is None:
                seen[index] = first + n
            else:
                scores[index] = self.judge(held, own)
            if ended is not None:
                raise ended
            return out

        def settled(*rest):
            settle(*rest)
            counts.append([])
            for index, heads in layers.items():
                kept = kept_positions(cache, index)
                counts[-1].append([len(row) for row in kept])
                best = self._best(scores[index], counts[-1][-1])
                assert [head.positions[i].tolist() for head, i in zip(heads, best, strict=True)] == kept
                for head, i in zip(heads, best, strict=True):
                    head.positions, head.keys, head.values = head.positions[i], head.keys[i], head.values[i]

        cache.attend, cache.enforcer.settle_all = watched, settled  # type: ignore[method-assign]
        cache.prefill(model, ids, **options)
        del cache.attend, cache.enforcer.settle_all
        return counts

    def _best(self, scores: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if self.joint:
            flat = torch.cat(scores)
            chosen = torch.zeros(len(flat), dtype=torch.bool)
            chosen[flat.argsort(descending=True, stable=True)[: sum(sizes)]] = True
            return [part.nonzero()[:, 0] for part in chosen.split([len(score) for score in scores])]
        return [
            score.argsort(descending=True, stable=True)[:size].sort().values
            for score, size in zip(scores, sizes, strict=True)
        ]
