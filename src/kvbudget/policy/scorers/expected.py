"""Scores from the attention that future queries are expected to pay, modeled as a Gaussian."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.moments import Moments, square, triangle
from kvbudget.policy.view import View


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """``(mean over the group of softmax(z) + epsilon) * ||v||`` (Expected Attention, arXiv 2510.00636).

    Queries before RoPE are taken as Gaussian; turned by the mean rotation R of the next ``future`` positions they have the
    mean ``R mu`` and covariance ``R S R^T``, and ``log E exp(q k) = z = mu k + k S k / 2`` with the attention's scale inside
    of the queries. The moments run over all queries but those of the first ``sinks`` tokens, unless ``mean [L, Hq, D]``
    and ``spread [L, Hq, D (D + 1) / 2]`` are given for all layers of the model. A logit soft cap is not modeled.
    """

    rotates: ClassVar[bool] = True

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    mean: Tensor | None = field(default=None, repr=False, compare=False)
    spread: Tensor | None = field(default=None, repr=False, compare=False)

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        if self.mean is not None:
            return 0.0
        return 4.0 * group * (key_dim + (key_dim * (key_dim + 1) // 2 if self.covariance else 0))

    def observe(self, view: View) -> None:
        if self.mean is not None:
            return
        fresh = plain_queries(view, self.sinks, self.covariance)
        mean, spread = view.statistic("query mean"), view.statistic("query covariance")
        if mean is not None:
            before = torch.tensor(view.seen) - torch.tensor(view.new_tokens) - self.sinks
            covariance = None if spread is None else square(spread.flatten(1, 2), mean.shape[-1])
            held = Moments(before.clamp_min(0).to(fresh.mean), mean.flatten(1, 2), covariance)
            fresh = held.join(fresh)
        view.set_statistic("query mean", fresh.mean.unflatten(1, (view.num_kv_heads, -1)))
        if fresh.covariance is not None:
            view.set_statistic("query covariance", triangle(fresh.covariance).unflatten(1, (view.num_kv_heads, -1)))

    def score(self, view: View) -> Tensor:
        keys, rotation = view.keys.float(), view.rotation
        mean, spread = self._moments(view)
        begin = torch.tensor(view.seen, device=keys.device)[:, None, None]
        mean = rotation.embed_mean(mean, begin, self.future)
        if spread is not None:
            spread = square(spread, keys.shape[-1])
            for _ in range(2):
                spread = rotation.embed_mean(spread, begin[..., None], self.future).transpose(-1, -2)
        outside = ~view.valid | (view.positions < self.sinks)
        expected = torch.zeros_like(outside, dtype=torch.float32)
        for g in range(mean.shape[2]):
            z = (keys @ mean[:, :, g, :, None])[..., 0]
            if spread is not None:
                z = z + 0.5 * ((keys @ spread[:, :, g]) * keys).sum(-1)
            expected += z.masked_fill(outside, float("-inf")).softmax(-1).nan_to_num(0.0)
        expected /= mean.shape[2]
        return (expected + self.epsilon) * view.values.float().norm(dim=-1) if self.value_norm else expected

    def _moments(self, view: View) -> tuple[Tensor, Tensor | None]:
        """Mean ``[B, Hkv, G, D]`` and covariance's upper triangle of one layer's queries before RoPE."""
        if self.mean is None:
            mean = view.statistic("query mean")
            assert mean is not None
            return mean, view.statistic("query covariance")
        shape = (view.num_kv_heads, -1)
        device = view.positions.device
        mean = self.mean[view.layer_idx].to(device).unflatten(0, shape)[None].expand(view.batch_size, -1, -1, -1)
        if self.spread is None or not self.covariance:
            return mean, None
        spread = self.spread[view.layer_idx].to(device).unflatten(0, shape)[None]
        return mean, spread.expand(view.batch_size, -1, -1, -1)


def plain_queries(view: View, sinks: int, covariance: bool) -> Moments:
    """Moments of this forward's queries before RoPE, times the attention's scale; those of the first tokens are left out."""
    queries = view.queries
    assert queries is not None
    query, _ = queries.last(None)
    steps = view.query_steps()
    plain = view.rotation.strip(query.float() * queries.scale, steps.clamp_min(0)[:, None])
    return Moments.of(plain, steps >= sinks, covariance)
