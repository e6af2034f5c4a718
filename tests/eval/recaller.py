"""A tiny model trained to look pairs up: every pair that a cache has lost is a visible error."""

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_model

KEYS = VALUES = 48
PAIRS = 16


def pairs(count: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values ``[rows, count]``: keys are distinct in a row, values are drawn freely."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:count] for _ in range(rows)]) + 1
    values = torch.randint(VALUES, (rows, count), generator=generator) + 1 + KEYS
    return keys, values


def _batch(rows: int, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Texts that say all pairs and then all again in another order, ``[rows, 4 count]``, and where to predict."""
    keys, values = pairs(count, rows, generator)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(rows)])
    said = torch.stack([keys, values], -1).flatten(1)
    again = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    ids = torch.cat([said, again], 1)
    labels = torch.full_like(ids, -100)
    labels[:, said.shape[1] + 1 :: 2] = ids[:, said.shape[1] + 1 :: 2]
    return ids, labels


@cache
def recaller() -> PreTrainedModel:
    """Two layers, 64 wide, trained on `_batch` for some 15 seconds of CPU: few pairs first, then `PAIRS`.

    Raises AssertionError when training does not converge.
    """
    torch.manual_seed(0)
    model = tiny_model(
        "llama", vocab_size=1 + KEYS + VALUES, hidden_size=64, intermediate_size=64, num_key_value_heads=4
    )
    for weights in model.parameters():
        weights.requires_grad_(True)
        if weights.ndim == 2:
            torch.nn.init.normal_(weights, std=0.06)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=40)
    generator = torch.Generator().manual_seed(0)
    count = 4
    for _ in range(900):
        ids, labels = _batch(48, generator, count)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if loss.item() < 0.05 and count < PAIRS:
            count *= 2
        elif loss.item() < 0.005:
            return model.requires_grad_(False)
    raise AssertionError(f"training ended at a loss of {loss.item():.3g}")
