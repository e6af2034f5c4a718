"""Lattice's memory on pretrained models: what is evicted turns the slots that its keys are nearest to."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.slots import Slots
from kvbudget.policy.scorers.position import Recency


@dataclass(frozen=True)
class Lattice(Recipe):
    """A recent window as it is, and everything older in ``slots`` memory slots per KV head that take only what is new to them.

    Paper: Karami and Mirrokni, arXiv 2504.05646, 2025, whose recurrent layers are trained from scratch: each token writes to all
    slots by learned coefficients and a learned step, reads them by others, and no attention is left (*unverified*: how the
    step is gated). Its writing rule, orthogonal to what a slot holds, is taken here as a summary of evicted values on models
    that know nothing of it, which no paper supports: the slot of the nearest key codeword is written, with a step that is a
    constant or one over the entries so far, and slots are read by attention, under the softmax of what is kept, each
    with the weight of all its entries. A mean of the values, `transformer_vq`, is the plain form of the same memory: compare
    the two before using this one. Constant size; goes with any evicting method (``snapkv+lattice``). Claim, for trained
    layers: better perplexity than other memories of constant size.

    Attributes:
        slots: per KV head (paper: 16).
        rate: least step of a slot, 0 for one that lets all its entries count alike (paper: learned).
        chunk: entries that are written with the slots' directions before them (paper: 4).
        sinks: first entries that stay, where the window is the default one.
    """

    name = "lattice"
    role = "destination"
    phase = "prefill and decode"
    paper = "Lattice: Learning to Efficiently Compress the Memory, arXiv 2504.05646, 2025"
    needs = ("keys",)
    prefix_reusable = True

    slots: int = 16
    rate: float = 0.0
    chunk: int = 4
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.slots < 1 or self.chunk < 1 or not 0 <= self.rate <= 1:
            raise PolicyError(
                f"lattice: slots={self.slots} and chunk={self.chunk} must be at least 1, and rate={self.rate} from 0 to 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"destination": Slots(self.slots, self.rate, self.chunk)}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": Recency(), "protect": Protect(sinks=self.sinks)}
