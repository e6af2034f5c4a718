"""Scores by the cheapest of a few sets of entries that hold most of what a head attends to in the prompt."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.marks import PUNCTUATION, SPECIAL
from kvbudget.policy.selection import rank
from kvbudget.policy.view import View

POLICIES = ("special", "punctuation", "frequent", "local", "full")


@dataclass(frozen=True)
class HeadProfile(Scorer):
    """Each head keeps by the first of its `POLICIES` that recovers ``recovery`` of its attention (FastGen, arXiv 2310.01801).

    Each policy adds to those before it: special tokens and the first ``sinks``; punctuation; the ``frequent`` share of the
    text with the highest mean weight so far; the ``local`` share of it that is newest; all. The weights (mean over the GQA
    group) of all queries that come more than one at a time are profiled. Members of a head's policy score 0 or more, other
    entries less than 0.
    """

    states: ClassVar[tuple[str, ...]] = ("received",)
    uses_marks: ClassVar[bool] = True

    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    sinks: int = 4

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return 4.0 * len(POLICIES)

    def observe(self, view: View) -> None:
        view.add_mass("received")
        profiled = torch.tensor([new > 1 for new in view.new_tokens], device=view.positions.device)
        if not bool(profiled.any()):
            return
        sets = torch.stack(self._sets(view), dim=-1).float()
        band = self._band(view)
        found = torch.zeros(*view.valid.shape[:2], len(POLICIES), device=sets.device)
        for weights, steps in view.attention_rows():
            weights = weights.mean(2) * profiled[:, None, None, None]
            found[..., :3] += (weights @ sets).sum(2)
            near = view.positions[:, :, None] > (steps - band[:, None])[:, None, :, None]
            inside = torch.maximum(near.float(), sets[..., 2][:, :, None])
            found[..., 3] += (weights * inside).sum((2, 3))
            found[..., 4] += ((steps >= 0) & profiled[:, None]).sum(1)[:, None]
        before = view.statistic("recovered")
        view.set_statistic("recovered", found if before is None else before + found)

    def score(self, view: View) -> Tensor:
        policy = self.policies(view)[..., None]
        special, punctuation, frequent = self._sets(view)
        seen = torch.tensor(view.seen, device=policy.device)
        newest = view.positions >= (seen - self._band(view))[:, None, None]
        member = special | (punctuation & (policy >= 1)) | (frequent & (policy >= 2)) | (newest & (policy >= 3))
        member |= policy == len(POLICIES) - 1
        score = self._rate(view) + 1.0 * newest + punctuation + special
        return torch.where(member, score, score - 10.0)

    def policies(self, view: View) -> Tensor:
        """Index into `POLICIES` of every head: ``[B, Hkv]``; the full one before anything has been profiled."""
        found = view.statistic("recovered")
        if found is None:
            return torch.full(view.valid.shape[:2], len(POLICIES) - 1, device=view.positions.device)
        reached = found[..., :4] / found[..., 4:].clamp_min(1) >= self.recovery
        reached &= (found[..., 4:] > 0) & (self.recovery < 1)
        return torch.where(reached.any(-1), reached.int().argmax(-1), len(POLICIES) - 1)

    def _sets(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """What the first three policies keep, each with those before it: bool ``[B, Hkv, T]``."""
        special = (((view.marks & SPECIAL) > 0) | (view.positions < self.sinks)) & view.valid
        punctuation = special | ((view.marks & PUNCTUATION) > 0)
        rest = self._rate(view).masked_fill(punctuation | ~view.valid, -1.0)
        number = torch.tensor([math.ceil(self.frequent * seen) for seen in view.seen], device=rest.device)
        return special, punctuation, punctuation | ((rank(rest) < number[:, None, None]) & (rest >= 0))

    def _rate(self, view: View) -> Tensor:
        seen = torch.tensor(view.seen, device=view.positions.device)[:, None, None]
        return view.state("received") / (seen - view.positions.clamp_min(0))

    def _band(self, view: View) -> Tensor:
        """Positions ``[B]`` that the local policy reaches back."""
        return torch.tensor([int(self.local * seen) for seen in view.seen], device=view.positions.device)
