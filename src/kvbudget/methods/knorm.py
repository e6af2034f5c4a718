"""Knorm: keys with a low L2 norm attract attention, so they stay."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvbudget.policy.allocators.pinned import PinnedLayers
from kvbudget.policy.base import Protect, Recipe, Scorer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """``score = -||k||_2`` (rotary embeddings preserve the norm, so post-RoPE keys serve)."""

    def score(self, view: View) -> Tensor:
        return -view.keys.float().norm(dim=-1)


@dataclass(frozen=True)
class Knorm(Recipe):
    """Keeps, per KV head, the entries whose keys have the lowest L2 norm.

    Paper: Devoto et al., arXiv 2406.11430, 2024 (EMNLP), section 3: ``score = -||k||_2``. Claim: half of the cache without
    loss on language modeling, a tenth on passkeys. It needs neither queries nor attention, so it never looks at the
    question. Weak where keys are normalized (Qwen3, Gemma 3), and in the first layers, which the paper's experiments leave
    whole: with ``skip`` they keep everything, and the others share what is left of the budget.

    Attributes:
        skip: first layers of the model that keep everything (the reference's default: 0; its example and experiments: 2).
        recent: newest entries that always stay (the reference has none and may drop the newest entry while decoding).
    """

    name = "knorm"
    role = "scorer"
    phase = "prefill and decode"
    paper = "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430, 2024"
    needs = ("keys",)
    prefix_reusable = True

    skip: int = 0
    recent: int = 0

    def parts(self) -> dict[str, Any]:
        whole = {"heads": PinnedLayers(layers=self.skip)} if self.skip else {}
        return {"scorer": KeyNorm(), "protect": Protect(recent=self.recent)} | whole
