"""CQ: neighboring channels share one code."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.codebook import Coupled
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class CoupledQuantization(Recipe):
    """Codes groups of consecutive channels as one byte each, by codebooks of every layer, KV head and group.

    Paper: Zhang et al., arXiv 2405.03917, 2024 (NeurIPS). The joint entropy of channels grows slower than the sum of
    their own, so the more channels share a code, the less is lost at the same bits. Keys are coded before RoPE.
    ``kvbudget calibrate cq --model M`` finds 256 words per codebook by k-means, weighted by squared gradients of the loss
    (Fisher information); the paper's 10-bit codes are left out. True bits per element: ``8 / channels``, nothing else is
    stored. Claim: usable down to 1 bit per channel. Texts unlike those of the calibration lose more.

    Attributes:
        channels: that share a code (8: 1 bit, 4: 2 bits, 2: 4 bits); as in the calibration.
        residual: newest entries in full precision (paper: a sliding window helps at 1 bit; its size is unverified).
        sinks: first entries in full precision.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "cq"
    aliases = ("coupled_quant",)
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization, "
        "arXiv 2405.03917, 2024"
    )
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    channels: int = 8
    residual: int = 32
    sinks: int = 4
    file: str = ""
    key_words: Tensor | None = field(default=None, repr=False, compare=False)
    value_words: Tensor | None = field(default=None, repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"channels": self.channels, "residual": self.residual, "sinks": self.sinks}
        keys = Coupled(words=self.key_words, before_rope=True, **shared)
        return {"codec": (keys, Coupled(words=self.value_words, **shared))}

    def bind(self, fingerprint: str) -> "CoupledQuantization":
        found = Artifact.load(self.name, fingerprint, self.file).tensors
        made = found["key"].shape[-1]
        if made != self.channels:
            raise PolicyError(
                f"cq: the codebooks were calibrated for channels={made}, not {self.channels}; run: kvbudget calibrate "
                f'"cq(channels={self.channels})"'
            )
        return replace(self, key_words=found["key"].float(), value_words=found["value"].float())
