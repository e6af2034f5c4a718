"""A2ATS: codes of keys that know no position say which entries a query reads."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.selectors.codes import Retrieved


@dataclass(frozen=True)
class A2ATS(Recipe):
    """Reads the entries whose coded keys promise the most, which takes one product with a codebook per generated token.

    Paper: He et al., arXiv 2502.12665, 2025 (ACL Findings). ``kvbudget calibrate a2ats --model M`` fits a codebook to the
    keys before RoPE of every layer and KV head by k-means in the metric of the queries (query-aware vector quantization).
    Far entries are scored as if all of them were equally far away, which takes the position out of a key. In the paper
    exact keys and values stay in slower memory beside an index of 12 bits per key; here everything is resident, each key
    is coded once (4 bytes beside its position), and attention in plain torch sees all keys: it measures what reading less
    loses, not how fast it could be. The prompt is attended to densely. Claim: lower loss than other retrieval at the same
    reads, up to 2.7 times the throughput.

    Attributes:
        share: of the entries that a query head reads beside the window and the first ones (paper: 0.03).
        window: newest positions that are always read (paper: 64).
        sinks: first positions that are always read (paper: 8).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "a2ats"
    role = "selector"
    phase = "decode, reads only"
    paper = (
        "A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector Quantization, "
        "arXiv 2502.12665, 2025"
    )
    needs = ("queries", "calibration")
    lossless_when_fits = False
    prefix_reusable = True

    share: float = 0.03
    window: int = 64
    sinks: int = 8
    file: str = ""
    found: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.window < 1:
            raise PolicyError(
                f"a2ats: share={self.share} must be a share of the entries, and window={self.window} at least 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"selector": Retrieved(self.share, self.window, self.sinks, self.found or {})}

    def bind(self, fingerprint: str) -> "A2ATS":
        return replace(self, found=dict(Artifact.load(self.name, fingerprint, self.file).tensors))
