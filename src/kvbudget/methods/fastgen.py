"""FastGen: every head keeps by the cheapest rule that recovers its attention over the prompt."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.demand import ByDemand
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.scorers.profile import HeadProfile


@dataclass(frozen=True)
class FastGen(Recipe):
    """Profiles the heads on the prompt: special tokens, punctuation, frequent entries, local ones, or all; no budget needed.

    Paper: Ge et al., arXiv 2310.01801, 2023 (ICLR 2024), section 3. Each of these sets holds the ones before it; a head gets
    the first whose share of its attention, mean over the prompt's queries, reaches ``recovery``, and keeps by it from then
    on. Frequent are the entries with the highest mean weight over the queries that saw them. Heads differ in size; with a
    budget they get what they ask for in proportion. GQA heads are profiled by the mean over their group. Claim: about half
    of the cache gone with a win rate above 45% against the full cache. Punctuation and special tokens are known where
    `KVCache.prefill` gets a tokenizer (``kvbudget run`` does that); otherwise only the first ``sinks`` tokens count as special.

    Attributes:
        recovery: share of a head's attention that its rule must keep (paper: 0.85 to 0.95; 1 keeps everything).
        frequent: share of the text that counts as frequent (paper: 0.3).
        local: share of the text that counts as local (paper: 0.3).
        sinks: first entries that always stay (cold-compress: 4).
        every: decode steps between two evictions (paper: 1).
    """

    name = "fastgen"
    role = "scorer and threshold"
    phase = "profile in prefill, then both"
    paper = "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs, arXiv 2310.01801, 2023"
    needs = ("queries", "tokens")
    lossless_when_fits = False

    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    sinks: int = 4
    every: int = 16

    def __post_init__(self) -> None:
        for name in ("recovery", "frequent", "local"):
            if not 0 <= getattr(self, name) <= 1:
                raise PolicyError(f"fastgen: {name}={getattr(self, name)} must be a share, from 0 to 1")
        if self.every < 1:
            raise PolicyError(f"fastgen: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": HeadProfile(self.recovery, self.frequent, self.local, self.sinks),
            "heads": ByDemand(),
            "threshold": 0.0,
            "protect": Protect(sinks=self.sinks),
            "trigger": Trigger(every=self.every),
        }
