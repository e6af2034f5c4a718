"""HCAttention: keys as codes into codebooks of the prompt's own."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.codebook import WORDS, Prompted
from kvbudget.codecs.formats import BFloat16
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class HCAttention(Recipe):
    """Codes groups of consecutive key channels as one byte each, by codebooks that are fitted to the prompt's own keys.

    Paper: arXiv 2507.19823, 2025. Post-RoPE keys are split into groups of ``channels``; k-means over the first entries of a KV
    head that are coded gives each group 256 words, which serve all later ones (group size, words and when they are fitted
    are unverified). The paper keeps values in slower memory and reads those of the few entries that the approximate weights
    name; that tier is not here: values stay in bfloat16, and a selector may be added (``hcattention+top_theta``). True bits
    per element: keys ``8 / channels``, and ``512 head_dim`` bytes of codebooks per KV head and sequence. Claim: the accuracy of
    the full cache at 25% of it in fast memory.

    Attributes:
        channels: of a group (2: 4 bits, 4: 2 bits, 8: 1 bit).
        residual: newest entries in full precision, coded all at once; so many fit the first codebooks at least.
    """

    name = "hcattention"
    role = "codec"
    phase = "prefill and decode"
    paper = "HCAttention: Extreme KV Cache Compression via Heterogeneous Attention Computing for LLMs, arXiv 2507.19823, 2025"
    lossless_when_fits = False
    prefix_reusable = True

    channels: int = 4
    residual: int = 256

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise PolicyError(f"hcattention: channels={self.channels} is no group; give at least 1")
        if self.residual < 1:
            raise PolicyError(f"hcattention: residual=0 leaves nothing to fit {WORDS} words to; give at least 1")

    def parts(self) -> dict[str, Any]:
        keys = Prompted(channels=self.channels, residual=self.residual, cyclic=True)
        return {"codec": (keys, BFloat16(residual=0))}
