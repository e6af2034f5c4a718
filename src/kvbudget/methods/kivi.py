"""KIVI: per-channel keys, per-token values, full-precision tails."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.integer import ChannelQuant, TokenQuant, check_bits
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class Kivi(Recipe):
    """Quantizes keys per channel in groups of ``group`` entries and values per entry in groups of channels, min-max.

    Paper: Liu et al., arXiv 2402.02750, 2024 (ICML), section 3 and algorithm 1. The newest keys stay in full precision
    until ``residual`` of them are there, which are then coded at once (so the key tail runs from 0 to residual - 1); the
    last ``residual`` values always stay (the paper codes one value a step, here an eighth of the residual and at most 16 come
    together, so that a step does not pay for it). What has been coded is never coded again; eviction takes keys in whole groups.
    True bits per element: ``bits + 32 / group``. Attention over the prompt itself uses full precision. Claim: 2 bits
    almost without loss, 2.6x less memory; the authors advise 4 bits for grouped-query models.

    Attributes:
        bits: code width of keys and values (1, 2, 3, 4 or 8).
        bits_k, bits_v: the same for keys or values alone (0: as ``bits``).
        group: entries per key group and channels per value group (paper: 32).
        residual: full-precision window; a multiple of ``group`` (paper: 128, 32 on GSM8K).
    """

    name = "kivi"
    role = "codec"
    phase = "prefill and decode"
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750, 2024"
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 4
    bits_k: int = 0
    bits_v: int = 0
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        check_bits(self.bits)
        keys = ChannelQuant(bits=self.bits_k or self.bits, unit=self.group, residual=self.residual)
        values = TokenQuant(bits=self.bits_v or self.bits, group=self.group, residual=self.residual)
        return {"codec": (keys, values)}
