"""What a model's queries look like over texts: moments before RoPE, and directions that keys are filtered by."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry, rotations_of
from kvbudget.policy.moments import Moments, square, triangle


@dataclass(frozen=True)
class QueryMoments(TextCalibration):
    """Mean and covariance of the queries before RoPE, times the attention's scale (Expected Attention, arXiv 2510.00636).

    The artifact holds ``mean [L, Hq, D]`` and the upper triangle of ``covariance [L, Hq, D (D + 1) / 2]``, float32, over all
    layers of the model (0 for those that no budget governs).

    Attributes:
        count: number of texts (kvpress: 100).
        length: tokens of each (kvpress: 1000).
        sinks: first queries of a text that do not count.
    """

    method: ClassVar[str] = "expected_attention_stats"

    sinks: int = 4

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rotations = rotations_of(model)
        fresh: dict[int, Moments] = {}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            rotation = rotations[index]
            assert rotation is not None
            steps = torch.arange(call.query.shape[2], device=call.query.device)[None]
            plain = rotation.strip(call.query.float() * call.scale, steps[:, None])
            fresh[index] = Moments.of(plain, steps >= self.sinks)

        watch(model, ids, look)
        heads, width = _shape(model)
        mean = torch.zeros(len(rotations), heads, width)
        covariance = torch.zeros(len(rotations), heads, width * (width + 1) // 2)
        count = state.get("count", torch.zeros(1))
        for index, found in fresh.items():
            if state:
                held = Moments(count, state["mean"][index][None], square(state["covariance"][index][None], width))
                found = held.join(Moments(*(x.cpu() for x in found if x is not None)))
            assert found.covariance is not None
            mean[index], covariance[index] = found.mean[0], triangle(found.covariance[0])
        return {"mean": mean, "covariance": covariance, "count": count + max(0, ids.shape[1] - self.sinks)}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: state[name] for name in ("mean", "covariance")}


@dataclass(frozen=True)
class QueryDirections(TextCalibration):
    """The direction that most queries of a head share, post-RoPE (Q-Filters, arXiv 2503.02812, section 3).

    It is the first right singular vector of the head's queries (not centered), with the sign of their mean projection, and
    the mean over the GQA group of these unit vectors. The artifact holds ``filters [L, Hkv, D]``, float32 (0 for layers that
    no budget governs), so that ``filter k`` is high for keys that attract attention; the reference stores the negative.
    The reference decomposes 3000 sampled queries and takes the majority's sign; all queries of the texts count here.

    Attributes:
        count: number of texts (reference: 20).
        length: tokens of each (reference: 2048).
    """

    method: ClassVar[str] = "qfilters"

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = len(CacheGeometry.from_config(model.config).layers)
        heads, width = _shape(model)
        square = torch.zeros(layers, heads, width, width) if not state else state["square"].clone()
        total = torch.zeros(layers, heads, width) if not state else state["sum"].clone()

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            query = call.query[0].float()
            square[index] += (query.transpose(-1, -2) @ query).cpu()
            total[index] += query.sum(1).cpu()

        watch(model, ids, look)
        return {"square": square, "sum": total}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = max(layer.num_kv_heads for layer in CacheGeometry.from_config(model.config).layers)
        direction = torch.linalg.eigh(state["square"].double()).eigenvectors[..., -1].float()
        sign = (direction * state["sum"]).sum(-1, keepdim=True).sign()
        return {"filters": (direction * sign).unflatten(1, (heads, -1)).mean(2)}


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    """Query heads and key dimension of the layers that a budget governs."""
    geometry = CacheGeometry.from_config(model.config)
    layer = geometry.layers[geometry.budgeted_layers[0]]
    return layer.num_attention_heads, layer.key_head_dim
