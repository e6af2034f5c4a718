"""Recurrent layers: their states across inference modes, and taken back after a speculation."""

from __future__ import annotations

import torch
from transformers.cache_utils import LinearAttentionLayer


def leave_inference(layer: LinearAttentionLayer) -> None:
    """Makes states that were written under inference mode writable outside of it."""
    for states in (layer.conv_states, layer.recurrent_states):
        for i, state in states.items():
            if state is not None and state.is_inference():
                states[i] = state.clone()


def shorten(layer: LinearAttentionLayer, tokens: int) -> None:
    """Takes the newest tokens out of a recorded convolution state and gives it its ordinary width again."""
    for i, state in layer.conv_states.items():
        if state is not None:
            width = layer.conv_kernel_size[i]
            state = state[..., : state.shape[-1] - tokens][..., -width:]
            layer.conv_states[i] = torch.nn.functional.pad(state, (width - state.shape[-1], 0)).clone()
