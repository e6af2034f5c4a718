"""KCache: all keys at hand, and only the values of the heaviest weights fetched."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe, Selector
from kvbudget.policy.selection import rank
from kvbudget.segments.selective import Chosen, Reading


@dataclass(frozen=True)
class HeaviestValues(Selector):
    """Reads the values of the ``count`` heaviest weights of each query head, with the weights of the full softmax.

    With ``renormalize`` they are divided by their sum. The first ``exempt`` layers read everything.
    """

    prefill: ClassVar[bool] = False

    count: int = 128
    renormalize: bool = False
    exempt: int = 0

    def select(self, reading: Reading) -> Chosen:
        weights = reading.probabilities
        if reading.layer_idx >= self.exempt:
            weights = weights * (rank(weights) < self.count)
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        return Chosen(weights)


@dataclass(frozen=True)
class KCache(Recipe):
    """Generated tokens read all keys, and the values of their ``top`` heaviest weights alone.

    Paper: arXiv 2404.18057, 2024. Keys stay in fast memory, values go to a slower one after the prefill, and a decode step
    fetches the rows that it needs. This library has one memory, so nothing is moved and no byte is saved: it measures what
    the reads that are left out cost in quality, and a codec for the values alone (``kivi(bits_k=8, bits_v=2)``) is the form
    that saves bytes. Each query head has a set of its own, and a value row is needed when any head of a group wants it. What a
    head loses is at most ``(1 - the weights read)`` times the largest norm of a value. The paper keeps the weights of the
    full softmax (*unverified*: ``renormalize``), and may leave the first layers out (``exempt``). Claim: 40% more throughput,
    almost without loss at 128 values.

    Attributes:
        top: values that a query head reads (paper: 32, 64 or 128).
        renormalize: divide the weights read by their sum.
        exempt: first layers that read everything.
    """

    name = "kcache"
    role = "selector"
    phase = "decode, reads only"
    paper = "Efficient LLM Inference with Kcache, arXiv 2404.18057, 2024"
    needs = ("queries",)
    lossless_when_fits = False
    prefix_reusable = True

    top: int = 128
    renormalize: bool = False
    exempt: int = 0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise PolicyError(f"kcache: top={self.top} must be at least 1")

    def parts(self) -> dict[str, Any]:
        return {"selector": HeaviestValues(self.top, self.renormalize, self.exempt)}
