"""StreamingLLM: attention sinks and a recent window."""

from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.position import Recency


@dataclass(frozen=True)
class StreamingLLM(Recipe):
    """Keeps the first ``sinks`` entries and the newest ones that the budget allows, the same in all heads.

    Paper: Xiao et al., arXiv 2309.17453, 2023 (ICLR 2024), section 3. Claim: stable perplexity to 4 million tokens.
    The paper numbers positions inside the cache; ``positions="cache"`` does that, so that no distance exceeds the cache's
    size. It is carried out by turning the query for the sinks by the number of evicted tokens, which RoPE cannot tell from
    renumbering all keys, and leaves nothing to drift. ``positions="original"`` keeps true distances to the sinks.

    Attributes:
        sinks: first entries that always stay (paper: 4).
        positions: ``original`` or ``cache``.
    """

    name = "streaming_llm"
    role = "scorer"
    phase = "prefill and decode"
    paper = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, 2023"
    prefix_reusable = True

    sinks: int = 4
    positions: Literal["original", "cache"] = "original"

    def parts(self) -> dict[str, Any]:
        return {"scorer": Recency(), "protect": Protect(sinks=self.sinks), "position_mode": self.positions}
