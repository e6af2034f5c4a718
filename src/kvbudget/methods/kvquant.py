"""KVQuant: keys before RoPE per channel, values per token, codebooks that the loss chose, outliers apart."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.nonuniform import NonUniform
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class KVQuant(Recipe):
    """Codes elements by non-uniform codebooks of the layer, keys before RoPE; the farthest elements and the first token stay.

    Paper: Hooper et al., arXiv 2401.18079, 2024 (NeurIPS). Keys are normalized per channel with ranges known beforehand,
    values per entry; the codebooks come from k-means weighted with the loss's squared gradients, which ``kvbudget
    calibrate kvquant --model M`` runs. Outliers are kept per entry, a fixed number of them (the reference's deployed form).
    The paper normalizes values and counts outliers over all heads of a token; here each KV head stands alone, since heads
    evict alone. True bits per element: ``bits``, 24 per outlier (value and index) and 32 / head_dim for the values' range.
    Claim: under 0.1 perplexity at 3 bits. Refused for models whose rotation is not known.

    Attributes:
        bits: code width (2, 3 or 4).
        bits_k, bits_v: the same for keys or values alone (0: as ``bits``).
        sparsity: share of the elements that are outliers, at least one of an entry (0: none; paper: 0.01).
        sinks: first entries in full precision (paper: 1).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "kvquant"
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, arXiv 2401.18079, 2024"
    )
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 3
    bits_k: int = 0
    bits_v: int = 0
    sparsity: float = 0.01
    sinks: int = 1
    file: str = ""
    found: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bits in (self.bits_k or self.bits, self.bits_v or self.bits):
            if bits not in (2, 3, 4):
                raise PolicyError(f"kvquant has codebooks of 2, 3 and 4 bits; bits={bits} is none of them")
        if self.sparsity > 0.5:
            raise PolicyError(f"kvquant: sparsity={self.sparsity} is a share of outliers, at most 0.5")

    def parts(self) -> dict[str, Any]:
        found = self.found or {}
        keys, values = self.bits_k or self.bits, self.bits_v or self.bits
        shared: dict[str, Any] = {"share": self.sparsity, "sinks": self.sinks}
        ranges: dict[str, Any] = {name: found.get(name) for name in ("offset", "spread")}
        return {
            "codec": (
                NonUniform(bits=keys, before_rope=True, book=found.get(f"keys_{keys}"), **ranges, **shared),
                NonUniform(bits=values, side="values", book=found.get(f"values_{values}"), **shared),
            )
        }

    def bind(self, fingerprint: str) -> "KVQuant":
        return replace(self, found=dict(Artifact.load(self.name, fingerprint, self.file).tensors))
