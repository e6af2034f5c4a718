"""Entries as codes into codebooks (vector quantization), attended by look-up tables and never written out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.kernels.operands import Operand


@dataclass
class CodebookOperand(Operand):
    """Vector-quantized entries: in each of P groups of coupled channels the sum of one codeword per stage.

    ``codebook [H, K, P, 2^b, D / P]`` float32 holds the codewords of K stages (more than one: additive or residual codes);
    row r uses ``codebook[r % H]``, so H is the number of KV heads, or 1 where they share. Dimensions along which words are
    shared may be expanded. ``codes [N, unit, K * P]`` uint8 or int16 name them, stage after stage; row r's units begin at
    ``starts[r]`` (counted in units) and its first ``skip[r]`` entries are passed over, as in `ChannelQuantOperand`.

    With ``paired`` codes, K = 2 k stages of 64 words share 12 bits by twos, the earlier one's code above: the last dimension of
    ``codes`` is then k low bytes and ``ceil(k / 2)`` bytes of high halves.

    ``scale [N, unit]`` multiplies an entry; ``shift [N, unit]`` times ``mean [N, D]`` is added to it. None leaves them out.
    Coupled quantization (arXiv 2405.03917) is K = 1 with a codebook per head and group; NSNQuant (arXiv 2505.18231) is one
    shared codebook with ``scale``, ``shift`` and the chunk's ``mean``; additive codes over whole vectors
    (CommVQ, arXiv 2506.18879, before its rotation) are P = 1 with K tables.
    """

    codes: Tensor
    codebook: Tensor
    starts: Sequence[int]
    skip: Sequence[int] | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    paired: bool = False

    @property
    def unit(self) -> int:
        """Entries per unit."""
        return self.codes.shape[1]

    @property
    def width(self) -> int:
        """Channels of an entry."""
        return self.codebook.shape[2] * self.codebook.shape[4]

    @property
    def columns(self) -> int:
        """Numbers that name an entry's words, as they are stored."""
        stages, groups = self.codebook.shape[1:3]
        return stages // 2 + -(-stages // 4) if self.paired else stages * groups

    def block(self, row: int, begin: int, end: int) -> Tensor:
        return self.chosen(row, torch.arange(begin, end, device=self.codes.device))

    def chosen(self, row: int, index: Tensor) -> Tensor:
        """Entries of a row by their in-row ``index [T']``, dense ``[T', D]``."""
        words = self.codebook[row % self.codebook.shape[0]]
        slot = index + (0 if self.skip is None else self.skip[row]) + self.starts[row] * self.unit
        stages, groups = words.shape[:2]
        codes = self.codes.flatten(0, 1)[slot].long()
        if self.paired:
            codes = unpaired(codes, stages // 2)
        codes = codes.unflatten(-1, (stages, groups))
        stage = torch.arange(stages, device=codes.device)[:, None]
        group = torch.arange(groups, device=codes.device)
        dense = words[stage, group, codes].float().sum(1).flatten(1)
        if self.scale is not None:
            dense = dense * self.scale.flatten()[slot, None].float()
        if self.mean is not None:
            assert self.shift is not None, "a mean is added times shift"
            dense = dense + self.shift.flatten()[slot, None].float() * self.mean[slot // self.unit].float()
        return dense


def paired(codes: Tensor) -> Tensor:
    """Packs codes below 64 ``[N, 2 k]`` by twos into 12 bits: k low bytes, then the high halves, two to a byte."""
    both = codes[:, 0::2] << 6 | codes[:, 1::2]
    high = both >> 8
    if both.shape[1] % 2:
        high = torch.nn.functional.pad(high, (0, 1))
    return torch.cat([both & 255, high[:, 0::2] | high[:, 1::2] << 4], dim=1).to(torch.uint8)


def unpaired(packed: Tensor, pairs: int) -> Tensor:
    """Inverse of `paired`: codes ``[N, 2 pairs]``."""
    low, high = packed[:, :pairs].long(), packed[:, pairs:].long()
    both = low | torch.stack([high & 15, high >> 4], dim=-1).flatten(1)[:, :pairs] << 8
    return torch.stack([both >> 6, both & 63], dim=-1).flatten(1)
