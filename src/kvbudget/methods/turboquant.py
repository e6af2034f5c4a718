"""TurboQuant: a random rotation, then the best scalar codes for normal data."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import check_bits
from kvbudget.codecs.rotated import NormalCodes, Rotated, SignSketch
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class TurboQuant(Recipe):
    """Rotates keys and values at random and codes each element in the nearest of 2^b values that are best for normal data.

    Paper: Zandieh et al., arXiv 2504.19874, 2025 (ICLR 2026). Entry by entry: its norm in half precision, the unit vector
    times a random orthogonal matrix (the same everywhere), and a Lloyd-Max code per element: no calibration, no window.
    With ``qjl``, one of the bits goes to a sign sketch of the residual, which makes logits unbiased but noisier; independent
    re-implementations report that it hurts attention, so it is off. The paper's fractional rates (more bits for outlier
    channels) are left out. True bits per element: ``bits + 16 / head_dim`` (``+ 16 / head_dim`` with qjl). Claim: neutral
    at 3.5 bits, marginal loss at 2.5.

    Attributes:
        bits: code width of keys and values (1, 2, 3, 4 or 8).
        bits_k, bits_v: the same for keys or values alone (0: as ``bits``).
        qjl: spend one bit of the keys on the sign sketch (paper: the inner-product form).
        residual: newest entries in full precision (paper: none).
    """

    name = "turboquant"
    role = "codec"
    phase = "prefill and decode"
    paper = "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, arXiv 2504.19874, 2025"
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 4
    bits_k: int = 0
    bits_v: int = 0
    qjl: bool = False
    residual: int = 0

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        return {
            "codec": (self._codec(self.bits_k or self.bits, self.qjl), self._codec(self.bits_v or self.bits, False))
        }

    def _codec(self, bits: int, sketched: bool) -> Codec:
        check_bits(bits)
        if sketched and bits not in (2, 3, 4):
            raise PolicyError(f"turboquant: qjl leaves {bits} - 1 bits for the codes; give 2, 3 or 4 bits")
        coded: Codec = NormalCodes(bits=bits - 1 if sketched else bits, residual=self.residual)
        coded = Rotated(base=coded, kind="random")
        return SignSketch(base=coded) if sketched else coded
