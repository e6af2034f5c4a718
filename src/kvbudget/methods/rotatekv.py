"""RotateKV: Hadamard-rotated keys before RoPE and values, coded per entry with clipped ranges; sinks stay."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import TokenQuant, check_bits
from kvbudget.codecs.rotated import Rotated
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class RotateKV(Recipe):
    """Spreads outlier channels by a Hadamard rotation of keys before RoPE and of values, then codes per entry in few bits.

    Paper: Su et al., arXiv 2501.16383, 2025 (IJCAI). Each group of channels of an entry is coded min-max with its range
    shrunk by ``clip`` (0.8 at 2 bits). The paper rotates four KV heads of keys together and sorts the rotated channels by a
    calibration, so that groups of 128 are alike; here each KV head stands alone (it evicts alone), its rotation and its
    group are the head, and nothing is left to sort. Its sinks are the tokens of the largest hidden states, which do not
    reach the cache; here they are the first ``sinks`` tokens. True bits per element: ``bits + 32 / group``. Claim: 2 bits
    within 0.3 perplexity on Llama-2-13B.

    Attributes:
        bits: code width of keys and values (1, 2, 3, 4 or 8).
        bits_k, bits_v: the same for keys or values alone (0: as ``bits``).
        group: channels per scale (at most a head).
        clip: the part of the range that the codes span (0: 0.8 up to 2 bits, else 1).
        sinks: first entries that stay in full precision (paper: those of the 20 largest hidden values, often 1 to 5).
    """

    name = "rotatekv"
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations, "
        "arXiv 2501.16383, 2025"
    )
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 4
    bits_k: int = 0
    bits_v: int = 0
    group: int = 128
    clip: float = 0.0
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.clip > 1:
            raise PolicyError(f"rotatekv: clip={self.clip} must be a part of the range, at most 1 (0: by the bits)")
        self.parts()

    def parts(self) -> dict[str, Any]:
        return {"codec": (self._codec(self.bits_k or self.bits, True), self._codec(self.bits_v or self.bits, False))}

    def _codec(self, bits: int, before_rope: bool) -> Codec:
        check_bits(bits)
        clip = self.clip or (0.8 if bits <= 2 else 1.0)
        coded = TokenQuant(bits=bits, group=self.group, clip=clip, sinks=self.sinks, before_rope=before_rope)
        return Rotated(base=coded)
