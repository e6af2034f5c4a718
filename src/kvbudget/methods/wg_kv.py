"""WG-KV: a trained gate decides for each token whether it is worth writing down when it leaves the local window."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.demand import ByDemand
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe, Trigger
from kvbudget.policy.gates import Gated, WriteGate


@dataclass(frozen=True)
class WGKV(Recipe):
    """Keeps the newest ``window`` entries, and of the older ones those that their gate has admitted; needs no budget.

    Paper: EMCLab, arXiv 2512.17452, 2025, section 3. Per KV head a small network reads a token's key before and after RoPE
    and gives ``g``; tokens with ``g`` above ``admit`` go on into the global cache when the window has passed them, the
    others are gone. What has been admitted stays. ``kvbudget calibrate wg_kv --model M`` trains the gate by forward passes,
    layer by layer (the paper back-propagates through the model). A forward of many tokens attends to all of them and what
    is not admitted leaves afterwards; the paper masks inside of it too (smaller chunks come close). With a budget the heads
    get what they ask for in proportion, and the window shrinks to half of it. Claim: 46 to 68% less memory, 3 times faster
    prefill. Sinks are protected here, where the paper's gate has to learn them.

    Attributes:
        admit: least gate of an entry that outlives the window (paper: 0.1).
        window: newest entries that always stay (paper: 256).
        sinks: first entries that always stay (paper: 0).
        every: decode steps between two evictions (paper: 1).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "wg_kv"
    role = "scorer and threshold"
    phase = "prefill and decode"
    paper = "KV Admission: Learning What to Write for Efficient Long-Context Inference, arXiv 2512.17452, 2025"
    needs = ("keys", "calibration")
    lossless_when_fits = False
    prefix_reusable = True

    admit: float = 0.1
    window: int = 256
    sinks: int = 4
    every: int = 16
    file: str = ""
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.admit <= 1 or self.every < 1:
            raise PolicyError(f"wg_kv: admit={self.admit} must be from 0 to 1, and every={self.every} at least 1")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": Gated(WriteGate(), self.weights),
            "heads": ByDemand(self.admit),
            "threshold": self.admit,
            "protect": Protect(sinks=self.sinks, recent=self.window, most=0.5),
            "trigger": Trigger(every=self.every),
        }

    def bind(self, fingerprint: str) -> "WGKV":
        return replace(self, weights=Artifact.load(self.name, fingerprint, self.file).tensors)
