"""Codecs of all KV heads of a token together, keys and values, and of several layers one upon the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.codecs.rotated import GridCodes

Columns = dict[str, Tensor]
State = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class JointCodec(ABC):
    """Encodes ``key [N, Hkv * D]`` (before RoPE) and ``value [N, Hkv * Dv]`` of tokens into columns, a cell per `unit` of them.

    ``residual`` newest tokens are awaited and coded at once; the ``sinks`` oldest ones, when a sequence is first coded,
    stay in full precision (tokens by themselves only: ``unit=1``). What a layer gives upwards besides its keys and values
    is the `State` of the layers below, which stays inside of one forward and is never stored.
    """

    calibrated: ClassVar[str] = ""
    """The method whose calibration the codec needs."""
    scope: ClassVar[str] = "all layers"
    """What is coded by itself."""
    before_rope: ClassVar[bool] = True

    unit: int = 1
    residual: int = 128
    sinks: int = 0

    @property
    def lump(self) -> int:
        """Tokens that are coded together."""
        return max(self.unit, self.residual)

    @property
    def longest_tail(self) -> int:
        """Full-precision tokens that a forward of one token may hold before it codes what is due."""
        return self.lump + self.sinks

    @abstractmethod
    def encode(self, layer: int, key: Tensor, value: Tensor, below: State) -> Columns:
        """Columns ``[N / unit, ...]`` of layer ``layer`` of the model; ``below`` is what the layer under it decodes to."""

    @abstractmethod
    def decode(self, layer: int, columns: Mapping[str, Tensor], below: State) -> tuple[Tensor, Tensor, State]:
        """Keys and values, float32, and the state for the layer above."""

    @abstractmethod
    def bytes_per_entry(self, place: int, key_width: int, value_width: int) -> float:
        """Stored bytes per token of all heads (so many elements of keys and of values) in the layer number ``place`` of its
        group of layers, counted from below."""


def coded(name: str, codec: Codec, x: Tensor, unit: int) -> Columns:
    """The columns of another codec under a name of their own, in cells of ``unit`` entries."""
    return {f"{name}.{part}": x.unflatten(0, (-1, unit // codec.unit)) for part, x in codec.encode(x).items()}


def restored(name: str, codec: Codec, columns: Mapping[str, Tensor]) -> Tensor:
    """What `coded` took: float32 ``[N, D]``."""
    begin = f"{name}."
    return codec.decode({n.removeprefix(begin): x.flatten(0, 1) for n, x in columns.items() if n.startswith(begin)})


@dataclass(frozen=True)
class LayerInputs(JointCodec):
    """The inputs X of a layer's attention in ``bits`` bits, from which its keys and values are made again (XQuant).

    ``found`` are the maps of all layers of the model ``[L, ...]``. Where X is narrower than a token's keys and values
    together, ``down`` is the pseudoinverse of ``[W_k | W_v] = up``, so that X comes from the keys and values themselves,
    and is coded per token in groups of channels. Else, by ``W = U S B^T``, the latents ``X U`` of keys and of values are
    coded apart, the keys' per channel and unit of tokens, the values' per token.
    """

    calibrated: ClassVar[str] = "xquant"
    scope: ClassVar[str] = "layer"

    bits: int = 4
    group: int = 128
    found: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def whole(self) -> bool:
        """Whether X itself is held."""
        return "down" in self.found

    def encode(self, layer: int, key: Tensor, value: Tensor, below: State) -> Columns:
        if self.whole:
            return coded("input", self._tokens, self._map("down", layer, torch.cat([key, value], -1), True), self.unit)
        keys, values = self._map("key_down", layer, key, True), self._map("value_down", layer, value, True)
        return coded("key", self._channels, keys, self.unit) | coded("value", self._tokens, values, self.unit)

    def decode(self, layer: int, columns: Mapping[str, Tensor], below: State) -> tuple[Tensor, Tensor, State]:
        if self.whole:
            both = self._map("up", layer, restored("input", self._tokens, columns))
            key, value = both.tensor_split([int(self.found["split"])], -1)
            return key, value, None
        key = self._map("key_up", layer, restored("key", self._channels, columns))
        return key, self._map("value_up", layer, restored("value", self._tokens, columns)), None

    def bytes_per_entry(self, place: int, key_width: int, value_width: int) -> float:
        if self.whole:
            return self._tokens.bytes_per_entry(self.found["down"].shape[-1])
        return self._channels.bytes_per_entry(key_width) + self._tokens.bytes_per_entry(value_width)

    @property
    def _tokens(self) -> TokenQuant:
        return TokenQuant(bits=self.bits, group=self.group)

    @property
    def _channels(self) -> ChannelQuant:
        return ChannelQuant(bits=self.bits, unit=self.unit, residual=self.unit)

    def _map(self, name: str, layer: int, x: Tensor, down: bool = False) -> Tensor:
        """``(x - bias) down`` or ``x up + bias``."""
        matrix, bias = (
            self.found[n][layer].to(x.device) for n in (name, name.replace("down", "bias").replace("up", "bias"))
        )
        return (x.float() - bias) @ matrix if down else x @ matrix + bias


@dataclass(frozen=True)
class InputDeltas(LayerInputs):
    """What a layer's input differs by from the inputs below it, as far as these have been restored (XQuant-CL).

    ``Z = X U`` with an orthonormal basis U of ``[W_k | W_v]`` (the unit matrix where X is narrower), ``Z^ = A U + Q(Z - A
    U)`` with the accumulator A of the layers below, and ``A + Q(Z - A U) U^T`` goes upwards. The ``first`` layers of the
    model take 4 bits.
    """

    calibrated: ClassVar[str] = "xquant_cl"
    scope: ClassVar[str] = "all layers"

    first: int = 3

    def encode(self, layer: int, key: Tensor, value: Tensor, below: State) -> Columns:
        inputs = self._map("down", layer, torch.cat([key, value], -1), True)
        if below is not None:
            inputs = inputs - self._seen(layer, below[0])
        return coded("input", self._deltas(self._place(layer)), inputs, self.unit)

    def decode(self, layer: int, columns: Mapping[str, Tensor], below: State) -> tuple[Tensor, Tensor, State]:
        delta = restored("input", self._deltas(self._place(layer)), columns)
        basis = self.found["basis"][layer].to(delta.device) if "basis" in self.found else None
        inputs = delta if below is None else delta + self._seen(layer, below[0])
        raised = delta if basis is None else delta @ basis.T
        key, value = self._map("up", layer, inputs).tensor_split([int(self.found["split"])], -1)
        return key, value, (raised if below is None else below[0] + raised,)

    def bytes_per_entry(self, place: int, key_width: int, value_width: int) -> float:
        return self._deltas(place).bytes_per_entry(self.found["down"].shape[-1])

    def _seen(self, layer: int, accumulated: Tensor) -> Tensor:
        if "basis" not in self.found:
            return accumulated
        return accumulated @ self.found["basis"][layer].to(accumulated.device)

    def _place(self, layer: int) -> int:
        return int(self.found["place"][layer])

    def _deltas(self, place: int) -> TokenQuant:
        return TokenQuant(bits=max(4, self.bits) if place < self.first else self.bits, group=self.group)


@dataclass(frozen=True)
class Predicted(JointCodec):
    """What linear predictors miss: keys from the keys of the layer below, values from both (AQUA-KV, arXiv 2501.19392).

    ``k~ = k^_below W_k + b``, ``v~ = [k^, v^_below] W_v + b`` on what has been restored; the lowest layer is coded by
    itself in ``first_bits``. ``found`` holds ``key_map [L, K, K]``, ``key_bias``, ``value_map [L, K + V, V]``,
    ``value_bias`` and the ``place`` of each layer.
    """

    calibrated: ClassVar[str] = "aquakv"

    bits: int = 2
    first_bits: int = 4
    found: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, layer: int, key: Tensor, value: Tensor, below: State) -> Columns:
        codec = self._codec(0 if below is None else 1)
        if below is None:
            return coded("key", codec, key, 1) | coded("value", codec, value, 1)
        guess = self._guess("key", layer, below[:1])
        columns = coded("key", codec, key - guess, 1)
        known = guess + restored("key", codec, columns)
        return columns | coded("value", codec, value - self._guess("value", layer, (known, below[1])), 1)

    def decode(self, layer: int, columns: Mapping[str, Tensor], below: State) -> tuple[Tensor, Tensor, State]:
        codec = self._codec(0 if below is None else 1)
        key, value = restored("key", codec, columns), restored("value", codec, columns)
        if below is not None:
            key = key + self._guess("key", layer, below[:1])
            value = value + self._guess("value", layer, (key, below[1]))
        return key, value, (key, value)

    def bytes_per_entry(self, place: int, key_width: int, value_width: int) -> float:
        return sum(self._codec(place).bytes_per_entry(width) for width in (key_width, value_width))

    def _codec(self, place: int) -> GridCodes:
        return GridCodes(bits=self.bits if place else self.first_bits)

    def _guess(self, side: str, layer: int, known: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(known), -1)
        return x @ self.found[f"{side}_map"][layer].to(x.device) + self.found[f"{side}_bias"][layer].to(x.device)
