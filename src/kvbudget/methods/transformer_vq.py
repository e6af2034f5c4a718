"""Transformer-VQ's cache on pretrained models: what is evicted is summed up over the codewords of its keys."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.codewords import Codewords
from kvbudget.policy.scorers.position import Recency


@dataclass(frozen=True)
class TransformerVQ(Recipe):
    """A recent window as it is, and everything older as ``codes`` weighted entries per KV head: key codewords and mean values.

    Paper: Lingle, arXiv 2309.16354, 2023 (ICLR 2024), where a model is trained with quantized, position-free keys and a
    codebook; attention then needs a window, and a number and a mean value per codeword. This is that cache's arithmetic for
    models that were not: the codebook of a head is made of its own evicted keys, which hold RoPE, so keys of one codeword
    have to agree in content and phase, and the cost is quantization error that training would have removed. Aggregation is
    exact for equal keys, and goes with any evicting method (``snapkv+transformer_vq``). Constant size, whatever the
    length. Claim, for trained models: quality of full attention at linear cost.

    Attributes:
        codes: codewords per KV head (paper: 512 for one head of 128 elements); bytes pay for all of them, as float32 keys and
            values, before any entry.
        sinks: first entries that stay, where the window is the default one.
    """

    name = "transformer_vq"
    role = "destination"
    phase = "prefill and decode"
    paper = "Transformer-VQ: Linear-Time Transformers via Vector Quantization, arXiv 2309.16354, 2023"
    needs = ("keys",)
    prefix_reusable = True

    codes: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.codes < 1:
            raise PolicyError(f"transformer_vq: codes={self.codes} must be at least 1")

    def parts(self) -> dict[str, Any]:
        return {"destination": Codewords(self.codes)}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": Recency(), "protect": Protect(sinks=self.sinks)}
