"""Linear predictors of a layer's keys and values from those of the layer below."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.samples import CacheSamples, by_head
from kvbudget.codecs.joint import Predicted
from kvbudget.errors import PolicyError


@dataclass(frozen=True)
class Predictors(CacheSamples):
    """Ridge regressions with a bias, layer after layer, on keys before RoPE and values as they are restored (arXiv 2501.19392).

    The artifact holds ``key_map [L, K, K]``, ``value_map [L, K + V, V]`` and their biases in float32, 0 for the lowest
    layer and for those that no budget governs. The paper takes 224 texts of 8192 tokens, and residuals of 2 bits.

    Attributes:
        ridge: added to the diagonal, times its mean (paper: 1e-3).
        bits: of the residuals while fitting (2, 3 or 4).
    """

    method: ClassVar[str] = "aquakv"

    rows: int = 512
    ridge: float = 1e-3
    bits: int = 2

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise PolicyError(f"aquakv has grids of 2, 3 and 4 bits per channel; {self.bits} is none of them")

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        sides = {}
        for side in ("key", "value"):
            samples, layers, number = by_head(model, state[side])
            sides[side] = samples.transpose(1, 2).flatten(2)  # [L, tokens, Hkv * D]
        keys, values = sides["key"], sides["value"]
        widths = {"key": (keys.shape[2], keys.shape[2]), "value": (keys.shape[2] + values.shape[2], values.shape[2])}
        found = {f"{side}_map": torch.zeros(number, *shape) for side, shape in widths.items()}
        found |= {f"{side}_bias": torch.zeros(number, shape[1]) for side, shape in widths.items()}
        codec, below = Predicted(bits=self.bits, found=found), None
        for at, layer in enumerate(layers):
            if below is not None:
                fitted = self._fit(below[0], keys[at])
                found["key_map"][layer], found["key_bias"][layer] = fitted
                # The values' predictor sees the keys as they are restored with the one just found.
                known = codec.decode(layer, codec.encode(layer, keys[at], values[at], below), below)[0]
                fitted = self._fit(torch.cat([known, below[1]], -1), values[at])
                found["value_map"][layer], found["value_bias"][layer] = fitted
            below = codec.decode(layer, codec.encode(layer, keys[at], values[at], below), below)[2]
        return found

    def _fit(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map and bias of the ridge regression from ``x [N, m]`` to ``y [N, n]``."""
        x, y = x.double(), y.double()
        centered, target = x - x.mean(0), y - y.mean(0)
        gram = centered.T @ centered
        gram += self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        fitted = torch.linalg.solve(gram, centered.T @ target)
        return fitted.float(), (y.mean(0) - x.mean(0) @ fitted).float()
