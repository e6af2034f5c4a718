"""CommVQ: additive codes of keys that commute with RoPE."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.commuting import WORDS, Commuting, laid_out, stages_of
from kvbudget.codecs.rotated import NormalCodes, Rotated
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class CommVQ(Recipe):
    """Codes the keys before RoPE of each KV head as sums of centers from tables that were trained for it.

    Paper: Li et al., arXiv 2506.18879, 2025 (ICML). Each stage adds a center of 12 bits made of two vectors of a table, one of
    them turned by 90 degrees in every pair that RoPE turns; such centers commute with RoPE, so that a query could meet
    the tables before any rotation (here blocks are decoded and rotated). ``kvbudget calibrate commvq --model M`` trains the
    tables by expectation maximization. The norm is that of a KV head's key (paper: of all heads together). The paper's
    values go through a trained encoder; here they are rotated and coded with the best scalar codes for normal data. True bits
    per element: keys ``12 round(bits D / 12) / D`` (whole bytes) + 16 / D, values ``bits + 16 / D``. Claim: 87.5% less cache
    at 2 bits, usable at 1.

    Attributes:
        bits: per channel of keys and values (1 or 2).
        residual: newest entries in full precision (paper: 128, coded 128 at a time).
        sinks: first entries in full precision.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "commvq"
    role = "codec"
    phase = "prefill and decode"
    paper = "CommVQ: Commutative Vector Quantization for KV Cache Compression, arXiv 2506.18879, 2025"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 2
    residual: int = 128
    sinks: int = 0
    file: str = ""
    vectors: Tensor | None = field(default=None, repr=False, compare=False)
    order: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in (1, 2):
            raise PolicyError(f"commvq: bits={self.bits} must be 1 or 2")

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"residual": self.residual, "sinks": self.sinks}
        width = 128 if self.vectors is None else self.vectors.shape[-1]
        found: dict[str, Any] = {"vectors": self.vectors, "order": self.order}
        keys = Commuting(stages=stages_of(self.bits, width), before_rope=True, **found, **shared)
        return {"codec": (keys, Rotated(base=NormalCodes(bits=self.bits, **shared)))}

    def bind(self, fingerprint: str) -> "CommVQ":
        found = Artifact.load(self.name, fingerprint, self.file).tensors
        assert found["tables"].shape[-2] == WORDS, "tables of another form"
        return replace(self, vectors=laid_out(found["tables"], found["order"]), order=found["order"])
