"""ZipVL: as many entries in four bits as the attention needs, the others in two."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.levels import AdaptiveQuant
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class ZipVL(Recipe):
    """Codes entries in ``bits`` or ``low_bits``, with a share of each that every layer and KV head finds by its attention.

    Paper: He et al., arXiv 2410.08584, 2024, section 3 (its first version, with quantization). A few probe queries look at the
    entries that are to be coded; the fewest entries that receive ``mass`` of their attention set the number of important
    ones, which are then those with the highest attention per query that can see them. Keys are coded per channel, values per
    token after a division by channel, as in zipcache. The paper also runs the prefill's attention on the important tokens
    alone, which changes what later layers see; here the prefill is whole. Each KV head decides for itself (paper: the mean
    over heads), and probes are spread evenly. True bits per element lie between those of zipcache at ``low_share`` 1 and 0;
    a byte budget counts every entry as important. Claim: half the memory at 0.2 points on Video-MME.

    Attributes:
        bits, low_bits: code width of important entries and of the others (1, 2, 3, 4 or 8; paper: 4 and 2).
        mass: share of the attention that the important entries receive together (0.975 is unverified).
        gap: new entries that are coded together.
        probes: share of the queries that are probes among the newest, and as many again among the earlier ones.
    """

    name = "zipvl"
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression, "
        "arXiv 2410.08584, 2024"
    )
    needs = ("queries",)
    lossless_when_fits = False

    bits: int = 4
    low_bits: int = 2
    mass: float = 0.975
    gap: int = 100
    probes: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or self.probes > 1:
            raise PolicyError(f"zipvl: mass={self.mass} and probes={self.probes} are shares, above 0 and at most 1")
        if self.low_bits > self.bits:
            raise PolicyError(f"zipvl: low_bits={self.low_bits} must be at most bits={self.bits}")
        self.parts()

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"residual": max(1, self.gap), "cyclic": True, "high": self.bits, "low": self.low_bits}
        shared |= {"mass": self.mass, "probes": self.probes}
        return {"codec": (AdaptiveQuant(side="keys", **shared), AdaptiveQuant(side="values", **shared))}
