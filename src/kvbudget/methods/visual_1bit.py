"""CalibQuant: a long static span at one bit, one shrunken range per channel."""

from dataclasses import dataclass
from typing import Any, Literal

from kvbudget.codecs.span import SpanQuant
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class Visual1Bit(Recipe):
    """Codes everything but the first and the newest entries at one bit, with two levels per channel for the whole span.

    Paper: Han et al., arXiv 2502.14882, 2025 ("From 16-Bit to 1-Bit", later CalibQuant), which codes an image's tokens once
    and leaves text in full precision. Here the span begins after ``sinks`` entries and ends ``residual`` before the newest one;
    the levels are found in the first entries of a KV head that are coded, best the whole prompt in one forward, and stay
    for what follows. Codes of one or two bits stretch the logits, so those over the span are calibrated: each query's are
    mapped linearly from ``[min, max]`` to ``[min, max - lowered]`` (the reference's 3, tuned for InternVL, brings the KL on
    SmolLM2's text to two fifths; with more bits it would do harm). Before a soft cap, and not under a selector, which reads plain
    keys. True bits per element: ``bits``, and 32 per channel of a KV head. Claim: small loss on captions and visual
    questions; on text it is lossy.

    Attributes:
        bits: code width (paper: 1 or 2).
        shrink_k, shrink_v: factor of a channel's range (0: 0.5 and 0.3 at one bit, else 1, as the reference).
        toward: the range shrinks toward zero (reference), or toward its middle, which suits channels far from zero.
        sinks: first entries in full precision (paper: the system prompt).
        residual: newest entries in full precision.
        lowered: by how much each query's highest logit over the span falls (0: not at all; None: 3 up to two bits, else 0).
    """

    name = "visual_1bit"
    role = "codec"
    phase = "prefill and decode"
    paper = "From 16-Bit to 1-Bit: Visual KV Cache Quantization for Memory-Efficient Multimodal LLMs, arXiv 2502.14882, 2025"
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 1
    shrink_k: float = 0.0
    shrink_v: float = 0.0
    toward: Literal["zero", "middle"] = "zero"
    sinks: int = 4
    residual: int = 32
    lowered: float | None = None

    def __post_init__(self) -> None:
        if max(self.shrink_k, self.shrink_v) > 1:
            raise PolicyError(f"visual_1bit: shrink_k={self.shrink_k} and shrink_v={self.shrink_v} must be at most 1")
        self.parts()

    def parts(self) -> dict[str, Any]:
        defaults = (0.5, 0.3) if self.bits == 1 else (1.0, 1.0)
        shared: dict[str, Any] = {
            "bits": self.bits,
            "toward": self.toward,
            "sinks": self.sinks,
            "residual": self.residual,
            "lowered": (3.0 if self.bits <= 2 else 0.0) if self.lowered is None else self.lowered,
        }
        factors = (self.shrink_k or defaults[0], self.shrink_v or defaults[1])
        return {"codec": tuple(SpanQuant(shrink=factor, **shared) for factor in factors)}
