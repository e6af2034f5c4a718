"""Thinning: which tokens of a forward still take part in the attention of the layers above."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbudget.layer import AttentionCall, LayerCache


@dataclass(frozen=True)
class Survivors:
    """Tokens of a forward that the layers so far have all kept, right-aligned in m columns.

    ``columns [B, m]`` are their columns in the forward, ``steps [B, m]`` their positions in the text, and ``valid [B, m]``
    marks the cells that hold one.
    """

    columns: Tensor
    steps: Tensor
    valid: Tensor

    @classmethod
    def all(cls, seen: list[int], width: int, valid: Tensor | None, device: torch.device) -> Survivors:
        """Every token of a forward of ``width`` columns after ``seen[b]`` tokens; ``valid [B, width]`` is its padding."""
        real = torch.ones(len(seen), width, dtype=torch.bool, device=device) if valid is None else valid
        steps = torch.tensor(seen, device=device)[:, None] + real.long().cumsum(1) - 1
        return cls(torch.arange(width, device=device).expand_as(real), steps, real)

    def after(self, layer: LayerCache) -> Survivors:
        """Those of them that a layer, whose heads hold the same entries, has kept."""
        alive = torch.zeros_like(self.valid)
        for b in range(len(alive)):
            row = b * layer.num_kv_heads
            held = [segment.meta.row("position", row) for segment in layer.main if segment.lengths[row]]
            alive[b] = torch.isin(self.steps[b], torch.cat(held).long()) if held else False
        alive &= self.valid
        if torch.equal(alive, self.valid):
            return self
        order = torch.argsort(alive.int(), dim=1, stable=True)[:, -max(1, int(alive.sum(1).max())) :]
        return Survivors(*(x.gather(1, order) for x in (self.columns, self.steps, alive)))

    def take(self, call: AttentionCall) -> AttentionCall:
        """The call of these tokens alone."""

        def chosen(x: Tensor) -> Tensor:
            index = self.columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
            return x.gather(2, index)

        query, key, value = chosen(call.query), chosen(call.key), chosen(call.value)
        valid = None if bool(self.valid.all()) else self.valid
        return replace(call, query=query, key=key, value=value, valid=valid, steps=self.steps)

    def spread(self, out: Tensor, width: int) -> Tensor:
        """Their answers ``[B, Hq, m, Dv]`` among the zeros of all ``width`` columns."""
        whole = out.new_zeros(*out.shape[:2], width, out.shape[-1])
        index = self.columns[:, None, :, None].expand_as(out)
        return whole.scatter_add_(2, index, out * self.valid[:, None, :, None].to(out.dtype))
