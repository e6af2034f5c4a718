"""CHAI: heads whose attention maps are alike share one, and the keys behind it."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.clusters import HeadClusters


@dataclass(frozen=True)
class CHAI(Recipe):
    """Holds one set of keys for each cluster of KV heads that attend alike; every head keeps its own values.

    Paper: Agarwal et al., CHAI, arXiv 2403.08058, 2024 (ICML). The first head of a cluster attends, and the others apply its
    weights to their values, so the saving is ``(1 - clusters / heads) / 2`` of the cache. ``kvbudget calibrate chai`` clusters
    attention maps over texts. The paper fixes the number of clusters of a layer offline, by an elbow (*unverified*: which;
    here the linkage is cut at a distance), and finds the members anew for each request from the maps of its first five
    tokens; here they are found offline too, so that requests may come in pieces of any size, at the price of clusters that
    fit no text in particular. The paper is about one KV head per query head; with grouped queries keys are saved only
    where whole KV heads join: their query heads then use the map of the nearest query head of the first KV head, and with
    few KV heads little is left to share. The maps of all heads are computed all the same: bytes are saved, the
    paper's compute is not. Scorers judge the first head of a cluster for all of it. Claim: 21% less KV cache at 3% lower
    accuracy.

    Attributes:
        file: the calibration, which decides how many heads share ("": where ``kvbudget calibrate`` puts it).
    """

    name = "chai"
    role = "clusters of heads"
    phase = "prefill and decode"
    paper = "CHAI: Clustered Head Attention for Efficient LLM Inference, arXiv 2403.08058, 2024"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    file: str = ""
    clusters: HeadClusters = field(default=HeadClusters(), repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        return {"projection": self.clusters}

    def bind(self, fingerprint: str) -> "CHAI":
        tensors = Artifact.load(self.name, fingerprint, self.file).tensors
        owners, sources = (tuple(map(tuple, tensors[name].tolist())) for name in ("owners", "sources"))
        return replace(self, clusters=HeadClusters(owners, sources))
