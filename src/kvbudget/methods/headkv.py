"""HeadKV: heads that retrieve keep more, over all layers together, by importances found once per model."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvbudget.errors import PolicyError
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.allocators.table import HeadTable, LayerTable
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class HeadKV(Recipe):
    """Shares the whole model's budget over its KV heads by their importance, and selects inside them by any scorer.

    Paper: Fu et al., arXiv 2410.19258, 2024 (ICLR 2025), whose details are *unverified*: every head keeps ``1 - 1 / beta``
    of the mean, and the pool that this leaves goes to the heads in proportion to their importance. The paper scores query
    heads on needles that have to be reasoned about; here the importance is the attention that a head pays to what followed
    earlier copies of a token (or to the copies), as ``kvbudget calibrate razor_attention --model M`` measures it, the
    maximum over the GQA group. Layers and heads are ragged. Claim: 1.5% of the cache keeps 97% of the quality on question
    answering.

    Attributes:
        beta: the larger, the less of the budget the importances move (1: all of it).
        importance: ``induction`` or ``echo``.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "headkv"
    role = "allocator over layers and heads"
    phase = "wherever the scorer acts"
    paper = (
        "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning, "
        "arXiv 2410.19258, 2024"
    )
    needs = ("calibration",)
    prefix_reusable = True

    beta: float = 1.2
    importance: Literal["induction", "echo"] = "induction"
    file: str = ""
    shares: tuple[tuple[float, ...], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise PolicyError(
                f"headkv: beta={self.beta} must be at least 1 (1 leaves the whole budget to the importances)"
            )

    def parts(self) -> dict[str, Any]:
        return {
            "layers": LayerTable(tuple(sum(row) for row in self.shares if row)),
            "heads": HeadTable(self.shares),
        }

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()

    def bind(self, fingerprint: str) -> "HeadKV":
        scores = Artifact.load("razor_attention", fingerprint, self.file).tensors[self.importance].double()
        real = scores >= 0  # cells without a head are negative
        mean = scores[real].mean().clamp_min(1e-30)
        shares = (1 - 1 / self.beta) + scores / mean / self.beta
        rows = zip(shares, real, strict=True)
        return replace(self, shares=tuple(tuple(row[held].tolist()) for row, held in rows))
