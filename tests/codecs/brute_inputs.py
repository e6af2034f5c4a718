"""The true inputs of a model's attention layers, its keys before RoPE and its values."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import watch
from kvbudget.models import rotations_of


def layer_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per layer: inputs ``[T, d]``, keys before RoPE and values ``[T, Hkv * D]``, for ``ids [1, T]``."""
    inputs, keys, values = [], [], []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, given: inputs.append(given["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    steps = torch.arange(ids.shape[1])

    def look(index, call, lse):
        rotation = rotations_of(model)[index]
        keys.append(rotation.strip(call.key[0], steps).transpose(0, 1).flatten(1))
        values.append(call.value[0].transpose(0, 1).flatten(1))

    watch(model, ids, look)
    for hook in hooks:
        hook.remove()
    return inputs, keys, values
