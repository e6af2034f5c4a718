"""Attention of few queries in two steps, logits and then values, where the extension cannot read both sides as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.kernels import reference
from kvbudget.kernels.operands import DenseOperand, Operand
from kvbudget.kernels.reference import Partial

FEW_QUERIES = 32
"""Up to this many queries per row; more of them are worth decoding blocks of entries for."""
LOWEST = -1e30
"""Stands for a masked logit, since zero times it is zero."""


@dataclass
class SummedOperand(Operand):
    """Entries that are sums of the entries of several operands, such as nested codes (QuantSpec, arXiv 2502.10424)."""

    parts: Sequence[Operand]
    most = 512

    def block(self, row: int, begin: int, end: int) -> Tensor:
        return self.together([part.block(row, begin, end).float() for part in self.parts])

    def queries(self, query: Tensor) -> Sequence[Tensor]:
        """What each of the parts is asked for a query ``[R, M, D]``."""
        return [query] * len(self.parts)

    def together(self, answers: list[Tensor]) -> Tensor:
        """Entries or answers of the parts as those of the whole."""
        return torch.stack(answers).sum(0)


@dataclass
class JoinedOperand(SummedOperand):
    """Entries whose channels lie in several operands side by side, ``widths`` of them in each."""

    widths: Sequence[int]

    def queries(self, query: Tensor) -> Sequence[Tensor]:
        return query.split(list(self.widths), -1)

    def together(self, answers: list[Tensor]) -> Tensor:
        return torch.cat(answers, -1)


@dataclass(frozen=True)
class Kernels:
    """What the extension does: which operands it ``reads``, `kernels.attend`, and `kernels.attend_keeping_logits`."""

    reads: Callable[[Operand], bool]
    attend: Callable[..., Partial]
    keeping_logits: Callable[..., tuple[Partial, Tensor]]


def attend(
    query: Tensor,
    key: Operand,
    value: Operand,
    lengths: Sequence[int],
    kernels: Kernels,
    *,
    scale: float,
    **options: Any,
) -> Partial:
    """As `reference.attend` for few queries and rows that all hold entries, without a soft cap."""
    return weighted(logits(query, key, lengths, kernels, scale=scale, **options), value, lengths, kernels)


def logits(
    query: Tensor, key: Operand, lengths: Sequence[int], kernels: Kernels, *, scale: float, **options: Any
) -> list[Tensor]:
    """Scaled, biased and masked logits of each row ``[M, length]`` float32."""
    if isinstance(key, SummedOperand):
        (first, asked), *others = zip(key.parts, key.queries(query), strict=True)
        found = logits(asked, first, lengths, kernels, scale=scale, **options)
        for other, asked in others:
            more = logits(asked, other, lengths, kernels, scale=scale)
            found = [x + y for x, y in zip(found, more, strict=True)]
        return found
    if kernels.reads(key):
        nothing = DenseOperand(torch.zeros(max(lengths), 8, device=query.device), [0] * len(lengths))
        _, flat = kernels.keeping_logits(query, key, nothing, lengths, scale=scale, **options)
        sizes = [query.shape[1] * length for length in lengths]
        return [x.view(query.shape[1], -1) for x in flat.split(sizes)]
    return [
        reference.whole_row(query[row], key, row, n, scale=scale, **reference.options_of_row(row, n, **options))
        for row, n in enumerate(lengths)
    ]


def weighted(found: list[Tensor], value: Operand, lengths: Sequence[int], kernels: Kernels) -> Partial:
    """Values weighted by the softmax of each row's logits ``[M, length]``."""
    if isinstance(value, SummedOperand):
        parts = [weighted(found, part, lengths, kernels) for part in value.parts]
        return Partial(value.together([part.out.float() for part in parts]), parts[0].lse)
    if kernels.reads(value):
        return _by_kernel(found, value, lengths, kernels)
    outs, lses = [], []
    for row, x in enumerate(found):
        lse = torch.logsumexp(x, dim=-1)
        weight = torch.exp(x - lse.nan_to_num(neginf=0.0)[:, None])
        step = min(value.most, x.shape[1])
        begins = range(0, x.shape[1], step)
        blocks = [value.weighted(row, b, min(b + step, x.shape[1]), weight[:, b : b + step]) for b in begins]
        outs.append(torch.stack(blocks).sum(0))
        lses.append(lse)
    return Partial(torch.stack(outs), torch.stack(lses))


def _by_kernel(found: list[Tensor], value: Operand, lengths: Sequence[int], kernels: Kernels) -> Partial:
    """The logits as keys, which unit vectors ask for."""
    queries, device = found[0].shape[0], found[0].device
    columns = torch.zeros(sum(lengths), -(-queries // 8) * 8, device=device)
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    for start, x in zip(starts, found, strict=True):
        columns[start : start + x.shape[1], :queries] = x.T.clamp_min(LOWEST)
    unit = torch.eye(queries, columns.shape[1], device=device).expand(len(lengths), -1, -1).contiguous()
    out, lse = kernels.attend(unit, DenseOperand(columns, starts), value, lengths, scale=1.0)
    return Partial(out, lse.masked_fill(lse < LOWEST / 2, float("-inf")))
