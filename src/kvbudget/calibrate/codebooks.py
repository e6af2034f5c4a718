"""Codebooks of a model's keys and values, by k-means over texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import SIDES, CacheSamples, by_head, over_layers
from kvbudget.codecs.codebook import codewords
from kvbudget.errors import PolicyError

SETS = 16
"""Codebooks that are fitted at a time."""


@dataclass(frozen=True)
class CoupledCodebooks(CacheSamples):
    """A codebook of 256 words per layer, KV head and group of channels, keys before RoPE and values (arXiv 2405.03917).

    The artifact holds ``key`` and ``value [L, Hkv, P, 256, D / P]`` in float16. The paper runs k-means to convergence over 16 texts
    of 2048 tokens and weights vectors by squared gradients of the loss (Fisher information); here all count alike.

    Attributes:
        channels: of a group (paper: 8 for 1 bit per channel, 4 for 2 bits, 2 for 4 bits).
        steps: of k-means.
    """

    method: ClassVar[str] = "cq"

    channels: int = 8
    steps: int = 25

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for side in SIDES:
            samples, layers, number = by_head(model, state[side])
            width = samples.shape[-1]
            if width % self.channels:
                raise PolicyError(f"cq: channels={self.channels} does not divide the {width} of a head; give a divisor")
            sets = samples.unflatten(-1, (-1, self.channels)).transpose(2, 3).flatten(0, 2)
            words = torch.cat([codewords(part, steps=self.steps) for part in sets.split(SETS)])
            shape = (len(layers), samples.shape[1], width // self.channels)
            tensors[side] = over_layers(words.unflatten(0, shape).half(), layers, number)
        return tensors
