"""Min-max quantization as its formula says, group by group and without packing: what the codecs are tested against."""

import torch
from torch import Tensor


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """``x`` after coding in one group along ``dim`` with half-precision scale and zero; float64.

    Codes are computed in float32, as in the codecs, since double precision would round some ties the other way.
    """
    x = x.float()
    levels = 2**bits - 1
    zero = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - zero) / levels).half().float()
    scale[scale <= 0] = 1.0
    codes = ((x - zero) / scale).round().clamp(0, levels)
    return codes.double() * scale + zero


def per_token(x: Tensor, bits: int, group: int) -> Tensor:
    """Entries ``[..., D]`` coded in groups of ``group`` channels each."""
    return torch.cat([rounded(part, bits, -1) for part in x.split(group, dim=-1)], dim=-1)


def per_channel(x: Tensor, bits: int, group: int) -> Tensor:
    """Entries ``[T, D]``, T a multiple of ``group``, coded in groups of ``group`` consecutive entries per channel."""
    return torch.cat([rounded(part, bits, 0) for part in x.split(group)]) if len(x) else x.double()
