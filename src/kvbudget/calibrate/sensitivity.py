"""How much a model's loss depends on each element of its keys and values: gradients of one text."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvbudget.models import CacheGeometry, rotations_of


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer and text: ``keys`` before RoPE and ``values [Hkv, T, D]``, and the gradients of the loss by them."""

    keys: Tensor
    values: Tensor
    key_gradient: Tensor
    value_gradient: Tensor


class _Recorder(DynamicCache):
    """Hands keys and values through and remembers them; the first ones start a graph of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        key, value = (x if x.requires_grad else x.detach().requires_grad_() for x in (key_states, value_states))
        self.held[layer_idx] = (key, value)
        return key, value


def sensitivities(model: PreTrainedModel, ids: Tensor) -> dict[int, Sensitivity]:
    """Keys, values and their gradients in each layer that a budget governs, for the mean loss of one text ``ids [1, T]``.

    The gradient by a key before RoPE is that by the key after it, turned back. One forward and one backward pass.
    """
    rotations = rotations_of(model)
    cache = _Recorder()
    with torch.enable_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        layers = [i for i in CacheGeometry.from_config(model.config).budgeted_layers if i in cache.held]
        tensors = [x for i in layers for x in cache.held[i]]
        gradients = torch.autograd.grad(loss, tensors)
    steps = torch.arange(ids.shape[1], device=ids.device)
    found = {}
    for at, index in enumerate(layers):
        rotation = rotations[index]
        assert rotation is not None
        key, value = (x.detach()[0].float() for x in cache.held[index])
        by_key, by_value = (x[0].float() for x in gradients[2 * at : 2 * at + 2])
        # The rotation is orthogonal up to its scaling, whose square turns the inverse into the transpose.
        turned = rotation.strip(by_key, steps)
        turned[..., : rotation.rotary_dim] *= rotation.attention_scaling**2
        found[index] = Sensitivity(rotation.strip(key, steps), value, turned, by_value)
    return found
