"""EpiCache: a long conversation in blocks under the budget, each cut by what one of its episodes attends to."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.base import Recipe
from kvbudget.policy.plans import Episode
from kvbudget.policy.scorers.repeated import HighestAttention


@dataclass(frozen=True)
class EpiCache(Recipe):
    """Clusters the conversation into episodes, and keeps in each one's cache what its most typical windows attend to.

    Paper: Kim et al., arXiv 2509.17396, 2025, section 3. Windows of the text are embedded and clustered by k-means; the
    ``medoids`` windows nearest to a center are the episode's text. The prompt is fed in blocks; after each, that text runs
    on top of the cache, ``score = max over its queries and the GQA group of softmax(q k)`` over the held entries, and the
    heads of a layer compete for the layer's budget. So the peak is the budget and one block. A question goes to the cache of
    the nearest center: ``cache.prefill(model, ids, question_ids=question)`` builds that one,
    `kvbudget.episodes.Episodes` one for each episode. Without a question all of the prompt is one episode. The paper embeds
    four utterances by a sentence encoder; here a window has a fixed number of tokens and the mean of the model's own token
    embeddings, less the text's mean, stands for it. The paper's offline layer budgets are `epicache_layers`, which can be
    added. Claim: up to 40% more accurate than other bounded methods on long conversations.

    Attributes:
        block: tokens per block.
        episodes: clusters (paper: 4).
        window: tokens per window (paper: 4 utterances).
        medoids: windows that speak for an episode (paper: 8).
        uniform: the same number of entries for all heads of a layer.
    """

    name = "epicache"
    role = "scorer, plan and allocator over heads"
    phase = "prefill, in blocks"
    paper = "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering, arXiv 2509.17396, 2025"
    needs = ("plan", "queries")

    block: int = 512
    episodes: int = 4
    window: int = 128
    medoids: int = 8
    uniform: bool = False

    def __post_init__(self) -> None:
        if min(self.block, self.episodes, self.window, self.medoids) < 1:
            raise PolicyError(
                f"epicache: block={self.block}, episodes={self.episodes}, window={self.window} and medoids={self.medoids} "
                "must be at least 1"
            )

    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "scorer": HighestAttention("held"),
            "plan": Episode(self.block, self.episodes, self.window, self.medoids),
        }
        return parts if self.uniform else parts | {"heads": JointTopK(safeguard=0.0)}
