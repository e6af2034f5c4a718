"""Fast KVzip: a trained gate takes the place of KVzip's extra passes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.policy.allocators.heads import JointTopK
from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.gates import Gated, SinkGate


@dataclass(frozen=True)
class FastKVzip(Recipe):
    """Keeps the entries that a gate per layer expects to be looked at when the model repeats the text.

    Paper: Kim et al., arXiv 2601.17668, 2026, section 3. The gate is a tiny attention of the token's query to its own key
    against learned keys, trained on KVzip's scores; one threshold over all layers and heads decides, the first ``sinks`` and
    the newest ``window`` entries stay. No passes are needed, so the prompt may be evicted while it is read, and the answer
    too. ``kvbudget calibrate fast_kvzip --model M`` trains it by forward passes. It reads the token's queries, keys and
    values before RoPE instead of the hidden state that they are linear maps of. Claim: up to 70% evicted nearly without loss.

    Attributes:
        sinks: first entries that always stay (paper: 4).
        window: newest entries that always stay (paper: 4096, or 2% of shorter prompts).
        uniform: the same number of entries for all layers and heads.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "fast_kvzip"
    role = "scorer and allocator over layers and heads"
    phase = "prefill and decode"
    paper = "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction, arXiv 2601.17668, 2026"
    needs = ("queries", "keys", "calibration")
    prefix_reusable = True

    sinks: int = 4
    window: int = 32
    uniform: bool = False
    file: str = ""
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "scorer": Gated(self._gate(), self.weights),
            "protect": Protect(sinks=self.sinks, recent=self.window),
        }
        return parts if self.uniform else parts | {"layers": GlobalTopK(), "heads": JointTopK(safeguard=0.0)}

    def bind(self, fingerprint: str) -> "FastKVzip":
        return replace(self, weights=Artifact.load(self.name, fingerprint, self.file).tensors)

    def _gate(self) -> SinkGate:
        if self.weights is None:
            return SinkGate()
        _, _, sinks, dim = self.weights["sink"].shape
        return SinkGate(dim, sinks)
