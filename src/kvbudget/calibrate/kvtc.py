"""The principal components of a model's cache over texts, for caches that are saved transform-coded."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.codecs.transform import Transform
from kvbudget.layer import AttentionCall
from kvbudget.models import rotations_of
from kvbudget.storage.coded import METHOD, SIDES


@dataclass(frozen=True)
class CacheTransform(TextCalibration):
    """Principal components over all layers and heads together, keys before RoPE and values apart (arXiv 2511.01815).

    The artifact holds, for ``key`` and ``value``, the fields of `kvbudget.codecs.transform.Transform`; the bases in float16.

    Attributes:
        count: number of texts.
        length: tokens of each.
        rows: tokens of a text that count, evenly spread.
        rank: components that are kept at most.
        sinks: first tokens of a text that do not count: they are stored exactly, and would dominate the rest.
    """

    method: ClassVar[str] = METHOD

    rows: int = 512
    rank: int = 1536
    sinks: int = 4

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rotations = rotations_of(model)
        steps = torch.linspace(self.sinks, ids.shape[1] - 1, min(self.rows, ids.shape[1] - self.sinks)).long()
        found: dict[str, list[Tensor]] = {side: [] for side in SIDES}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            rotation = rotations[index]
            key = call.key[0, :, steps].float()
            if rotation is not None:
                key = rotation.strip(key, steps.to(key.device))
            for side, x in zip(SIDES, (key, call.value[0, :, steps]), strict=True):
                found[side].append(x.transpose(0, 1).flatten(1).half().cpu())

        watch(model, ids, look)
        fresh = {side: torch.cat(pieces, 1) for side, pieces in found.items()}
        return {side: torch.cat([state[side], x]) if side in state else x for side, x in fresh.items()}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for side in SIDES:
            fitted = Transform.fit(state[side], self.rank)
            for name in ("mean", "basis", "scale", "rate", "loss"):
                x = getattr(fitted, name)
                tensors[f"{side}.{name}"] = x.half() if name == "basis" else x
        return tensors
