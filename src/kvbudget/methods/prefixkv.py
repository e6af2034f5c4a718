"""PrefixKV: every layer keeps as many entries as hold the same share of its importance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.policy.allocators.joint import GlobalTopK
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.received import AccumulatedAttention


@dataclass(frozen=True)
class EqualRatio(GlobalTopK):
    """One information ratio for all layers: the largest share of its scores that each of them can retain.

    All heads of a layer keep the same number of entries, and its ratio is what the best ones of each head sum to. Scores
    below 0 are first raised by the lowest of their layer.
    """

    def rank(self, scores: Sequence[Tensor], total: int) -> list[float]:
        levels, heads = [], [len(score) for score in scores]
        for score in scores:
            always, real = score.isposinf(), score.isfinite()
            mass = score.double().masked_fill(~real, 0.0)
            mass = (mass - mass.amin().clamp_max(0.0)) * real
            # Protected entries come first, and what a head does not hold comes last.
            ranked = mass.masked_fill(always, float("inf")).sort(-1, descending=True).values
            gained = ranked.masked_fill(ranked.isposinf(), 0.0).sum(0)
            level = (gained.cumsum(0) - gained) / gained.sum().clamp_min(1e-300)
            level[: int(always.sum(-1).max())] = -1.0
            levels.append(level[: int((always | real).sum(-1).max())])
        # The n-th entry of a layer is needed once the ratio exceeds what the entries before it hold.
        sizes = torch.tensor([len(level) for level in levels]).cumsum(0)
        best = torch.cat(levels).argsort(stable=True)[: total // max(heads)].cpu()
        layer = torch.bucketize(best, sizes, right=True)
        counts = torch.bincount(layer, minlength=len(scores)).tolist()
        return [n * h for n, h in zip(counts, heads, strict=True)]


@dataclass(frozen=True)
class PrefixKV(Recipe):
    """Shares the budget over layers so that all retain the same share of importance, by any scorer.

    Paper: Wang et al., arXiv 2412.03409, 2024. A layer's entries in falling order of importance form a curve of cumulative
    importance; one ratio p on all curves decides how long each layer's prefix is, and a binary search finds the p whose
    prefixes fill the budget. Here the entries of all layers are sorted by the ratio from which on each is needed, which is
    where that search ends, without its tolerance and without rescaling. No allocation with the same total has a higher
    minimum over the layers of retained importance. The importance is the scorer's, by default the attention received from
    all queries; the ratios are those of the text itself (the paper can also average them over some samples beforehand), and
    heads select on their own (the paper shares one set). All layers are needed to compare them, so a forward is held whole
    until its end. Claim: the best trade-off of perplexity on LLaVA-1.5 at 20 to 80% of the cache.

    Attributes:
        sinks: first entries that always stay, with the default scorer.
        recent: newest entries that always stay, with the default scorer (paper: 25 of the prompt, and what follows).
    """

    name = "prefixkv"
    role = "allocator over layers"
    phase = "prefill and decode"
    paper = (
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation, "
        "arXiv 2412.03409, 2024"
    )

    sinks: int = 1
    recent: int = 25

    def parts(self) -> dict[str, Any]:
        return {"layers": EqualRatio()}

    def defaults(self) -> dict[str, Any]:
        return {"scorer": AccumulatedAttention(), "protect": Protect(sinks=self.sinks, recent=self.recent)}
