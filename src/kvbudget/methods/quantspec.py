"""QuantSpec: a cache of eight bits whose upper four are the draft's."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.codecs.nested import Refined
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class QuantSpec(Recipe):
    """Codes keys per channel and values per entry in four bits, and what these leave in four more.

    Paper: Tiwari et al., arXiv 2502.10424, 2025 (ICML). The cache answers with all eight bits; `kvbudget.speculate` drafts
    tokens with the upper four alone, out of the same memory, and verifies them with all. At least ``group`` newest entries
    stay in full precision and ``group`` more are awaited before any are coded, so that drafted tokens that are taken back
    were never coded. The paper's draft also runs on weights of four bits, which is left out: drafts cost as much as
    other tokens but for what they read of the cache. True bits per element: ``8 + 32 / group``. Claim: more than 90% of
    drafted tokens accepted, 2.5x faster.

    Attributes:
        group: entries per key group, channels per value group, and half of the full-precision buffer (unverified: 128).
    """

    name = "quantspec"
    role = "codec"
    phase = "prefill and decode"
    paper = "QuantSpec: Self-Speculative Decoding with Hierarchical Quantized KV Cache, arXiv 2502.10424, 2025"
    lossless_when_fits = False
    prefix_reusable = True

    group: int = 128

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        keys: Codec = ChannelQuant(bits=4, unit=self.group, residual=self.group, cyclic=False)
        values: Codec = TokenQuant(bits=4, group=self.group, residual=self.group)
        return {"codec": (Refined(base=keys), Refined(base=values))}
