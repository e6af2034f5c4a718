"""Random eviction: the control that every scorer has to beat."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.policy.base import Protect, Recipe, Scorer
from kvbudget.policy.view import View


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit integer hash of int64 values (multiply and xor-shift rounds), as int64 in [0, 2^32)."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


@dataclass(frozen=True)
class RandomScore(Scorer):
    """A uniform number per (seed, layer, KV head, position), the same whenever and in whatever batch it is asked for."""

    seed: int = 0

    def score(self, view: View) -> Tensor:
        key = _mixed(_mixed(torch.tensor(self.seed)) + view.layer_idx)
        heads = _mixed(key + torch.arange(view.num_kv_heads)).to(view.positions.device)
        return _mixed(heads[None, :, None] + view.positions.long()).float() / 2**32


@dataclass(frozen=True)
class Random(Recipe):
    """Keeps entries by a fixed random order of their positions, drawn per layer and KV head.

    No paper: a control. An entry's number does not change between evictions, so what has survived many of them is a fair
    sample of the text.

    Attributes:
        seed: another seed, another sample.
        sinks: first entries that always stay, so that a model that needs attention sinks is not simply broken.
        recent: newest entries that always stay.
    """

    name = "random"
    role = "scorer"
    phase = "prefill and decode"
    paper = "none (a control)"
    prefix_reusable = True

    seed: int = 0
    sinks: int = 4
    recent: int = 32

    def parts(self) -> dict[str, Any]:
        return {"scorer": RandomScore(self.seed), "protect": Protect(sinks=self.sinks, recent=self.recent)}
