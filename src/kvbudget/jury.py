"""Jury: layers that judge, or select from, each by its own queries, what one segment holds for all of them."""

from __future__ import annotations

from typing import Any

from kvbudget.layer import LayerCache
from kvbudget.segments.base import Segment
from kvbudget.segments.joint import FaceSegment, JointSegment


class Juror(LayerCache):
    """One of the layers whose entries the first of them, the ``owner``, holds coded together.

    It holds the same entries as the owner, with states and statistics of its own and the owner's keys and values, whatever a
    destination makes of what leaves it, and a selector of its own.
    """

    def __init__(self, layer_idx: int, owner: LayerCache, **options: Any) -> None:
        super().__init__(layer_idx, owner.num_kv_heads, make_segment=self._make, **options)
        self.owner, self.together = owner, owner.together

    def beside(self, owner: LayerCache) -> Juror:
        """A fork of it beside a fork of its owner."""
        other = self.fork()
        assert isinstance(other, Juror)
        other.owner, other.make_segment = owner, other._make
        for segment in other.main:
            assert isinstance(segment, FaceSegment)
            segment.whole = other._whole
        return other

    def _make(self, num_rows: int) -> Segment:
        return FaceSegment(num_rows, self._whole, self.together.index(self.layer_idx))

    def _whole(self) -> JointSegment:
        (segment,) = self.owner.main
        assert isinstance(segment, JointSegment)
        return segment
