"""Window votes, and how far the meaning that each head gathers lies from that of its layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.view import View

WHOLE = "whole"
"""The statistic ``[B, Hkv]`` that orders heads to keep whole: 1 for the first one, 0 for those that are not."""


@dataclass(frozen=True)
class SemanticHeads(WindowAttention):
    """Marks heads whose semantic vector is far from the layer's mean, beside the votes of the window (Task-KV).

    Over the last ``window`` queries ``C`` is the mean weight of each entry, and ``v' = sum of C * v`` over its ``top``
    heaviest entries, per query head. A KV head lies as far from the mean of all ``v'`` as the farthest of its query heads.
    From the first layer to the last, ``share * Hkv`` heads become ``least``, linearly; of several the last is the nearest.
    Forwards of fewer tokens than the window leave the marks as they are, unless a calibration has ``found`` the distances.
    """

    top: int = 256
    share: float = 0.25
    least: int = 1
    found: tuple[tuple[float, ...], ...] = ()
    """Distances ``[L, Hkv]`` that a calibration found, in place of the prompt's own; (): those of each prompt."""

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return 4.0

    def observe(self, view: View) -> None:
        super().observe(view)
        before = view.statistic(WHOLE)
        first = bool(self.found) and before is None  # what a calibration has found does not change any more
        judged = torch.tensor([first or new >= self.window for new in view.new_tokens], device=view.positions.device)
        if bool(judged.any()):
            order = self.order(view)
            kept = torch.zeros_like(order) if before is None else before
            view.set_statistic(WHOLE, torch.where(judged[:, None], order, kept))

    def count(self, heads: int, depth: float) -> int:
        """Heads to keep whole at ``depth`` (0: first layer, 1: last one), at most all of them."""
        most = heads * self.share
        return min(heads, max(0, round(most - (most - self.least) * depth)))

    def order(self, view: View) -> Tensor:
        """`WHOLE` as this forward's queries, or a calibration, find it: float32 ``[B, Hkv]``."""
        if self.found:
            heads = torch.tensor(self.found[view.layer.layer_idx][: view.num_kv_heads], device=view.positions.device)
            distance = heads.expand(len(view.new_tokens), -1)
        else:
            distance = distances(view.window_attention(self.window).mean(3), view.values, self.top)
        ranked = distance.argsort(dim=-1, descending=True, stable=True)
        count = self.count(view.num_kv_heads, view.layer.depth)
        chosen = ranked[:, :count].clone()
        if count > 1:
            chosen[:, -1] = ranked[:, -1]
        places = torch.arange(1, count + 1, device=distance.device).to(distance).expand_as(chosen)
        return torch.zeros_like(distance).scatter_(1, chosen, places)


def distances(weights: Tensor, values: Tensor, top: int) -> Tensor:
    """How far each KV head's ``v'`` lie from the mean of all: ``[B, Hkv]``, the largest over its query heads.

    ``weights [B, Hkv, G, T]`` are means over the window's queries, ``values [B, Hkv, T, Dv]``.
    """
    best = weights.topk(min(top, weights.shape[-1]), dim=-1)
    index = best.indices[..., None]
    each = values.float()[:, :, None].expand(*weights.shape, -1)
    each = each.gather(3, index.expand(*index.shape[:-1], each.shape[-1]))
    vectors = (best.values[..., None] * each).sum(3)
    return (vectors - vectors.mean((1, 2), keepdim=True)).norm(dim=-1).amax(-1)
