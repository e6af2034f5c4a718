"""Chelsea: keys that resemble a neighbor are clustered, and clusters count as many entries as they hold."""

from dataclasses import dataclass
from typing import Any

from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.cluster import Cluster
from kvbudget.policy.scorers.redundant import Distinct, check_chunk


@dataclass(frozen=True)
class Chelsea(Recipe):
    """Clusters keys inside chunks of the text by soft matching, and keeps their centroids; with a scorer, what that evicts.

    Paper: Hu et al., arXiv 2506.11418, 2025 (CentroidKV in a later version), whose chunk size, similarity and weights are
    *unverified*. Entries at even places of a chunk are matched with their most similar key at an odd place, and the most
    similar pairs of all chunks are joined until the budget holds; where more than half must go, the centroids are matched
    again. Keys and values are means weighted by counts, and an entry that stands for n has ``log n`` added to its logit,
    which makes clusters of equal keys exact. Where another scorer is named, what it evicts joins its most similar
    neighbors. The mean of rotated keys mixes the phases of their positions, hence chunks. Claim: 80% less memory, decoding
    3.19 times faster.

    Attributes:
        chunk: entries per chunk.
        sinks, recent: first and newest entries that stay as they are.
        counts: weigh clusters by their number in the attention.
    """

    name = "chelsea"
    aliases = ("centroidkv",)
    role = "destination"
    phase = "prefill and decode"
    paper = "Efficient Long-Context LLM Inference via KV Cache Clustering, arXiv 2506.11418, 2025"
    needs = ("keys",)
    prefix_reusable = True

    chunk: int = 128
    sinks: int = 4
    recent: int = 32
    counts: bool = True

    def __post_init__(self) -> None:
        check_chunk(self.chunk)

    def parts(self) -> dict[str, Any]:
        return {"destination": Cluster(self.chunk, counts=self.counts, sinks=self.sinks, recent=self.recent)}

    def defaults(self) -> dict[str, Any]:
        return {
            "scorer": Distinct(self.chunk, self.sinks, self.recent),
            "protect": Protect(sinks=self.sinks, recent=self.recent),
        }
