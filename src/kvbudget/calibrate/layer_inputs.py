"""Maps between the inputs of a model's layers and their keys and values, from the weights alone."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import Calibration, watch
from kvbudget.errors import UnsupportedModel
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry, rotations_of

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest relative difference between keys from the weights and the model's own."""
CUT = 1e-5
"""Singular values below this part of the largest one carry nothing."""


class Projection(NamedTuple):
    """``k = X W_k + b_k`` before RoPE, ``v = X W_v + b_v``: ``key [d, K]``, ``value [d, V]``; ``gain [d]`` of the norm."""

    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor
    gain: Tensor


@dataclass(frozen=True)
class InputMaps(Calibration):
    """What `kvbudget.codecs.joint.LayerInputs` needs (XQuant, arXiv 2508.10395); no texts are read.

    Where X is narrower than a token's keys and values the artifact holds ``down [L, K + V, d]`` and ``up [L, d, K + V]``;
    else ``key_down``, ``key_up [L, K, K]``, ``value_down`` and ``value_up [L, V, V]``; biases beside them, all in float32.
    """

    method: ClassVar[str] = "xquant"

    def fit(self, model: PreTrainedModel) -> dict[str, Tensor]:
        layers = projections(model)
        if narrow(next(iter(layers.values()))):
            return joint_maps(model, layers, gains=False)
        pieces = {}
        for index, layer in layers.items():
            found: dict[str, Tensor] = {}
            for side, weight, bias in (("key", layer.key, layer.key_bias), ("value", layer.value, layer.value_bias)):
                _, down, up = latent(weight)
                found |= {f"{side}_down": down, f"{side}_up": up, f"{side}_bias": bias}
            pieces[index] = found
        return stacked(model, pieces)


@dataclass(frozen=True)
class InputDeltaMaps(Calibration):
    """What `kvbudget.codecs.joint.InputDeltas` needs (XQuant-CL, arXiv 2508.10395); no texts are read.

    The artifact holds ``down [L, K + V, r]``, ``up [L, r, K + V]`` and, where X is not narrower than a token's keys and
    values, an orthonormal ``basis [L, d, r]``, of inputs divided by the weights of the norm before them.
    """

    method: ClassVar[str] = "xquant_cl"

    def fit(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return joint_maps(model, projections(model), gains=True)


def joint_maps(model: PreTrainedModel, layers: dict[int, Projection], *, gains: bool) -> dict[str, Tensor]:
    """Maps of keys and values side by side, for inputs as they are or divided by the weights of the norm."""
    pieces = {}
    for place, (index, layer) in enumerate(layers.items()):
        weight = torch.cat([layer.key, layer.value], 1)
        weight = layer.gain[:, None] * weight if gains else weight
        found = {"bias": torch.cat([layer.key_bias, layer.value_bias]), "place": torch.tensor(place)}
        if narrow(layer):
            found |= {"down": torch.linalg.pinv(weight, rtol=CUT), "up": weight}
        else:
            basis, down, up = latent(weight)
            found |= {"down": down, "up": up, "basis": basis}
        pieces[index] = found
    return stacked(model, pieces) | {"split": torch.tensor(next(iter(layers.values())).key.shape[1])}


def narrow(layer: Projection) -> bool:
    """Whether the input has fewer elements than keys and values together."""
    return len(layer.key) < layer.key.shape[1] + layer.value.shape[1]


def latent(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By ``W = U S B^T [d, n]``: the basis U of latents ``X U``, what takes ``X W`` there (``B / S``), and what takes them
    back."""
    basis, scale, turned = torch.linalg.svd(weight, full_matrices=False)
    inverse = torch.where(scale > CUT * scale[0], 1 / scale.clamp_min(1e-300), 0.0)
    return basis, turned.T * inverse, scale[:, None] * turned


def stacked(model: PreTrainedModel, pieces: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of layers at their places among all layers of the model, zeros elsewhere; float32 where they are no integers."""
    number, found = len(CacheGeometry.from_config(model.config).layers), {}
    for name, like in next(iter(pieces.values())).items():
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        found[name] = torch.zeros(number, *like.shape, dtype=dtype)
        for index, piece in pieces.items():
            found[name][index] = piece[name].to(dtype)
    return found


def projections(model: PreTrainedModel) -> dict[int, Projection]:
    """The key and value projections of the layers that a budget governs in float64, checked against the model's own keys.

    Raises:
        UnsupportedModel: where keys and values are not linear in a layer's input, or lie in weights of another form.
    """
    governed = CacheGeometry.from_config(model.config).budgeted_layers
    modules, name = attention_modules(model, "k_proj", "v_proj"), type(model).__name__
    if not modules:
        raise UnsupportedModel(
            f"{name} has no separate key and value projections in all layers; use another codec, such as kivi"
        )
    inputs: dict[int, Tensor] = {}
    calls: dict[int, AttentionCall] = {}
    hooks = [
        module.k_proj.register_forward_pre_hook(lambda _, given, index=index: inputs.update({index: given[0][0]}))
        for index, module in modules.items()
    ]
    ids = torch.randint(
        model.get_input_embeddings().weight.shape[0], (1, 16), generator=torch.Generator().manual_seed(0)
    )
    try:
        watch(model, ids.to(model.device), lambda index, call, lse: calls.update({index: call}))
    finally:
        for hook in hooks:
            hook.remove()
    found, rotations, steps = {}, rotations_of(model), torch.arange(ids.shape[1], device=model.device)
    for index in governed:
        linear, x, call, rotation = modules[index], inputs[index].double(), calls[index], rotations[index]
        weights = [getattr(linear, part) for part in ("k_proj", "v_proj")]
        maps = [part.weight.detach().double().T for part in weights]
        biases = [
            torch.zeros(w.shape[1], dtype=torch.float64, device=w.device)
            if part.bias is None
            else part.bias.detach().double()
            for part, w in zip(weights, maps, strict=True)
        ]
        assert rotation is not None
        own = (rotation.strip(call.key[0].float(), steps), call.value[0].float())
        for weight, bias, held in zip(maps, biases, own, strict=True):
            made, held = x @ weight + bias, held.transpose(0, 1).flatten(1).double()
            error = float((made - held).norm() / held.norm())
            if not error <= TOLERANCE.get(model.dtype, 1e-3):
                raise UnsupportedModel(
                    f"keys or values of layer {index} of {name} are no linear map of the layer's input (relative error "
                    f"{error:.2g}), perhaps because they are normalized; use another codec, such as kivi"
                )
        found[index] = Projection(maps[0], maps[1], biases[0], biases[1], _gain(model, index, x))
    return {index: Projection(*(part.cpu() for part in layer)) for index, layer in found.items()}


def attention_modules(model: PreTrainedModel, *parts: str) -> dict[int, Any]:
    """The attention modules of the layers that a budget governs, if all of them have linear ``parts`` of these names."""
    governed = CacheGeometry.from_config(model.config).budgeted_layers
    found = {
        module.layer_idx: module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in governed and all(hasattr(module, part) for part in parts)
    }
    return found if set(found) == set(governed) else {}


def _gain(model: PreTrainedModel, index: int, x: Tensor) -> Tensor:
    """The weights of the norm that ``x [T, d]`` comes from, where dividing by them leaves tokens of norm sqrt(d); else ones."""
    for name, weight in model.named_parameters():
        if f".{index}." in name and weight.shape == x.shape[1:] and name.endswith("norm.weight"):
            for gain in (weight.detach().double(), 1 + weight.detach().double()):
                sizes = (x / gain).square().mean(-1)
                if bool(((sizes - 1).abs() < 0.1).all()):
                    return gain
    return torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
