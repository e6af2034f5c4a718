"""NSNQuant: entries made normal, and one codebook for all models."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.codebook import GROUP, Normalized
from kvbudget.codecs.rotated import Rotated
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class NSNQuant(Recipe):
    """Rotates entries, normalizes, shifts and normalizes them, and codes 8 channels at a time in one fixed codebook.

    Paper: Son et al., arXiv 2505.18231, 2025 (NeurIPS). What a Hadamard matrix and the double normalization leave looks like
    N(0, 1), so one codebook, made from normal numbers alone, serves keys (before RoPE) and values of every layer of every
    model: no calibration, and nothing that another domain of text could break. Two bits are two codes, the second for
    what the first one leaves (the paper's form is unverified); the codebook is k-means over 16384 draws, without the
    paper's fine-tuning. True bits per element: ``bits + 32 / head_dim + 16 / chunk`` with scales and means in half precision
    (the paper codes these too, and reaches 1.23 at 1 bit). Claim: best at 1 and 2 bits without calibration.

    Attributes:
        bits: 1 or 2.
        chunk: entries that share a mean and are coded, and evicted, together (unverified).
    """

    name = "nsnquant"
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "NSNQuant: A Double Normalization Approach for Calibration-Free Low-Bit Vector Quantization of KV Cache, "
        "arXiv 2505.18231, 2025"
    )
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 2
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (1, 2):
            raise PolicyError(f"nsnquant: bits={self.bits} must be 1 or 2, one code per {GROUP} channels or two")
        if self.chunk < 2:
            raise PolicyError(f"nsnquant: a chunk of {self.chunk} entries is its own mean; give at least 2")

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"unit": self.chunk, "residual": self.chunk, "stages": self.bits}
        keys = Rotated(base=Normalized(before_rope=True, **shared))
        return {"codec": (keys, Rotated(base=Normalized(**shared)))}
