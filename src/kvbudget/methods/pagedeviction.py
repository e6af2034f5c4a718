"""PagedEviction: tokens leave in prefill and whole pages in decode, by the norms of values and keys."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Granularity, Protect, Recipe, Scorer, Trigger
from kvbudget.policy.scoring import by_layer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class NormRatio(Scorer):
    """``||v|| / ||k||``, mean over the KV heads of the layer (rotary embeddings preserve the norm)."""

    aligned: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        ratio = view.values.float().norm(dim=-1) / view.keys.float().norm(dim=-1).clamp_min(1e-12)
        return by_layer(ratio)


@dataclass(frozen=True)
class PagedEviction(Recipe):
    """Evicts single entries before they are cut into pages, and whole pages of ``page`` entries from then on.

    Paper: Chitty-Venkata et al., arXiv 2509.04377, 2025, section 3: ``score = ||v|| / ||k||``, the same in all heads of a
    layer; a page is judged by its mean. New entries leave one by one in the forward that brings them (the prompt, or a chunk
    of it) and belong to a page once it is full; entries never move between pages. The first page and the newest ``page``
    entries, with the page that they reach into, always stay. Claim: better than StreamingLLM and key norms at 256 to 4096
    entries, with page tables untouched. The published code evicts a page at every fill; as in the paper's text a page
    leaves only over budget, hence one per ``page`` decode steps, at the step before the page would overrun the budget.

    Attributes:
        page: entries per page (vLLM: 16).
    """

    name = "pagedeviction"
    aliases = ("paged_eviction",)
    role = "scorer and granularity"
    phase = "prefill and decode"
    paper = "PagedEviction: Structured Block-wise KV Cache Pruning for Efficient LLM Inference, arXiv 2509.04377, 2025"
    needs = ("keys",)
    prefix_reusable = True

    page: int = 16

    def __post_init__(self) -> None:
        if self.page < 1:
            raise PolicyError(f"pagedeviction: page={self.page} must be at least 1 entry")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": NormRatio(),
            "granularity": Granularity(self.page),
            "protect": Protect(sinks=self.page, recent=self.page),
            "trigger": Trigger(every=1),
        }
