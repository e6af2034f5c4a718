"""Codes of keys that know no position: a query reads the entries whose code promises most."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.codebook import nearest
from kvbudget.models import Rotation
from kvbudget.policy.base import Selector
from kvbudget.policy.selection import rank
from kvbudget.segments.selective import Chosen, Reading


@dataclass(frozen=True)
class Retrieved(Selector):
    """Reads the ``window`` newest entries, the first ``sinks`` positions, and the best ``share`` of all by their codes.

    A key before RoPE is the nearest word ``w`` of its head by ``|(k - w) L|`` with the factor ``L L^T`` of the queries'
    second moment; its score is the product of w with the query turned to position ``base``, whatever the distance (windowed
    RoPE). Query heads of a group read what any of them wants, exactly. An entry is coded once, when it is first met.
    """

    prefill: ClassVar[bool] = False
    states: ClassVar[tuple[str, ...]] = ("code",)

    share: float = 0.03
    window: int = 64
    sinks: int = 8
    found: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def select(self, reading: Reading) -> Chosen:
        assert reading.steps is not None and reading.positions is not None
        steps, positions, device = reading.steps, reading.positions, reading.keys.device
        inside = reading.visible & (positions[:, :, None] > (steps - self.window)[:, None, :, None])
        inside |= reading.visible & (positions < self.sinks)[:, :, None]
        far = reading.visible & ~inside
        scores = self.scores(reading).masked_fill(~far[:, :, None], float("-inf"))
        count = (self.share * reading.visible.sum(-1)).ceil()[:, :, None, :, None].to(device)
        read = ((rank(scores) < count) & far[:, :, None]).any(2) | inside
        logits = reading.logits.masked_fill(~read[:, :, None], float("-inf"))
        return Chosen(logits.softmax(-1).nan_to_num(0.0))

    def scores(self, reading: Reading) -> Tensor:
        """Approximate logits by the codes of the keys ``[B, Hkv, G, n, T]``, up to a factor."""
        assert reading.steps is not None
        words = self.found["words"][reading.layer_idx].to(reading.keys)
        rotation = self._rotation(reading.layer_idx)
        query = rotation.rotate(reading.query, int(self.found["base"]) - reading.steps[:, None, None])
        table = torch.einsum("bhgnd,hwd->bhgnw", query, words)
        codes = (reading.states["code"].long() - 1).clamp_min(0)
        return table.gather(-1, codes[:, :, None, None].expand(*table.shape[:4], -1))

    def meet(self, layer_idx: int, keys: Tensor, positions: Tensor, states: Mapping[str, Tensor]) -> None:
        """Codes are kept as 1 and more."""
        codes = states["code"]
        fresh = ((codes == 0) & (positions >= 0)).any(1).any(0).nonzero()[:, 0]
        words, factor = (self.found[name][layer_idx].to(keys) for name in ("words", "factor"))
        plain = self._rotation(layer_idx).strip(keys[:, :, fresh], positions[:, :, fresh])
        found = torch.stack([nearest(sequence @ factor, words @ factor) for sequence in plain])
        codes[:, :, fresh] = torch.where(codes[:, :, fresh] == 0, found + 1.0, codes[:, :, fresh])

    def _rotation(self, layer_idx: int) -> Rotation:
        turned = bool(self.found["interleaved"])
        scaling = float(self.found["scaling"])
        return Rotation(self.found["inv_freq"][layer_idx], "interleaved" if turned else "half", scaling)
