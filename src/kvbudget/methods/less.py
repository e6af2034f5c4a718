"""LESS: an evicting method, and a small learned state for what it evicts."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.destinations.recurrence import Recurrence
from kvbudget.policy.scorers.position import Recency


@dataclass(frozen=True)
class LESS(Recipe):
    """Evicted entries go into a learned state of constant size, which answers under the same softmax as what is kept.

    Paper: Dong et al., arXiv 2402.09398, 2024 (ICML), section 4. Two small feature maps per head, fitted by ``kvbudget
    calibrate less --model M`` for each layer by itself, stand for ``exp(q k)`` of the entries that were evicted; the state is
    about as large as 4 to 8 entries per head and never grows, and nothing leaves it again. The paper trains for one
    evicting method at one sparsity, with the error taken behind the output projection, at 512 hidden channels and for
    40 epochs over 512 texts on a GPU; here sinks and a recent window evict while training, the error is that of the heads'
    answers, and the fit takes minutes on a CPU, so it recovers less. Keys of a group share a state, and each query head has
    a map of its own. Any evicting method goes with it (``h2o+less``). Claim: a large part of the distance between an
    evicting method and the full cache, for the memory of 4 entries.

    Attributes:
        sinks: first entries that stay, where the window is the default one.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "less"
    role = "destination"
    phase = "prefill and decode"
    paper = (
        "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM Inference, "
        "arXiv 2402.09398, 2024"
    )
    needs = ("calibration", "queries", "keys")
    prefix_reusable = True

    sinks: int = 4
    file: str = ""
    state: Recurrence = field(default=Recurrence(), repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        return {"destination": self.state}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": Recency(), "protect": Protect(sinks=self.sinks)}

    def bind(self, fingerprint: str) -> "LESS":
        weights = Artifact.load(self.name, fingerprint, self.file).tensors
        return replace(self, state=Recurrence(weights["key_scale"].shape[-1], weights))
