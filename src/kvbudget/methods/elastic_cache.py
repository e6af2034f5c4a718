"""Elastic Cache: important entries of the prompt take in their neighbors; the answer pushes out what ended the prompt."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import CHOSEN, Protect, Recipe
from kvbudget.policy.destinations.merge import MergeNearby
from kvbudget.policy.scorers.received import AccumulatedAttention
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View

SLOT = "slot"


@dataclass(frozen=True)
class FixedSlot(AccumulatedAttention):
    """The prompt by accumulated attention, mean over all heads; afterwards entries leave from one slot on, oldest first.

    The slot lies ``distance`` entries before the end of what is held when decoding begins, and what is before it stays.
    """

    aligned: ClassVar[bool] = True

    distance: int = 25

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return 4.0

    def observe(self, view: View) -> None:
        super().observe(view)
        new = torch.tensor(view.new_tokens, device=view.positions.device)[:, None]
        held, slot = view.valid.sum(-1), view.statistic(SLOT)
        slot = torch.zeros(held.shape, device=held.device) if slot is None else slot
        begins = (held - 1 - self.distance).clamp_min(1).float()
        decoding = torch.where(slot > 0, slot, begins)
        view.set_statistic(SLOT, torch.where(new > 1, torch.zeros_like(slot), torch.where(new > 0, decoding, slot)))

    def score(self, view: View) -> Tensor:
        scores = by_layer(super().score(view))
        slot = view.statistic(SLOT)
        if slot is None:
            return scores
        place = torch.arange(scores.shape[-1], device=scores.device)
        decoding = torch.where(place < slot[..., None], CHOSEN, view.positions.float())
        return torch.where(slot[..., None] > 0, decoding, scores)


@dataclass(frozen=True)
class ElasticCache(Recipe):
    """Evicted entries of the prompt are averaged into the nearest kept one by position; later ones leave at a fixed slot.

    Paper: Liu et al., arXiv 2407.18121, 2024 (ECCV). Anchors are the entries with the most accumulated attention, the mean
    over all heads; each dropped entry joins the anchor at the smallest distance, and anchors become plain means of keys and
    values. While decoding, what exceeds the budget leaves at the slot ``distance`` entries before the end of the compressed
    prompt, so that the prompt's head and the newest tokens stay, without scores or merges. The published code ranks by a
    single argsort and forgets an offset; this is the ranking that it means. With another scorer, what that evicts is merged
    the same way at any time. Claim: ahead of H2O and local windows on LLaVA-1.5 at every ratio.

    Attributes:
        distance: entries of the compressed prompt behind the slot (paper: 25).
        sinks: first entries that always stay, and that nothing is merged into.
        recent: newest entries that always stay (paper: 1).
    """

    name = "elastic_cache"
    aliases = ("elastic",)
    role = "scorer and destination"
    phase = "prefill and decode"
    paper = "Efficient Inference of Vision Instruction-Following Models with Elastic Cache, arXiv 2407.18121, 2024"
    needs = ("queries",)

    distance: int = 25
    sinks: int = 1
    recent: int = 1

    def parts(self) -> dict[str, Any]:
        return {"destination": MergeNearby(unless=SLOT, weights="mean", sinks=self.sinks)}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": FixedSlot(self.distance), "protect": Protect(sinks=self.sinks, recent=self.recent)}
