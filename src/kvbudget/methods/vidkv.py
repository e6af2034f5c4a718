"""VidKV: keys at 1.5 bits with the hard channels at two, values at 1.58 bits."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.ternary import MixedChannels, Ternary
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class VidKV(Recipe):
    """Between one and two bits: channels of keys with a large range at 2 bits and the others at 1, values at three levels.

    Paper: Tao et al., arXiv 2503.16257, 2025, made for the visual tokens of video models; here all tokens are coded, and the
    most relevant ones get no more bits (the paper's optional STP). Both are coded per channel and group of entries, which
    leave together. Which channels are hard is found once per KV head. True bits per element: keys
    ``2 hard + (1 - hard) + (16 hard + 16) / group``, values ``1.6 + 16 / group``. Claim: almost no drop on video benchmarks; on
    text it is lossy.

    Attributes:
        hard: share of the key channels at 2 bits (paper: 0.5 for 1.5 bits; rounded to bytes of codes).
        group: entries per group (paper: 32).
        residual: full-precision window; a multiple of ``group`` (paper: 128).
    """

    name = "vidkv"
    role = "codec"
    phase = "prefill and decode"
    paper = "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models, arXiv 2503.16257, 2025"
    lossless_when_fits = False
    prefix_reusable = True

    hard: float = 0.5
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.hard < 1 or not self.group or self.residual % self.group:
            raise PolicyError(
                f"vidkv: hard={self.hard} must lie between 0 and 1, residual={self.residual} be a multiple of group={self.group}"
            )

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"unit": self.group, "residual": self.residual}
        return {"codec": (MixedChannels(share=self.hard, **shared), Ternary(**shared))}
