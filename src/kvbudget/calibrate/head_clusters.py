"""Clusters of heads: which KV heads of a layer attend alike on texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, logits_of, watch
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry


@dataclass(frozen=True)
class HeadClustering(TextCalibration):
    """Average linkage over the cosine distances of the heads' attention maps (CHAI, arXiv 2403.08058, section 3).

    A text's map is that of all its tokens, causal; distances are averaged over texts. KV heads are as far apart as their
    query heads are on average from the nearest query head of the other side; the two whose clusters are nearest join until
    they are further apart than ``distance``, or ``clusters`` are left. The artifact holds ``owners [L, Hkv]`` and ``sources
    [L, Hq]`` int64 as `HeadClusters` has them (each its own in layers that no budget governs).

    Attributes:
        count: number of texts (paper: 500 to 1024).
        length: tokens of each.
        distance: up to which clusters join.
        clusters: KV heads per layer whose keys are held (0: as many as ``distance`` leaves).
    """

    method: ClassVar[str] = "chai"

    count: int = 16
    length: int = 64
    distance: float = 0.2
    clusters: int = 0

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        shape = geometry.layers[geometry.budgeted_layers[0]]
        if not 0 <= self.clusters <= shape.num_kv_heads:
            raise PolicyError(f"chai: clusters={self.clusters} must be from 0 to the {shape.num_kv_heads} KV heads")
        found = torch.zeros(geometry.num_layers, shape.num_attention_heads, shape.num_attention_heads)

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            logits = logits_of(call, slice(None)).flatten(0, 1)
            maps = normalize((logits - lse[0, ..., None]).exp().tril().flatten(1), dim=1)
            found[index] = (1 - maps @ maps.mT).cpu()

        watch(model, ids, look)
        return {"distances": found + state.get("distances", 0.0)}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        heads = geometry.layers[geometry.budgeted_layers[0]].num_kv_heads
        owners, sources = [], []
        for index, distances in enumerate(state["distances"] / self.count):
            governed = index in geometry.budgeted_layers
            owners.append(self._joined(distances, heads) if governed else torch.arange(heads))
            sources.append(nearest(distances, owners[-1]))
        return {"owners": torch.stack(owners), "sources": torch.stack(sources)}

    def _joined(self, distances: Tensor, heads: int) -> Tensor:
        """The first head of each KV head's cluster ``[Hkv]``, from the query heads' ``distances [Hq, Hq]``."""
        blocks = distances.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # Hkv, G, Hkv, G
        across = blocks.amin(3).mean(1)
        across = (across + across.mT) / 2
        clusters = [[head] for head in range(heads)]
        while len(clusters) > max(1, self.clusters):
            pairs = [
                (float(across[one][:, other].mean()), i, j)
                for j, other in enumerate(clusters)
                for i, one in enumerate(clusters[:j])
            ]
            apart, i, j = min(pairs)
            if not self.clusters and apart > self.distance:
                break
            clusters[i] += clusters.pop(j)
        owners = torch.empty(heads, dtype=torch.long)
        for members in clusters:
            owners[members] = min(members)
        return owners


def nearest(distances: Tensor, owners: Tensor) -> Tensor:
    """For each query head the nearest of its owner's query heads ``[Hq]``; an owner's keep their own."""
    group = len(distances) // len(owners)
    found = []
    for head in range(len(distances)):
        owner = int(owners[head // group])
        own = owner == head // group
        found.append(
            head if own else owner * group + int(distances[head, owner * group : (owner + 1) * group].argmin())
        )
    return torch.tensor(found)
