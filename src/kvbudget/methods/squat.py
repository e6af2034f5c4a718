"""SQuat: KIVI's codes with key errors kept away from the subspace of the queries."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.integer import TokenQuant, check_bits
from kvbudget.codecs.subspace import SubspaceQuant
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class SQuat(Recipe):
    """Codes keys per channel so that their error hardly changes the logits of the prompt's queries; values as KIVI.

    Paper: Wang et al., arXiv 2503.24358, 2025. Channels are coded block by block, and the error of a block moves the channels
    that are still to come, toward errors orthogonal to the leading directions of the queries. These are the queries, after
    RoPE, of the forward that brings the first entries to be coded (the first chunk of a prompt in chunks). ``weight`` refers to
    unnormalized singular values, which grow with the prompt. Storage and attention are KIVI's: true bits per element
    ``bits + 32 / group``, and ``rank`` vectors per KV head. Claim: better than KIVI at 2 bits with the same storage.

    Attributes:
        bits: code width of keys and values (1, 2, 3, 4 or 8; paper: 2).
        bits_k, bits_v: the same for keys or values alone (0: as ``bits``).
        group: entries per key group and channels per value group (paper: 32).
        residual: full-precision window; a multiple of ``group`` (paper: 32).
        weight: of the error along the queries (0: KIVI; paper: 0.001).
        rank: leading directions of the queries (paper: 5 to 60).
        block: channels that are coded together (0: half a head; paper: 64 of 128).
    """

    name = "squat"
    role = "codec"
    phase = "prefill and decode"
    paper = "SQuat: Subspace-orthogonal KV Cache Quantization, arXiv 2503.24358, 2025"
    needs = ("queries",)
    lossless_when_fits = False

    bits: int = 4
    bits_k: int = 0
    bits_v: int = 0
    group: int = 32
    residual: int = 32
    weight: float = 0.001
    rank: int = 20
    block: int = 0

    def __post_init__(self) -> None:
        if self.block % 8 or not self.rank:
            raise PolicyError(
                f"squat: block={self.block} must be a multiple of 8 channels, rank={self.rank} at least 1"
            )
        self.parts()

    def parts(self) -> dict[str, Any]:
        check_bits(self.bits)
        keys = SubspaceQuant(
            bits=self.bits_k or self.bits, unit=self.group, residual=self.residual,
            weight=self.weight, rank=self.rank, block=self.block,
        )  # fmt: skip
        values = TokenQuant(bits=self.bits_v or self.bits, group=self.group, residual=self.residual)
        return {"codec": (keys, values)}
