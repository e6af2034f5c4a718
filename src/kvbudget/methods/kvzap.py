"""KVzap: a trained gate foresees what the model would look at, and what scores too low leaves behind the window."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.gates import Gated, LinearGate


@dataclass(frozen=True)
class KVzap(Recipe):
    """Drops entries older than ``window`` whose predicted log score is below ``-depth``; needs no budget.

    Paper: Jegou and Jeblick, arXiv 2601.07891, 2026, section 3. A linear map per layer predicts the logarithm of the
    highest attention that an entry would get while the model repeats the text (KVzip); a token is scored when it comes, and
    leaves when the window has passed it. How much is kept follows from the text; with a budget the threshold rises, the same
    for all layers and heads, until what is above it fits, and the window shrinks to half of the budget; a forward is held
    whole until its end, so a long prompt should come in chunks. ``kvbudget calibrate kvzap --model M`` trains it by forward
    passes. The gate reads the token's queries, keys and values before RoPE instead of the hidden state that they are linear
    maps of; the target is the attention alone, or the paper's KVzip+, which weighs it by what a value adds to the output, with
    ``kvbudget calibrate "kvzap(value_norm=True)"``. Claim: 2 to 4 times smaller caches with
    negligible loss. Sinks are protected here: a few heads score them low, and losing them there costs most of the quality.

    Attributes:
        depth: entries leave below ``exp(-depth)`` (paper: 3 to 6).
        window: newest entries that always stay (paper: 128).
        sinks: first entries that always stay (paper: 0).
        every: decode steps between two evictions (paper: 1).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "kvzap"
    role = "scorer, threshold and allocator over layers and heads"
    phase = "prefill and decode"
    paper = "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning, arXiv 2601.07891, 2026"
    needs = ("queries", "keys", "calibration")
    lossless_when_fits = False
    prefix_reusable = True

    depth: float = 4.0
    window: int = 128
    sinks: int = 4
    every: int = 16
    file: str = ""
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise PolicyError(f"kvzap: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": Gated(LinearGate(), self.weights),
            "layers": GlobalTopK(),
            "heads": JointTopK(safeguard=0.0),
            "threshold": -self.depth,
            "protect": Protect(sinks=self.sinks, recent=self.window, most=0.5),
            "trigger": Trigger(every=self.every),
        }

    def bind(self, fingerprint: str) -> "KVzap":
        return replace(self, weights=Artifact.load(self.name, fingerprint, self.file).tensors)
