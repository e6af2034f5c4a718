"""Bases for groups of KV heads: the leading singular vectors of their keys and values over texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry


@dataclass(frozen=True)
class HeadBases(TextCalibration):
    """Right singular vectors of the joint keys (after RoPE) and values of ``group`` neighboring KV heads (arXiv 2406.07056).

    They are the eigenvectors of ``X^T X``, summed over all tokens of all texts; nothing is centered. The artifact holds
    ``keys`` and ``values [L, Hkv / group, group D, rank]`` float32 over all layers (0 for those that no budget governs).

    Attributes:
        count: number of texts (paper: about 128).
        length: tokens of each (paper: about 2048).
        group: KV heads that become one (0: all of a layer).
        rank: elements of the new head (0: as many as one head has).
    """

    method: ClassVar[str] = "kv_heads"

    count: int = 8
    group: int = 0
    rank: int = 0

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        shape = geometry.layers[geometry.budgeted_layers[0]]
        group = self.group or shape.num_kv_heads
        rank = self.rank or shape.key_head_dim
        widest = group * min(shape.key_head_dim, shape.value_head_dim)
        if group < 1 or shape.num_kv_heads % group or not 0 < rank <= widest:
            raise PolicyError(
                f"kv_heads: group={self.group} must divide the {shape.num_kv_heads} KV heads of a layer, and rank={self.rank} be "
                f"at most the {widest} elements of a group"
            )
        found: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            for name, x in (("keys", call.key), ("values", call.value)):
                joined = x[0].unflatten(0, (-1, group)).transpose(1, 2).flatten(2).float().cpu()
                found[name][index] = joined.mT @ joined

        watch(model, ids, look)
        sums = {}
        for name, layers in found.items():
            some = next(iter(layers.values()))
            each = [layers.get(i, torch.zeros_like(some)) for i in range(geometry.num_layers)]
            sums[name] = torch.stack(each) + state.get(name, 0.0)
        return sums

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        shape = geometry.layers[geometry.budgeted_layers[0]]
        rank = self.rank or shape.key_head_dim
        bases = {}
        for name, sums in state.items():
            vectors = torch.linalg.eigh(sums.double()).eigenvectors  # eigenvalues rise
            bases[name] = vectors[..., -rank:].flip(-1).float().contiguous()
            bases[name][[i for i in range(geometry.num_layers) if i not in geometry.budgeted_layers]] = 0.0
        return bases
