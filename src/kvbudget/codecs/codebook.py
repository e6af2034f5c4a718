"""Vector quantization: groups of channels of an entry as codes into codebooks, attended by look-up tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.kernels.codebook import CodebookOperand
from kvbudget.kernels.operands import Operand

WORDS = 256
"""Words of a codebook: codes are bytes."""
ROWS = 2048
"""Vectors whose distances to all words are held at a time."""


def nearest(x: Tensor, words: Tensor) -> Tensor:
    """Index of the nearest word: ``x [B, N, d]``, ``words [B, n, d]`` to int64 ``[B, N]``.

    >>> nearest(torch.tensor([[[0.9], [-3.0]]]), torch.tensor([[[0.0], [1.0]]])).tolist()
    [[1, 0]]
    """
    half = words.square().sum(-1)[:, None] / 2
    return torch.cat([(part @ words.mT - half).argmax(-1) for part in x.split(ROWS, 1)], 1)


def codewords(
    x: Tensor, count: int = WORDS, *, steps: int = 25, seed: int = 0, weights: Tensor | None = None
) -> Tensor:
    """Codebooks ``[B, count, d]`` for B sets of vectors ``[B, N, d]`` by k-means, the same for the same arguments.

    Starts at vectors that are drawn without replacement (the first ones again where there are fewer than ``count``). Words
    that lose all vectors stay where they are. ``weights [B, N]`` count a vector more or less.
    """
    sets, number, width = x.shape
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    words = x[:, order.repeat(-(-count // number))[:count]].clone().float()
    weight = torch.ones(sets, number) if weights is None else weights.float()
    weighted = torch.cat([x.float() * weight[..., None], weight[..., None]], -1)
    for _ in range(steps):
        codes = nearest(x.float(), words)
        sums = torch.zeros(sets, count, width + 1).scatter_add_(1, codes[..., None].expand(-1, -1, width + 1), weighted)
        total = sums[..., -1:]
        words = torch.where(total > 0, sums[..., :-1] / total.clamp_min(1e-30), words)
    return words


@dataclass(frozen=True)
class Coupled(Codec):
    """Each group of consecutive channels as one byte, into a codebook of its own per KV head (CQ, arXiv 2405.03917).

    ``words [L, H, P, 256, D / P]`` over all layers of the model; `at` takes a layer's ``[H, P, 256, D / P]``.
    """

    calibrated: ClassVar[str] = "cq"

    channels: int = 8
    words: Tensor | None = field(default=None, repr=False, compare=False)

    def at(self, layer_idx: int) -> Coupled:
        return self if self.words is None else replace(self, words=self.words[layer_idx])

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        words, heads = self._words(x.device), self._heads(place, len(x), x.device)
        codes = torch.empty(len(x), words.shape[1], dtype=torch.uint8, device=x.device)
        for head in heads.unique().tolist():
            own = heads == head
            parts = x[own].float().unflatten(-1, (words.shape[1], -1)).transpose(0, 1)
            codes[own] = nearest(parts, words[head]).T.to(torch.uint8)
        return {"codes": codes}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        codes = columns["codes"].long()
        heads = self._heads(place, len(codes), codes.device)
        group = torch.arange(codes.shape[1], device=codes.device)
        return self._words(codes.device)[heads[:, None], group, codes].flatten(1)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        codes = columns["codes"]
        return CodebookOperand(codes[:, None], self._words(codes.device)[:, None], starts, skip)

    def bytes_per_entry(self, width: int) -> float:
        return width / self.channels

    def _words(self, device: torch.device) -> Tensor:
        assert self.words is not None, "codebooks come from a calibration"
        return self.words.to(device)

    def _heads(self, place: Place | None, count: int, device: torch.device) -> Tensor:
        if place is None:
            return torch.zeros(count, dtype=torch.long, device=device)
        return place.rows % self._words(device).shape[0]


@dataclass(frozen=True)
class Normalized(Codec):
    """Entries made normal by Normalize, Shift, Normalize, then coded in one fixed codebook (NSNQuant, arXiv 2505.18231).

    Over a unit of entries ``[unit, D]``: ``s1 = |x| / sqrt(D)`` of each entry, ``mu`` the mean of ``x / s1``, and ``s2 = |y| /
    sqrt(D)`` of ``y = x / s1 - mu``; groups of 8 elements of ``y / s2`` are coded by ``stages`` bytes, each one the nearest
    word to what those before have left. Decodes to ``s1 (s2 c + mu)``. Entries should have been rotated before.
    """

    unit: int = 64
    residual: int = 64
    cyclic: bool = True
    stages: int = 1

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        root = x.shape[-1] ** 0.5
        units = x.float().unflatten(0, (-1, self.unit))
        first = _half(units.norm(dim=-1, keepdim=True) / root)
        shaped = units / first.float().clamp_min(SMALLEST)
        mean = _half(shaped.mean(1))
        shaped = shaped - mean[:, None].float()
        second = shaped.norm(dim=-1, keepdim=True) / root
        scale = _half(first.float() * second)
        # Against the stored scale, so that its rounding does not add up with that of the codes.
        left = (units - first.float() * mean[:, None].float()) / scale.float().clamp_min(SMALLEST)
        left, codes = left.flatten(0, 1).unflatten(-1, (-1, GROUP)), []
        for words in normal_words(self.stages).to(x.device):
            codes.append(nearest(left.flatten(0, 1)[None], words[None])[0].unflatten(0, (len(left), -1)))
            left = left - words[codes[-1]]
        packed = torch.cat(codes, -1).to(torch.uint8).unflatten(0, (-1, self.unit))
        return {"codes": packed, "scale": scale[..., 0], "shift": first[..., 0], "mean": mean}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        count = len(columns["codes"]) * self.unit
        return self.operand(columns, [0], [0]).block(0, 0, count)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        codes = columns["codes"]
        words = normal_words(self.stages).to(codes.device)
        groups = codes.shape[-1] // self.stages
        book = words[None, :, None].expand(1, self.stages, groups, WORDS, GROUP)
        return CodebookOperand(codes, book, starts, skip, columns["scale"], columns["shift"], columns["mean"])

    def bytes_per_entry(self, width: int) -> float:
        return self.stages * width / GROUP + 4 + 2 * width / self.unit


GROUP = 8
SMALLEST = 1e-20


@cache
def normal_words(stages: int) -> Tensor:
    """Codebooks ``[stages, 256, 8]`` for eight independent N(0, 1) numbers, each for what the ones before leave.

    K-means over 2^14 draws with a fixed seed; the same on every run.
    """
    left = torch.randn(1, 2**14, GROUP, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(stages):
        found.append(codewords(left, steps=10))
        left = left - found[-1][0][nearest(left, found[-1])]
    return torch.cat(found)


@dataclass(frozen=True)
class Prompted(Codec):
    """Product quantization with codebooks per row, found from the first entries that the row codes (hcattention's keys).

    State ``words [P, 256, D / P]`` float16 by k-means over `fitted` evenly spread ones of these entries at most; later entries are
    coded with the same words.
    """

    channels: int = 4
    steps: int = 5
    fitted: int = 1024

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        spread = torch.arange(min(len(x), self.fitted), device=x.device) * len(x) // min(len(x), self.fitted)
        parts = x[spread].float().unflatten(-1, (-1, self.channels)).transpose(0, 1)
        return {"words": _half(codewords(parts, steps=self.steps))}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        words = place.state["words"].float()
        codes = torch.empty(len(x), words.shape[1], dtype=torch.uint8, device=x.device)
        for row in place.rows.unique().tolist():
            own = place.rows == row
            parts = x[own].float().unflatten(-1, (-1, self.channels)).transpose(0, 1)
            codes[own] = nearest(parts, words[row]).T.to(torch.uint8)
        return {"codes": codes}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        codes = columns["codes"].long()
        group = torch.arange(codes.shape[1], device=codes.device)
        return place.state["words"][place.rows[:, None], group, codes].float().flatten(1)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> Operand:
        return CodebookOperand(columns["codes"][:, None], columns["words"][:, None].float(), starts, skip)

    def state_bytes(self, width: int) -> float:
        return 2 * WORDS * width

    def bytes_per_entry(self, width: int) -> float:
        return width / self.channels


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half()
