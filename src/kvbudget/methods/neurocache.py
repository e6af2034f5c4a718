"""Neurocache: upper layers attend to a window and to what a search over old tokens finds."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.selectors.neighbors import Neighbors, Search


@dataclass(frozen=True)
class Neurocache(Search, Recipe):
    """Upper layers attend to a recent window and to the stored states nearest to the token's own; generated tokens only.

    Paper: Safaya and Yuret, arXiv 2407.02486, 2024 (NAACL), whose model learns to compress the hidden state of a middle
    layer, searches a first-in first-out store of 16384 such states once per token, and adds a cross-attention with learned
    projections to the layers above. All of that has to be trained; nothing here is. What stands in: a layer's values,
    a linear map of its hidden states without position, are both query and store, each KV head of the upper layers searches
    by itself, and the entries found are attended to with the layer's own keys and values, under the softmax of the window,
    with which the paper's projections begin to learn. One memory, all of which stays: it measures what the search misses,
    and saves no byte. Untrained, the nearest values are not what a layer would attend to: `kcache`, which ranks by the
    weights themselves, reads the most weight that as many entries can hold. Claim, for trained models: lower perplexity at
    16K to 128K tokens than memories of nearest keys.

    Attributes:
        top: states found for a token (paper: 16).
        followers: entries taken of each hit, itself and those behind it (paper: 2).
        context: newest tokens whose hits a token uses (paper: 2).
        window: newest entries that are always read.
        sinks: first entries that are always read (paper: none).
        start: share of the depth from which layers search (paper: 0.75).
        cache: newest entries before the window that are searched (paper: 16384).
    """

    name = "neurocache"
    role = "selector"
    phase = "decode, reads only"
    paper = "Neurocache: Efficient Vector Retrieval for Long-range Language Modeling, arXiv 2407.02486, 2024"
    needs = ("queries",)
    lossless_when_fits = False
    prefix_reusable = True

    def __post_init__(self) -> None:
        for name in ("top", "followers", "context", "window", "cache"):
            if getattr(self, name) < 1:
                raise PolicyError(f"neurocache: {name}={getattr(self, name)} must be at least 1")
        if self.sinks < 0 or not 0 <= self.start <= 1:
            raise PolicyError(
                f"neurocache: sinks={self.sinks} is a number from 0, start={self.start} a share from 0 to 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"selector": Neighbors(**{name: getattr(self, name) for name in self.parameters()})}
