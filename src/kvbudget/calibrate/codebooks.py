"""Codebooks of a model's keys and values, by k-means over texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import SIDES, CacheSamples, by_head, grown, over_layers
from kvbudget.calibrate.sensitivity import sensitivities
from kvbudget.codecs.codebook import codewords
from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry

SETS = 16
"""Codebooks that are fitted at a time."""


@dataclass(frozen=True)
class CoupledCodebooks(CacheSamples):
    """A codebook of 256 words per layer, KV head and group of channels, keys before RoPE and values (arXiv 2405.03917).

    The artifact holds ``key`` and ``value [L, Hkv, P, 256, D / P]`` in float16. With ``fisher``, a vector counts as much as the sum
    of the squared gradients of the loss by its elements. The paper takes every token of 16 texts of 2048 tokens.

    Attributes:
        channels: of a group (paper: 8 for 1 bit per channel, 4 for 2 bits, 2 for 4 bits).
        steps: of k-means (paper: 100 at most).
        fisher: weight vectors by the sensitivity of the loss, which costs a backward pass per text (paper: yes).
    """

    method: ClassVar[str] = "cq"

    channels: int = 8
    steps: int = 25
    fisher: bool = True

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        width = CacheGeometry.from_config(model.config).layers[0].key_head_dim
        if width % self.channels:
            raise PolicyError(f"cq: channels={self.channels} does not divide the {width} of a head; give a divisor")
        if not self.fisher:
            return super().add(model, ids, state)
        steps = self.steps_of(ids.shape[1])
        fresh: dict[str, list[Tensor]] = {}
        for found in sensitivities(model, ids).values():
            gradients = (found.key_gradient, found.value_gradient)
            for side, x, gradient in zip(SIDES, (found.keys, found.values), gradients, strict=True):
                square = gradient.square().unflatten(-1, (-1, self.channels)).sum(-1)
                square = (square / square.mean().clamp_min(1e-30)).clamp_max(1e4)
                for name, column in ((side, x), (f"{side}.weights", square)):
                    fresh.setdefault(name, []).append(column[:, steps].transpose(0, 1).flatten(1).half().cpu())
        return grown(state, {name: torch.cat(pieces, 1) for name, pieces in fresh.items()})

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for side in SIDES:
            samples, layers, number = by_head(model, state[side])
            width = samples.shape[-1]
            sets = samples.unflatten(-1, (-1, self.channels)).transpose(2, 3).flatten(0, 2)
            weights = torch.ones(sets.shape[:2])
            if f"{side}.weights" in state:
                weights = by_head(model, state[f"{side}.weights"])[0].transpose(2, 3).flatten(0, 2)
            parts = zip(sets.split(SETS), weights.split(SETS), strict=True)
            words = torch.cat([codewords(x, steps=self.steps, weights=weight) for x, weight in parts])
            shape = (len(layers), samples.shape[1], width // self.channels)
            tensors[side] = over_layers(words.unflatten(0, shape).half(), layers, number)
        return tensors
