"""Neurocache: upper layers attend to a window and to what a search over old tokens finds."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe, Selector
from kvbudget.segments.selective import Chosen, Reading


@dataclass(frozen=True)
class Search:
    """What is searched and read; `Neurocache` says what each number means."""

    top: int = 16
    followers: int = 2
    context: int = 2
    window: int = 128
    sinks: int = 4
    start: float = 0.75
    cache: int = 16384


@dataclass(frozen=True)
class Neighbors(Search, Selector):
    """Upper layers read the first ``sinks``, the newest ``window`` and the neighbors of the token among the older entries.

    Of the ``cache`` entries before the window, the ``top`` whose values, normalized as by a layer norm, lie nearest to the
    value of the query's own token are taken, with the ``followers - 1`` entries behind each, and those of the
    ``context - 1`` tokens before. The softmax runs over what is read. Layers below the share ``start`` of the depth read all.
    """

    prefill: ClassVar[bool] = False

    def select(self, reading: Reading) -> Chosen:
        weights = reading.probabilities
        if reading.depth < self.start:
            return Chosen(weights)
        visible = reading.visible
        number = visible.cumsum(-1)
        age = number[..., -1:] - number  # 0: the query's own entry
        old = visible & (age >= self.window) & (age < self.window + self.cache) & (number > self.sinks)
        states = layer_norm(reading.values, reading.values.shape[-1:])
        own = (visible & (age == 0)).float().argmax(-1)
        found, held = torch.zeros_like(visible), visible.shape[-1]
        for back in range(min(self.context, held)):
            asked = states.gather(2, (own - back).clamp_min(0)[..., None].expand(-1, -1, -1, states.shape[-1]))
            found |= self._nearest(asked, states, old)
        follower = found
        for _ in range(min(self.followers, held) - 1):
            follower = torch.nn.functional.pad(follower[..., :-1], (1, 0))
            found = found | follower
        read = visible & (found | (age < self.window) | (number <= self.sinks))
        weights = weights * read[:, :, None]
        return Chosen(weights / weights.sum(-1, keepdim=True).clamp_min(1e-30))

    def _nearest(self, asked: Tensor, states: Tensor, old: Tensor) -> Tensor:
        """The ``top`` of the ``old [B, Hkv, n, T]`` entries that lie nearest to the states ``asked [B, Hkv, n, D]``."""
        distance = torch.cdist(asked, states).masked_fill(~old, float("inf"))
        nearest = distance.topk(min(self.top, distance.shape[-1]), dim=-1, largest=False).indices
        return torch.zeros_like(old).scatter(-1, nearest, True) & old


@dataclass(frozen=True)
class Neurocache(Search, Recipe):
    """Upper layers attend to a recent window and to the stored states nearest to the token's own; generated tokens only.

    Paper: Safaya and Yuret, arXiv 2407.02486, 2024 (NAACL), whose model learns to compress the hidden state of a middle
    layer, searches a first-in first-out store of 16384 such states once per token, and adds a cross-attention with learned
    projections to the layers above. All of that has to be trained; nothing here is. What stands in: a layer's values,
    a linear map of its hidden states without position, are both query and store, each KV head of the upper layers searches
    by itself, and the entries found are attended to with the layer's own keys and values, under the softmax of the window,
    with which the paper's projections begin to learn. One memory, all of which stays: it measures what the search misses,
    and saves no byte. Untrained, the nearest values are not what a layer would attend to: `kcache`, which ranks by the
    weights themselves, reads the most weight that as many entries can hold. Claim, for trained models: lower perplexity at
    16K to 128K tokens than memories of nearest keys.

    Attributes:
        top: states found for a token (paper: 16).
        followers: entries taken of each hit, itself and those behind it (paper: 2).
        context: newest tokens whose hits a token uses (paper: 2).
        window: newest entries that are always read.
        sinks: first entries that are always read (paper: none).
        start: share of the depth from which layers search (paper: 0.75).
        cache: newest entries before the window that are searched (paper: 16384).
    """

    name = "neurocache"
    role = "selector"
    phase = "decode, reads only"
    paper = "Neurocache: Efficient Vector Retrieval for Long-range Language Modeling, arXiv 2407.02486, 2024"
    needs = ("queries",)
    lossless_when_fits = False
    prefix_reusable = True

    def __post_init__(self) -> None:
        for name in ("top", "followers", "context", "window", "cache"):
            if getattr(self, name) < 1:
                raise PolicyError(f"neurocache: {name}={getattr(self, name)} must be at least 1")
        if self.sinks < 0 or not 0 <= self.start <= 1:
            raise PolicyError(
                f"neurocache: sinks={self.sinks} is a number from 0, start={self.start} a share from 0 to 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"selector": Neighbors(**{name: getattr(self, name) for name in self.parameters()})}
