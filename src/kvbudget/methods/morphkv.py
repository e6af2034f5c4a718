"""MorphKV: a cache of constant size, chosen anew by the recent queries whenever something has to leave."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Protect, Recipe, Scorer, Trigger
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


@dataclass(frozen=True)
class MorphKV(Recipe):
    """Keeps the newest ``window`` entries, and of the older ones those that the newest ``window`` queries attend to most.

    Paper: Ghadia et al., arXiv 2503.00979, 2025 (ICML), section 3. Per KV head the logits of the recent queries are summed
    over the GQA group, every query's softmax runs over the entries older than the window only, and the queries' weights are
    added (``sum``) or their maximum is taken (``max``). What one query found unimportant can be kept by the next, and what
    nobody has looked at for ``window`` steps leaves. The reference keeps attention rows per entry; here the layer keeps the
    queries, which cost the same whatever is kept and are counted in the budget. The reference masks the rows of single
    query heads by other entries than its cache holds; here one selection counts. Claim: half of the memory and higher
    accuracy than prior work on long answers. The newest query takes part, and the prompt is cut when it has been read
    (reference: one step later).

    Attributes:
        window: queries that judge, and newest entries that always stay (paper: 30 to 200).
        fusion: over queries, ``sum`` or ``max``.
        every: decode steps between two evictions (reference: configurable, 1).
    """

    name = "morphkv"
    role = "scorer"
    phase = "prefill and decode"
    paper = "Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs, arXiv 2503.00979, 2025"
    needs = ("queries",)

    window: int = 32
    fusion: Literal["sum", "max"] = "sum"
    every: int = 16

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.every < 1:
            raise PolicyError(f"morphkv: every={self.every} must be at least 1 (an eviction at each step)")

    def parts(self) -> dict[str, Any]:
        return {
            "scorer": RecentQueries(self.window, self.fusion),
            "protect": Protect(recent=self.window),
            "trigger": Trigger(every=self.every),
        }
