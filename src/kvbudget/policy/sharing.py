"""Sharing maps: which layers read another layer's entries instead of holding their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvbudget.codecs.joint import JointCodec
from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry
from kvbudget.policy.base import Part
from kvbudget.segments.base import Segment
from kvbudget.segments.joint import Group, JointSegment
from kvbudget.segments.paired import PairedSegment


@dataclass(frozen=True)
class Sharing(Part, ABC):
    """Which of the layers that a budget governs hold entries, and which read those of an earlier one.

    A reader attends with its own queries to its owner's entries, new ones included; its own keys and values are dropped.
    Layers are counted among those with full attention, others are left alone.
    """

    merges: ClassVar[bool] = False
    """Whether an owner and its readers hold their entries together (`segment`), and each is answered by its own."""
    aligned: ClassVar[bool] = False
    """Whether the heads of what is held together hold the same entries; `segment` then gets the layers' rotations."""

    @property
    def unit(self) -> int:
        """Entries that can only be kept or evicted together."""
        return 1

    @property
    def stacked(self) -> bool:
        """Whether all layers are coded one upon the other."""
        return False

    @abstractmethod
    def owners(self, layers: int) -> list[int]:
        """The owner of each of ``layers`` layers: itself, or an earlier one that is its own owner."""

    def windows(self, layers: int) -> list[int]:
        """Sliding windows in tokens, 0 for full attention; a reader has its owner's."""
        return [0] * layers

    def layout(self, geometry: CacheGeometry) -> CacheGeometry:
        """The geometry with the readers marked, and full layers as sliding ones where they have a window.

        Raises:
            PolicyError: for a map that no cache can follow on this model, naming the layer.
        """
        index = geometry.budgeted_layers
        owners, windows = self.owners(len(index)), self.windows(len(index))
        for i, owner in enumerate(owners):
            same = 0 <= owner <= i and owners[owner] == owner and windows[i] == windows[owner]
            if not same or geometry.layers[index[i]] != geometry.layers[index[owner]]:
                raise PolicyError(
                    f"layer {index[i]} cannot read the entries of layer {index[owner]}: a reader's owner comes before it, has "
                    "heads of the same number and size, the same window, and reads from nobody; give another map"
                )
        shapes = [geometry.layers[at].reading(index[owner]) for at, owner in zip(index, owners, strict=True)]
        for i, owner in enumerate(owners):
            if owner == i:
                shapes[i] = geometry.layers[index[i]].sliding(windows[i])
        return geometry.replaced(dict(zip(index, shapes, strict=True)))

    def segment(self, num_rows: int, group: Group) -> Segment:
        """What holds the entries of a group of layers."""
        raise NotImplementedError

    def entry_bytes(self, layout: CacheGeometry, itemsize: int, apart: int = 0) -> tuple[float, float]:
        """Bytes of an entry's keys and values per KV head, the mean over the layers that hold any, and those once per row.

        ``apart`` first entries may be held in a segment of their own.
        """
        raise NotImplementedError

    def together(self, layout: CacheGeometry, index: int) -> tuple[int, ...]:
        """Layer ``index`` and the layers that read what it holds."""
        return (index, *(i for i, layer in enumerate(layout.layers) if layer.owner == index))


@dataclass(frozen=True)
class Consecutive(Sharing):
    """Groups of ``factor`` consecutive layers, of which the first is the owner (the last group may be smaller)."""

    factor: int = 2

    def owners(self, layers: int) -> list[int]:
        return [i - i % self.factor for i in range(layers)]


@dataclass(frozen=True)
class Listed(Sharing):
    """Owners as listed."""

    table: tuple[int, ...] = ()

    def owners(self, layers: int) -> list[int]:
        if len(self.table) != layers:
            raise PolicyError(
                f"a map of {len(self.table)} layers does not fit a model with {layers}; give one number each"
            )
        return list(self.table)


@dataclass(frozen=True)
class Mixed(Sharing):
    """Full attention in every ``every``-th layer from ``first`` on, sliding windows in the runs of layers between.

    The full layers share ``caches`` caches, consecutive ones the same; each run shares one window of ``window`` tokens, or
    has one per ``run`` layers.
    """

    window: int = 1024
    every: int = 4
    first: int = 0
    caches: int = 1
    run: int = 0

    def owners(self, layers: int) -> list[int]:
        full = [i for i, window in enumerate(self.windows(layers)) if not window]
        share = -(-len(full) // self.caches)
        owners: list[int] = []
        start = 0
        for i in range(layers):
            if i in full:
                at = full.index(i)
                owners.append(full[at - at % share])
                start = i + 1
            else:
                owners.append(i - (i - start) % self.run if self.run else start)
        return owners

    def windows(self, layers: int) -> list[int]:
        return [0 if i >= self.first and (i - self.first) % self.every == 0 else self.window for i in range(layers)]


@dataclass(frozen=True)
class MergedPairs(Sharing):
    """Neighboring layers two by two, from ``start * layers`` on, whose entries are held merged (`PairedSegment`)."""

    merges: ClassVar[bool] = True

    start: float = 0.5
    part: float = 0.6
    share: float = 0.05

    def owners(self, layers: int) -> list[int]:
        first = round(self.start * layers)
        return [i if i < first else i - (i - first) % 2 for i in range(layers)]

    def segment(self, num_rows: int, group: Group) -> Segment:
        return PairedSegment(num_rows, self.part, self.share)

    def entry_bytes(self, layout: CacheGeometry, itemsize: int, apart: int = 0) -> tuple[float, float]:
        holding = layout.budgeted_layers
        width = sum((layout.layers[holding[0]].key_head_dim, layout.layers[holding[0]].value_head_dim))
        retained = 2 * width * itemsize + 4 + 4  # position and angle
        plain, merged = float(width * itemsize), (width + 4) * itemsize + self.share * retained
        pairs = sum(layer.owner is not None for layer in layout.layers)
        # All layers hold as many entries, so that the mean is what they cost; a share may be rounded up in some.
        once = retained + abs(merged - plain) if pairs else 0.0
        return plain + (merged - plain) * pairs / len(holding), once


@dataclass(frozen=True)
class Joint(Sharing):
    """All KV heads of a token are coded together, by a codec of single layers, or of all layers one upon the other."""

    merges: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    codec: JointCodec
    layered: bool = False

    @property
    def unit(self) -> int:
        return self.codec.unit

    @property
    def stacked(self) -> bool:
        return self.layered

    def owners(self, layers: int) -> list[int]:
        return [0] * layers if self.layered else list(range(layers))

    def segment(self, num_rows: int, group: Group) -> Segment:
        return JointSegment(num_rows, self.codec, group)

    def entry_bytes(self, layout: CacheGeometry, itemsize: int, apart: int = 0) -> tuple[float, float]:
        codec, holding = self.codec, layout.budgeted_layers
        shape, faces = layout.layers[holding[0]], len(self.together(layout, holding[0]))
        widths = (shape.num_kv_heads * shape.key_head_dim, shape.num_kv_heads * shape.value_head_dim)
        each = sum(codec.bytes_per_entry(place, *widths) for place in range(faces)) / shape.num_kv_heads
        tail = (codec.longest_tail + codec.sinks + apart) * faces * itemsize * sum(widths) / shape.num_kv_heads
        return each, tail + codec.unit * each
