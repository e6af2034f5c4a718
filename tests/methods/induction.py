"""A model that looks up, made by hand: one head finds a token again, the other what followed it."""

import torch
from transformers import PreTrainedModel

from tiny import tiny_model


def induction_model() -> PreTrainedModel:
    """Two layers of GPT-2 by hand: layer 0 copies the previous token, layer 1 looks for it (head 0) or for the token (1).

    The residual stream holds the token (128 channels, one-hot), the position (64) and the previous token (128).
    """
    tokens, waves, width = 128, 32, 320
    model = tiny_model("gpt2", vocab_size=tokens, hidden_size=width, num_attention_heads=2, head_dim=160)
    model.config.scale_attn_by_inverse_layer_idx = False
    for parameter_name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "ln_" in parameter_name and "weight" in parameter_name else 0.0)
    for block in model.transformer.h:
        block.attn.scale_attn_by_inverse_layer_idx = False
    at_token, at_position, at_previous = slice(0, 128), slice(128, 192), slice(192, 320)
    model.transformer.wte.weight[:, at_token] = torch.eye(tokens)
    turn = 3.0 * torch.rand(waves, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(len(model.transformer.wpe.weight))[:, None] * turn
    model.transformer.wpe.weight[:, at_position] = torch.cat([angle.sin(), angle.cos()], dim=1) / waves**0.5
    sin, cos = torch.diag(turn.sin()), torch.diag(turn.cos())
    one_step = torch.cat(
        [torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)]
    )  # p(t) -> p(t + 1), from the left
    first, second = (block.attn for block in model.transformer.h)
    query, key, value = (slice(i * width, (i + 1) * width) for i in range(3))
    first.c_attn.weight[at_position, query][:, :64] = 8 * torch.eye(64)
    first.c_attn.weight[at_position, key][:, :64] = one_step.T
    first.c_attn.weight[at_token, value][:, :tokens] = torch.eye(tokens)
    first.c_proj.weight[:tokens, at_previous] = 0.1 * torch.eye(tokens)
    for head, looks_at in enumerate((at_previous, at_token)):
        channels = slice(head * 160, head * 160 + tokens)
        second.c_attn.weight[at_token, query][:, channels] = 8 * torch.eye(tokens)
        second.c_attn.weight[looks_at, key][:, channels] = torch.eye(tokens)
    return model


def repeating_model() -> PreTrainedModel:
    """An `induction_model` that says what it finds: it goes on with a text that it has seen before."""
    model = induction_model()
    attention = model.transformer.h[1].attn
    attention.c_attn.weight[:128, 640:768] = torch.eye(128)  # head 0 writes the token that it looks at
    attention.c_proj.weight[:128, 192:320] = 10 * torch.eye(128)
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, 192:320] = torch.eye(128)
    return model
