"""Episodes of a long conversation: clusters of its windows, and one compressed cache for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.methods import parse
from kvbudget.policy.clustering import kmeans
from kvbudget.policy.plans import Episode


@dataclass(frozen=True, eq=False)
class Clusters:
    """The episodes of one text: ``centers [k, d]``, and per episode the token ids of the windows that speak for it.

    ``mean [d]`` is the mean token embedding of the text, from which embeddings are measured.
    """

    mean: Tensor
    centers: Tensor
    texts: list[list[int]]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Sequence[int], plan: Episode, count: int) -> Clusters:
        """Clusters the windows of ``ids`` by the mean of their token embeddings (EpiCache, arXiv 2509.17396, section 3)."""
        windows = [list(ids[begin : begin + plan.window]) for begin in range(0, len(ids), plan.window)]
        mean = _embed(model, ids).mean(0)
        points = torch.stack([_direction(model, window, mean) for window in windows])
        centers, labels = kmeans(points, count)
        texts = []
        for c, center in enumerate(centers):
            own = (labels == c).nonzero()[:, 0]
            near = torch.cdist(points[own], center[None])[:, 0].argsort(stable=True)[: plan.medoids]
            texts.append([token for window in own[near].sort().values.tolist() for token in windows[window]])
        return cls(mean, centers, texts)

    def nearest(self, model: PreTrainedModel, question: Sequence[int]) -> int:
        """The episode that a question belongs to."""
        return int((self.centers @ _direction(model, question, self.mean)).argmax())


class Episodes:
    """One compressed cache per episode of a conversation, and the way from a question to its cache.

    Args:
        model: the model that answers.
        input_ids: the conversation, ``[1, T]``.
        policy: ``"epicache(...)"``, alone or with other roles.
        budget: of each cache, as for `KVCache`.
        options: of `KVCache.prefill`.

    Every episode costs a prefill of its own; `cache` then answers any number of questions.

    Raises:
        PolicyError: for a policy without an episode plan, or more than one sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        policy: str = "epicache",
        budget: Budget | str | float | None = None,
        **options: Any,
    ) -> None:
        plan = parse(policy).parts().plan
        if not isinstance(plan, Episode):
            raise PolicyError(f"{policy} has no episodes; use a policy with epicache")
        if len(input_ids) != 1:
            raise PolicyError(f"{len(input_ids)} conversations cannot share their episodes; give one [1, T] at a time")
        self.model = model
        with torch.no_grad():
            self.clusters = Clusters.of(model, input_ids[0].tolist(), plan, plan.episodes)
        self.caches = []
        for number in range(len(self.clusters.texts)):
            cache = KVCache(model, policy, budget)
            cache.parts = replace(cache.parts, plan=replace(plan, only=number))
            cache.prefill(model, input_ids, **options)
            self.caches.append(cache)

    def route(self, question_ids: Tensor) -> int:
        """The number of the episode that ``question_ids [1, Q]`` belongs to."""
        with torch.no_grad():
            return self.clusters.nearest(self.model, question_ids[0].tolist())

    def cache(self, question_ids: Tensor) -> KVCache:
        """A fork of the cache of the question's episode, to go on with the conversation and the question."""
        return self.caches[self.route(question_ids)].fork()


def _embed(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float()


def _direction(model: PreTrainedModel, ids: Sequence[int], mean: Tensor) -> Tensor:
    """Mean of the token embeddings of a text, less what all of the conversation has in common, of length 1: ``[d]``."""
    return normalize((_embed(model, ids) - mean).mean(0), dim=0)
