"""CompressKV: the heads that retrieve by meaning vote for all heads of their layer."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.importance import ByImportance
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.selected import SelectedHeads


@dataclass(frozen=True)
class CompressKV(Recipe):
    """Keeps what a layer's semantic retrieval heads attend to, in all its heads, and more in layers that eviction hurts.

    Paper: Lin et al., arXiv 2508.02401, 2025. Retrieval heads are the four of a layer that pay a whole needle, not only the
    token to be copied, the most attention while the model repeats it; their votes over the last W queries, pooled, are the
    score. A layer gets ``least + importance (C L - least L)`` entries, at most ``most C``; importance is the relative error
    of its attention's output under eviction. ``kvbudget calibrate compresskv --model M`` finds both by forward passes over
    texts that end with a passage of themselves (the paper asks questions about inserted needles). Another scorer may judge
    the entries (``h2o+compresskv``). Claim: 97% of quality
    with 3% of the cache on LongBench questions.

    Attributes:
        window: queries that vote, and newest entries that always stay (paper: 8).
        kernel: pooling width over positions (paper: 5).
        least: entries of every layer (paper: 32).
        most: largest multiple of the mean that a layer gets (paper: 3).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "compresskv"
    role = "allocator over layers, brings a scorer"
    phase = "prefill, goes on in decode"
    paper = (
        "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation, "
        "arXiv 2508.02401, 2025"
    )
    needs = ("queries", "calibration")

    window: int = 8
    kernel: int = 5
    least: int = 32
    most: float = 3.0
    file: str = ""
    heads: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False)
    importance: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.most < 1:
            raise PolicyError(f"compresskv: most={self.most} must be at least 1 (1 is uniform)")

    def parts(self) -> dict[str, Any]:
        return {"layers": ByImportance(self.importance, self.least, self.most)}

    def defaults(self) -> dict[str, Any]:
        scorer = SelectedHeads(self.heads, self.window, self.kernel)
        return {"scorer": scorer, "protect": Protect(recent=self.window)}

    def bind(self, fingerprint: str) -> "CompressKV":
        found = Artifact.load(self.name, fingerprint, self.file).tensors
        heads = tuple(tuple(row) for row in found["heads"].tolist())
        return replace(self, heads=heads, importance=tuple(found["importance"].tolist()))
