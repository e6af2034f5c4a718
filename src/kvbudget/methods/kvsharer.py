"""KVSharer: some layers read the entries of an earlier, dissimilar layer, by a map that a search has found."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.sharing import Listed


@dataclass(frozen=True)
class KVSharer(Recipe):
    """Layers that a search has found to bear it attend to the keys and values of an earlier layer that differ most from theirs.

    Paper: Yang et al., arXiv 2410.18517, 2024. ``kvbudget calibrate kvsharer --model M`` compares the mean keys and values
    of all layers over short texts, and goes through the pairs from the most to the least different: the later layer of a pair
    reads the earlier one's entries if the final hidden states keep a cosine above a threshold, until enough layers share.
    That different layers should be shared is the paper's own finding, which runs against intuition; ``similar=True`` of the
    calibration takes them the other way round. Readers still compute keys and values and drop them: bytes are saved, the
    paper's compute is not. Evicting methods watch the owner's queries. Claim: 30% less with little loss on large models;
    small ones lose more.

    Attributes:
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "kvsharer"
    role = "sharing map"
    phase = "prefill and decode"
    paper = "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing, arXiv 2410.18517, 2024"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    file: str = ""
    owners: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        return {"sharing": Listed(self.owners)}

    def bind(self, fingerprint: str) -> "KVSharer":
        artifact = Artifact.load(self.name, fingerprint, self.file)
        return replace(self, owners=tuple(artifact.tensors["owners"].tolist()))
