"""Scores from the mean and the variance of the window's attention, and the layer statistic of the same weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import LayerAllocator, Scorer
from kvbudget.policy.scoring import check_window, pool
from kvbudget.policy.view import View


def _window(view: View, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the forward's last queries (at most ``window``) on the entries older than the newest ``window``.

    Returns weights ``[B, Hkv, G, w, T]`` (0 for the newest entries), their mean and unbiased variance over the queries
    ``[B, Hkv, G, T]`` (variance 0 for a single query), and the number of queries per sequence ``[B]``.
    """
    weights = view.window_attention(window)
    device, width = weights.device, weights.shape[3]
    older = view.positions < torch.tensor(view.seen, device=device)[:, None, None] - window
    weights = weights * older[:, :, None, None, :]
    queries = torch.tensor(view.new_tokens, device=device).clamp_max(window)
    count = queries[:, None, None, None]
    mean = weights.sum(3) / count.clamp_min(1)
    present = torch.arange(width, device=device) >= width - queries[:, None]
    spread = (weights - mean[:, :, :, None]).square() * present[:, None, None, :, None]
    return weights, mean, spread.sum(3) / (count - 1).clamp_min(1), queries


@dataclass(frozen=True)
class MeanVariance(Scorer):
    """``pool(mean + gamma * variance)`` over the queries of the window (CAKE, ICLR 2025), mean over the GQA group.

    The window are the last ``window`` queries of the newest forward, or as many as it has: in a decode step the score is
    the attention of its one query. The newest ``window`` entries score 0 and have to be protected.
    """

    states: ClassVar[tuple[str, ...]] = ("score",)

    window: int = 32
    gamma: float = 200.0
    kernel: int = 5

    def __post_init__(self) -> None:
        check_window(self.window)

    def observe(self, view: View) -> None:
        _, mean, variance, queries = _window(view, self.window)
        score = pool((mean + self.gamma * variance).mean(2), self.kernel)
        view.set_state("score", torch.where(queries[:, None, None] > 0, score, view.state("score")))

    def score(self, view: View) -> Tensor:
        return view.state("score")


@dataclass(frozen=True)
class Dispersion(LayerAllocator):
    """Layers whose attention is dispersed over entries and shifts over time get more (CAKE, ICLR 2025).

    ``preference = entropy^(1 / tau1) * variance^(1 / tau2)``, both summed over heads and entries of the window's weights.
    A forward of n < ``window`` queries moves the last preference by ``n / window`` only; a single query has no variance
    and leaves it as it is.
    """

    measures: ClassVar[bool] = True

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def preference(self, view: View, last: Sequence[float | None]) -> list[float | None]:
        counted = [new > 1 and seen > self.window for new, seen in zip(view.new_tokens, view.seen, strict=True)]
        if not any(counted):
            return list(last)
        weights, _, variance, queries = _window(view, self.window)
        entropy = -(weights * torch.log(weights + 1e-10)).sum((1, 2, 3, 4)).double() / queries.clamp_min(1)
        shift = variance.sum((1, 2, 3)).double()
        fresh = entropy.clamp_min(0.0) ** (1 / self.tau1) * shift ** (1 / self.tau2)
        fresh = fresh.nan_to_num(nan=0.0, posinf=1e300)  # tiny temperatures leave the range of numbers
        part = (queries / self.window).tolist()
        return [
            old if not use else new if old is None else (1 - p) * old + p * new
            for use, old, new, p in zip(counted, last, fresh.tolist(), part, strict=True)
        ]

    def weights(self, measured: Sequence[float | None], mean: float, floor: float) -> list[float]:
        return [1.0 if preference is None else preference for preference in measured]
