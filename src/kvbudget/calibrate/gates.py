"""Gates fitted to what a model attends to when it repeats or continues texts, by forward passes alone."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, pad, smooth_l1_loss
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate.base import TextCalibration, logits_of, watch
from kvbudget.calibrate.layer_inputs import attention_modules
from kvbudget.calibrate.samples import over_layers
from kvbudget.calibrate.training import Lesson, Training
from kvbudget.errors import UnsupportedModel
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry, rotations_of
from kvbudget.policy.gates import Gate, LinearGate, RetainingGate, SinkGate
from kvbudget.policy.view import View

LEAST = 1e-6
"""Attention below this counts as this much where its logarithm is taken."""
ROWS = 256
"""Queries whose weights are held at a time."""


@dataclass(frozen=True)
class GateCalibration(Training):
    """A gate trained on one text after the other.

    The artifact holds the weights of the gate, stacked over all layers of the model (those that no budget governs stay
    untrained).
    """

    @abstractmethod
    def gate(self) -> Gate:
        """The gate that is trained."""

    def untrained(self, model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        shape = geometry.layers[geometry.budgeted_layers[0]]
        width = shape.num_attention_heads * shape.key_head_dim
        width += shape.num_kv_heads * (shape.key_head_dim + shape.value_head_dim)
        layers = [self.gate().start(width, shape.num_kv_heads, shape.group_size, generator) for _ in geometry.layers]
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


@dataclass(frozen=True)
class Taught(TextCalibration):
    """A gate that learns to give each token of a text a known score."""

    @abstractmethod
    def gate(self) -> Gate:
        """The gate that learns."""

    @abstractmethod
    def targets(self, model: PreTrainedModel, ids: Tensor, calls: dict[int, tuple[AttentionCall, Tensor]]) -> Tensor:
        """What the first n tokens' scores should be, ``[l, n, Hkv]`` for the layers of ``calls`` (call and its lse) in order."""


