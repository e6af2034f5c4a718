"""LagKV: entries that stand out from the ranges of the partition that follows them stay."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Scorer
from kvbudget.policy.view import View


@dataclass(frozen=True)
class LagRank(Scorer):
    """Rank inside the partition of ``lag`` positions, from 1 / lag to 1; entries not judged yet are above all others.

    A partition is judged once, when the next one is complete, and keeps its ranks: evictions by them take equally from all
    partitions. Ranks are 0 in the state until then.
    """

    states: ClassVar[tuple[str, ...]] = ("rank",)

    sinks: int = 4
    lag: int = 128
    value_weight: float = 1.0

    def observe(self, view: View) -> None:
        complete = [max(0, (seen - self.sinks) // self.lag - 1) for seen in view.seen]
        new = zip(view.seen, view.new_tokens, strict=True)
        before = [max(0, (seen - tokens - self.sinks) // self.lag - 1) for seen, tokens in new]
        if complete == before:
            return
        keys, values, ranks = view.keys, view.values, view.state("rank").clone()
        for b, (begin, end) in enumerate(zip(before, complete, strict=True)):
            for h in range(view.num_kv_heads):
                positions = view.positions[b, h, view.valid[b, h]]
                edges = self.sinks + self.lag * torch.arange(begin, end + 2, device=positions.device)
                cuts = torch.searchsorted(positions, edges.to(positions.dtype)).tolist()
                for i, j, k in zip(cuts, cuts[1:], cuts[2:], strict=False):
                    if i < j < k:
                        score = self._score(keys[b, h, i:j], keys[b, h, j:k])
                        score = score + self.value_weight * self._score(values[b, h, i:j], values[b, h, j:k])
                        # Entries of the partition that are gone already were worth less than those that are left.
                        order = score.argsort(stable=True)
                        ranks[b, h, i + order] = torch.arange(1 + self.lag - (j - i), self.lag + 1).to(ranks) / self.lag
        view.set_state("rank", ranks)

    def score(self, view: View) -> Tensor:
        ranks = view.state("rank")
        return torch.where(ranks > 0, ranks, 1.0 + view.positions.float())

    @staticmethod
    def _score(x: Tensor, lag: Tensor) -> Tensor:
        """Softmax over the entries of the deviation, over channels, of ``x [n, D]`` scaled to the ranges of ``lag [m, D]``."""
        low, high = lag.float().amin(0), lag.float().amax(0)
        return ((x.float() - low) / (high - low).clamp_min(1e-8)).std(-1).softmax(-1)


@dataclass(frozen=True)
class LagKV(Recipe):
    """Keeps the sinks, the newest entries, and of every partition those that differ most from the next one's ranges.

    Paper: Liang et al., arXiv 2504.04704, 2025, section 3. Behind the sinks the text is cut into partitions of ``lag``
    tokens. With the channel-wise minimum and maximum of the next partition, ``Z = (X_p - min) / (max - min)`` for keys
    (post-RoPE) and values; ``score = softmax(std over channels of Z_K) + value_weight * softmax(std of Z_V)`` over the
    partition. The paper keeps a fixed ratio of each partition; under a budget every partition gives equally, so the ratio
    follows from the budget. The last complete partition and the unfinished one are not judged and leave last. No queries
    are needed. Claim: almost no loss at half of the cache, 60% better than H2O on 64-digit passkeys.

    Attributes:
        sinks: first entries that always stay (paper: 16, kvpress: 4).
        lag: positions per partition, and newest entries that always stay (paper: 128 to 1024).
        value_weight: weight of the values' score.
    """

    name = "lagkv"
    role = "scorer"
    phase = "prefill and decode"
    paper = "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important, arXiv 2504.04704, 2025"
    needs = ("keys",)
    prefix_reusable = True

    sinks: int = 4
    lag: int = 128
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.lag < 1:
            raise PolicyError(f"lagkv: lag={self.lag} must be at least 1 position per partition")

    def parts(self) -> dict[str, Any]:
        scorer = LagRank(self.sinks, self.lag, self.value_weight)
        return {"scorer": scorer, "protect": Protect(sinks=self.sinks, recent=self.lag)}
