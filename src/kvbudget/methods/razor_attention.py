"""RazorAttention: retrieval heads keep everything, the others sinks, a recent window and one compensation entry."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.pinned import PinnedHeads, strongest
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.compensate import Compensate
from kvbudget.policy.scorers.position import Recency


@dataclass(frozen=True)
class RazorAttention(Recipe):
    """Full cache for the heads that retrieve; elsewhere sinks, the newest entries and the mean of all that was dropped.

    Paper: Tang et al., arXiv 2407.15891, 2024 (ICLR 2025), section 3. Retrieval heads are the ``echo`` share of KV heads
    that attend most to earlier copies of a token and the ``induction`` share that attends most to what followed them, over
    all layers together; ``kvbudget calibrate razor_attention --model M`` finds them with one forward over repeated random
    tokens. The compensation entry of a head is the mean key and value of its N dropped entries with ``ln N`` added to its
    logit. Claim: 70% of the cache gone without visible loss, compatible with flash attention.

    A budget is spent on the retrieval heads first; what all other heads keep follows from the rest, and a budget that the
    retrieval heads alone exceed is refused. With ``window`` the paper's rule bounds the others to
    ``sinks + max(window, N / compression)`` entries, and no budget is needed.

    Attributes:
        sinks: first entries that always stay (paper: 4).
        echo, induction: shares of KV heads that count as retrieval heads (paper: 0.01 and 0.14).
        window: least recent window of the other heads (paper's S0: 4000; 0: as the budget allows).
        compression: with a window, the recent window grows to the text's length divided by this (paper's C: 5).
        heads: file of the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "razor_attention"
    role = "allocator over heads and destination"
    phase = "prefill and decode"
    paper = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv 2407.15891, 2024"
    needs = ("calibration",)
    prefix_reusable = True

    sinks: int = 4
    echo: float = 0.01
    induction: float = 0.14
    window: int = 0
    compression: float = 5.0
    heads: str = ""
    retrieval: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, share in (("echo", self.echo), ("induction", self.induction)):
            if not 0 <= share <= 1:
                raise PolicyError(f"razor_attention: {name}={share} must be a share of the heads, from 0 to 1")
        if self.window < 0 or self.compression < 1:
            raise PolicyError(
                f"razor_attention: window={self.window} must be at least 0 and compression={self.compression} at least 1"
            )

    def parts(self) -> dict[str, Any]:
        return {
            "heads": PinnedHeads(self.retrieval, self.sinks, self.window, self.compression),
            "destination": Compensate(),
        }

    def defaults(self) -> dict[str, Any]:
        return {"scorer": Recency(), "protect": Protect(sinks=self.sinks)}

    def bind(self, fingerprint: str) -> "RazorAttention":
        artifact = Artifact.load(self.name, fingerprint, self.heads)
        chosen = strongest(artifact.tensors["echo"], self.echo) | strongest(
            artifact.tensors["induction"], self.induction
        )
        table = tuple(tuple(row.nonzero().flatten().tolist()) for row in chosen)
        return replace(self, retrieval=table)
