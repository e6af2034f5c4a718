"""Codebooks of a model's keys in the metric of its queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import watch
from kvbudget.calibrate.samples import CacheSamples, by_head, over_layers
from kvbudget.codecs.codebook import codewords
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry, rotations_of


@dataclass(frozen=True)
class QueryAwareCodebooks(CacheSamples):
    """Words for the keys before RoPE of each layer and KV head, of which queries notice little (arXiv 2502.12665, section 3.3).

    With ``H = sum q q^T`` over the group's queries turned to position ``base``, normalized by its root mean square entry,
    and ``H + 1e-6 I = L L^T``, k-means of ``k L``. The artifact holds ``words [L, Hkv, n, D]`` as keys, ``factor [L, Hkv,
    D, D]`` and the rotation. The paper fits 64 thousand tokens, and 16 thousand of random identifiers.

    Attributes:
        words: of a codebook, no more than sampled keys (paper: 4096).
        steps: of k-means.
        base: position that queries are turned to (paper: 2048); at most the last one that the model was trained for.
    """

    method: ClassVar[str] = "a2ats"

    rows: int = 512
    words: int = 1024
    steps: int = 15
    base: int = 2048

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rotations, base = rotations_of(model), self._base(model)
        steps, found = self.steps_of(ids.shape[1]), []

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            rotation = rotations[index]
            assert rotation is not None
            query = rotation.rotate(call.query[0, :, steps].float(), base - steps.to(call.query.device))
            grouped = query.unflatten(0, (call.key.shape[1], -1)).flatten(1, 2)
            found.append((grouped.mT @ grouped).cpu())

        watch(model, ids, look)
        moment = torch.stack(found)
        before = {name: x for name, x in state.items() if name != "moment"}
        return super().add(model, ids, before) | {"moment": moment + state.get("moment", 0)}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        samples, layers, number = by_head(model, state["key"])
        moment = state["moment"].double()
        moment = moment / moment.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)
        factor = torch.linalg.cholesky(moment + 1e-6 * torch.eye(moment.shape[-1], dtype=torch.float64)).float()
        words = []
        for keys, turned in zip(samples, factor, strict=True):
            metric = codewords(keys @ turned, min(self.words, keys.shape[1]), steps=self.steps)
            words.append(torch.linalg.solve_triangular(turned, metric, upper=False, left=False))
        rotations = [rotation for rotation in rotations_of(model) if rotation is not None]
        governed = torch.stack([rotations_of(model)[index].inv_freq.cpu() for index in layers])  # type: ignore[union-attr]
        return {
            "words": over_layers(torch.stack(words), layers, number),
            "factor": over_layers(factor, layers, number),
            "inv_freq": over_layers(governed, layers, number),
            "interleaved": torch.tensor(rotations[0].layout == "interleaved"),
            "scaling": torch.tensor(rotations[0].attention_scaling),
            "base": torch.tensor(self._base(model)),
        }

    def _base(self, model: PreTrainedModel) -> int:
        longest = CacheGeometry.from_config(model.config).max_positions
        return self.base if longest is None else min(self.base, longest - 1)
