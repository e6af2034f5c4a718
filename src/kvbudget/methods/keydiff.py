"""KeyDiff: keys that differ from the mean key stay."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvbudget.policy.base import Protect, Recipe, Scorer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class KeyDifference(Scorer):
    """``-cos(k, mean of the normalized keys held)``, per KV head, on post-RoPE keys."""

    def score(self, view: View) -> Tensor:
        keys = view.keys.float()
        anchor = (normalize(keys, dim=-1) * view.valid[..., None]).sum(2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)


@dataclass(frozen=True)
class KeyDiff(Recipe):
    """Keeps, per KV head, the entries whose keys point away from the mean direction of the keys held.

    Paper: Park et al., arXiv 2504.15364, 2025, section 3: ``score = -cos(k, mean of k / ||k||)``, taken after each block of
    the prompt over the cache and the block; the anchor stands for all pairwise similarities. Claim: less than
    0.04% below the full cache on LongBench with 8k entries. It needs neither queries nor attention, so it never looks at
    the question.

    Attributes:
        recent: newest entries that always stay (the paper has none).
    """

    name = "keydiff"
    role = "scorer"
    phase = "prefill and decode"
    paper = "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference, arXiv 2504.15364, 2025"
    needs = ("keys",)
    prefix_reusable = True

    recent: int = 0

    def parts(self) -> dict[str, Any]:
        return {"scorer": KeyDifference(), "protect": Protect(recent=self.recent)}
