"""KVzip: entries matter that the model looks at when it repeats the context."""

from dataclasses import dataclass
from typing import Any

from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.plans import Reconstruct
from kvbudget.policy.scorers.repeated import HighestAttention


@dataclass(frozen=True)
class KVzip(Recipe):
    """Keeps the entries that the model attends to most when it repeats the context, whatever will be asked later.

    Paper: Kim et al., arXiv 2505.23416, 2025 (NeurIPS), section 3. After the prompt, the model repeats it in chunks of
    ``chunk`` tokens on top of the full cache (`KVCache.prefill` does that); an entry's score is the highest attention that a
    repeating query pays it. One threshold over all layers and heads decides (the paper's "pair"), so that layers and heads
    differ in size; ``uniform`` gives all the same. The first ``sinks`` entries stay (protect a system prompt by
    ``protect="system"``), generated ones leave last. Claim: a 3 to 4 times smaller cache with negligible loss for questions
    that were unknown when it was compressed. The whole prompt must be held first, so byte budgets are refused. The
    reference takes its softmax in the model's precision and drops ties; here float32, and the total is exact.

    Attributes:
        chunk: tokens that one pass repeats (reference: 2000 or 2048).
        overlap: tokens before a chunk that tell where to start.
        sinks: first entries that always stay and take part in every softmax.
        uniform: the same number of entries for all layers and heads.
        instruction_ids: token ids that ask for the repetition, where no tokenizer is at hand or it needs other words.
    """

    name = "kvzip"
    role = "scorer, plan and allocator over layers and heads"
    phase = "after the prefill, by extra passes"
    paper = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416, 2025"
    needs = ("plan", "queries")
    prefill_peak = "full_prompt"
    prefix_reusable = True

    chunk: int = 2048
    overlap: int = 8
    sinks: int = 4
    uniform: bool = False
    instruction_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "scorer": HighestAttention("chunk", self.sinks),
            "plan": Reconstruct(self.chunk, self.overlap, instruction_ids=self.instruction_ids),
            "protect": Protect(sinks=self.sinks),
        }
        return parts if self.uniform else parts | {"layers": GlobalTopK(), "heads": JointTopK(safeguard=0.0)}
