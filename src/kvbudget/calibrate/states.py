"""LESS's feature maps, fitted to what the full cache answers when all but sinks and a recent window has been evicted."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import watch
from kvbudget.calibrate.training import Lesson, Training
from kvbudget.errors import PolicyError
from kvbudget.kernels.reference import capped
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry
from kvbudget.policy.destinations.recurrence import key_features, query_features


@dataclass(frozen=True)
class StateTraining(Training):
    """Squared error between the answers of full attention and of a window with a state (LESS, arXiv 2402.09398, section 4.2).

    Each layer learns for itself; its error is relative to the mean square of its answers. A query of position t keeps the
    first ``sinks`` entries and the newest ``window``, and the state stands for all between. The artifact holds the weights
    that `Recurrence` names (those of layers that no budget governs stay untrained).

    Attributes:
        count: number of texts (paper: 512).
        length: tokens of each (paper: the model's).
        batch: queries of a text in each step.
        rank: slots of the state (paper: 8).
        hidden: channels of the maps (paper: 512).
        sinks, window: what stays while training.
    """

    method: ClassVar[str] = "less"
    widths: ClassVar[tuple[str, ...]] = ("rank", "hidden")

    length: int = 512
    batch: int = 48
    rank: int = 8
    hidden: int = 64
    sinks: int = 4
    window: int = 64

    def untrained(self, model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        shape = geometry.layers[geometry.budgeted_layers[0]]
        layers = geometry.num_layers

        def drawn(heads: int, rows: int, columns: int) -> Tensor:
            return torch.randn(layers, heads, rows, columns, generator=generator) / rows**0.5

        weights = {}
        for name, heads in (("query", shape.num_attention_heads), ("key", shape.num_kv_heads)):
            weights[f"{name}_in"] = drawn(heads, shape.key_head_dim, self.hidden)
            weights[f"{name}_out"] = drawn(heads, self.hidden, self.rank)
        weights["key_mix"] = drawn(shape.num_kv_heads, self.rank, self.rank)
        for name in ("key_scale", "mix_scale"):
            weights[name] = torch.full((layers, shape.num_kv_heads, self.rank), 1e-4)
        return weights

    def lesson(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Lesson]:
        if self.length <= self.sinks + self.window:
            raise PolicyError(
                f"less: length={self.length} must be more than sinks={self.sinks} and window={self.window} together"
            )
        calls: dict[int, AttentionCall] = {}
        watch(model, ids, lambda index, call, lse: calls.update({index: call}))
        query, key, value = (
            torch.cat([getattr(call, name).float().cpu() for call in calls.values()]).clone()
            for name in ("query", "key", "value")
        )
        call = next(iter(calls.values()))

        def error(weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
            first = self.sinks + self.window
            at = first + torch.randperm(query.shape[2] - first, generator=generator)[: self.batch]
            full, mixed = self.answers(query[:, :, at], key, value, at, weights, call.scale, call.softcap)
            return ((mixed - full).square().mean((1, 2, 3)) / full.square().mean((1, 2, 3)).clamp_min(1e-12)).sum()

        return torch.tensor(list(calls)), error

    def answers(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        steps: Tensor,
        weights: dict[str, Tensor],
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Answers ``[l, Hq, n, Dv]`` of full attention, and of what is kept with the state, to queries at ``steps [n]``.

        ``query [l, Hq, n, D]``, ``key [l, Hkv, T, D]``, ``value [l, Hkv, T, Dv]``.
        """
        heads, position = key.shape[1], torch.arange(key.shape[2])
        logits = capped(torch.einsum("lhgnd,lhtd->lhgnt", query.unflatten(1, (heads, -1)), key) * scale, softcap)
        seen = position <= steps[:, None]
        kept = seen & ((position < self.sinks) | (position > steps[:, None] - self.window))
        logits = logits.masked_fill(~seen, float("-inf"))
        highest = logits.amax(-1, keepdim=True)
        exact = (logits - highest).exp()
        phi = query_features(query, weights).unflatten(1, (heads, -1))
        stood = torch.einsum("lhgnr,lhtr->lhgnt", phi, key_features(key, weights)) * (-highest.clamp_min(-60.0)).exp()
        both = torch.where(kept, exact, stood * (seen & ~kept))
        answers = [(w / w.sum(-1, keepdim=True)) @ value[:, :, None] for w in (exact, both)]
        return answers[0].flatten(1, 2), answers[1].flatten(1, 2)
