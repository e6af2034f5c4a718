"""Additive codebooks of a model's keys that commute with its RoPE."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import CacheSamples, by_head, over_layers
from kvbudget.codecs.commuting import fitted, stages_of
from kvbudget.models import CacheGeometry, Rotation, rotations_of


@dataclass(frozen=True)
class CommutingCodebooks(CacheSamples):
    """Tables for the keys before RoPE of every layer and KV head, by expectation maximization (arXiv 2506.18879, section 3.3).

    The artifact holds ``tables [L, Hkv, R, 64, D]`` in float16 with as many stages R as 2 bits per channel take, and ``order [D]``:
    the first elements of the pairs that RoPE turns, then the second ones.

    Attributes:
        steps: of expectation and maximization per stage (reference: 100).
    """

    method: ClassVar[str] = "commvq"

    rows: int = 128
    steps: int = 10

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        samples, layers, number = by_head(model, state["key"])
        order, stages = pair_order(model), stages_of(2, samples.shape[-1])
        directions = normalize(samples[..., order], dim=-1)
        found = [torch.stack([fitted(x, stages, steps=self.steps) for x in heads]) for heads in directions]
        return {"tables": over_layers(torch.stack(found).half(), layers, number), "order": order.int()}


def pair_order(model: PreTrainedModel) -> Tensor:
    """Elements of a key, the first ones of all pairs that turn together and then the second ones: int64 ``[D]``.

    Elements that do not rotate form pairs in their own order, since turning them by nothing commutes with everything.
    """
    index = CacheGeometry.from_config(model.config).budgeted_layers[0]
    rotation, width = rotations_of(model)[index], CacheGeometry.from_config(model.config).layers[index].key_head_dim
    assert isinstance(rotation, Rotation)
    turning, rest = torch.arange(rotation.rotary_dim), torch.arange(rotation.rotary_dim, width)
    halves = turning.chunk(2) if rotation.layout == "half" else (turning[0::2], turning[1::2])
    if not len(turning):
        halves = (turning, turning)
    return torch.cat([halves[0], rest[: len(rest) // 2], halves[1], rest[len(rest) // 2 :]])
