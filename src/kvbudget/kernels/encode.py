"""Integer codes from dense entries: min-max quantization and packing, by the native extension where it was built."""

import torch
from torch import Tensor

from kvbudget.kernels.operands import pack

HALF_MAX = torch.finfo(torch.float16).max


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Min-max codes over ``dim``: returns uint8 codes (shape of x), float16 scale and zero (``dim`` kept as 1).

    >>> codes, scale, zero = quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2, -1)
    >>> codes.tolist(), scale.item(), zero.item()
    ([[0, 1, 2, 3]], 1.0, 0.0)
    """
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    levels = 2**bits - 1
    zero = low.clamp(-HALF_MAX, HALF_MAX).half()
    scale = ((high - zero.float()) / levels).clamp(0.0, HALF_MAX).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((x - zero.float()) / scale.float()).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero


def encode_tokens(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes ``[N, D * bits / 8]`` of entries ``x [N, D]``, scale and zero ``[N, D / group]`` per group of channels."""
    codes, scale, zero = quantize(x.unflatten(-1, (-1, group)), bits, -1)
    return pack(codes.flatten(-2), bits), scale[..., 0], zero[..., 0]


def encode_units(x: Tensor, bits: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes ``[N, unit, D * bits / 8]`` of ``x [N * unit, D]``, scale and zero ``[N, D]`` per unit and channel."""
    codes, scale, zero = quantize(x.unflatten(0, (-1, unit)), bits, 1)
    return pack(codes, bits), scale[:, 0], zero[:, 0]
