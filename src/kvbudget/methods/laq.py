"""Lookahead Q-Cache: the queries of a cheaply drafted answer vote for the entries that the answer will need."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.plans import Lookahead
from kvbudget.policy.scorers.lookahead import LookaheadAttention
from kvbudget.policy.scorers.window import WindowAttention
from kvbudget.policy.scoring import Pooling, Reduction


@dataclass(frozen=True)
class LAQ(Recipe):
    """Drafts ``tokens`` tokens of the answer on a compressed copy of the prompt, and lets their queries judge the whole one.

    Paper: Wang et al., arXiv 2505.20334, 2025 (EMNLP), section 3. A copy is cut to the budget by SnapKV with ``first``
    queries; it decodes greedily; its post-RoPE queries, after the last ``window`` ones of the prompt, are the observation
    window over the original prompt: ``S = pool(sum over rows of softmax(q k))``. ``window=8`` is the paper's LAQ++,
    ``window=0`` its LAQ, ``tokens=0`` is SnapKV. Neither tokens, entries nor positions of the draft remain. Its queries see
    the whole prompt (the published code masks some recent keys for all rows). Beyond the paper the votes go on while
    decoding. Claim: 1 to 4 points on LongBench at small budgets. The whole prompt is held until the draft is done; it is of
    no use where the question is not yet in the prompt.

    Attributes:
        tokens: length of the draft.
        window: prompt queries that vote with the draft's, and newest entries that always stay.
        first: prompt queries that compress the copy, and newest entries that stay in it.
        kernel: pooling width over positions.
        pooling: ``max`` or ``avg``.
        reduction: over the GQA group, ``mean`` or ``max``.
    """

    name = "laq"
    aliases = ("lookahead_q_cache",)
    role = "scorer and plan"
    phase = "after the prefill, by a drafted answer"
    paper = "Lookahead Q-Cache: Achieving More Consistent KV Cache Eviction via Pseudo Query, arXiv 2505.20334, 2025"
    needs = ("plan", "queries")
    prefill_peak = "full_prompt"

    tokens: int = 8
    window: int = 8
    first: int = 32
    kernel: int = 7
    pooling: Pooling = "max"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.first < 1 or not (self.tokens or self.window):
            raise PolicyError(
                f"laq: first={self.first} must be at least 1, and tokens={self.tokens} or window={self.window} above 0"
            )

    def parts(self) -> dict[str, Any]:
        if not self.tokens:
            return SnapKV(self.window, self.kernel, self.pooling, self.reduction).parts()
        draft = WindowAttention(self.first, self.kernel, self.pooling, self.reduction)
        return {
            "scorer": LookaheadAttention(self.window, self.kernel, self.pooling, self.reduction, self.first),
            "plan": Lookahead(self.tokens, draft, Protect(recent=self.first)),
            "protect": Protect(recent=self.window),
        }
