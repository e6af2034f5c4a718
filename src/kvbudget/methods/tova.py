"""TOVA: the entry that the newest query attends to least leaves."""

from dataclasses import dataclass
from typing import Any

from kvbudget.policy.base import Recipe, Trigger
from kvbudget.policy.scorers.received import NewestAttention


@dataclass(frozen=True)
class Tova(Recipe):
    """Keeps, the same in all heads of a layer, the entries that the newest query attends to most.

    Paper: Oren et al., arXiv 2401.06104, 2024, section 3.2: ``score = mean over all query heads of softmax(q_newest k)``;
    the lowest leaves at each step, and once after the prompt (here: after each chunk of it). Nothing is protected, not even
    the newest entry. Claim: nearly full quality with an eighth of the cache. All heads hold the same entries, so it does
    not go with an allocator over heads.
    """

    name = "tova"
    role = "scorer"
    phase = "prefill and decode"
    paper = "Transformers are Multi-State RNNs, arXiv 2401.06104, 2024"
    needs = ("queries",)

    def parts(self) -> dict[str, Any]:
        return {"scorer": NewestAttention(), "trigger": Trigger(every=1)}
