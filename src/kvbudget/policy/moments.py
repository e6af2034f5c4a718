"""Means and covariances that run over vectors as they come, per head, and how a symmetric matrix is stored once."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of ``number [B]`` vectors per head: ``mean [B, H, D]`` and the biased ``covariance [B, H, D, D]`` (None: not kept)."""

    number: Tensor
    mean: Tensor
    covariance: Tensor | None

    @classmethod
    def of(cls, x: Tensor, counted: Tensor, covariance: bool = True) -> "Moments":
        """Moments of ``x [B, H, n, D]`` over the vectors where ``counted [B, n]`` is set."""
        weight = counted.to(x.dtype)[:, None, :, None]
        number = counted.sum(1).to(x.dtype)
        divisor = number.clamp_min(1)[:, None, None]
        mean = (x * weight).sum(2) / divisor
        if not covariance:
            return cls(number, mean, None)
        apart = (x - mean[:, :, None]) * weight
        return cls(number, mean, apart.transpose(-1, -2) @ apart / divisor[..., None])

    def join(self, other: "Moments") -> "Moments":
        """Moments of both sets of vectors (Chan, Golub and LeVeque's update)."""
        total = self.number + other.number
        part = (other.number / total.clamp_min(1))[:, None, None]
        apart = other.mean - self.mean
        mean = self.mean + part * apart
        if self.covariance is None or other.covariance is None:
            return Moments(total, mean, None)
        part = part[..., None]
        between = apart[..., :, None] * apart[..., None, :]
        return Moments(
            total, mean, (1 - part) * self.covariance + part * other.covariance + part * (1 - part) * between
        )


def triangle(symmetric: Tensor) -> Tensor:
    """The upper triangle ``[..., D (D + 1) / 2]`` of symmetric matrices ``[..., D, D]``."""
    row, column = _cells(symmetric.shape[-1], symmetric.device)
    return symmetric[..., row, column]


def square(upper: Tensor, width: int) -> Tensor:
    """Symmetric matrices ``[..., D, D]`` from their upper triangles; the inverse of `triangle`.

    >>> square(torch.tensor([1.0, 2.0, 3.0]), 2).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    row, column = _cells(width, upper.device)
    out = upper.new_empty((*upper.shape[:-1], width, width))
    out[..., row, column] = upper
    out[..., column, row] = upper
    return out


def _cells(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = torch.triu_indices(width, width, device=device)
    return row, column
