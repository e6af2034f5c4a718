"""AQUA-KV: keys and values as what linear predictors from the layer below miss."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.joint import Predicted
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.sharing import Joint


@dataclass(frozen=True)
class AquaKV(Recipe):
    """Predicts a layer's keys from the layer below, and its values from both, and codes what is missed.

    Paper: Shutova et al., arXiv 2501.19392, 2025 (ICML). ``kvbudget calibrate aquakv --model M`` fits a ridge regression
    per layer to keys (before RoPE) and values as they are restored, all heads of a token side by side. The residual goes
    through a Hadamard matrix and a fixed grid for two normal numbers (HIGGS, in groups of at most 1024 channels; the
    paper's grids of 4 and 6 channels are left out). Layers are restored one after the other, so all of them hold the same
    entries, on which they vote under an evicting method (own choice), each by its own queries and with the share that an
    allocator over layers gives it; a forward's keys and values of all layers are coded after it. Thinned layers, in which tokens
    would be missing, are refused. True bits per element: ``bits`` (``first_bits`` in the lowest layer) and 16 per group.
    Claim: under 1% of perplexity at 2 to 2.5 bits.

    Attributes:
        bits: of the residuals (2, 3 or 4).
        first_bits: of the lowest layer (paper: 4).
        residual: newest tokens in full precision, coded all at once (paper: 128).
        sinks: first tokens in full precision (paper: 4).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "aquakv"
    role = "codec"
    phase = "prefill and decode"
    paper = "Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models, arXiv 2501.19392, 2025"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 2
    first_bits: int = 4
    residual: int = 128
    sinks: int = 4
    file: str = ""
    found: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bits in (self.bits, self.first_bits):
            if bits not in (2, 3, 4):
                raise PolicyError(f"aquakv has grids of 2, 3 and 4 bits per channel; {bits} is none of them")
        if self.residual < 1:
            raise PolicyError("aquakv: residual=0 codes nothing at once; give at least 1")

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"bits": self.bits, "first_bits": self.first_bits, "residual": self.residual}
        return {"sharing": Joint(Predicted(**shared, sinks=self.sinks, found=self.found or {}), layered=True)}

    def bind(self, fingerprint: str) -> "AquaKV":
        return replace(self, found=dict(Artifact.load(self.name, fingerprint, self.file).tensors))
