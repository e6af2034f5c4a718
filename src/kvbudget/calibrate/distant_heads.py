"""Which KV heads gather another meaning than their layer, over texts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.calibrate.semantic_heads import causal_weights
from kvbudget.errors import PolicyError
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry
from kvbudget.policy.scorers.semantic import distances


@dataclass(frozen=True)
class DistantHeads(TextCalibration):
    """Task-KV's distances (arXiv 2501.15113) as means over texts, for ``task_kv(judged='texts')``.

    In each text the last ``window`` queries make the semantic vectors; a head counts with its distance from the layer's
    center over the mean distance of the layer's heads. The artifact holds ``distance [L, Hkv]`` float32 over all layers of
    the model (-1 where no budget governs a head).

    Attributes:
        count: number of texts.
        length: tokens of each.
        window: queries that judge (paper: 32, of each prompt).
        top: heaviest entries that make a head's semantic vector (paper: 256).
    """

    method: ClassVar[str] = "task_kv"

    window: int = 32
    top: int = 256

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not 1 <= self.window <= self.length or self.top < 1:
            raise PolicyError(
                f"task_kv: a window of {self.window} queries and the {self.top} heaviest entries do not fit texts of "
                f"{self.length} tokens; give window= from 1 to the length and top= at least 1"
            )
        layers = CacheGeometry.from_config(model.config).layers
        found = torch.full((len(layers), max(layer.num_kv_heads for layer in layers)), -1.0)

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            weights = causal_weights(call, slice(-self.window, None)).mean(2)
            far = distances(weights[None], call.value, self.top)[0]
            found[index, : len(far)] = (far / far.mean().clamp_min(1e-30)).cpu()

        watch(model, ids, look)
        runs = state.get("runs", torch.zeros(1)) + 1
        before = state.get("distance", found)
        return {"distance": before + (found - before) / runs, "runs": runs}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"distance": state["distance"]}
