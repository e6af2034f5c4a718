"""What KVQuant needs to know: ranges of key channels before RoPE, and codebooks that spare what the loss depends on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration
from kvbudget.calibrate.sensitivity import sensitivities
from kvbudget.codecs.nonuniform import SMALLEST, codebook, farthest, middle, q_norm
from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry

BITS = (2, 3, 4)


@dataclass(frozen=True)
class NonUniformCodebooks(TextCalibration):
    """Non-uniform codebooks by k-means, weighted with squared gradients (KVQuant, arXiv 2401.18079, sections 3.1 to 3.3).

    Of every text, ``tokens`` positions are remembered with their keys before RoPE, values and squared gradients of the loss
    (so that a run can be resumed; the reference takes all). The artifact holds, for layers L, ``offset`` and ``spread
    [L, Hkv, D]`` of the key channels (middle and half of the range between the percentiles that leave ``share`` outside), and
    ``keys_b``, ``values_b [L, 2, 2^b]`` for b = 2, 3, 4: values that codes are chosen by and values that they decode to
    (equal but for 2 bits, where mean and deviation are corrected: Q-Norm).

    Attributes:
        count: number of texts (reference: 16).
        length: tokens of each (reference: 2048).
        tokens: remembered positions of each text.
        share: part of the elements that are outliers (reference: 0.01).
    """

    method: ClassVar[str] = "kvquant"

    tokens: int = 64
    share: float = 0.01

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not 0 < self.share < 0.5 or not 0 < self.tokens <= self.length:
            raise PolicyError(
                f"kvquant: share={self.share} must lie between 0 and 0.5, tokens={self.tokens} between 1 and length={self.length}"
            )
        done = state["keys"].shape[1] if state else 0
        chosen = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(done))[: self.tokens]
        fresh: dict[str, list[Tensor]] = {"keys": [], "values": [], "key_weights": [], "value_weights": []}
        for found in sensitivities(model, ids).values():
            for name, x in (("keys", found.keys), ("values", found.values)):
                fresh[name].append(x[:, chosen].transpose(0, 1))
            for name, x in (("key_weights", found.key_gradient), ("value_weights", found.value_gradient)):
                square = x.square()
                square = square / square.mean().clamp_min(1e-30)
                fresh[name].append(square[:, chosen].transpose(0, 1))
        stacked = {name: torch.stack(rows).float().cpu() for name, rows in fresh.items()}
        return {name: torch.cat([state[name], x], dim=1) if state else x for name, x in stacked.items()}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        layers, heads, width = len(geometry.layers), *state["keys"].shape[2:]
        found = {name: torch.zeros(layers, heads, width) for name in ("offset", "spread")}
        found |= {f"{side}_{bits}": torch.zeros(layers, 2, 2**bits) for side in ("keys", "values") for bits in BITS}
        for at, index in enumerate(geometry.budgeted_layers):
            keys, values = state["keys"][at], state["values"][at]
            edges = torch.tensor([self.share / 2, 1 - self.share / 2])
            low, high = torch.quantile(keys, edges, dim=0)
            offset, spread = (high + low) / 2, ((high - low) / 2).clamp_min(SMALLEST)
            found["offset"][index], found["spread"][index] = offset, spread
            taken = farthest(values - values.median(-1, keepdim=True).values, self.share)
            middles, ranges = (x.float() for x in middle(values, taken))
            sides = {"keys": (keys - offset) / spread, "values": (values - middles) / ranges.clamp_min(SMALLEST)}
            for side, normal in sides.items():
                inside = normal.abs() <= 1
                data, weight = normal[inside], state[f"{side[:-1]}_weights"][at][inside]
                for bits in BITS:
                    book = codebook(data, weight, bits)
                    decoded = q_norm(data, book) if bits == 2 else book
                    found[f"{side}_{bits}"][index] = torch.stack([book, decoded])
        return found
