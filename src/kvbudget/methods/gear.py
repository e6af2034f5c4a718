"""GEAR: the codes of any base, sparse outliers and a low-rank term for what they miss."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import ChannelQuant, TokenQuant, check_bits
from kvbudget.codecs.low_rank import LowRank
from kvbudget.codecs.sparse import Outliers
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class Gear(Recipe):
    """Codes what is left after its outliers as KIVI does, or another base, and adds a rank-``rank`` term for the codes' error.

    Paper: Kang et al., arXiv 2403.05527, 2024. Per KV head ``X = codes + sparse + low rank``: outliers are the largest and
    smallest elements per channel of a group of keys and per entry of values; ``sparsity=0`` is the paper's GEAR-L. Every
    ``group`` new tokens are coded together. Here one basis serves a KV head from its first coded entries on, and later
    entries add their coefficients; the paper gives each batch of tokens factors of its own (of rank 2 after the prompt).
    True bits per element: ``bits + 32 / group`` (values: over a head at most), or those of the base, 24 per outlier and
    ``16 rank / head_dim``.
    Claim: near-lossless at 4 bits, and at 2 bits with these groups.

    Attributes:
        bits: code width (1, 2, 3, 4 or 8; paper: 4 or 2).
        group: entries per key group, channels per value group, and tokens that are coded together (paper: 64).
        sparsity: share of the elements that are outliers, at least two of a vector (0: none; paper: 0.02).
        rank: of the error term, per KV head (0: none; paper: 4).
        base: another codec to correct, such as ``gear(base='turboquant(bits=2)')``, with its own bits and window.
    """

    name = "gear"
    role = "codec"
    phase = "prefill and decode"
    paper = "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM, arXiv 2403.05527, 2024"
    lossless_when_fits = False
    prefix_reusable = True

    bits: int = 4
    group: int = 64
    sparsity: float = 0.02
    rank: int = 4
    base: str = ""

    def __post_init__(self) -> None:
        if self.sparsity > 0.5 or not 1 < self.group <= 256:
            raise PolicyError(
                f"gear: sparsity={self.sparsity} must be at most 0.5, and group={self.group} between 2 and 256"
            )
        self.parts()

    def parts(self) -> dict[str, Any]:
        keys, values = self._corrected() if self.base else self._plain()
        if self.sparsity:
            keys, values = (
                Outliers(base=codec, share=self.sparsity, axis="unit" if codec.unit > 1 else "entry")
                for codec in (keys, values)
            )
        if self.rank:
            keys, values = LowRank(base=keys, rank=self.rank), LowRank(base=values, rank=self.rank)
        return {"codec": (keys, values)}

    def _plain(self) -> tuple[Codec, Codec]:
        check_bits(self.bits)
        keys = ChannelQuant(bits=self.bits, unit=self.group, residual=self.group)
        return keys, TokenQuant(bits=self.bits, group=self.group, residual=self.group, cyclic=True)

    def _corrected(self) -> tuple[Codec, Codec]:
        from kvbudget.methods import parse  # it knows this recipe, too

        policy = parse(self.base)
        codec = policy.parts().codec
        fitted = any(recipe.calibrated for recipe in policy.recipes)
        if codec is None or fitted or any(side.variable or side.judges for side in codec):
            raise PolicyError(
                f"gear: base={self.base!r} is no codec that can be corrected; give one without a calibration and with codes of one "
                "size, such as 'turboquant(bits=2)'"
            )
        return codec
