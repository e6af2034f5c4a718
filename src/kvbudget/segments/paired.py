"""PairedSegment: entries of two layers as one direction and two magnitudes each, the most different ones as they came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbudget.errors import PolicyError
from kvbudget.segments.base import Segment
from kvbudget.segments.ragged import RaggedTable
from kvbudget.segments.restored import RestoredSegment

PARALLEL = 1e-4
"""Angles below this have a sine too small to divide by; their directions are mixed linearly."""


def interpolate(one: Tensor, other: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
    """Direction between two vectors ``[..., D]``, their norms ``[..., 2]``, and the angle between them ``[...]``, float32.

    ``sin((1 - part) a) / sin(a)`` of the one's direction and ``sin(part a) / sin(a)`` of the other's (SLERP).
    """
    norms = torch.stack([one.float().norm(dim=-1), other.float().norm(dim=-1)], dim=-1)
    first, second = normalize(one.float(), dim=-1), normalize(other.float(), dim=-1)
    angle = torch.acos((first * second).sum(-1).clamp(-1.0, 1.0))
    sine = angle.sin()
    flat = sine < PARALLEL
    safe = sine.masked_fill(flat, 1.0)
    weights = ((((1 - part) * angle).sin() / safe), (part * angle).sin() / safe)
    left, right = (torch.where(flat, plain, w)[..., None] for w, plain in zip(weights, (1 - part, part), strict=True))
    return normalize(left * first + right * second, dim=-1), norms, angle


class PairedSegment(RestoredSegment):
    """Keys ``[N, 2 D]`` and values ``[N, 2 Dv]`` of a lower and an upper layer side by side, merged as they come.

    ``meta`` holds a direction and two norms of each entry's keys and values; ``apart`` both layers' vectors of at most
    ``ceil(retained * entries)`` entries per row, whose keys differ most by angle.
    """

    def __init__(self, num_rows: int, part: float, retained: float) -> None:
        self.meta = RaggedTable(num_rows)
        self.apart = RaggedTable(num_rows, step=4)
        self.part, self.retained = part, retained

    def append(self, key: Tensor, value: Tensor, meta: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        columns, angle = dict(meta), key.new_zeros(len(key))
        for name, x in (("value", value), ("key", key)):
            lower, upper = x.chunk(2, dim=-1)
            direction, norms, angle = interpolate(lower, upper, self.part)
            columns |= {name: direction.to(x.dtype), f"{name} norms": norms.to(x.dtype)}
        room = [
            max(0, self._most(length + count) - held)
            for length, count, held in zip(self.lengths, counts, self.apart.lengths, strict=True)
        ]
        picked, begin = [], 0
        for count, most in zip(counts, room, strict=True):
            picked.append(begin + angle[begin : begin + count].topk(min(count, most)).indices.sort().values)
            begin += count
        self.meta.append(columns, counts)
        at = torch.cat(picked)
        raw = {"key": key[at], "value": value[at], "position": meta["position"][at], "angle": angle[at]}
        self.apart.append(raw, [len(row) for row in picked])

    def restored(self, face: int) -> tuple[Tensor, Tensor]:
        return self._restored("key", face), self._restored("value", face)

    def keys(self) -> Tensor:
        return self._restored("key", 0)

    def values(self) -> Tensor:
        return self._restored("value", 0)

    def writable(self, row: int) -> tuple[Tensor, Tensor]:
        raise PolicyError("entries that several layers or heads hold together cannot be written in place")

    def take(self, keep: Tensor, spare: int = 0) -> None:
        kept = []
        for row, length in enumerate(self.lengths):
            staying = self.meta.row("position", row)[keep[row, :length].to(self.meta.columns["position"].device)]
            held = torch.isin(self.apart.row("position", row), staying)
            angle = self.apart.row("angle", row).masked_fill(~held, -1.0)
            mask = torch.zeros_like(held)
            mask[angle.topk(min(int(held.sum()), self._most(len(staying)))).indices] = True
            kept.append(mask)
        self.meta.take(keep, spare)
        wide = torch.zeros(self.num_rows, self.apart.longest, dtype=torch.bool, device=keep.device)
        for row, mask in enumerate(kept):
            wide[row, : len(mask)] = mask
        self.apart.take(wide)

    def truncate(self, lengths: Sequence[int]) -> None:
        rest = []
        for row, length in enumerate(lengths):
            gone = self.meta.row("position", row)[length:]
            held = self.apart.row("position", row)
            rest.append(int((held < gone[0]).sum()) if len(gone) else len(held))
        self.meta.truncate(lengths)
        self.apart.truncate(rest)

    def can_truncate(self, lengths: Sequence[int]) -> bool:
        return True

    def gather(self, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[int]]:
        """As of any segment, with the vectors of both layers side by side."""
        columns, counts = self.meta.gather(keep)
        keys, values = (
            torch.cat([self._restored(name, face)[keep] for face in (0, 1)], dim=-1) for name in ("key", "value")
        )
        own = ("key", "value", "key norms", "value norms")
        return keys, values, {name: x for name, x in columns.items() if name not in own}, counts

    def tables(self) -> list[RaggedTable]:
        return [self.meta, self.apart]

    def set_limits(self, limits: Sequence[int] | None) -> None:
        self.meta.limits = None if limits is None else list(limits)
        self.apart.limits = None if limits is None else [self._most(limit) for limit in limits]

    def parts(self) -> dict[str, int]:
        parts = {"retained": self.apart.nbytes}
        names = {
            "key norms": "keys",
            "key": "keys",
            "value norms": "values",
            "value": "values",
            "position": "positions",
        }
        for name, column in self.meta.columns.items():
            label = names.get(name, "states")
            parts[label] = parts.get(label, 0) + column.untyped_storage().nbytes()
        return parts

    def branch(self, hard: bool) -> Segment:
        return PairedSegment(self.num_rows, self.part, self.retained) if self.shared else self

    def absorb(self, trail: Sequence[Segment], spare: int = 0) -> None:
        self.meta.reserve([sum(n) + spare for n in zip(*(s.lengths for s in (self, *trail)), strict=True)])
        for segment in trail:
            self.append(*segment.gather(segment.meta.valid()))

    def check_integrity(self) -> None:
        super().check_integrity()
        for row, length in enumerate(self.lengths):
            assert self.apart.lengths[row] <= self._most(length), "more entries are retained than their share"
            held = self.apart.row("position", row) if self.apart.lengths[row] else None
            assert held is None or bool(torch.isin(held, self.meta.row("position", row)).all()), "a retained stranger"

    def _most(self, entries: int) -> int:
        return math.ceil(self.retained * entries)

    def _restored(self, name: str, face: int) -> Tensor:
        """Keys or values of one of the two layers: ``[R, longest, D]``."""
        found = self.meta.padded(name) * self.meta.padded(f"{name} norms")[..., face : face + 1]
        width = found.shape[-1]
        for row, held in enumerate(self.apart.lengths):
            if held:
                at = torch.searchsorted(self.meta.row("position", row).contiguous(), self.apart.row("position", row))
                found[row, at] = self.apart.row(name, row)[:, face * width : (face + 1) * width]
        return found
