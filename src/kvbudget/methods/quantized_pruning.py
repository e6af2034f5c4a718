"""Quantized pruning: more entries in fewer bits for the same bytes."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.integer import TokenQuant, check_bits
from kvbudget.methods.snapkv import SnapKV
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class QuantizedPruning(Recipe):
    """Any eviction with its survivors in ``bits`` per element: given bytes, ``bits`` trades their precision for their number.

    Paper: Zhang et al., arXiv 2412.12706, 2024 ("More Tokens, Lower Precision"). The entries that a byte budget buys grow
    with ``16 / (bits + 32 / group)``: scales and zeros, positions and votes are counted, which the paper's ``16 / bits`` leaves
    out; ``bits=16`` is the plain pruner. A budget in tokens or a fraction counts entries, so there ``bits`` only saves bytes.
    Keys and values are coded min-max per entry after the eviction, so any entry may leave later; entries are chosen by SnapKV
    unless another scorer is named (``h2o+quantized_pruning``). The reference codes by HQQ and leaves generated tokens in full
    precision, which no byte budget could bound: here the newest ``residual`` stay. Claim: four times the entries at 4 bits
    beat full precision at nearly all budgets, most of all in retrieval; 2 bits are worse again.

    Attributes:
        bits: code width (1, 2, 3, 4, 8, or 16: as the model computes; paper: 4).
        group: channels per scale (at most a head; paper: 64).
        residual: newest entries in full precision.
    """

    name = "quantized_pruning"
    role = "codec"
    phase = "prefill and decode"
    paper = (
        "More Tokens, Lower Precision: Towards the Optimal Token-Precision Trade-off in KV Cache Compression, "
        "arXiv 2412.12706, 2024"
    )
    needs = ("queries",)
    lossless_when_fits = False

    bits: int = 4
    group: int = 64
    residual: int = 32

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> dict[str, Any]:
        if self.bits == 16:
            return {}
        check_bits(self.bits)
        codec = TokenQuant(bits=self.bits, group=self.group, residual=self.residual)
        return {"codec": (codec, codec)}

    def defaults(self) -> dict[str, Any]:
        return SnapKV().parts()
