"""MorphKV: a cache of constant size, chosen anew by the recent queries whenever something has to leave."""

from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.scorers.recent import RecentQueries
from kvbudget.policy.scoring import check_window


@dataclass(frozen=True)
class MorphKV(Recipe):
    """Keeps the newest ``window`` entries, and of the older ones those that the newest ``window`` queries attend to most.

    Paper: Ghadia et al., arXiv 2503.00979, 2025 (ICML), section 3. Per KV head the logits of the recent queries are summed
    over the GQA group, every query's softmax runs over the entries older than the window only, and the queries' weights are
    added (``sum``) or their maximum is taken (``max``). What one query found unimportant can be kept by the next, and what
    nobody has looked at for ``window`` steps leaves. The reference keeps attention rows per entry; here the layer keeps the
    queries, which cost the same whatever is kept and are counted in the budget. The reference masks the rows of single
    query heads by other entries than its cache holds; here one selection counts. Claim: half of the memory and higher
    accuracy than prior work on long answers. The newest query takes part, and the prompt is cut when it has been read
    (reference: one step later).

    Attributes:
        window: queries that judge, and newest entries that always stay (paper: 30 to 200).
        fusion: over queries, ``sum`` or ``max``.
        every: decode steps between two evictions (reference: configurable, 1).
    """

    name = "morphkv"
    role = "scorer"
    phase = "prefill and decode"
    paper = "Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs, arXiv 2503.00979, 2025"
    needs = ("queries",)

    window: int = 32
    fusion: Literal["sum", "max"] = "sum"
    every: int = 16

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.every < 1:
            raise PolicyError(f"morphkv: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": RecentQueries(self.window, self.fusion),
            "protect": Protect(recent=self.window),
            "trigger": Trigger(every=self.every),
        }
