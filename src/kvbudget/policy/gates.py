"""Gates: small trained heads that score a token, when it comes, from its projections in the layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, logsigmoid, rms_norm, silu

from kvbudget.models import Rotation
from kvbudget.policy.base import Part, Scorer
from kvbudget.policy.view import View

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Gate(Part, ABC):
    """A head from features ``[..., n, F]`` to scores ``[..., n, Hkv]``; its weights may lead with the same dimensions."""

    def features(self, query: Tensor, key: Tensor, value: Tensor, steps: Tensor, rotation: Rotation) -> Tensor:
        """What the gate reads of each token, from what `projections` takes."""
        return projections(query, key, value, steps, rotation)

    @abstractmethod
    def start(self, width: int, heads: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Untrained weights for ``width`` features, ``heads`` KV heads and ``group`` query heads on each."""

    @abstractmethod
    def score(self, x: Tensor, weights: Weights) -> Tensor:
        """Higher means keep."""


@dataclass(frozen=True)
class LinearGate(Gate):
    """``x W + b`` (KVzap, arXiv 2601.07891, the linear surrogate)."""

    def start(self, width: int, heads: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"weight": _draw(generator, width, heads), "bias": torch.zeros(1, heads)}

    def score(self, x: Tensor, weights: Weights) -> Tensor:
        return x @ weights["weight"] + weights["bias"]


@dataclass(frozen=True)
class RetainingGate(Gate):
    """``act(x W1) W2`` without bias (Locret, arXiv 2410.01805, section 3.1); the activation is SiLU, as in its models."""

    hidden: int = 128

    def start(self, width: int, heads: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"inner": _draw(generator, width, self.hidden), "outer": _draw(generator, self.hidden, heads)}

    def score(self, x: Tensor, weights: Weights) -> Tensor:
        return silu(x @ weights["inner"]) @ weights["outer"]


@dataclass(frozen=True)
class SinkGate(Gate):
    """Attention of a token's small query to its small key, against ``sinks`` learned keys (Fast KVzip, arXiv 2601.17668).

    ``q = norm(x Wq + bq)`` per query head and ``k = norm(x Wk)`` per KV head, both of ``dim`` elements;
    ``s = mean over the group of 1 / (1 + sum_s exp(q k_s / sqrt(dim) - logit))`` with ``logit = q k / sqrt(dim) + b``. The
    reference adds b a second time in training; here it counts once everywhere.
    """

    dim: int = 16
    sinks: int = 16

    def start(self, width: int, heads: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "query": _draw(generator, width, heads * group * self.dim),
            "query_bias": torch.zeros(1, heads * group * self.dim),
            "key": _draw(generator, width, heads * self.dim),
            "bias": torch.zeros(1, heads, group),
            "sink": torch.randn(heads, self.sinks, self.dim, generator=generator),
        }

    def score(self, x: Tensor, weights: Weights) -> Tensor:
        heads, group = weights["bias"].shape[-2:]
        query = (x @ weights["query"] + weights["query_bias"]).unflatten(-1, (heads, group, self.dim))
        key = (x @ weights["key"]).unflatten(-1, (heads, self.dim))
        query, key = rms_norm(query, (self.dim,)), rms_norm(key, (self.dim,))
        scale = self.dim**-0.5
        logit = torch.einsum("...nhgd,...nhd->...nhg", query, key) * scale + weights["bias"]
        sink = torch.einsum("...nhgd,...hsd->...nhgs", query, weights["sink"]) * scale
        return logsigmoid(logit - sink.logsumexp(-1)).exp().mean(-1)


@dataclass(frozen=True)
class WriteGate(Gate):
    """``sigmoid(gelu([norm(k before RoPE); norm(k)] W1 + b1) W2 + b2)``, at least ``least``, per KV head.

    The hidden layer is twice as wide as the two keys together (WG-KV, arXiv 2512.17452, section 3).
    """

    least: float = 1e-3

    def features(self, query: Tensor, key: Tensor, value: Tensor, steps: Tensor, rotation: Rotation) -> Tensor:
        plain = rotation.strip(key.float(), steps[:, None])
        keys = [rms_norm(x, (x.shape[-1],)).transpose(1, 2) for x in (plain, key.float())]
        return torch.cat(keys, dim=-1)

    def start(self, width: int, heads: int, group: int, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = 2 * width // (heads * (group + 2))
        inner = torch.randn(heads, inputs, 2 * inputs, generator=generator) * inputs**-0.5
        outer = torch.randn(heads, 2 * inputs, 1, generator=generator) * (2 * inputs) ** -0.5
        return {
            "inner": inner,
            "inner_bias": torch.zeros(1, heads, 2 * inputs),
            "outer": outer,
            "bias": torch.ones(1, heads),
        }

    def score(self, x: Tensor, weights: Weights) -> Tensor:
        inner = torch.einsum("...nhf,...hfe->...nhe", x, weights["inner"]) + weights["inner_bias"]
        logit = torch.einsum("...nhe,...hef->...nhf", gelu(inner), weights["outer"])[..., 0] + weights["bias"]
        return logit.sigmoid().clamp_min(self.least)


@dataclass(frozen=True)
class Gated(Scorer):
    """The score that a gate gave each token when it came; ``weights`` are those of all layers of the model, stacked.

    Nothing later changes it, so it does not matter how a text is cut into forwards.
    """

    states: ClassVar[tuple[str, ...]] = ("score",)
    rotates: ClassVar[bool] = True

    gate: Gate = field(default_factory=LinearGate)
    weights: Weights | None = field(default=None, repr=False, compare=False)

    def observe(self, view: View) -> None:
        assert view.queries is not None and self.weights is not None
        steps = view.query_steps()
        width = steps.shape[1]
        cells = view.valid.sum(-1, keepdim=True) - width + torch.arange(width, device=steps.device)
        at = cells.clamp_min(0)[..., None]
        key, value = (x.gather(2, at.expand(*at.shape[:3], x.shape[-1])) for x in (view.keys, view.values))
        x = self.gate.features(view.queries.last(None)[0], key, value, steps.clamp_min(0), view.rotation)
        weights = {name: tensor[view.layer_idx].to(x.device) for name, tensor in self.weights.items()}
        fresh = self.gate.score(x, weights).transpose(1, 2)
        scores = torch.nn.functional.pad(view.state("score"), (0, 1))  # what is padding goes to a cell of its own
        index = torch.where((steps >= 0)[:, None], cells, scores.shape[-1] - 1)
        view.set_state("score", scores.scatter(2, index, fresh)[..., :-1])

    def score(self, view: View) -> Tensor:
        return view.state("score")


def projections(query: Tensor, key: Tensor, value: Tensor, steps: Tensor, rotation: Rotation) -> Tensor:
    """What a layer makes of each token before RoPE: queries, keys and values of all heads side by side ``[B, n, F]``.

    From post-RoPE ``query [B, Hq, n, D]`` and ``key, value [B, Hkv, n, D]`` at positions ``steps [B, n]``; each of the three
    is scaled to a root mean square of 1. The layer's hidden state can be had from them as long as they are not fewer.
    """
    plain = (rotation.strip(query.float(), steps[:, None]), rotation.strip(key.float(), steps[:, None]), value.float())
    parts = [x.transpose(1, 2).flatten(2) for x in plain]
    return torch.cat([rms_norm(part, (part.shape[-1],)) for part in parts], dim=-1)


def _draw(generator: torch.Generator, inputs: int, outputs: int) -> Tensor:
    return torch.randn(inputs, outputs, generator=generator) * inputs**-0.5
