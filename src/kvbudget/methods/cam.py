"""CaM-like merging: what any scorer evicts is added to the kept entry with the nearest key, by a choice of weights."""

from dataclasses import dataclass
from typing import Any

from kvbudget.methods.h2o import H2O
from kvbudget.policy.base import Recipe
from kvbudget.policy.destinations.merge import MergeNearest, Weights


@dataclass(frozen=True)
class CaM(Recipe):
    """Merges evicted entries instead of dropping them, keys and values alike; H2O selects where no scorer is named.

    Paper: Zhang et al., ICML 2024, of which this is a relative. CaM merges one entry at a time while decoding: its value,
    divided by their number, is added to those of the next kept entries, with a probability by its attention over theirs. What
    a prompt evicts at once would add up, so here weights of an entry and its members sum to one: every evicted entry goes to
    the kept one with the nearest key of its head, and ``weights`` says how they add up: ``score`` by importance, as CaM's
    probability and ZeroMerge; ``count`` as a running centroid; ``mean``; ``pivot`` as LOOK-M; ``cosine`` and ``softmax`` by
    similarity. With ``counts``, an entry that stands for n has ``log n`` added to its logit, which makes merging equal entries
    exact where values are weighted by count.

    Attributes:
        weights: ``score``, ``count``, ``mean``, ``pivot``, ``cosine`` or ``softmax``.
        counts: weigh merged entries by their number in the attention.
        threshold: least cosine for a merge; below it an entry is dropped (0: opposite directions never merge).
        sinks: first entries that nothing is merged into.
    """

    name = "cam"
    role = "destination"
    phase = "wherever the scorer acts"
    paper = "CaM: Cache Merging for Memory-efficient LLMs Inference, ICML 2024"
    needs = ("queries", "keys")
    prefix_reusable = True

    weights: Weights = "score"
    counts: bool = False
    threshold: float = 0.0
    sinks: int = 4

    def parts(self) -> dict[str, Any]:
        part = MergeNearest(least=self.threshold, weights=self.weights, counts=self.counts, sinks=self.sinks)
        return {"destination": part}

    def defaults(self) -> dict[str, Any]:
        return H2O().parts()
