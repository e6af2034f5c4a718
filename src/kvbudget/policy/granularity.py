"""Granularities by position: what stays or goes together, whatever lies next to it in storage."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Granularity, Span
from kvbudget.policy.view import View


@dataclass(frozen=True)
class Windows(Granularity):
    """Windows of ``width`` consecutive positions, counted from the beginning of the text.

    ``prompt_only`` leaves what came after the prompt as single entries.
    """

    width: int = 8
    prompt_only: bool = False

    def units(self, view: View) -> Tensor:
        windows = view.positions.clamp_min(0).long() // self.width
        return _apart(windows, view, view.positions < _prompt(view)) if self.prompt_only else windows


@dataclass(frozen=True)
class Spans(Granularity):
    """Given half-open ranges of positions; everything outside of them is a unit of its own."""

    spans: tuple[Span, ...] = ()

    def inside(self, view: View) -> Tensor:
        """Entries that lie in one of the spans: bool ``[B, Hkv, T]``."""
        return self._number(view) >= 0

    def units(self, view: View) -> Tensor:
        number = self._number(view)
        return _apart(number.clamp_min(0), view, number >= 0)

    def _number(self, view: View) -> Tensor:
        """Which span each entry lies in, -1 outside of all."""
        number = torch.full_like(view.positions, -1, dtype=torch.long)
        for i, (begin, end) in enumerate(self.spans):
            number[(view.positions >= begin) & (view.positions < end)] = i
        return number


def checked_spans(spans: tuple[Any, ...], what: str) -> tuple[Span, ...]:
    """Spans in order, one of them possibly as a plain pair of numbers; refuses what is not a range, and overlaps.

    Raises:
        PolicyError: naming the range, and the parameter ``what``.
    """
    ordered: list[Span] = []
    if len(spans) == 2 and all(isinstance(edge, int) for edge in spans):
        spans = (spans,)
    for span in sorted(spans):
        if not (isinstance(span, tuple) and len(span) == 2 and all(isinstance(edge, int) for edge in span)):
            raise PolicyError(f"{what} must hold pairs of positions (start, end), got {span!r}")
        if span[0] >= span[1] or (ordered and span[0] < ordered[-1][1]):
            raise PolicyError(f"{what}: {span} is empty or overlaps the range before it; give disjoint (start, end)")
        ordered.append(span)
    return tuple(ordered)


def _prompt(view: View) -> Tensor:
    return torch.tensor(view.prompt, device=view.positions.device)[:, None, None]


def _apart(units: Tensor, view: View, inside: Tensor) -> Tensor:
    """``units`` where ``inside``, and a unit of its own for every other cell."""
    cells = torch.arange(units.shape[-1], device=units.device) + units.max() + 1
    return torch.where(inside, units, cells)
