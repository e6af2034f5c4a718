"""Keys before RoPE and values of evenly spread tokens of texts, for what is fitted to them together."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import TextCalibration, watch
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry, rotations_of

SIDES = ("key", "value")


@dataclass(frozen=True)
class CacheSamples(TextCalibration):
    """Keeps ``key`` and ``value [tokens, L * Hkv * D]`` in float16, budgeted layers and their heads side by side.

    Attributes:
        count: number of texts.
        length: tokens of each.
        rows: tokens of a text that count, evenly spread.
        sinks: first tokens of a text that do not count: their outliers would dominate the rest.
    """

    rows: int = 256
    sinks: int = 4

    @property
    def strips(self) -> bool:
        """Whether keys are turned back to what they were before RoPE."""
        return True

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rotations = rotations_of(model)
        steps = self.steps_of(ids.shape[1])
        found: dict[str, list[Tensor]] = {side: [] for side in SIDES}

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            key = call.key[0, :, steps].float()
            rotation = rotations[index] if self.strips else None
            if rotation is not None:
                key = rotation.strip(key, steps.to(key.device))
            for side, x in zip(SIDES, (key, call.value[0, :, steps]), strict=True):
                found[side].append(x.transpose(0, 1).flatten(1).half().cpu())

        watch(model, ids, look)
        return grown(state, {side: torch.cat(pieces, 1) for side, pieces in found.items()})

    def steps_of(self, length: int) -> Tensor:
        """Positions that count of a text of so many tokens."""
        return torch.linspace(self.sinks, length - 1, min(self.rows, length - self.sinks)).long()


def grown(state: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with fresh rows after those that it has."""
    return {name: torch.cat([state[name], x]) if name in state else x for name, x in fresh.items()}


def by_head(model: PreTrainedModel, samples: Tensor) -> tuple[Tensor, list[int], int]:
    """Samples ``[tokens, L * Hkv * D]`` as ``[L, Hkv, tokens, D]`` float32, the layers' indices, and all layers' number.

    The budgeted layers must be alike.
    """
    geometry = CacheGeometry.from_config(model.config)
    layers = list(geometry.budgeted_layers)
    heads = geometry.layers[layers[0]].num_kv_heads
    return samples.float().unflatten(1, (len(layers), heads, -1)).permute(1, 2, 0, 3), layers, len(geometry.layers)


def over_layers(found: Tensor, layers: list[int], number: int) -> Tensor:
    """``found [len(layers), ...]`` at its place among all layers of the model, zeros elsewhere: ``[number, ...]``."""
    whole = found.new_zeros(number, *found.shape[1:])
    whole[layers] = found
    return whole
