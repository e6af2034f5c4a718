"""Scores by the newest queries, which are kept so that they can judge anew whatever is held."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbudget.policy.base import Scorer
from kvbudget.policy.scoring import check_window
from kvbudget.policy.view import View


@dataclass(frozen=True)
class RecentQueries(Scorer):
    """What the newest ``window`` queries together attend to among the entries that are older than all of them.

    The layer keeps these queries, so that their attention can be taken anew over whatever is held: the logits summed over
    the GQA group, a softmax per query over the older entries alone, and over the queries their ``fusion``. The newest
    ``window`` entries score 0 and have to be protected.
    """

    window: int = 32
    fusion: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        check_window(self.window)

    def fixed_bytes(self, key_dim: int, group: int) -> float:
        return 4.0 * (self.window * group * key_dim + 1)

    def observe(self, view: View) -> None:
        assert view.queries is not None
        query, lse = view.queries.last(self.window)
        fresh = (query.float() * view.queries.scale).unflatten(1, (view.num_kv_heads, -1))
        held = view.statistic("queries")
        if held is None:
            held = torch.zeros_like(fresh[:, :, :, :1]).expand(-1, -1, -1, self.window, -1)
        joined = torch.cat([held, fresh], dim=3)
        if view.queries.valid is None:
            newest = joined[:, :, :, -self.window :].clone()
        else:
            present = torch.ones(joined.shape[0], joined.shape[3], dtype=torch.bool, device=joined.device)
            present[:, self.window :] = lse[:, 0] < float("inf")
            order = torch.argsort(present.int(), dim=1, stable=True)[:, -self.window :]
            newest = joined.gather(3, order[:, None, None, :, None].expand(*joined.shape[:3], -1, joined.shape[-1]))
        view.set_statistic("queries", newest)
        if view.statistic("softcap") is None:
            cap = view.queries.softcap or 0.0
            view.set_statistic("softcap", torch.full(joined.shape[:2], cap, device=joined.device))

    def score(self, view: View) -> Tensor:
        queries, cap = view.statistic("queries"), view.statistic("softcap")
        assert queries is not None and cap is not None
        logits = torch.einsum("bhgwd,bhtd->bhgwt", queries, view.keys.float())
        if bool((cap > 0).all()):
            cap = cap[..., None, None, None]
            logits = cap * torch.tanh(logits / cap)
        seen = torch.tensor(view.seen, device=logits.device)
        steps = seen[:, None] - self.window + torch.arange(self.window, device=logits.device)
        older = view.valid & (view.positions < (seen - self.window)[:, None, None])
        weights = logits.sum(2).masked_fill(~older[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        weights = weights * (steps >= 0)[:, None, :, None]
        return weights.sum(2) if self.fusion == "sum" else weights.amax(2)
