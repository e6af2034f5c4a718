"""RetroAttention: pages read for one query complete the answers of the queries before it, and those are computed anew."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.selectors.pages import Pages


@dataclass(frozen=True)
class RetroAttention(Recipe):
    """Reads few pages per generated token, and gives the tokens just before it what those pages would have told them.

    Paper: arXiv 2508.09001, 2025 (ICLR 2026), on Quest's page selection. A query of the last ``window`` that has not read a
    page that a later one loads reads it then, by the log-sum-exp, in its stored answer; its hidden state goes through the
    layers once more, and its keys and values in deeper layers are written anew. A forward therefore carries ``window``
    tokens: `kvbudget.generate` does that by itself, and ``with kvbudget.driver.revising(model, cache):`` does it for
    ``model.generate`` and bare forwards; without it, each token reads its own pages, which is Quest. Nothing leaves the cache
    and no method that evicts or codes goes with it: it saves reads. It is written in plain torch and finds a page's bounds
    anew at every step, so it measures what is lost and not how fast it could be. Forwards of more than 8 tokens, and those
    with padding, read everything. The newest page is always read here. Claim: 1.6 times the entries seen, up to 21.9%
    more accuracy than Quest on long answers.

    Attributes:
        window: queries that share what is read, the newest included (paper: 2, up to 8; 1 is Quest).
        share: of the pages that a query reads (paper: 0.15).
        page: positions per page (Quest: 16).
        dense: first layers that read everything (Quest: 2).
    """

    name = "retro_attention"
    role = "selector"
    phase = "decode, reads only"
    paper = "Retrospective Sparse Attention for Efficient Long-Context Generation, arXiv 2508.09001, 2025"
    needs = ("driver", "queries")
    lossless_when_fits = False
    prefix_reusable = True

    window: int = 2
    share: float = 0.15
    page: int = 16
    dense: int = 2

    def __post_init__(self) -> None:
        if self.window < 1 or self.page < 1 or not 0 < self.share <= 1:
            raise PolicyError(
                f"retro_attention: window={self.window} and page={self.page} must be at least 1, and share={self.share} a "
                "share of the pages above 0"
            )

    def parts(self) -> dict[str, Any]:
        return {"selector": Pages(self.window, self.page, self.share, self.dense)}
