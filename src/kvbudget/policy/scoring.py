"""Parts that many scorers share: pooling over positions and reductions over the GQA group."""

from typing import Literal

import torch
from torch import Tensor

from kvbudget.errors import PolicyError

Reduction = Literal["mean", "max", "sum"]
Pooling = Literal["avg", "max", "none"]


def check_window(window: int) -> None:
    """Raises PolicyError for an observation window without queries."""
    if window < 1:
        raise PolicyError(f"window={window} leaves no query that could judge entries; give at least 1")


def pool(scores: Tensor, kernel: int, how: Pooling = "avg") -> Tensor:
    """1-D pooling over the last dimension, stride 1, padding ``kernel // 2``, length kept (SnapKV, arXiv 2404.14469).

    Average pooling counts the zero padding, as ``torch.nn.functional.avg_pool1d`` does.

    >>> pool(torch.tensor([0.0, 3.0, 0.0, 0.0]), 3, "max").tolist()
    [3.0, 3.0, 3.0, 0.0]
    """
    if how == "none" or kernel <= 1 or not scores.numel():
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    operation = torch.nn.functional.avg_pool1d if how == "avg" else torch.nn.functional.max_pool1d
    if how == "max":
        kernel = min(kernel, 2 * scores.shape[-1] + 1)  # which sees all
    pooled = operation(flat, kernel, stride=1, padding=kernel // 2)
    return pooled[..., : scores.shape[-1]].reshape(scores.shape)


def reduce_group(x: Tensor, how: Reduction = "mean", dim: int = 2) -> Tensor:
    """Reduces the GQA group dimension: ``[B, Hkv, G, ...]`` to ``[B, Hkv, ...]``."""
    if how == "max":
        return x.amax(dim)
    return x.mean(dim) if how == "mean" else x.sum(dim)


def by_layer(scores: Tensor) -> Tensor:
    """The mean over the KV heads of scores ``[B, Hkv, T]``, given back to each of them (for aligned scorers)."""
    return scores.mean(1, keepdim=True).expand_as(scores)
