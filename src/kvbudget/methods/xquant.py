"""XQuant: layer inputs are held in few bits, and keys and values are made from them again."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.integer import check_bits
from kvbudget.codecs.joint import InputDeltas, LayerInputs
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.sharing import Joint

PAPER = "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, arXiv 2508.10395, 2025"


@dataclass(frozen=True)
class XQuant(Recipe):
    """Holds the input X of a layer's attention in few bits instead of keys and values, which are made anew at every step.

    Paper: arXiv 2508.10395, 2025. ``kvbudget calibrate xquant --model M`` finds the maps from the weights alone. X is taken
    from the keys and values of all heads, which are linear in it, so that no layer is changed. With a KV head per query
    head X is half as wide as keys and values together, and is coded per token in groups of channels. With grouped queries
    it would be wider: by the singular value decomposition of each projection, latents as wide as keys and values take its
    place, those of keys coded per channel and ``group`` tokens. True bits per element of keys and values: ``bits + 32 /
    group``, half of it where X itself is held. The full-precision window is unverified. All heads hold the same entries, so
    scores are averaged over them, under plans, stages and second looks too; with an allocator over heads, they vote with what it
    gives each. Mergers write into the full-precision window alone. A second codec is refused, and so
    are models that normalize keys after their projection. Claim: 7.7x less memory at under 0.1 perplexity.

    Attributes:
        bits: code width (1, 2, 3, 4 or 8; paper: 4 to 2).
        group: channels (paper: 128), or tokens, that share a scale and a zero; so many tokens are coded at once.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "xquant"
    role = "codec"
    phase = "prefill and decode"
    paper = PAPER
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 4
    group: int = 128
    file: str = ""
    found: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise PolicyError(f"{self.name}: a group of {self.group} holds nothing to quantize; give at least 1")

    def parts(self) -> dict[str, Any]:
        found = self.found or {}
        unit = 1 if "down" in found else self.group
        codec = LayerInputs(bits=self.bits, group=self.group, unit=unit, residual=self.group, found=found)
        return {"sharing": Joint(codec)}

    def bind(self, fingerprint: str) -> "XQuant":
        return replace(self, found=dict(Artifact.load(self.name, fingerprint, self.file).tensors))


@dataclass(frozen=True)
class XQuantCL(XQuant):
    """Holds what a layer's input differs by from the inputs of the layers below, summed up as they are restored.

    Paper: arXiv 2508.10395, 2025 (XQuant-CL). The residual stream changes slowly from layer to layer; the difference is
    taken against what has been restored, so errors do not add up. With grouped queries it is coded in an orthonormal basis
    of a layer's key and value projections and turned back into the sum (the paper's form is unverified); inputs are divided
    by the weights of the norm before the projections, which differ from layer to layer (own choice). ``kvbudget calibrate
    xquant_cl --model M`` finds the maps from the weights. Layers are restored one after the other, so all of them hold the
    same entries, on which they vote under an evicting method (own choice), each by its own queries and with the share that an
    allocator over layers gives it; a forward's keys and values of all layers are coded after it. Thinned layers, in
    which tokens would be missing, are refused. True bits per element of keys and values: ``bits + 32 / group`` (4 bits in
    the first layers), half of it where X itself is narrower than keys and values. Claim: 10x less memory at 0.01
    perplexity, 12.5x at 0.1.

    Attributes:
        bits: of the differences (1, 2, 3, 4 or 8; paper: 3 or 2).
        group: channels that share a scale and a zero (paper: 128); so many tokens are coded at once.
        first: layers that take 4 bits (unverified).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "xquant_cl"

    bits: int = 3
    first: int = 3

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"bits": self.bits, "group": self.group, "residual": self.group}
        return {"sharing": Joint(InputDeltas(**shared, first=self.first, found=self.found or {}), layered=True)}
