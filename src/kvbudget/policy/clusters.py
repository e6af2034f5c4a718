"""Clusters of heads: heads that attend alike share queries and keys, and keep their own values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry
from kvbudget.policy.projection import Projection
from kvbudget.segments.clustered import ClusteredSegment

if TYPE_CHECKING:
    from kvbudget.layer import AttentionCall

Table = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadClusters(Projection):
    """Some heads attend as another head of their layer does, to that head's keys, and each to its own values.

    KV head h of layer l reads the keys of head ``owners[l][h]``, and only an owner's keys are held; query head q asks with the
    query of head ``sources[l][q]``, which belongs to the owner of its KV head. Both cover all layers of the model.
    """

    owners: Table = ()
    sources: Table = ()

    def layout(self, geometry: CacheGeometry) -> CacheGeometry:
        for index in geometry.budgeted_layers:
            shape, known = geometry.layers[index], index < len(self.owners)
            owners, sources = (self.owners[index], self.sources[index]) if known else ((), ())
            whole = [owner for owner in owners for _ in range(shape.group_size)]
            fits = len(owners) == shape.num_kv_heads and all(owners[owner] == owner for owner in owners)
            if not fits or [source // shape.group_size for source in sources] != whole:
                raise PolicyError(
                    f"layer {index} has {shape.num_attention_heads} query heads over {shape.num_kv_heads} KV heads, which the "
                    f"clusters {owners} of KV heads and {sources} of query heads do not fit; calibrate this model"
                )
        return geometry

    def key_share(self, geometry: CacheGeometry) -> float:
        """Keys that are held, as a share of those of all heads, over the layers that a budget governs."""
        tables = [self.owners[index] for index in geometry.budgeted_layers]
        return sum(len(set(owners)) for owners in tables) / sum(map(len, tables))

    def segment(self, index: int, num_rows: int) -> ClusteredSegment:
        """What holds the entries of layer ``index``."""
        return ClusteredSegment(num_rows, self.owners[index])

    def enter(self, index: int, call: AttentionCall) -> AttentionCall:
        owners, sources = list(self.owners[index]), list(self.sources[index])
        sink = None if call.sink is None else call.sink[sources]
        return replace(call, query=call.query[:, sources], key=call.key[:, owners], sink=sink)

    def leave(self, index: int, out: Tensor, call: AttentionCall) -> Tensor:
        return out
