"""Projections: what heads are held as, and what is asked of them, where that differs from the model's own heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbudget.errors import PolicyError
from kvbudget.models import CacheGeometry
from kvbudget.policy.base import Part

if TYPE_CHECKING:
    from kvbudget.layer import AttentionCall


@dataclass(frozen=True)
class Projection(Part, ABC):
    """Turns the attention calls of the layers that a budget governs into those of the heads that are held, and back."""

    @abstractmethod
    def layout(self, geometry: CacheGeometry) -> CacheGeometry:
        """The geometry of the heads that are held.

        Raises:
            PolicyError: where the projection does not fit the heads of a layer.
        """

    @abstractmethod
    def enter(self, index: int, call: AttentionCall) -> AttentionCall:
        """The call of layer ``index`` as the heads that are held see it."""

    @abstractmethod
    def leave(self, index: int, out: Tensor, call: AttentionCall) -> Tensor:
        """Their answers as those of the model's heads ``[B, Hq, n, Dv]``; ``call`` is the model's own."""


@dataclass(frozen=True)
class HeadProjection(Projection):
    """Holds t KV heads as one: ``k = [k_1 .. k_t] Phi`` and ``v = [v_1 .. v_t] Psi``, whose columns are orthonormal.

    A query of head i is asked as ``q Phi_i``, and answers come back by ``Psi_i^T``, so products and answers are those of keys
    and values projected onto the bases. ``keys [L, Hkv / t, t D, r]`` and ``values [L, Hkv / t, t Dv, r]`` over all layers of
    the model; layers that no budget governs are left alone.
    """

    keys: Tensor | None = field(default=None, repr=False, compare=False)
    values: Tensor | None = field(default=None, repr=False, compare=False)

    def layout(self, geometry: CacheGeometry) -> CacheGeometry:
        """The geometry with fewer KV heads in the layers that a budget governs.

        Raises:
            PolicyError: where the bases do not fit the heads of a layer.
        """
        assert self.keys is not None and self.values is not None
        heads, rank = self.keys.shape[1], self.keys.shape[3]
        changed = {}
        for index in geometry.budgeted_layers:
            shape = geometry.layers[index]
            group = shape.num_kv_heads // heads
            rows = (group * shape.key_head_dim, group * shape.value_head_dim)
            if shape.num_kv_heads % heads or rows != (self.keys.shape[2], self.values.shape[2]):
                raise PolicyError(
                    f"layer {index} has {shape.num_kv_heads} KV heads of {shape.key_head_dim} elements, which the bases of "
                    f"{heads} groups do not fit; calibrate a model whose layers are alike"
                )
            changed[index] = replace(shape, num_kv_heads=heads, key_head_dim=rank, value_head_dim=self.values.shape[3])
        return geometry.replaced(changed)

    def enter(self, index: int, call: AttentionCall) -> AttentionCall:
        """The call in the bases of layer ``index``: queries ``[B, Hq, n, r]``, keys and values ``[B, Hkv / t, n, r]``."""
        keys, values = self._bases(index, call.query)
        return replace(
            call,
            query=torch.einsum("bhnd,hdr->bhnr", call.query, self._of_queries(keys, call)),
            key=_joined(call.key, len(keys)) @ keys,
            value=_joined(call.value, len(values)) @ values,
        )

    def leave(self, index: int, out: Tensor, call: AttentionCall) -> Tensor:
        """Answers ``[B, Hq, n, r]`` as those of the model's heads ``[B, Hq, n, Dv]``; ``call`` is the model's own."""
        _, values = self._bases(index, out)
        return torch.einsum("bhnr,hdr->bhnd", out, self._of_queries(values, call))

    def _bases(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys[index].to(like), self.values[index].to(like)

    def _of_queries(self, basis: Tensor, call: AttentionCall) -> Tensor:
        """The block ``[D, r]`` of each query head's own KV head: ``[Hq, D, r]``."""
        heads = call.key.shape[1]
        blocks = basis.unflatten(1, (heads // len(basis), -1)).flatten(0, 1)
        return blocks.repeat_interleave(call.query.shape[1] // heads, dim=0)


def _joined(x: Tensor, groups: int) -> Tensor:
    """Heads of a group side by side: ``[B, Hkv, n, D]`` as ``[B, groups, n, t D]``."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