@dataclass(frozen=True)
class TaughtGate(GateCalibration, Taught):
    """A gate that is trained step by step."""

    def lesson(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Lesson]:
        x, y, index = examples(self, model, ids)

        def error(weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
            begin = int(torch.randint(max(1, y.shape[1] - self.batch + 1), (), generator=generator))
            at = slice(begin, begin + self.batch)
            return self.loss(self.gate().score(x[:, at], weights), y[:, at])

        return index, error

    @abstractmethod
    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The error of ``scores [l, n, Hkv]``, a mean over everything but layers and heads."""


def examples(calibration: Taught, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[l, n, F]`` and targets ``[l, n, Hkv]`` of one text ``ids [1, T]``, and which layers of the model they are."""
    calls: dict[int, tuple[AttentionCall, Tensor]] = {}
    watch(model, ids, lambda index, call, lse: calls.update({index: (call, lse)}))
    with torch.no_grad():
        y = calibration.targets(model, ids, calls).float().cpu()
    x = features(calibration.gate(), model, {index: call for index, (call, _) in calls.items()})
    return x[:, : y.shape[1]].float().cpu().clone(), y.clone(), torch.tensor(list(calls))


def features(gate: Gate, model: PreTrainedModel, calls: Mapping[int, AttentionCall]) -> Tensor:
    """What a gate reads of a text's tokens in each layer of ``calls``: ``[l, T, ...]``, free of gradients."""
    rotations, found = rotations_of(model), []
    with torch.no_grad():
        for index, call in calls.items():
            rotation = rotations[index]
            assert rotation is not None
            steps = torch.arange(call.query.shape[2], device=call.query.device)[None]
            found.append(gate.features(call.query, call.key, call.value, steps, rotation)[0].clone())
        return torch.stack(found)


@dataclass(frozen=True)
class FastKVzipGate(TaughtGate):
    """The gate learns KVzip's scores by binary cross-entropy (Fast KVzip, arXiv 2601.17668, section 3).

    The paper takes 29 texts of 10k tokens and 5000 steps of SGD.

    Attributes:
        dim: elements of the gate's queries and keys.
        sinks: learned keys per KV head.
    """

    method: ClassVar[str] = "fast_kvzip"
    widths: ClassVar[tuple[str, ...]] = ("dim",)

    dim: int = 16
    sinks: int = 16

    def gate(self) -> Gate:
        return SinkGate(self.dim, self.sinks)

    def targets(self, model: PreTrainedModel, ids: Tensor, calls: dict[int, tuple[AttentionCall, Tensor]]) -> Tensor:
        return kvzip_scores(model, ids)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy(scores.clamp(LEAST, 1 - LEAST), targets.clamp(0, 1), reduction="none").mean(1).sum()


@dataclass(frozen=True)
class KVzapGate(Taught):
    """The gate learns the logarithm of KVzip's scores by ridge regression (KVzap, arXiv 2601.07891, section 3).

    Sums of products over all tokens of all texts are kept, so that the best linear gate is found at once.

    Attributes:
        count: number of texts (paper: 4500, 500 tokens of each).
        length: tokens of each.
        value_norm: the target is that of `kvzip_plus_scores` (the paper's), else the attention alone.
        ridge: what is added to the mean square of each feature, which is 1.
    """

    method: ClassVar[str] = "kvzap"

    value_norm: bool = False
    ridge: float = 0.03

    def gate(self) -> Gate:
        return LinearGate()

    def targets(self, model: PreTrainedModel, ids: Tensor, calls: dict[int, tuple[AttentionCall, Tensor]]) -> Tensor:
        scores = kvzip_plus_scores(model, ids) if self.value_norm else kvzip_scores(model, ids)
        return scores.clamp_min(LEAST).log()

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y, _ = examples(self, model, ids)
        x = pad(x, (0, 1), value=1.0)  # for the bias
        fresh = {"squares": x.mT @ x, "products": x.mT @ y}
        return {name: tensor + state.get(name, 0.0) for name, tensor in fresh.items()}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        geometry = CacheGeometry.from_config(model.config)
        damping = torch.full((state["squares"].shape[-1],), self.ridge * self.count * self.length)
        damping[-1] = 0.0
        found = torch.linalg.solve(state["squares"] + damping.diag(), state["products"])
        whole = over_layers(found, list(geometry.budgeted_layers), geometry.num_layers)
        return {"weight": whole[:, :-1].contiguous(), "bias": whole[:, -1:].contiguous()}


@dataclass(frozen=True)
class LocretGate(TaughtGate):
    """The gate learns the highest attention that a token gets from what follows (Locret, arXiv 2410.01805, section 3.2).

    The paper's texts are prompts with answers; here the last ``answer`` share of a text follows the rest. The label is the
    logarithm of that attention, which ranks entries as the attention does: most labels are so small that the paper's, on a
    few texts, teach the gate less than a constant. The error is a smooth L1 one, plus ``smooth`` times the squared difference
    between neighbors' scores.

    Attributes:
        hidden: width of the gate (paper: 1024).
        answer: share of the text whose queries judge the rest.
        smooth: weight of the second error (paper: 0.0025).
    """

    method: ClassVar[str] = "locret"
    widths: ClassVar[tuple[str, ...]] = ("hidden",)

    hidden: int = 128
    answer: float = 0.25
    smooth: float = 0.0025

    def gate(self) -> Gate:
        return RetainingGate(self.hidden)

    def targets(self, model: PreTrainedModel, ids: Tensor, calls: dict[int, tuple[AttentionCall, Tensor]]) -> Tensor:
        cut = max(1, ids.shape[1] - max(1, int(ids.shape[1] * self.answer)))
        return torch.stack([_highest(call, lse, cut) for call, lse in calls.values()]).clamp_min(LEAST).log()

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        error = smooth_l1_loss(scores, targets, reduction="none").mean(1).sum()
        return error + self.smooth * (scores[:, 1:] - scores[:, :-1]).square().mean(1).sum()


def kvzip_scores(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """KVzip's scores of a text ``ids [1, T]``: ``[l, T, Hkv]`` over the layers that a budget governs."""
    cache = KVCache(model, "kvzip(sinks=0)")
    cache.prefill(model, ids)
    return torch.stack([View(layer).state("score")[0].T for layer in cache.enforcer.layers])


def kvzip_plus_scores(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """KVzip+ of a text ``ids [1, T]``, which the model reads twice: ``[l, T, Hkv]`` over the layers that a budget governs.

    The attention ``a`` from a query of the second reading to token t is weighed by what t's value adds to the layer's
    output, in relation to the layer's input h at the query: ``max over queries and group of a ||W_O v_t|| / ||h||``.

    Raises:
        UnsupportedModel: where the projections of keys and of the output are no modules of their own.
    """
    modules, length = attention_modules(model, "k_proj", "o_proj"), ids.shape[1]
    if not modules:
        raise UnsupportedModel(
            f"{type(model).__name__} has no k_proj and o_proj in all layers, which value_norm=True weighs by; leave it out"
        )
    found: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def look(index: int, call: AttentionCall, lse: Tensor) -> None:
        value = call.value[0, :, None, :length].float()
        output = modules[index].o_proj.weight.float().T.unflatten(0, (call.key.shape[1], -1, value.shape[-1]))
        added = ((value @ (output @ output.mT)) * value).sum(-1).clamp_min(0).sqrt()
        found[index] = _highest(call, lse, length, added, 1 / inputs[index].float().norm(dim=-1))

    hooks = [
        module.k_proj.register_forward_pre_hook(lambda _, given, index=index: inputs.update({index: given[0][0]}))
        for index, module in modules.items()
    ]
    try:
        watch(model, torch.cat([ids, ids], dim=1), look)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(list(found.values()))


def _highest(
    call: AttentionCall, lse: Tensor, cut: int, added: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """Highest weight of each token before ``cut`` from any query from there on, over the GQA group: ``[cut, Hkv]``.

    Weights are multiplied by ``added [Hkv, G, cut]`` of the token and ``share [T]`` of the query.
    """
    heads = call.key.shape[1]
    best = torch.zeros(heads, cut, device=lse.device)
    for begin in range(cut, call.query.shape[2], ROWS):
        at = slice(begin, begin + ROWS)
        weights = (logits_of(call, at, slice(cut)) - lse[0, :, at].unflatten(0, (heads, -1))[..., None]).exp()
        if added is not None and share is not None:
            weights = weights * added[:, :, None] * share[at, None]
        best = torch.maximum(best, weights.amax((1, 2)))
    return best.T
